"""The lanes of a vector environment: their state, seeds and starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import transfer
from ..checks import checked_integer
from ..models.base import Conditioning, DiffusionModel
from ..naming import unknown_name
from ..prompts import PromptSet

_OPTION_KEYS = ("prompt", "prompt_id", "latents", "reset_mask")


def lane_seeds(seed: int | Sequence[int | None] | None, num_envs: int) -> list[int | None]:
    """Return one seed per lane: seed + i, or the i-th of a sequence; modulo 2⁶⁴, as torch's generators take them.

    Raises:
        ValueError: one is no integer or is negative, or there are several seeds, but not one per lane.
    """
    if isinstance(seed, Tensor | np.ndarray):
        seed = _as_array(seed).tolist()
    if seed is None:
        return [None] * num_envs
    if not isinstance(seed, Sequence) or isinstance(seed, str):
        base_seed = checked_integer("seed", seed, at_least=0)
        return [(base_seed + lane) % 2**64 for lane in range(num_envs)]
    if len(seed) != num_envs:
        raise ValueError(f"seed must be an integer or one per lane ({num_envs}), got {len(seed)}")
    return [None if lane_seed is None else checked_integer("seed", lane_seed, at_least=0) % 2**64 for lane_seed in seed]


def lanes_to_reset(options: Mapping[str, Any] | None, *, num_envs: int) -> np.ndarray:
    """Return `options["reset_mask"]` as a numpy array, [num_envs] bool; all lanes if it is not there.

    Raises:
        TypeError, ValueError: it is no bool array of that shape, or selects nothing.
    """
    mask = (options or {}).get("reset_mask")
    if mask is None:
        return np.ones(num_envs, dtype=bool)
    if not isinstance(mask, np.ndarray | Tensor):
        raise TypeError(f'options["reset_mask"] must be a numpy array or a torch tensor, got {type(mask).__name__}')
    array = _as_array(mask)
    if array.shape != (num_envs,) or array.dtype != np.bool_ or not array.any():
        raise ValueError(
            f'options["reset_mask"] must be bool of shape ({num_envs},) with at least one True, got {array}'
        )
    return array.copy()


@dataclass(frozen=True)
class ResetOptions:
    """The starting states that a reset fixes; None leaves one to the lane's seed.

    Args:
        texts: [num_envs] prompts.
        prompt_id: [num_envs] their indices in the prompt set, −1 for a text that is not in it.
        latents: [num_envs, C, H, W] x_T.
    """

    texts: list[str] | None = None
    prompt_id: np.ndarray | None = None
    latents: Tensor | None = None

    @classmethod
    def parse(
        cls, options: Mapping[str, Any] | None, *, num_envs: int, prompts: PromptSet, model: DiffusionModel
    ) -> "ResetOptions":
        """Return the checked options.

        Raises:
            ValueError: a key is not known, a value does not fit the lanes, the prompts or the latents, or latents are
                not finite.
        """
        options = options or {}
        for key in options:
            if key not in _OPTION_KEYS:
                raise ValueError(unknown_name("reset option", key, _OPTION_KEYS))
        if "prompt" in options and "prompt_id" in options:
            raise ValueError('reset options "prompt" and "prompt_id" exclude each other: give one')
        texts, prompt_id = None, None
        if "prompt" in options:
            texts = _per_lane(options["prompt"], str, num_envs, "prompt")
            index_of = {text: index for index, text in enumerate(prompts)}
            prompt_id = np.array([index_of.get(text, -1) for text in texts], dtype=np.int64)
        elif "prompt_id" in options:
            ids = _per_lane(options["prompt_id"], int | np.integer, num_envs, "prompt_id")
            if not all(0 <= index < len(prompts) for index in ids):
                raise ValueError(f"prompt_id must be between 0 and {len(prompts) - 1}, got {options['prompt_id']}")
            prompt_id = np.array(ids, dtype=np.int64)
            texts = [prompts[int(index)] for index in ids]
        latents = None
        if "latents" in options:
            latents = torch.as_tensor(options["latents"]).float().to(model.device)
            if latents.shape not in (model.latent_shape, (num_envs, *model.latent_shape)):
                raise ValueError(
                    f"latents must have shape {list(model.latent_shape)} or {[num_envs, *model.latent_shape]}, "
                    f"got {list(latents.shape)}"
                )
            if not transfer.to_host(torch.isfinite(latents)).all():
                raise ValueError("reset option 'latents' must be finite, got NaN or infinity")
            latents = latents.expand(num_envs, *model.latent_shape)
        return cls(texts, prompt_id, latents)


def _as_array(values: Tensor | np.ndarray) -> np.ndarray:
    return transfer.to_host(values) if isinstance(values, Tensor) else values


def _per_lane(value: Any, kind: type | object, num_envs: int, name: str) -> list[Any]:
    """Return one value of `kind` per lane, from one or from a sequence of them."""
    if isinstance(value, Tensor | np.ndarray):
        value = _as_array(value).tolist()
    values = [value] * num_envs if isinstance(value, kind) else value  # type: ignore[arg-type]
    if (
        not isinstance(values, Sequence)
        or len(values) != num_envs
        or not all(isinstance(item, kind) for item in values)  # type: ignore[arg-type]
    ):
        raise ValueError(f"reset option {name!r} must be one value, or one per lane ({num_envs}), got {value!r}")
    return list(values)


class Lanes:
    """The state of all lanes. Tensors are on the model's device, everything that steers the loop is on the host.

    Attributes:
        latents: [num_envs, C, H, W] x_t.
        finite: [num_envs] bool on the device: no action of the episode was NaN or infinite.
        step: [num_envs] int64, actions taken in the episode.
        ended: [num_envs] bool: the episode is over and the lane waits for its reset.
        prompt_id: [num_envs] int64.
        texts: The lanes' prompts.
        prompt_metadata: Their metadata.
        final_images: (lanes, images [k, 3, H, W]) of the episodes that the last step ended, or None.
    """

    def __init__(
        self,
        model: DiffusionModel,
        prompts: PromptSet,
        *,
        num_envs: int,
        negative_prompt: str,
        dtype: torch.dtype,
    ) -> None:
        self._model = model
        self._dtype = dtype
        self._initial_std = model.schedule.initial_std
        self._prompts = prompts
        self._negative_prompt = negative_prompt
        self._generators = [torch.Generator() for _ in range(num_envs)]
        for generator in self._generators:
            generator.seed()
        self._conditioning: dict[str, Tensor] = {}
        self.latents = self.finite = torch.empty(0)  # before the first reset
        self.step = np.zeros(num_envs, dtype=np.int64)
        self.ended = np.zeros(num_envs, dtype=bool)
        self.prompt_id = np.full(num_envs, -1, dtype=np.int64)
        self.texts = [""] * num_envs
        self.prompt_metadata: list[Mapping[str, object]] = [{} for _ in range(num_envs)]
        self.final_images: tuple[Tensor, Tensor] | None = None

    def start(self, mask: np.ndarray, *, seeds: Sequence[int | None] = (), options: ResetOptions | None = None) -> None:
        """Begin a new episode in the lanes of `mask`: draw prompt and x_T from each lane's own CPU generator.

        Both are drawn even where `options` fix them, so that a lane's stream does not depend on the options.
        """
        options = options or ResetOptions()
        lanes = np.flatnonzero(mask)
        noise = []
        for lane in lanes.tolist():
            generator = self._generators[lane]
            seed = seeds[lane] if seeds else None
            if seed is not None:
                generator.manual_seed(seed)
            drawn, lane_noise = self._draw(generator)
            noise.append(lane_noise)
            self.prompt_id[lane] = drawn if options.prompt_id is None else options.prompt_id[lane]
            is_in_set = self.prompt_id[lane] >= 0
            self.texts[lane] = self._prompts[self.prompt_id[lane]] if options.texts is None else options.texts[lane]
            self.prompt_metadata[lane] = self._prompts.metadata[self.prompt_id[lane]] if is_in_set else {}
        index = transfer.to_device(lanes, self._model.device)
        latents = transfer.to_device(torch.stack(noise) * self._initial_std, self._model.device).to(self._dtype)
        if options.latents is not None:
            latents = options.latents[index].to(self._dtype)
        finite = torch.ones(len(lanes), dtype=torch.bool, device=self._model.device)
        is_every_lane = len(lanes) == len(self.step)
        self.latents = latents.clone() if is_every_lane else self.latents.index_copy(0, index, latents)
        self.finite = finite if is_every_lane else self.finite.index_copy(0, index, finite)
        self.step[mask] = 0
        self.ended[mask] = False
        self._conditioning = {}

    def _draw(self, generator: torch.Generator) -> tuple[int, Tensor]:
        """Return a prompt's index and x_T [C, H, W], drawn on the host."""
        prompt_id = self._prompts.draw(generator)
        return prompt_id, torch.randn(self._model.latent_shape, generator=generator, dtype=torch.float32)

    def watch_finite(self, actions: Tensor, active: np.ndarray) -> None:
        """Note on the device which active lanes were given an action that is not finite."""
        finite = torch.isfinite(actions).flatten(1).all(1)
        self.finite = self.finite & (finite | transfer.to_device(~active, actions.device))

    def conditioning(self) -> Conditioning:
        """Return the embeddings of the lanes' prompts, [num_envs, ...] each; gathered once per reset, to read only."""
        if not self._conditioning:
            row_of = {text: row for row, text in enumerate(sorted(set(self.texts)))}
            table = self._model.encode_prompts(list(row_of), self._negative_prompt)
            index = transfer.to_device(np.array([row_of[text] for text in self.texts]), self._model.device)
            self._conditioning = {key: value[index] for key, value in table.items()}
        return self._conditioning

    def release(self) -> None:
        """Drop all tensors."""
        self._conditioning = {}
        self.final_images = None
        self.latents = self.finite = torch.empty(0)
