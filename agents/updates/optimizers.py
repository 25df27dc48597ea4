"""The optimizers that algorithms can be told to use: AdamW, its 8-bit form, and Muon with AdamW."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def adamw_class(*, use_8bit_adam: bool) -> type[torch.optim.AdamW]:
    """Return torch's AdamW, or bitsandbytes' with 8-bit states.

    Raises:
        ImportError: bitsandbytes is missing.
    """
    if not use_8bit_adam:
        return torch.optim.AdamW
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ImportError("use_8bit_adam needs bitsandbytes: pip install bitsandbytes") from error
    return AdamW8bit


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for matrices and convolution kernels (as matrices [out, in·h·w]), AdamW for all other parameters.

    Muon orthogonalises the momentum, so that a step is as long in every direction of a weight matrix. A policy gradient
    is nearly all noise, and most of it lies in few directions, the inputs' mean above all; AdamW follows them further.
    Both are torch's own; Muon's steps are scaled to an RMS of 0.2·lr ("match_rms_adamw"), about that of AdamW's.

    Source: Jordan et al., 2024, https://kellerjordan.github.io/posts/muon; Liu et al., 2025,
    https://arxiv.org/abs/2502.16982 (the scale).

    Args:
        parameters: What is trained.
        lr: The learning rate of both.
        betas: AdamW's; the first is Muon's momentum too.
        weight_decay: Of both.
        eps: AdamW's ε.

    Raises:
        ImportError: torch is older than 2.9, and has no Muon.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        eps: float,
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise ImportError(f'optimizer="muon" needs torch 2.9 or later, this is {torch.__version__}')
        super().__init__(parameters, {"lr": lr})
        own = self.param_groups[0]["params"]
        self._matrices = {one: nn.Parameter(one.detach().flatten(1).clone()) for one in own if one.ndim >= 2}
        self._parts: list[tuple[torch.optim.Optimizer, list[int]]] = []
        if self._matrices:
            scale: dict[str, Any] = {"momentum": betas[0], "adjust_lr_fn": "match_rms_adamw"}
            muon = torch.optim.Muon(self._matrices.values(), lr=lr, weight_decay=weight_decay, **scale)
            self._parts.append((muon, [place for place, one in enumerate(own) if one.ndim >= 2]))
        if others := [one for one in own if one.ndim < 2]:
            adamw = torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
            self._parts.append((adamw, [place for place, one in enumerate(own) if one.ndim < 2]))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Apply the gradients of all parameters; those without one stay."""
        for parameter, matrix in self._matrices.items():
            matrix.copy_(parameter.flatten(1))
            matrix.grad = None if parameter.grad is None else parameter.grad.flatten(1)
        for part, _ in self._parts:
            part.param_groups[0]["lr"] = self.param_groups[0]["lr"]
            part.step()
        for parameter, matrix in self._matrices.items():
            parameter.copy_(matrix.view_as(parameter))
            matrix.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state of both, by the parameters' places."""
        parts = [(part.state_dict()["state"], places) for part, places in self._parts]
        groups = [{**self.param_groups[0], "params": list(range(len(self.param_groups[0]["params"])))}]
        return {
            "state": {places[k]: one for state, places in parts for k, one in state.items()},
            "param_groups": groups,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.param_groups[0]["lr"] = state_dict["param_groups"][0]["lr"]
        state = state_dict["state"]
        for part, places in self._parts:
            own = {k: state[place] for k, place in enumerate(places) if place in state}
            part.load_state_dict({**part.state_dict(), "state": own})
