"""The time-prediction MDP: the action is the next diffusion time."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from gymnasium.spaces import Box, Space
from gymnasium.utils import EzPickle
from gymnasium.vector import AutoresetMode
from torch import Tensor
from typing_extensions import Unpack

from .. import transfer
from ..checks import checked_integer, checked_number
from ..grids import MAX_RATIO, MIN_RATIO
from ..models.base import DiffusionModel, Prediction
from ..rewards.names import REFERENCE_DISTANCE
from ..samplers import DDIM
from ..transitions import transition
from .contract import Observation
from .core import DiffusionVectorEnv
from .options import EnvOptions, VectorEnvOptions, refuse_vector_options
from .reference import REFERENCE_STEPS, ReferenceDistance
from .scoring import RewardOf
from .single import DiffusionEnv
from .step_cost import StepCost, StepCostName

LastStep = Literal["clean", "raw"]


@dataclass(eq=False)
class _Dynamics:
    """The denoiser's last prediction for each lane, and the noise that the lane began with.

    Args:
        noise: [B, C, H, W] x_T.
        pred_x0: [B, C, H, W] x̂_0.
        pred_epsilon: [B, C, H, W] ε̂.
        features: [B, F, h, w], 0 where the episode has ended.
        time_embedding: [B, E], 0 where the episode has ended.
    """

    noise: Tensor
    pred_x0: Tensor
    pred_epsilon: Tensor
    features: Tensor
    time_embedding: Tensor

    @classmethod
    def starting_from(cls, noise: Tensor, model: DiffusionModel) -> "_Dynamics":
        """Return the dynamics of lanes that all begin: the denoiser has not been asked."""
        size = len(noise)
        return cls(
            noise,
            torch.zeros_like(noise),
            torch.zeros_like(noise),
            noise.new_zeros(size, *model.feature_shape),
            noise.new_zeros(size, model.time_embedding_size),
        )

    def predict(self, index: Tensor, prediction: Prediction) -> None:
        """Take over a prediction, with features, for the lanes of the index."""
        assert prediction.features is not None
        assert prediction.time_embedding is not None
        self.pred_x0 = self.pred_x0.index_copy(0, index, prediction.x0)
        self.pred_epsilon = self.pred_epsilon.index_copy(0, index, prediction.epsilon)
        self.features = self.features.index_copy(0, index, prediction.features)
        self.time_embedding = self.time_embedding.index_copy(0, index, prediction.time_embedding)

    def end(self, ended: Tensor) -> None:
        """Set the features of the lanes that have ended, [B] bool, to 0."""
        self.features = self.features.masked_fill(ended.reshape(-1, 1, 1, 1), 0.0)
        self.time_embedding = self.time_embedding.masked_fill(ended[:, None], 0.0)


class TimePredictionOptions(EnvOptions, total=False):
    """The keywords of a single `TimePredictionEnv`, which explains them."""

    max_steps: int
    guidance_scale: float | None
    t_min: float | None
    last_step: LastStep
    step_cost: StepCostName
    gamma: float
    step_cost_weight: float
    allow_negative: bool
    reference_steps: int


class TimePredictionVectorEnv(DiffusionVectorEnv, EzPickle):
    """`gym.make_vec("TimePredictionMDP-v0", num_envs=…)`: many lanes of `TimePredictionEnv` as torch tensors.

    Observations, actions, rewards and flags are those of `TimePredictionEnv` with a leading dimension `num_envs`, as
    tensors on `device`. Lanes end at different steps: the denoiser is called for those that go on, and for no other.
    The autoreset modes are those of `DenoisingVectorEnv`; an algorithm that compares episodes wants DISABLED, because
    "the first so many episodes that end" are the short ones. In `info["final_obs"]` only the lanes of
    `info["_final_obs"]` mean anything.

    A step waits for the device once, for the times; `info["ended"]` is a numpy array.

    Args are those of `TimePredictionEnv`, and:
        num_envs: The number of lanes.
        autoreset_mode: An `AutoresetMode`, its name or its value.
    """

    _uses_embeds = True

    def __init__(
        self,
        num_envs: int = 1,
        *,
        max_steps: int = 28,
        guidance_scale: float | None = None,
        t_min: float | None = None,
        last_step: LastStep = "clean",
        step_cost: StepCostName = "none",
        gamma: float = 0.97,
        step_cost_weight: float = 0.0,
        allow_negative: bool = False,
        reference_steps: int = REFERENCE_STEPS,
        **options: Unpack[VectorEnvOptions],
    ) -> None:
        keywords: dict[str, Any] = {
            "max_steps": max_steps,
            "guidance_scale": guidance_scale,
            "t_min": t_min,
            "last_step": last_step,
            "step_cost": step_cost,
            "gamma": gamma,
            "step_cost_weight": step_cost_weight,
            "allow_negative": allow_negative,
            "reference_steps": reference_steps,
        }
        EzPickle.__init__(self, num_envs, **{**keywords, **options})
        self.max_steps: int = checked_integer("max_steps", max_steps, at_least=1)
        if last_step not in get_args(LastStep):
            raise ValueError(f"last_step must be one of {get_args(LastStep)}, got {last_step!r}")
        self._step_cost = StepCost(step_cost, gamma=gamma, weight=step_cost_weight)
        if allow_negative and step_cost != "discount":
            raise ValueError(f'allow_negative=True needs step_cost="discount", got {step_cost!r}')
        reward = options.get("reward")
        if isinstance(reward, str) and reward == REFERENCE_DISTANCE:
            options["reward"] = ReferenceDistance(num_steps=reference_steps)
        elif reference_steps != REFERENCE_STEPS:
            raise ValueError(
                f'reference_steps={reference_steps} needs reward="{REFERENCE_DISTANCE}", by this name '
                f"(ReferenceDistance itself takes num_steps); got the reward {reward!r}"
            )
        super().__init__(num_envs, **options)
        if self.model.is_sharded:
            raise ValueError(
                "episodes differ in length here, and a denoiser whose weights are divided among processes needs the "
                "same passes in all: launch without --use_fsdp, each process with all of the weights"
            )
        self.guidance_scale = self.model.guidance_scale_of(guidance_scale)
        if self.negative_prompt and self.guidance_scale <= 1:
            raise ValueError(
                f"negative_prompt={self.negative_prompt!r} needs guidance, guidance_scale above 1; "
                f"got {self.guidance_scale}"
            )
        if not allow_negative:
            self._step_cost.require_sign(self.reward)
        schedule = self.model.schedule
        self._start_time = schedule.start_time
        self._start_ratio = float(schedule.noise_ratio(torch.tensor([self._start_time], dtype=torch.float64)))
        # Above the noise ratio at the start, an episode would end before its first step.
        self.t_min = checked_number(
            "t_min", schedule.min_noise_ratio if t_min is None else t_min, f"(0, {self._start_ratio:.6g})"
        )
        self.last_step = last_step
        self.single_action_space = Box(0.0, 1.0, (1,), np.float32)
        self._dynamics = _Dynamics.starting_from(torch.empty(0), self.model)  # before the first reset
        # Times and noise ratios live on the host, in float64: only the action is read from the device.
        self._noise_ratio = np.full(self.num_envs, self._start_ratio)
        self._visited = np.full((self.num_envs, self.max_steps + 1), schedule.clean)
        self._through = np.zeros(self.num_envs, dtype=bool)
        self._cut_off = np.zeros(self.num_envs, dtype=bool)
        self._unseen = np.zeros(self.num_envs, dtype=bool)

    def _time_spaces(self) -> dict[str, Space]:
        schedule = self.model.schedule
        low = min(schedule.clean, 0.0)
        return {"timestep": Box(low, schedule.max_time, (1,), np.float32), "step": Box(0.0, 1.0, (1,), np.float32)}

    def _observation_spaces(self) -> dict[str, Space]:
        model = self.model
        return super()._observation_spaces() | {
            "features": Box(-np.inf, np.inf, model.feature_shape, np.float32),
            "time_embedding": Box(-np.inf, np.inf, (model.time_embedding_size,), np.float32),
        }

    def _observe_time(self) -> dict[str, np.ndarray]:
        times, step = self._times(), self._lanes.step / self.max_steps
        return {"timestep": times[:, None].astype(np.float32), "step": step[:, None].astype(np.float32)}

    def _observe(self) -> Observation:
        return super()._observe() | {
            "features": self._dynamics.features.clone(),
            "time_embedding": self._dynamics.time_embedding.clone(),
        }

    def _info(self) -> dict[str, Any]:
        return super()._info() | {
            "times": self._visited.astype(np.float32),
            "max_steps_reached": self._cut_off.copy(),
        }

    def _times(self) -> np.ndarray:
        """Return each lane's time, [num_envs] float64."""
        return self._visited[np.arange(self.num_envs), self._lanes.step]

    def _dtype(self) -> torch.dtype:
        """Return float32, whatever the denoiser's precision: rounding would add up along the path."""
        return torch.float32

    def _on_reset(self, mask: np.ndarray) -> None:
        latents = self._lanes.latents
        if mask.all():
            self._dynamics = _Dynamics.starting_from(latents, self.model)
        else:
            is_new = self._to_device(mask).reshape(-1, 1, 1, 1)
            self._dynamics.noise = torch.where(is_new, latents, self._dynamics.noise)
        self._noise_ratio[mask] = self._start_ratio
        self._visited[mask] = self.model.schedule.clean
        self._visited[mask, 0] = self._start_time
        self._through[mask] = self._cut_off[mask] = False
        self._unseen |= mask

    def _advance(self, actions: Tensor, active: np.ndarray) -> None:
        ratios = np.clip(transfer.to_host(actions[:, 0]).astype(np.float64), MIN_RATIO, MAX_RATIO)
        lanes = np.flatnonzero(active)
        before = self._times()[lanes]
        self._noise_ratio[lanes] *= ratios[lanes]
        self._lanes.step[lanes] += 1
        # A ratio that is not a number ends the episode, and is named where the reward is computed.
        # A grid that ends at t_min is walked to its end: a product of float32 ratios is some 1e-7 off.
        arrived = ~(self._noise_ratio[lanes] >= self.t_min * (1 - 1e-5))
        self._cut_off[lanes] = ~arrived & (self._lanes.step[lanes] == self.max_steps)
        self._through[lanes] = arrived | self._cut_off[lanes]
        after = self._time_of(self._noise_ratio[lanes])
        if self.last_step == "clean":
            after = np.where(self._through[lanes], self.model.schedule.clean, after)
        self._visited[lanes, self._lanes.step[lanes]] = after
        index = self._to_device(lanes)
        times = (self._to_device(time.astype(np.float32)) for time in (before, after))
        scales = DDIM(0.0).scales(self.model.schedule, *times)
        dynamics = self._dynamics
        moved = transition(dynamics.pred_x0[index], dynamics.pred_epsilon[index], scales).mean.to(self.dtype)
        self._lanes.latents = self._lanes.latents.index_copy(0, index, moved)
        self._dynamics.end(self._to_device(self._through))
        self._unseen |= active & ~self._through

    def _finished(self) -> np.ndarray:
        return self._through

    def _before_observing(self) -> None:
        """Ask the denoiser about the lanes that have moved since it was asked last."""
        lanes = np.flatnonzero(self._unseen)
        if not len(lanes):
            return
        index = self._to_device(lanes)
        prediction = self.model.denoise(
            self._lanes.latents[index],
            self._to_device(self._times()[lanes].astype(np.float32)),
            {key: value[index] for key, value in self._lanes.conditioning().items()},
            guidance_scale=self.guidance_scale,
            with_features=True,
        )
        self._dynamics.predict(index, prediction)
        self._unseen[:] = False

    def _time_of(self, noise_ratios: np.ndarray) -> np.ndarray:
        return transfer.to_host(self.model.schedule.time_of(torch.from_numpy(noise_ratios)))

    def _scored_by(self, lanes: np.ndarray) -> RewardOf:
        if not isinstance(self.reward, ReferenceDistance):
            return super()._scored_by(lanes)
        index = self._to_device(lanes)
        return partial(
            self.reward.distance,
            model=self.model,
            noise=self._dynamics.noise[index],
            conditioning={key: value[index] for key, value in self._lanes.conditioning().items()},
            negative_prompt=self.negative_prompt,
            guidance_scale=self.guidance_scale,
        )

    @contextlib.contextmanager
    def deferred_rewards(self) -> Iterator[None]:
        """The base's context; but the distance to a reference is computed at once, because lanes use its denoiser."""
        is_reference = isinstance(self.reward, ReferenceDistance)
        with contextlib.nullcontext() if is_reference else super().deferred_rewards():
            yield

    def _episode_return(self, values: Tensor, num_steps: Tensor) -> Tensor:
        return self._step_cost(values, num_steps)

    def close_extras(self, **kwargs: object) -> None:
        """Let go of the lanes' tensors."""
        super().close_extras(**kwargs)
        self._dynamics = _Dynamics.starting_from(torch.empty(0), self.model)


class TimePredictionEnv(DiffusionEnv, EzPickle, lane_of=TimePredictionVectorEnv):
    """`gym.make("TimePredictionMDP-v0")`: choosing the times at which a frozen model denoises one image.

    ## Description
    The environment owns the denoiser, and walks from noise to image in as many steps as the agent likes: the agent
    sees what the denoiser sees and says to which diffusion time to go next. x moves there by the deterministic step
    (DDIM; Euler on a flow). This is the MDP of TPDM, for the continuous time of every noise process:

        s = (c, t, x_t, hidden layers)    a = r    τ(t') = r·τ(t)    R = r(x_0, c) at the end

    with the noise ratio τ = σ/α, and τ = σ on a flow. An episode of N actions takes N network calls, the one at reset
    included.

    Source: Ye et al., 2024, "Schedule On the Fly: Diffusion Time Prediction for Faster and Better Image Generation",
    https://arxiv.org/abs/2412.01243.

    ## Action Space
    `Box(0, 1, (1,), float32)`: the ratio r, clipped to [0.001, 0.999].

    ## Observation Space
    A `Dict`; C, H, W are the latents' (4, 16, 16 with the emoji model), F, h, w the features' (128, 16, 16), E the
    time embedding's (256), P is the number of prompts.

    | Key | Shape | Dtype | Min | Max | Meaning |
    |---|---|---|---|---|---|
    | `latents` | (C, H, W) | float32 | −∞ | ∞ | x_t |
    | `timestep` | (1,) | float32 | −1 or 0 | 999 or 1 | t: an index (also between indices), σ for flow models |
    | `step` | (1,) | float32 | 0 | 1 | actions taken over `max_steps` |
    | `features` | (F, h, w) | float32 | −∞ | ∞ | the denoiser's first and last hidden layer; 0 at the end |
    | `time_embedding` | (E,) | float32 | −∞ | ∞ | its time embedding; 0 at the end |
    | `prompt_id` | (1,) | int64 | −1 | P − 1 | index in `env.unwrapped.prompts`; −1, none: a text given to `reset` |
    | `prompt_embeds` | (L, D) | float32 | −∞ | ∞ | the prompt's embedding (with `observe_embeds`) |
    | `negative_prompt_embeds` | (L, D) | float32 | −∞ | ∞ | the negative prompt's (with `observe_embeds`) |

    `info` has `prompt_id`, `nfe` (network calls answered so far), `timestep`, `step`, `times` [max_steps + 1] (those
    visited, then the clean end's), `max_steps_reached` and `ended`; on the last step also the raw `reward/<name>`,
    `reward_invalid` and `images` [3, H, W] in [0, 1].

    ## Rewards
    0 until the last step, then the reward of the decoded x_0 less the cost of the steps (see `step_cost`). What is
    NaN or infinite is treated as in `DenoisingMDP-v0`.

    ## Starting State
    As in `DenoisingMDP-v0`, both drawn from the lane's own generator, at the noisiest time.
    `reset(options=…)` fixes them: `prompt` (any text), `prompt_id`, `latents`.

    ## Episode End
    `terminated` when τ falls below `t_min`, or after `max_steps` actions. Either way x_0 is the denoiser's x̂_0 of the
    last call: clean, and for no further call (`last_step="raw"`: x at the time chosen last). There is no truncation:
    `gym.make(…, max_episode_steps=…)` below `max_steps` is warned about.

    ## Arguments
    | Argument | Default | Meaning |
    |---|---|---|
    | `model` | `"emoji"` | a name, a diffusers folder, a Hub id, or a loaded `DiffusionModel` |
    | `reward` | `"incompressibility"` | as in `DenoisingMDP-v0`; or `"reference_distance"` alone (−MSE to many steps) |
    | `prompts` | the model's (`"simple_animals"`) | a name, a file, a list, or `{prompt: weight}` |
    | `max_steps` | `28` | the most actions of an episode |
    | `guidance_scale` | the model's | classifier-free guidance of the frozen denoiser, ≥ 0; none up to 1 |
    | `t_min` | 0.1; flow 0.01 | the noise ratio τ below which an episode ends |
    | `last_step` | `"clean"` | `"raw"`: end with the noise of the last time, as the published code does |
    | `step_cost` | `"none"` | `"discount"`: R·(1−γ^N)/(N(1−γ)) as TPDM; `"linear"`: R − λ·N |
    | `gamma` | `0.97` | γ of the discount |
    | `step_cost_weight` | `0` | λ of the linear cost |
    | `allow_negative` | `False` | allow the discount on rewards that may be negative, where more steps earn more |
    | `reference_steps` | `80` | network calls of `"reference_distance"`'s reference |
    | `device` | `"cpu"` | where the model runs |
    | `dtype` | `"float32"` | the denoiser's precision; latents and actions are float32 |
    | `image_size` | the model's | height and width in pixels, or one number for both |
    | `variant` | none | which of the files of weights to read, such as "fp16" |
    | `without` | none | parts of the folder to leave out, such as ("text_encoder_3",) |
    | `offload` | no | keep text encoders and autoencoder on the CPU between uses |
    | `text_encoder_dtype` | `"float32"` | precision of the text encoders |
    | `negative_prompt` | `""` | what guidance moves away from |
    | `observe_embeds` | below 1 MB a lane | whether embeddings are part of the observation |
    | `render_mode` | `None` | `"rgb_array"`: the decoded x_t; x_0 once the episode has ended |
    | `on_invalid_reward` | `"raise"` | `"nan"`: no error where an action, image or reward is NaN or infinite (below) |

    ## Version History
    - v0: initial version.
    """

    def __init__(self, **options: Unpack[TimePredictionOptions]) -> None:
        EzPickle.__init__(self, **options)
        refuse_vector_options(options)
        lane = TimePredictionVectorEnv(1, autoreset_mode=AutoresetMode.DISABLED, **options)
        super().__init__(lane, max_steps=lane.max_steps)
