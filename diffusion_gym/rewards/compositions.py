"""Rewards made of another reward: `Threshold`, `Timed`, `Cached` and `Retry`; `normalised` has one more."""

import hashlib
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import final

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from .. import transfer
from ..checks import checked_integer, checked_number
from .base import Metadata, Reward, RewardFunction, RewardOutput, as_json, check_output, checked_output
from .names import make_reward

logger = logging.getLogger(__name__)

_LONGEST_WAIT = 60.0


class RewardWrapper(Reward):
    """A reward made of another one, whose memory is saved with it.

    Args:
        reward: The other reward, or a source of one for `make_reward`.
    """

    def __init__(self, reward: str | Reward | RewardFunction | Mapping[str, float]) -> None:
        self.reward = make_reward(reward)
        self.name, self.unit, self.range = self.reward.name, self.reward.unit, self.reward.range

    @override
    def state_dict(self) -> dict[str, object]:
        return self.reward.state_dict()

    @override
    def load_state_dict(self, state: Mapping[str, object]) -> None:
        self.reward.load_state_dict(state)


@final
class Threshold(RewardWrapper):
    """1 where the other reward is at least `at`, otherwise 0; the other one's values are reported as an extra.

    Raises:
        ValueError: `at` is no finite number.
    """

    def __init__(self, reward: str | Reward | RewardFunction | Mapping[str, float], at: float) -> None:
        super().__init__(reward)
        self.at = checked_number("the threshold `at`", at)
        self.name = f"{self.reward.name}_from_{at:g}"
        self.unit = "1"
        self.range = (0.0, 1.0)

    @override
    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None
    ) -> RewardOutput:
        output = checked_output(self.reward, images, prompts, metadata)
        reached = (output.values >= self.at).float().masked_fill(output.values.isnan(), float("nan"))
        return RewardOutput(reached, {**output.extras, self.reward.name: output.values})


@final
class Timed(RewardWrapper):
    """The other reward, timed: the extra `<name>_seconds` is the seconds per image of the call.

    The clock stops when the values are on the host, so that a GPU's work counts.

    Attributes:
        seconds: The seconds of all calls.
        num_images: The images of all calls.
    """

    def __init__(self, reward: str | Reward | RewardFunction | Mapping[str, float]) -> None:
        super().__init__(reward)
        self.seconds = 0.0
        self.num_images = 0

    @override
    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None
    ) -> RewardOutput:
        began = time.perf_counter()
        output = checked_output(self.reward, images, prompts, metadata)
        transfer.to_host(output.values)
        seconds = time.perf_counter() - began
        self.seconds += seconds
        self.num_images += len(images)
        each = torch.full_like(output.values, seconds / len(images), dtype=torch.float32, requires_grad=False)
        return RewardOutput(output.values, {**output.extras, f"{self.name}_seconds": each})


@final
class Cached(RewardWrapper):
    """The other reward, asked once for the same picture, prompt and metadata: for evaluations that repeat themselves.

    For a reward that is a function of these three alone, and costs more than a hash of the picture. Without gradients.

    Args:
        reward: The other reward, which remembers nothing.
        size: The most results that are kept; the one that was not asked for longest is dropped first.

    Attributes:
        hits: The images whose reward was remembered.
        misses: The images whose reward was computed.

    Raises:
        ValueError: `size` is not positive, or the reward's values depend on those before (`Normalised`, learning).
    """

    def __init__(self, reward: str | Reward | RewardFunction | Mapping[str, float], *, size: int = 10_000) -> None:
        super().__init__(reward)
        if self.reward.state_dict():
            raise ValueError(f"{self.name} remembers what it saw: cache the reward within it instead")
        self.size = checked_integer("size", size, at_least=1)
        self.hits = self.misses = 0
        self._results: OrderedDict[bytes, tuple[float, dict[str, float]]] = OrderedDict()

    @torch.no_grad()
    @override
    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None
    ) -> RewardOutput:
        keys = self._keys(images, prompts, metadata)
        results = {key: self._results[key] for key in keys if key in self._results}
        first_index = {key: index for index, key in reversed(list(enumerate(keys))) if key not in results}
        missing = sorted(first_index.values())
        self.hits += len(keys) - len(missing)
        self.misses += len(missing)
        if missing:
            missing_metadata = None if metadata is None else [metadata[index] for index in missing]
            output = checked_output(
                self.reward, images[missing], [prompts[index] for index in missing], missing_metadata
            )
            columns = {name: transfer.to_host(extra).tolist() for name, extra in output.extras.items()}
            values = transfer.to_host(output.values).tolist()
            for row, (index, value) in enumerate(zip(missing, values, strict=True)):
                results[keys[index]] = value, {name: column[row] for name, column in columns.items()}
        for key in keys:
            self._results[key] = results[key]
            self._results.move_to_end(key)
        while len(self._results) > self.size:
            self._results.popitem(last=False)
        device, rows = images.device, [results[key] for key in keys]
        as_tensor = partial(torch.tensor, dtype=torch.float32, device=device)
        extras = {name: as_tensor([row[1][name] for row in rows]) for name in rows[0][1]}
        return RewardOutput(as_tensor([row[0] for row in rows]), extras)

    @staticmethod
    def _keys(images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] | None) -> list[bytes]:
        """Return a hash of each image, its prompt and its metadata."""
        pixels = transfer.to_host(images)
        keys = []
        for index, prompt in enumerate(prompts):
            entry = None if metadata is None else dict(metadata[index])
            content = [prompt, entry, list(images.shape[1:]), str(images.dtype)]
            texts = json.dumps(content, sort_keys=True, default=as_json)
            keys.append(hashlib.sha256(texts.encode() + b"\0" + pixels[index].tobytes()).digest())
        return keys


@final
class Retry(RewardWrapper):
    """The other reward, asked again where it fails: for one that needs a network, a service, a queue.

    A batch that raises is asked for again as a whole; where values are NaN or infinite, only their images are; after
    `backoff`, 2·backoff, 4·backoff … seconds, at most 60, with a warning in the log. After the last try the error is
    raised, or the values are returned as they are, for the environment to judge. (A server's `RemoteReward` tries again
    by itself.)

    Args:
        reward: The other reward, which remembers nothing.
        tries: The most calls, the first one included.
        backoff: The seconds before the second try.
        errors: The errors that are worth another try; all others are raised at once.

    Attributes:
        num_retries: The second and later calls so far.

    Raises:
        ValueError: an argument is out of its range, or the reward's values depend on those before (`Normalised`,
            learning).
    """

    def __init__(
        self,
        reward: str | Reward | RewardFunction | Mapping[str, float],
        *,
        tries: int = 4,
        backoff: float = 1.0,
        errors: tuple[type[Exception], ...] = (Exception,),
    ) -> None:
        super().__init__(reward)
        if self.reward.state_dict():
            raise ValueError(f"{self.name} remembers what it saw: retry the reward within it instead")
        self.tries = checked_integer("tries", tries, at_least=1)
        self.backoff = checked_number("backoff", backoff, "[0, inf)")
        self.errors = errors
        self.num_retries = 0

    @override
    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None
    ) -> RewardOutput:
        output: RewardOutput | None = None
        rows = list(range(len(images)))  # those without a finite value yet
        for attempt in range(1, self.tries + 1):
            part_images = images if output is None else images[rows]
            part_metadata = None if metadata is None else [metadata[row] for row in rows]
            try:
                answer = self.reward(part_images, [prompts[row] for row in rows], part_metadata)
            except self.errors as error:
                if attempt == self.tries:
                    raise
                reason = f"{type(error).__name__}: {error}"
            else:
                part = check_output(self.reward, answer, part_images)
                output = part if output is None else _replaced(output, part, rows)
                rows = np.flatnonzero(~transfer.to_host(torch.isfinite(output.values))).tolist()
                if not rows or attempt == self.tries:
                    break
                reason = f"NaN or infinity for {len(rows)} of {len(images)} images"
            wait = min(self.backoff * 2 ** (attempt - 1), _LONGEST_WAIT)
            logger.warning(
                "the reward %s, try %d of %d: %s; again in %g s", self.name, attempt, self.tries, reason, wait
            )
            self.num_retries += 1
            time.sleep(wait)
        assert output is not None
        return output


def _replaced(output: RewardOutput, part: RewardOutput, rows: Sequence[int]) -> RewardOutput:
    """Return a batch's output in which some rows are replaced by those of a part.

    Raises:
        ValueError: the part has other extras.
    """
    if part.extras.keys() != output.extras.keys():
        raise ValueError(f"a reward must always report the same extras, got {[*output.extras]} and {[*part.extras]}")
    index = torch.tensor(rows, device=output.values.device)
    extras = {name: values.index_copy(0, index, part.extras[name]) for name, values in output.extras.items()}
    return RewardOutput(output.values.index_copy(0, index, part.values), extras)
