"""The rewards of lanes that end: their images are decoded, checked and rewarded, at once or in a thread."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from gymnasium.error import InvalidAction
from torch import Tensor
from typing_extensions import ParamSpec

from .. import transfer
from ..models.base import DiffusionModel
from ..rewards import RewardOutput
from ..rewards.base import Metadata
from .lanes import Lanes
from .options import InvalidReward

RewardOf = Callable[[Tensor, Sequence[str], Sequence[Metadata]], RewardOutput]
"""The raw rewards of images [k, 3, H, W], k prompts and their metadata."""

Scores = tuple[Tensor, dict[str, Any]]
"""The rewards of all lanes, [num_envs] float32, and the info of those that ended."""

_OVERFLOW = (
    ". Weights may have diverged; in float16, numbers beyond 65504 overflow: bfloat16 and float32 do not "
    '(dtype="float32", precision="bf16"). on_invalid_reward="nan" goes on without these lanes\' rewards'
)

_P = ParamSpec("_P")
_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class FinalImages:
    """The images with which k lanes have just ended.

    Args:
        lanes: [k] int64, the lanes.
        index: [k] int64, the lanes on the device.
        images: [k, 3, H, W] in [0, 1].
        valid: [k] bool: the image is finite, and so were the episode's actions.
        num_steps: [k] int64, the actions of each episode.
        prompts: The k prompts.
        metadata: The prompts' metadata.
    """

    lanes: np.ndarray
    index: Tensor
    images: Tensor
    valid: np.ndarray
    num_steps: np.ndarray
    prompts: list[str]
    metadata: list[Mapping[str, object]]


class _AtOnce(Executor):
    """An executor that runs a function when it is submitted: the future is done, and an error is raised at once."""

    def submit(self, function: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """Return a future that already holds the function's result."""
        future: Future[_T] = Future()
        future.set_result(function(*args, **kwargs))
        return future


class Scorer:
    """Decodes the lanes that end and rewards their images.

    Scores always come as a future: one that is done when `submit` returns it, or within `deferred()` a thread's.

    Args:
        lanes: The lanes.
        model: The model, which decodes.
        name: The reward's name.
        on_invalid_reward: "raise", or "nan": lanes with something that is not finite are given NaN.
    """

    def __init__(self, lanes: Lanes, model: DiffusionModel, *, name: str, on_invalid_reward: InvalidReward) -> None:
        self._lanes = lanes
        self._num_envs = len(lanes.ended)
        self._model = model
        self._name = name
        self._raises = on_invalid_reward == "raise"
        self._executor: Executor = _AtOnce()
        self._is_deferred = False

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """The context in which one thread computes the rewards, in the order in which they are submitted."""
        self._executor, self._is_deferred = ThreadPoolExecutor(1, thread_name_prefix="reward"), True
        try:
            yield
        finally:
            self._executor.shutdown(cancel_futures=True)
            self._executor, self._is_deferred = _AtOnce(), False

    def decode(self, ended: np.ndarray) -> FinalImages:
        """Return the images of the lanes that have just ended, a mask [num_envs] bool; waits for the device.

        Raises:
            InvalidAction, ValueError: an action or an image is not finite, and `on_invalid_reward` is "raise".
        """
        lanes = np.flatnonzero(ended)
        index = transfer.to_device(lanes, self._model.device)
        images = self._model.decode(self._lanes.latents[index])
        self._lanes.final_images = (index, images)
        return FinalImages(
            lanes,
            index,
            images,
            self._valid(lanes, self._lanes.finite[index], torch.isfinite(images).flatten(1).all(1)),
            self._lanes.step[lanes],
            [self._lanes.texts[lane] for lane in lanes],
            [self._lanes.prompt_metadata[lane] for lane in lanes],
        )

    def _valid(self, lanes: np.ndarray, actions: Tensor, images: Tensor) -> np.ndarray:
        """Return the mask of lanes that had finite actions [k] and have a finite image [k], [k] bool on the host."""
        finite_actions, finite_images = transfer.to_host(torch.stack([actions, images]))
        if self._raises and not finite_actions.all():
            raise InvalidAction(
                f"the actions of lanes {lanes[~finite_actions].tolist()} were NaN or infinite in the episode that has "
                f"just ended{_OVERFLOW}"
            )
        if self._raises and not finite_images.all():
            raise ValueError(
                f"the images of lanes {lanes[~finite_images].tolist()} are NaN or infinite, so they cannot be "
                f"rewarded: the last latents were far outside the decoder's range, or NaN{_OVERFLOW}"
            )
        return finite_actions & finite_images

    def score(
        self, final: FinalImages, reward_of: RewardOf, episode_return: Callable[[Tensor, Tensor], Tensor]
    ) -> Scores:
        """Return all lanes' rewards and the entries of info; where deferred, 0 and their future, `pending_rewards`.

        The arguments are those of `submit`.
        """
        ended = np.zeros(self._num_envs, dtype=bool)
        ended[final.lanes] = True
        info: dict[str, Any] = {"images": self._of_lanes(final.images, final.index), "_images": ended}
        pending = self.submit(final, reward_of, episode_return)
        if self._is_deferred:
            rewards = torch.zeros(self._num_envs, device=final.images.device, dtype=torch.float32)
            return rewards, info | {"pending_rewards": pending}
        rewards, reward_info = pending.result()
        return rewards, info | reward_info

    def submit(
        self, final: FinalImages, reward_of: RewardOf, episode_return: Callable[[Tensor, Tensor], Tensor]
    ) -> Future[Scores]:
        """Return the future scores of lanes that have ended; an image that is not valid is not shown to the reward.

        Args:
            final: Their images.
            reward_of: The function that gives the valid ones their raw rewards.
            episode_return: The function from raw rewards [k] and numbers of steps [k] to the episodes' returns [k].

        Raises:
            ValueError: a reward is not finite, and `on_invalid_reward` is "raise". Where deferred, the future raises.
        """
        images = final.images
        if not final.valid.all():
            images = images[transfer.to_device(np.flatnonzero(final.valid), images.device)]
        return self._executor.submit(self._scores, final, images, reward_of, episode_return)

    @torch.no_grad()
    def _scores(
        self,
        final: FinalImages,
        images: Tensor,
        reward_of: RewardOf,
        episode_return: Callable[[Tensor, Tensor], Tensor],
    ) -> Scores:
        """Return the scores: the reward is asked about the valid lanes, whose images these are."""
        lanes, valid = final.lanes, final.valid
        output, finite = self._asked(final, images, reward_of)
        rewarded_lanes, invalid_lanes, steps = (
            transfer.to_device(values, images.device)
            for values in (lanes[valid], lanes[~finite], final.num_steps[valid])
        )
        ended = np.zeros(self._num_envs, dtype=bool)
        ended[lanes] = True
        failed = np.zeros_like(ended)
        failed[lanes[~finite]] = True
        info: dict[str, Any] = {"reward_invalid": failed, "_reward_invalid": ended}
        rewards = self._of_lanes(episode_return(output.values.float(), steps), rewarded_lanes)
        for key, values in {**output.extras, self._name: output.values}.items():
            info[f"reward/{key}"] = self._of_lanes(values.float(), rewarded_lanes).index_fill_(
                0, invalid_lanes, torch.nan
            )
            info[f"_reward/{key}"] = ended
        return rewards.index_fill_(0, invalid_lanes, torch.nan), info

    def _asked(self, final: FinalImages, images: Tensor, reward_of: RewardOf) -> tuple[RewardOutput, np.ndarray]:
        """Return the reward's output for the valid lanes, and the mask of finite rewards, [k] bool. It waits."""
        finite = final.valid.copy()
        if not finite.any():
            return RewardOutput(images.new_zeros(0, dtype=torch.float32)), finite
        rows = np.flatnonzero(finite)
        output = reward_of(images, [final.prompts[row] for row in rows], [final.metadata[row] for row in rows])
        finite[rows] = transfer.to_host(torch.isfinite(output.values))
        if self._raises and not finite.all():
            raise ValueError(
                f"the reward {self._name!r} returned NaN or infinity for lanes {final.lanes[~finite].tolist()}: "
                f"{transfer.to_host(output.values).tolist()}"
            )
        return output, finite

    def _of_lanes(self, values: Tensor, lanes: Tensor) -> Tensor:
        """Return the values of some lanes, [k, ...], as one per lane, [num_envs, ...]: 0 for the others."""
        return values.new_zeros((self._num_envs, *values.shape[1:])).index_copy_(0, lanes, values)
