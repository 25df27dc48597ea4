"""The guard between a loss and the optimizer: fp16's loss scale, and the treatment of numbers that are not finite."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffusion_gym import transfer

from .distributed import Processes
from .optimizers import OnNonfinite


class GradientGuard:
    """Lets an update through to the weights if its losses and its gradient are finite.

    With fp16 the loss is scaled up (torch's `GradScaler`), and a gradient that overflows for that reason is normal: the
    update is left out and the scale halved. Below a scale of 1 it is not the scale that makes the gradient overflow.

    Args:
        device: The device of the losses.
        on_nonfinite: The consequence of a loss or gradient that is NaN or infinite: "raise", or "skip" with a warning.
        scale_losses: The arithmetic is in fp16.

    Attributes:
        num_skipped: Updates that "skip" has left out.
        num_overflows: Updates that fp16's loss scale has left out.
    """

    def __init__(self, device: torch.device, *, on_nonfinite: OnNonfinite, scale_losses: bool) -> None:
        self.on_nonfinite = on_nonfinite
        self.scaler = torch.amp.GradScaler(device.type, enabled=scale_losses)
        self.scaler.scale(torch.zeros((), device=device))  # a process that has no loss needs the scale too
        self.num_skipped = self.num_overflows = 0
        self._losses_are_finite = torch.ones((), dtype=torch.bool, device=device)

    def backward(self, loss: Tensor) -> None:
        """Accumulate a loss's gradient, scaled."""
        self._losses_are_finite = self._losses_are_finite & torch.isfinite(loss.detach())
        self.scaler.scale(loss).backward()

    def agree(self, processes: Processes) -> None:
        """Count a loss that is not finite in any of the processes."""
        if processes.count > 1:
            self._losses_are_finite = processes.sum((~self._losses_are_finite).float()) == 0

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the scale out of the accumulated gradient; needed once before each `step`."""
        self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer, norm: Tensor, *, where: str) -> bool:
        """Make an optimizer's step if all is finite, and clear its gradient; return whether it was made.

        Args:
            optimizer: The optimizer, whose gradient was accumulated.
            norm: The norm of its gradient.
            where: The place in the training, for the message.

        Raises:
            FloatingPointError: a loss or the gradient is not finite, and `on_nonfinite` is "raise".
        """
        sound_losses, sound_gradient = transfer.to_host(
            torch.stack([self._losses_are_finite, torch.isfinite(norm)])
        ).tolist()
        overflow = not sound_gradient and self.scaler.is_enabled() and self.scaler.get_scale() >= 1
        if sound_losses and sound_gradient:
            self.scaler.step(optimizer)
        self.scaler.update()
        self.clear(optimizer)
        if not sound_losses or not (sound_gradient or overflow):
            self._leave_out("gradient" if sound_losses else "loss", where)
        elif overflow:
            self.num_overflows += 1
        return sound_losses and sound_gradient

    def clear(self, optimizer: torch.optim.Optimizer) -> None:
        """Forget the gradient that was accumulated, and its losses."""
        optimizer.zero_grad(set_to_none=True)
        self._losses_are_finite = torch.ones_like(self._losses_are_finite)

    def _leave_out(self, culprit: str, where: str) -> None:
        message = (
            f"the {culprit} of an update was NaN or infinite ({where}); the weights are as they were before it. Try a "
            'lower learning_rate, a smaller clip_range or clip of advantages, or a precision other than "fp16"'
        )
        if self.on_nonfinite == "raise":
            raise FloatingPointError(f'{message}; optimizer=AdamW(on_nonfinite="skip") leaves such updates out')
        self.num_skipped += 1
        warnings.warn(message, stacklevel=4)

    def counts(self) -> dict[str, Tensor]:
        """Return the numbers of updates left out so far, as scalars to log; only those that can be above 0."""
        counts = {"skipped_updates": self.num_skipped} if self.on_nonfinite == "skip" else {}
        if self.scaler.is_enabled():
            counts["overflowed_updates"] = self.num_overflows
        return {name: torch.tensor(float(count)) for name, count in counts.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the counts and the loss scale, as JSON can hold them."""
        return {"skipped": self.num_skipped, "overflows": self.num_overflows, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned; the scale only if both runs have one."""
        self.num_skipped, self.num_overflows = state["skipped"], state["overflows"]
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
