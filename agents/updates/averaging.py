"""The average of a policy's weights over its updates."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from diffusion_gym.models import sharding

_STEPS = "optimization_step"


class WeightAverage:
    """The exponential moving average of parameters, by diffusers' `EMAModel`.

        θ̄_1 = θ_1    θ̄_k = d_k·θ̄_{k−1} + (1 − d_k)·θ_k,  d_k = min(decay, k/(k + 9)),  after the k-th update

    so that a short run's average is not that of its first weights: until d_k reaches `decay` it spans about the last
    tenth of the updates. (`EMAModel` with update_after_step=0, min_decay=0 and use_ema_warmup=False.)

    Args:
        parameters: The parameters to average.
        decay: The largest d, in (0, 1).

    Attributes:
        is_applied: The parameters are the averaged ones at this moment.

    Raises:
        ValueError: `decay` is out of its range.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"ema_decay must be None or in (0, 1), got {decay}")
        self.is_applied = False
        self._parameters = parameters
        together = not any(map(sharding.is_shard, parameters))  # shards cannot be copied so
        self._ema = EMAModel(
            parameters, decay=decay, min_decay=0.0, update_after_step=0, use_ema_warmup=False, foreach=together
        )

    def update(self) -> None:
        """Take in the weights after an update.

        Raises:
            RuntimeError: the parameters are the averaged ones.
        """
        if self.is_applied:
            raise RuntimeError("the policy has its averaged weights: train outside of averaged_weights()")
        self._ema.step(self._parameters)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Give the parameters the averaged values within the block, and their own back after it."""
        if self.is_applied:
            raise RuntimeError("the policy has its averaged weights already")
        self._ema.store(self._parameters)
        self._ema.copy_to(self._parameters)
        self.is_applied = True
        try:
            yield
        finally:
            self._ema.restore(self._parameters)
            self.is_applied = False

    def save(self, file: Path) -> None:
        """Write the averages as safetensors, "<parameter>", with the number of updates in the header.

        All processes have to call it where the parameters are divided among them; the main one writes what is divided.
        """
        averages = sharding.whole_tensors({str(index): one for index, one in enumerate(self._ema.shadow_params)})
        tensors = {name: average.contiguous() for name, average in averages.items()}
        save_file(tensors, file, metadata={_STEPS: str(self._ema.optimization_step)})

    @torch.no_grad()
    def load(self, file: Path) -> None:
        """Read what `save` wrote."""
        with safe_open(file, framework="pt") as opened:
            self._ema.optimization_step = int(opened.metadata()[_STEPS])
            for index, average in enumerate(self._ema.shadow_params):
                average.copy_(sharding.like(average, opened.get_tensor(str(index))))
