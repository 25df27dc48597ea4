"""The check of a reward: that it is a function of each image and its prompt, and of nothing else."""

import json
import pickle
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import transfer
from ..rewards import Reward, RewardOutput, make_reward
from ..rewards.base import Metadata, RewardFunction, check_output
from .isolation import called, generator_states, moved_generators, unlike_tensors
from .report import Findings, Report, fault

_TOLERANCE = 1e-3
_PROMPTS = ("a cat", "a dog on a red background", "two houses", "a cat")


def check_reward(
    reward: str | Reward | RewardFunction | Mapping[str, float],
    *,
    prompts: Sequence[str] = _PROMPTS,
    metadata: Sequence[Metadata] | None = None,
    image_size: int = 64,
    device: str | torch.device = "cpu",
    strict: bool = False,
) -> Report:
    """Check that a reward keeps its contract, and report on what could not be checked.

    Its name, unit and range; one finite float32 number in that range for each image, on the images' device; the same
    numbers again, in another order, one image at a time, in another memory layout and from another thread. Neither its
    arguments nor what it returned before are changed. What it remembers (`state_dict`) is JSON, and gives back the same
    values. A weakness: it needs metadata, moves the global generators, carries a gradient, or cannot be pickled.

    Args:
        reward: What `make_reward` takes: a `Reward`, a function, a name.
        prompts: At least two prompts, of which one may stand there twice.
        metadata: One dict for each of them, where the reward needs it.
        image_size: Height and width of the images, noise of several scales, black and white.
        device: Their device.
        strict: Weaknesses, and what cannot be checked, are errors.

    Raises:
        AssertionError: the contract is broken; the message says where.
        ValueError, RuntimeError: `make_reward`'s: the reward is not to be had.
    """
    if len(prompts) < 2 or (metadata is not None and len(metadata) != len(prompts)):
        raise ValueError(f"give at least two prompts, and metadata for each; got {prompts!r:.80} and {metadata!r:.80}")
    try:
        ready = make_reward(reward)
    except TypeError as error:
        raise AssertionError(str(error)) from error
    check = _Check(ready, list(prompts), metadata, _images(len(prompts), image_size).to(device))
    check.run()
    return check.findings.report(strict=strict)


def _images(number: int, size: int) -> Tensor:
    """Return images [number, 3, size, size]: noise of several scales, a black and a white one."""
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(number, 3, size, size)
    for scale in (size, max(size // 4, 1), max(size // 16, 1)):
        noise = torch.rand(number, 3, scale, scale, generator=generator)
        images += F.interpolate(noise, size=(size, size)) / 3
    images[-2], images[-1] = 0.0, 1.0
    return images


class _Check:
    """One check of one reward; the arguments are those of `check_reward`, made ready."""

    def __init__(self, reward: Reward, prompts: list[str], metadata: Sequence[Metadata] | None, images: Tensor) -> None:
        self.reward, self.prompts, self.images = reward, prompts, images
        self.metadata: list[Metadata] = [dict(entry) for entry in metadata or [{} for _ in prompts]]
        self.findings = Findings(f"reward {reward.name!r} ({type(reward).__name__}) on {images.device}")
        self.state = reward.state_dict()

    def run(self) -> None:
        """Make all checks."""
        with self.findings.checking("name, unit, range"):
            pass  # make_reward has checked them
        with self.findings.checking("one finite float32 number in the range for each image, on its device"):
            states = moved_generators()
            first = self._values()
            self._check_values(first)
        with self.findings.checking("it leaves the global generators alone"):
            if generator_states() != states:
                what = "it draws from or seeds a generator that others draw from"
                self.findings.weakness("it leaves the global generators alone", what)
        kept = first.clone()
        with self.findings.checking("the same batch has the same rewards"):
            self._require(self._values(), kept, 0.0, "the same batch must have the same rewards")
        with self.findings.checking("the order and the memory layout do not matter"):
            flipped = self._values(list(reversed(range(len(self.prompts)))))
            if not torch.equal(first, kept):
                raise fault("was changed by a later call: return a copy, not a buffer", key="values")
            self._require(flipped.flip(0), kept, _TOLERANCE, "an image's reward must not depend on its place")
            strided = self._of(self.images.to(memory_format=torch.channels_last), self.prompts, self.metadata).values
            self._require(strided, kept, _TOLERANCE, "an image's reward must not depend on its memory layout")
        with self.findings.checking("an image's reward does not depend on the others"):
            self._check_one_by_one(kept)
        with self.findings.checking("it works in another thread"), ThreadPoolExecutor(1) as executor:
            self._require(executor.submit(self._values).result(), kept, _TOLERANCE, "another thread must do the same")
        with self.findings.checking("it needs no metadata"):
            self._check_without_metadata()
        with self.findings.checking("it carries no gradient"):
            if first.requires_grad:
                what = "values.requires_grad: freeze its networks, or compute under torch.no_grad()"
                self.findings.weakness("it carries no gradient", what)
        with self.findings.checking("its memory is JSON"):
            self._check_state()
        with self.findings.checking("it can be pickled"):
            self._check_pickling(kept)

    def _of(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> RewardOutput:
        """Return the checked output, with the reward's memory as it was before the check."""
        if self.state:
            self.reward.load_state_dict(self.state)
        output = called("reward", self.reward, images=images, prompts=prompts, metadata=metadata)
        try:
            return check_output(self.reward, output, images)
        except ValueError as error:
            raise AssertionError(str(error)) from error

    def _values(self, rows: list[int] | None = None) -> Tensor:
        rows = list(range(len(self.prompts))) if rows is None else rows
        metadata: list[Metadata] = [self.metadata[row] for row in rows]
        return self._of(self.images[rows], [self.prompts[row] for row in rows], metadata).values

    def _check_values(self, values: Tensor) -> None:
        if values.dtype != torch.float32:
            raise fault(f"must be float32, got {values.dtype}: return values.float()", key="values")
        numbers = transfer.to_host(values)
        low, high = self.reward.range
        slack = 1e-5 * max(1.0, *(abs(bound) for bound in (low, high) if abs(bound) < float("inf")), 0.0)
        for image, number in enumerate(numbers.tolist()):
            if not low - slack <= number <= high + slack:
                what = f"must be finite and in its range {(low, high)}, got {number} for {self.prompts[image]!r}"
                raise fault(what, key=f"values[{image}]")
        if max(map(abs, numbers.tolist())) == float("inf"):
            raise fault(f"must be finite, got {numbers.tolist()}", key="values")

    def _require(self, got: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
        found = unlike_tensors(got, expected, tolerance)
        if found:
            raise fault(f"{what}: {found}", key="values")

    def _check_one_by_one(self, expected: Tensor) -> None:
        name = "an image's reward does not depend on the others"
        if self.state:
            return self.findings.cannot(name, "it learns from batches, so that it does")
        for row in range(len(self.prompts)):
            what = f"image {row} must have the same reward alone as in a batch of {len(self.prompts)}"
            self._require(self._values([row]), expected[row : row + 1], _TOLERANCE, what)
        return None

    def _check_without_metadata(self) -> None:
        try:
            self.reward(self.images, self.prompts)
        except Exception as error:
            what = f"without metadata it raises {type(error).__name__} ({error!s:.120})"
            self.findings.weakness("it needs no metadata", what)

    def _check_state(self) -> None:
        state = self.reward.state_dict()
        try:
            again = json.loads(json.dumps(state))
        except TypeError as error:
            raise fault(f"must be what JSON can hold: {error}", key="state_dict()") from error
        if again != state:
            raise fault(f"is {state!r:.80}, and {again!r:.80} once it was written as JSON", key="state_dict()")
        self.reward.load_state_dict(again)
        if self.reward.state_dict() != state:
            raise fault("must give back what state_dict() returned", key="load_state_dict")

    def _check_pickling(self, expected: Tensor) -> None:
        try:
            copied = pickle.loads(pickle.dumps(self.reward))
        except Exception as error:
            what = f"it raises {type(error).__name__} ({error!s:.120})"
            return self.findings.weakness("it can be pickled", what)
        if self.state:
            copied.load_state_dict(self.state)
        values = copied(self.images, self.prompts, self.metadata).values
        self._require(values, expected, _TOLERANCE, "a pickled copy must do the same")
        return None
