"""From a loss to new weights: accumulated, checked, clipped, summed over processes, applied and averaged."""

from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor, nn

from diffusion_gym.models import sharding

from .averaging import WeightAverage
from .distributed import Processes
from .guard import GradientGuard
from .optimizers import Optimizer


@final
class Updates:
    """The updates of a run: `backward(loss)` as often as it takes, then `apply()`.

    Args:
        parameters: The parameters to train.
        part: The optimizer that the algorithm was given.
        learning_rate: A function that returns the learning rate of the next update, before it is warmed up.
        processes: The processes that train together.
        scale_losses: The arithmetic is in fp16, where small gradients vanish unless the loss is scaled up.
        where: A function that returns the place in the training, for errors.

    Attributes:
        optimizer: The torch optimizer. Its `register_step_pre_hook` shows gradients as they are applied.
        guard: Counts the updates that were left out.
        average: The average of the weights; None: there is none.
        num_updates: Optimizer steps so far.

    Raises:
        ValueError: the parameters are divided among processes, and cannot be trained so.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        part: Optimizer,
        *,
        learning_rate: Callable[[], float],
        processes: Processes,
        scale_losses: bool,
        where: Callable[[], str],
    ) -> None:
        self._where = where
        self.part = part
        self.num_updates = 0
        self._steps = self._applied = 0
        self._learning_rate = learning_rate
        self._processes = processes
        _check_shards(parameters, part, scale_losses=scale_losses)
        self.optimizer = part.make(parameters, self.learning_rate)
        self.optimizer.register_step_post_hook(self._count_step)
        device = parameters[0].device
        self.guard = GradientGuard(device, on_nonfinite=part.on_nonfinite, scale_losses=scale_losses)
        self.average = None if part.ema_decay is None else WeightAverage(parameters, part.ema_decay)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next update."""
        return self.part.warmed(self._learning_rate(), self.num_updates)

    def backward(self, loss: Tensor) -> None:
        """Accumulate a loss's gradient; it replaces `loss.backward()`."""
        self.guard.backward(loss)

    def apply(self) -> Tensor:
        """Apply the gradient that all processes accumulated if it is finite; return its norm before clipping.

        Raises:
            FloatingPointError: it is not finite, and the optimizer's `on_nonfinite` is "raise".
        """
        parameters = self.optimizer.param_groups[0]["params"]
        self._processes.sum_gradients(parameters)
        self.guard.agree(self._processes)
        self.guard.unscale(self.optimizer)
        max_norm = self.part.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(parameters, float("inf") if max_norm is None else max_norm)
        norm = norm.full_tensor() if sharding.is_shard(norm) else norm
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        if self.guard.step(self.optimizer, norm, where=f"{self._where()}, after {self.num_updates} updates"):
            self._applied += 1
            self.num_updates += 1
            if self.average is not None:
                self.average.update()
        return norm

    def clear(self) -> None:
        """Forget the gradient that was accumulated."""
        self.guard.clear(self.optimizer)

    @property
    def num_steps_around(self) -> int:
        """The number of steps of the optimizer that were made without `apply`."""
        return self._steps - self._applied

    def _count_step(self, *_: object) -> None:
        self._steps += 1


def _check_shards(parameters: Sequence[nn.Parameter], part: Optimizer, *, scale_losses: bool) -> None:
    """Raise ValueError if parameters are divided among processes and this cannot be done with shards."""
    are_shards = {sharding.is_shard(parameter) for parameter in parameters}
    if True not in are_shards:
        return
    if False in are_shards:
        raise ValueError(
            "the policy trains weights beside a denoiser that is divided among the processes: give it a LoRA "
            "adaptation, whose layers are whole too, or launch without --use_fsdp"
        )
    if not part.takes_shards:
        raise ValueError(
            f"{part} needs whole weights, and all of the denoiser's are divided among the processes here: give "
            "AdamW(), or train LoRA layers, which are whole"
        )
    if scale_losses:
        raise ValueError(
            'the scale of losses in "fp16" would differ between processes that share the trained weights: give '
            'precision="bf16", or train LoRA layers, which are whole'
        )
