"""The time predictor: a small head on the frozen denoiser's features that chooses the next diffusion time."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from gymnasium.spaces import Box, Dict, Space
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import skip_init

from diffusion_gym.models.base import DiffusionModel
from diffusion_gym.models.weights import read_weights, require_weights

from .base import Observation, Policy, Shape, read_config, write_config
from .beta import BetaDistribution

_WEIGHTS_FILE = "time_predictor.safetensors"

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


def _drawn(layer: Layer, generator: torch.Generator) -> Layer:
    """Draw a layer's first weights as torch does, but from an explicit generator; return the layer."""
    nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
    assert layer.bias is not None
    bound = layer.weight[0].numel() ** -0.5
    nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
    return layer


class TimePredictor(Policy):
    """π(r | s) = Beta(1 + e^a, 1 + e^b), with (a, b) from the denoiser's features, its time embedding and the prompt.

        h = SiLU(GroupNorm(conv(features))·(1 + scale) + shift),  (scale, shift) = Linear(SiLU(embedding))
        (a, b) = Linear(SiLU(Linear(maxpool(conv_stride_2(h)))))

    The embedding is the time embedding, followed by the mean of the prompt's token embeddings where these are
    observed (SD3's and Flux's time embedding tells of the prompt by itself; a UNet's does not). 4.1 M parameters at
    SD3's width, 0.07 M on the emoji model.

    Source: Ye et al., 2024, section 3.2, https://arxiv.org/abs/2412.01243; TPDM's modeling_sd3_pnt.py.

    Note:
        Features come in raster order (the published code scrambles them), and weights start as torch initialises them,
        but the last layer at zero: its output is added to the logits of the first schedule, which an untrained
        predictor walks exactly.

    Args:
        observation_space: The space of one lane, `env.single_observation_space` of TimePredictionMDP-v0.
        hidden_channels: The head's width; None: a quarter of the features' channels, between 32 and TPDM's 128.
        initial_ratio: The mode of r before training. One number takes log(t_min/τ_start)/log(initial_ratio) steps: 0.7
            makes 19 of the emoji model, 14 of Stable Diffusion 1.5 and 13 of SD3. A mapping from times to ratios is
            interpolated between them: `dict(zip(grid.tolist(), step_ratios(schedule, grid).tolist()))` walks `grid`.
        initial_concentration: α + β before training; above 2. Larger: less exploration.
        device: The head's device.
        seed: The seed of its first weights and of its draws.

    Raises:
        TypeError, ValueError: the observations have no features, or a number is out of its range.
    """

    _times: Tensor
    _first_logits: Tensor

    def __init__(
        self,
        observation_space: Space,
        *,
        hidden_channels: int | None = None,
        initial_ratio: float | Mapping[float, float] = 0.7,
        initial_concentration: float = 16.0,
        device: str | torch.device = "cpu",
        seed: int | None = None,
    ) -> None:
        super().__init__(seed=seed)
        spaces = observation_space.spaces if isinstance(observation_space, Dict) else {}
        if "features" not in spaces or len(spaces["features"].shape or ()) != 3:
            raise TypeError(
                "observation_space must be that of one lane of TimePredictionMDP-v0, env.single_observation_space; "
                f"got {observation_space}"
            )
        ratio_at = dict(initial_ratio) if isinstance(initial_ratio, Mapping) else {0.0: initial_ratio}
        if (
            not ratio_at
            or not all(0 < ratio < 1 for ratio in ratio_at.values())
            or not 2 < initial_concentration < math.inf
        ):
            raise ValueError(
                "initial_ratio must be in (0, 1) and initial_concentration above 2 and finite, "
                f"got {initial_ratio} and {initial_concentration}"
            )
        self.device = torch.device(device)
        self._shapes = {
            key: tuple(spaces[key].shape or ())
            for key in ("features", "time_embedding", "prompt_embeds")
            if key in spaces
        }
        channels = self._shapes["features"][0]
        width = min(128, max(32, channels // 4)) if hidden_channels is None else hidden_channels
        embedding = self._shapes["time_embedding"][0] + self._shapes.get("prompt_embeds", (0,))[-1]
        generator = torch.Generator().manual_seed(self.generator.initial_seed())
        float32 = {"dtype": torch.float32}
        self.conv = _drawn(skip_init(nn.Conv2d, channels, width, 3, padding=1, **float32), generator)
        self.norm = nn.GroupNorm(1, width, dtype=torch.float32)
        self.modulation = _drawn(skip_init(nn.Linear, embedding, 2 * width, **float32), generator)
        self.down = _drawn(skip_init(nn.Conv2d, width, width, 3, stride=2, padding=1, **float32), generator)
        self.hidden = _drawn(skip_init(nn.Linear, width, width, **float32), generator)
        self.output = skip_init(nn.Linear, width, 2, **float32)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        times, ratios = torch.tensor(sorted(ratio_at.items()), dtype=torch.float32).T
        self.register_buffer("_times", times.contiguous())
        self.register_buffer("_first_logits", BetaDistribution.logits_of(ratios, initial_concentration))
        self._arguments = {
            "hidden_channels": width,
            "initial_ratio": [*ratio_at.items()],
            "initial_concentration": initial_concentration,
        }
        self.to(self.device)

    @property
    def needed_shapes(self) -> Mapping[str, Shape]:
        """The shapes of the space that it was made for; features of any size, prompts of any number of tokens."""
        shapes: dict[str, Shape] = {"features": (self._shapes["features"][0], None, None)}
        shapes["time_embedding"] = self._shapes["time_embedding"]
        if "prompt_embeds" in self._shapes:
            shapes["prompt_embeds"] = (None, self._shapes["prompt_embeds"][-1])
        return {**shapes, "timestep": (1,), "action": (1,)}

    def distribution(self, observation: Observation) -> BetaDistribution:
        """Return the Beta of the ratio r, in float32 whatever the features' precision."""
        embedding = observation["time_embedding"].float()
        if "prompt_embeds" in self._shapes:
            embedding = torch.cat([embedding, observation["prompt_embeds"].float().mean(1)], dim=1)
        scale, shift = self.modulation(F.silu(embedding))[:, :, None, None].chunk(2, dim=1)
        h = self.norm(self.conv(observation["features"].float()))
        h = self.down(F.silu(h * (1 + scale) + shift))
        h = F.adaptive_max_pool2d(F.adaptive_avg_pool2d(h, 16) if min(h.shape[2:]) > 16 else h, 1).flatten(1)
        return BetaDistribution.from_logits(self._initial(observation) + self.output(F.silu(self.hidden(h))))

    def _initial(self, observation: Observation) -> Tensor:
        """Return the logits before training, [B, 2], linear in time between the given ones."""
        t = observation["timestep"][:, 0].float().clamp(self._times[0], self._times[-1])
        after = torch.searchsorted(self._times, t).clamp(1 if len(self._times) > 1 else 0)
        before = (after - 1).clamp(0)
        weight = ((t - self._times[before]) / (self._times[after] - self._times[before]).clamp(1e-9))[:, None]
        return torch.lerp(self._first_logits[before], self._first_logits[after], weight)

    def save(self, folder: Path) -> None:
        """Write the head's weights, in safetensors, and its shape."""
        write_config(folder, self, shapes=self._shapes, **self._arguments)
        save_file(self.state_dict(), Path(folder) / _WEIGHTS_FILE)

    def load_weights(self, folder: Path) -> None:
        """Read what `save` wrote into this head.

        Raises:
            FileNotFoundError: the folder is not a saved policy.
            ValueError: its weights are not all there, of another shape, NaN or infinite, or the file is damaged.
        """
        read_config(Path(folder), type(self))
        file = Path(folder) / _WEIGHTS_FILE
        weights = read_weights(file)
        require_weights(weights, self.state_dict(), file=file, owner=f"this {type(self).__name__}")
        self.load_state_dict(weights)

    @classmethod
    def load(
        cls, folder: Path | str, model: DiffusionModel | None = None, device: str | torch.device = "cpu"
    ) -> "TimePredictor":
        """Return the predictor that `save` wrote; it needs no diffusion model."""
        config = read_config(Path(folder), cls)
        shapes, ratios = config.pop("shapes"), dict(config.pop("initial_ratio"))
        space = Dict({key: Box(-float("inf"), float("inf"), tuple(shape)) for key, shape in shapes.items()})
        policy = cls(space, device=device, initial_ratio=ratios, **config)
        policy.load_weights(Path(folder))
        return policy
