"""The physics that all environments share: lanes, seeds, prompts, episode ends, rewards, rendering.

It works on torch tensors on one device; `single.py` shows one lane of it as a numpy environment.
"""

import contextlib
import os
import sys
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from inspect import Signature
from typing import Any, ClassVar, get_args

import gymnasium as gym
import numpy as np
import torch
from gymnasium.error import ClosedEnvironmentError, InvalidAction, ResetNeeded
from gymnasium.spaces import Box, Dict, Space
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from .. import transfer
from ..checks import checked_integer
from ..models.base import ImageSize
from ..naming import unexpected_argument
from ..prompts import make_prompts
from ..rewards import make_reward, to_uint8
from ..rewards.base import checked_output
from .contract import Observation
from .lanes import Lanes, ResetOptions, lane_seeds, lanes_to_reset
from .options import (
    HasSpec,
    InvalidReward,
    ModelSource,
    PromptSource,
    RewardSource,
    resolve_model,
    signature_of,
    to_autoreset_mode,
)
from .scoring import RewardOf, Scorer, Scores

_OBSERVED_BYTES_LIMIT = 1_000_000

if sys.platform != "win32":
    # OpenMP's threads are not there in a forked child (AsyncVectorEnv's workers), where torch would wait for them
    # for ever. With one thread it asks for none; torch's own DataLoader does the same in its workers.
    os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))


class DiffusionVectorEnv(HasSpec, VectorEnv[Observation, Tensor, Tensor]):
    """Many lanes of one diffusion MDP on one device: a `TorchVectorEnv`, whose members it documents.

    A subclass defines the effect of an action (`_advance`), the lanes whose episode is over (`_finished`) and the
    observations beside the prompt and x_t (`_observe_time`). One that asks the denoiser itself also sets up the lanes
    of new episodes (`_on_reset`) and prepares observations (`_before_observing`). Of the facts about itself it states
    those that it changes: `num_steps` and `times`, or `max_steps`; `action_is_next_latents`. See the concrete
    environments for arguments and spaces.

    Attributes:
        reward_seconds: It is counted from one wait for the device to the next, so it holds on a GPU too.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012
        "render_modes": ["rgb_array"],
        "render_fps": 10,
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }
    num_steps: int | None = None
    times: tuple[float, ...] = ()
    max_steps: int | None = None
    action_is_next_latents = False
    single_observation_space: Dict
    single_action_space: Box
    __signature__: ClassVar[Signature]
    _uses_embeds = False  # whether the prompts' embeddings steer the environment itself
    closed = True  # until it is made: there is nothing to close before

    def __init_subclass__(cls) -> None:
        """Show the keywords that the constructor passes on to its bases, with their defaults, in its signature."""
        super().__init_subclass__()
        cls.__signature__ = signature_of(cls)

    def __init__(
        self,
        num_envs: int,
        *,
        model: ModelSource = "emoji",
        reward: RewardSource = "incompressibility",
        prompts: PromptSource = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        image_size: ImageSize | None = None,
        variant: str | None = None,
        without: Sequence[str] | None = None,
        offload: bool | None = None,
        text_encoder_dtype: str | torch.dtype | None = None,
        negative_prompt: str = "",
        observe_embeds: bool | None = None,
        render_mode: str | None = None,
        on_invalid_reward: InvalidReward = "raise",
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        **unknown: object,
    ) -> None:
        for name in unknown:
            keywords = self.__signature__.parameters.keys() - {"num_envs"}
            raise TypeError(unexpected_argument(type(self).__name__, name, keywords))
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode must be None or one of {self.metadata['render_modes']}, got {render_mode!r}")
        if on_invalid_reward not in get_args(InvalidReward):
            raise ValueError(f"on_invalid_reward must be one of {get_args(InvalidReward)}, got {on_invalid_reward!r}")
        self.on_invalid_reward = on_invalid_reward
        self.num_envs = checked_integer("num_envs", num_envs, at_least=1)
        self.reward = make_reward(reward)
        self.model = resolve_model(
            model,
            device=device,
            dtype=dtype,
            image_size=image_size,
            variant=variant,
            without=without,
            offload=offload,
            text_encoder_dtype=text_encoder_dtype,
        )
        self.prompts = make_prompts(self.model.default_prompts if prompts is None else prompts)
        self.device, self.dtype = self.model.device, self._dtype()
        self.negative_prompt = negative_prompt
        self.render_mode = render_mode
        self.autoreset_mode = to_autoreset_mode(autoreset_mode)
        self.metadata = {**type(self).metadata, "autoreset_mode": self.autoreset_mode}
        self._embed_shapes = {} if observe_embeds is False else self._shapes_of_embeds()
        num_bytes = 4 * sum(shape.numel() for shape in self._embed_shapes.values())
        self.observe_embeds = num_bytes < _OBSERVED_BYTES_LIMIT if observe_embeds is None else bool(observe_embeds)
        self.single_observation_space = Dict(self._observation_spaces())
        self.constant_keys = frozenset({"prompt_id", *(self._embed_shapes if self.observe_embeds else ())})
        self.large_keys = frozenset(self.single_observation_space).difference(self.constant_keys, self._time_spaces())
        self._lanes = Lanes(
            self.model, self.prompts, num_envs=self.num_envs, negative_prompt=negative_prompt, dtype=self.dtype
        )
        self._scorer = Scorer(self._lanes, self.model, name=self.reward.name, on_invalid_reward=self.on_invalid_reward)
        self._started = self._interrupted = False
        self.reward_seconds = 0.0
        self.reward_queries = 0
        self.closed = False

    @abstractmethod
    def _advance(self, actions: Tensor, active: np.ndarray) -> None:
        """Apply the actions of the active lanes: change `self._lanes.latents` and count `self._lanes.step`."""

    @abstractmethod
    def _finished(self) -> np.ndarray:
        """Return the mask of lanes that have reached the end of their episode, [num_envs] bool."""

    @abstractmethod
    def _time_spaces(self) -> dict[str, Space]:
        """Return the spaces of `_observe_time`'s observations, for one lane."""

    @abstractmethod
    def _observe_time(self) -> dict[str, np.ndarray]:
        """Return the observations of each lane's time, [num_envs, 1] float32 each."""

    def _dtype(self) -> torch.dtype:
        """Return the precision of latents and actions: the model's."""
        return self.model.dtype

    def _on_reset(self, mask: np.ndarray) -> None:
        """Set up the lanes of the mask, [num_envs] bool, whose episodes have just been started."""

    def _before_observing(self) -> None:
        """Prepare the observation of the lanes; called once in a step, and once in a reset."""

    def _scored_by(self, lanes: np.ndarray) -> RewardOf:
        """Return the function that gives the final images of these lanes [k] their raw rewards.

        It may be called later, when the lanes are in their next episode.
        """
        return partial(checked_output, self.reward)

    def _episode_return(self, values: Tensor, num_steps: Tensor) -> Tensor:
        """Return the episodes' returns [k], from their raw rewards [k] and numbers of steps [k]."""
        return values

    @torch.inference_mode(False)
    def _shapes_of_embeds(self) -> dict[str, torch.Size]:
        one_lane = self.model.encode_prompts(self.prompts.texts[:1], self.negative_prompt)
        return {key: value.shape[1:] for key, value in one_lane.items()}

    def _observation_spaces(self) -> dict[str, Space]:
        spaces: dict[str, Space] = {
            "latents": Box(-np.inf, np.inf, self.model.latent_shape, np.float32),
            **self._time_spaces(),
            "prompt_id": Box(-1, len(self.prompts) - 1, (1,), np.int64),
        }
        embeds = self._embed_shapes if self.observe_embeds else {}
        return spaces | {key: Box(-np.inf, np.inf, tuple(s), np.float32) for key, s in embeds.items()}

    @cached_property
    def observation_space(self) -> Space:  # type: ignore[override]
        """The batched space; built when asked for, since its bounds take as much memory as a batch."""
        return batch_space(self.single_observation_space, self.num_envs)

    @cached_property
    def action_space(self) -> Space:  # type: ignore[override]
        """The batched space of the actions."""
        return batch_space(self.single_action_space, self.num_envs)

    @torch.inference_mode(False)  # what is returned may be trained on, wherever it was made
    @torch.no_grad()
    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start new episodes and return their first observations.

        Args:
            seed: Lane i is seeded with seed + i, or with the i-th of a sequence, modulo 2⁶⁴; None goes on with the
                streams.
            options: `prompt` (a text, or one per lane), `prompt_id` (an index, or one per lane), `latents` (x_T,
                [C, H, W] or [num_envs, C, H, W]), `reset_mask` ([num_envs] bool: only these lanes are reset).

        Raises:
            ClosedEnvironmentError: the environment was closed.
            ResetNeeded: `reset_mask` leaves out lanes that have never been reset, or that an error has interrupted.
            ValueError, TypeError: the seed or an option has the wrong key, type or shape; the message says which.
        """
        self._require_open()
        seeds = lane_seeds(seed, self.num_envs)
        super().reset(seed=int(seed) if isinstance(seed, int | np.integer) else None)
        parsed = ResetOptions.parse(options, num_envs=self.num_envs, prompts=self.prompts, model=self.model)
        mask = lanes_to_reset(options, num_envs=self.num_envs)
        if (
            not (self.observe_embeds or self._uses_embeds)
            and parsed.prompt_id is not None
            and (parsed.prompt_id < 0).any()
        ):
            raise ValueError(
                "a prompt outside the prompt set can only be given where its embedding is observed: "
                "make the environment with observe_embeds=True, or with the prompt in prompts="
            )
        if not mask.all() and not (self._started and not self._interrupted):
            what = "reset after an error" if self._started else "first reset"
            raise ResetNeeded(f"the {what} must be of all lanes: call reset() without reset_mask")
        self._interrupted = True
        self._lanes.final_images = None
        self._start(mask, seeds=seeds, options=parsed)
        self._before_observing()
        observation, info = self._observe(), self._info() | {"ended": self._lanes.ended.copy()}
        self._started, self._interrupted = True, False
        return observation, info

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self, actions: Tensor) -> tuple[Observation, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Take one action in every lane.

        Args:
            actions: [num_envs, *single_action_space.shape] on the environment's device, in its `dtype`.

        Returns:
            Observation, reward [num_envs] float32 (0 until the last step of an episode), terminated and truncated
            [num_envs] bool: tensors on the device, none of which shares memory with `actions` or an earlier return
            (the prompts' embeddings excepted: read only); and an info dict whose `ended` [num_envs] is a numpy array,
            so that a loop over episodes never waits for the device.

        Raises:
            ClosedEnvironmentError, ResetNeeded: the environment is closed, or no lane is in an episode.
            InvalidAction: the actions' type, shape, dtype or device is wrong; or, at an episode's end, one of its
                actions was not finite.
            ValueError: an image or its reward is not finite. Neither this nor the actions' not being finite raises with
                `on_invalid_reward="nan"`.
        """
        self._require_open()
        self._require_reset()
        self._check_actions(actions)
        self._interrupted = True
        actions = actions.detach()
        waiting = self._lanes.ended.copy()
        self._lanes.watch_finite(actions, ~waiting)
        self._advance(actions, ~waiting)
        ended = self._finished() & ~waiting
        self._lanes.ended |= ended
        rewards, scores = self._score(ended)
        final: dict[str, Any] = {}
        if self.autoreset_mode is AutoresetMode.SAME_STEP and ended.any():
            final_info = self._info() | scores | {"ended": ended}
            scores = {}
            final = {"final_obs": self._observe(), "_final_obs": ended.copy()}
            final |= {"final_info": final_info, "_final_info": ended.copy()}
            self._start(ended)
        if self.autoreset_mode is AutoresetMode.NEXT_STEP and waiting.any():
            self._start(waiting)
        self._before_observing()
        observation, info = self._observe(), self._info() | scores | final
        terminated = self._lanes.ended if self.autoreset_mode is AutoresetMode.DISABLED else ended
        info["ended"] = terminated.copy()
        truncated = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
        self._interrupted = False
        return observation, rewards, self._to_device(terminated), truncated, info

    @torch.inference_mode(False)
    @torch.no_grad()
    def render(self) -> tuple[np.ndarray, ...] | None:
        """Return one frame [H, W, 3] uint8 per lane: the decoded x_t; x_0 where the last step ended an episode."""
        if self.render_mode is None:
            gym.logger.warn('render() needs render_mode="rgb_array", given to gym.make or gym.make_vec')
            return None
        self._require_open()
        self._require_reset(of_all=False)
        images = self.model.decode(self._lanes.latents)
        if self._lanes.final_images is not None:
            lanes, finals = self._lanes.final_images
            images[lanes] = finals
        return tuple(transfer.to_host(to_uint8(images.nan_to_num())))

    @contextlib.contextmanager
    def deferred_rewards(self) -> Iterator[None]:
        """The context in which rewards are computed in a thread, for callers that wait for them.

        Where lanes end, `step` then returns rewards of 0 for them, and the info of their last step has, in the place of
        their rewards by name, `pending_rewards`: a future of both. A reward that learns sees images in the same order.
        `reward_seconds` counts the decoding alone.
        """
        with self._scorer.deferred():
            yield

    def close_extras(self, **kwargs: object) -> None:
        """Let go of the lanes' tensors."""
        self._lanes.release()

    def _start(
        self, mask: np.ndarray, *, seeds: Sequence[int | None] = (), options: ResetOptions | None = None
    ) -> None:
        self._lanes.start(mask, seeds=seeds, options=options)
        self._on_reset(mask)

    def _require_open(self) -> None:
        if self.closed:
            raise ClosedEnvironmentError(f"{type(self).__name__} was closed: make a new one")

    def _require_reset(self, *, of_all: bool = True) -> None:
        if not self._started:
            raise ResetNeeded("call reset() before step() or render()")
        if of_all and self._interrupted:
            raise ResetNeeded("the last step or reset ended in an error: call reset() of all lanes")
        if of_all and self.autoreset_mode is AutoresetMode.DISABLED and self._lanes.ended.all():
            raise ResetNeeded("every lane has ended: call reset() (autoreset_mode is DISABLED)")

    def _check_actions(self, actions: Tensor) -> None:
        shape = (self.num_envs, *self.single_action_space.shape)
        expected = f"a torch tensor of shape {list(shape)}, {self.dtype}, on {self.device}"
        if not isinstance(actions, Tensor):
            raise InvalidAction(f"actions must be {expected}; got {type(actions).__name__}")
        wrong_device = actions.device.type != self.device.type or self.device.index not in (None, actions.device.index)
        if actions.shape != shape or actions.dtype != self.dtype or wrong_device:
            raise InvalidAction(
                f"actions must be {expected}; got shape {list(actions.shape)}, {actions.dtype}, on {actions.device}"
            )

    def _score(self, ended: np.ndarray) -> Scores:
        """Return the rewards of all lanes, and the info of those that have just ended.

        This is the one place in a step that waits for the device.
        """
        self._lanes.final_images = None
        if not ended.any():
            return torch.zeros(self.num_envs, device=self.device, dtype=torch.float32), {}
        began = time.perf_counter()
        self.reward_queries += int(ended.sum())
        final = self._scorer.decode(ended)
        scores = self._scorer.score(final, self._scored_by(final.lanes[final.valid]), self._episode_return)
        self.reward_seconds += time.perf_counter() - began
        return scores

    def _observe(self) -> Observation:
        lanes = self._lanes
        observation = {"latents": lanes.latents.clone()}
        observation |= {key: self._to_device(value) for key, value in self._observe_time().items()}
        observation["prompt_id"] = self._to_device(lanes.prompt_id[:, None])
        return observation | (dict(lanes.conditioning()) if self.observe_embeds else {})

    def _info(self) -> dict[str, Any]:
        times = {key: value[:, 0] for key, value in self._observe_time().items()}
        return {
            "prompt_id": self._lanes.prompt_id.copy(),
            "nfe": self._lanes.step.copy(),
            "ended": np.zeros(self.num_envs, dtype=bool),
            **times,
        }

    def _to_device(self, values: np.ndarray) -> Tensor:
        return transfer.to_device(values, self.device)
