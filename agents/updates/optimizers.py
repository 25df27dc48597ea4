"""The optimizers that algorithms can be given: AdamW, its 8-bit form, and Muon with AdamW."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, final, get_args

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffusion_gym.checks import checked_integer, checked_number
from diffusion_gym.parts import Part
from diffusion_gym.precision import has_fast_bf16

OnNonfinite = Literal["raise", "skip"]


@dataclass(frozen=True, kw_only=True)
class Optimizer(Part, ABC):
    """The rule by which a gradient changes the weights; the learning rate is the algorithm's.

    Args:
        weight_decay: The weight decay of all weights.
        betas: AdamW's β₁ and β₂; the first is Muon's momentum too.
        epsilon: AdamW's ε.
        warmup_updates: The number n of first updates, which have 1/n, 2/n … of the learning rate, for Adam knows little
            then of the gradient's size.
        max_grad_norm: The gradient is clipped to this norm; None: not at all.
        on_nonfinite: The consequence of a loss or gradient that is NaN or infinite, before it touches the weights:
            "raise", or "skip" with a warning, counted as `train/skipped_updates`. With a policy in fp16, gradients that
            overflow because of the loss scale are no such case: torch's `GradScaler` skips them and halves the scale
            (`train/overflowed_updates`).
        ema_decay: Keep an average of the trained weights over the updates, see `WeightAverage`; None: none.

    Raises:
        TypeError, ValueError: a number is out of its range.
    """

    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    warmup_updates: int = 0
    max_grad_norm: float | None = 1.0
    on_nonfinite: OnNonfinite = "raise"
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        checked_number("weight_decay", self.weight_decay, "[0, inf)")
        if not isinstance(self.betas, tuple) or len(self.betas) != 2:
            raise TypeError(f"betas must be two numbers, (0.9, 0.999); got {self.betas!r}")
        for beta in self.betas:
            checked_number("betas", beta, "[0, 1)")
        checked_number("epsilon", self.epsilon, "(0, inf)")
        checked_integer("warmup_updates", self.warmup_updates, at_least=0)
        if self.max_grad_norm is not None:
            checked_number("max_grad_norm", self.max_grad_norm, "(0, inf)")
        if self.on_nonfinite not in get_args(OnNonfinite):
            raise ValueError(f"on_nonfinite must be one of {get_args(OnNonfinite)}, got {self.on_nonfinite!r}")
        if self.ema_decay is not None:
            checked_number("ema_decay", self.ema_decay, "(0, 1)")

    @abstractmethod
    def make(self, parameters: Iterable[Tensor], learning_rate: float) -> torch.optim.Optimizer:
        """Return torch's optimizer of some parameters."""

    @property
    def takes_shards(self) -> bool:
        """Whether weights may be divided among processes: each number's step depends on its own gradient alone."""
        return True

    def warmed(self, learning_rate: float, num_updates: int) -> float:
        """Return the learning rate of the update that follows `num_updates` others."""
        return min(1.0, (num_updates + 1) / max(1, self.warmup_updates)) * learning_rate


@final
@dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """AdamW, as all the published codes have it.

    Source: Loshchilov & Hutter, 2019, https://arxiv.org/abs/1711.05101.

    Args are those of `Optimizer`, and:
        eight_bit: bitsandbytes' AdamW with 8-bit states (needs a GPU and `pip install bitsandbytes`).
    """

    eight_bit: bool = False

    def make(self, parameters: Iterable[Tensor], learning_rate: float) -> torch.optim.Optimizer:
        """Return torch's AdamW, or bitsandbytes'.

        Raises:
            ImportError: bitsandbytes is missing.
        """
        kind: type[torch.optim.AdamW] = torch.optim.AdamW
        if self.eight_bit:
            try:
                from bitsandbytes.optim import AdamW8bit
            except ImportError as error:
                raise ImportError("AdamW(eight_bit=True) needs bitsandbytes: pip install bitsandbytes") from error
            kind = AdamW8bit
        return kind(parameters, lr=learning_rate, betas=self.betas, weight_decay=self.weight_decay, eps=self.epsilon)

    @property
    def takes_shards(self) -> bool:
        """With states in 32 bits; bitsandbytes knows no shards."""
        return not self.eight_bit


@final
@dataclass(frozen=True, kw_only=True)
class Muon(Optimizer):
    """Muon for matrices and convolution kernels, AdamW for all other weights: see `MuonWithAdamW`.

    Its steps follow the gradient's noise less far than AdamW's; the learning rates of the two compare only roughly.

    Args are those of `Optimizer`.
    """

    def make(self, parameters: Iterable[Tensor], learning_rate: float) -> torch.optim.Optimizer:
        """Return the optimizer.

        Raises:
            ValueError: all weights are Muon's, and AdamW's numbers have no effect.
        """
        weights = list(parameters)
        if all(weight.ndim >= 2 for weight in weights):
            for name, value, default in (("betas[1]", self.betas[1], 0.999), ("epsilon", self.epsilon, 1e-8)):
                if value != default:
                    raise ValueError(
                        f"{name}={value!r} has no effect: it needs a weight that is no matrix, for Muon takes all of "
                        "these"
                    )
        return MuonWithAdamW(
            weights, lr=learning_rate, betas=self.betas, weight_decay=self.weight_decay, eps=self.epsilon
        )

    @property
    def takes_shards(self) -> bool:
        """No: it orthogonalises whole matrices."""
        return False


class _InFloat32(TorchFunctionMode):
    """The context in which a copy to bfloat16 is one in float32."""

    def __torch_function__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        return args[0].to(torch.float32, copy=True) if func is Tensor.bfloat16 else func(*args, **(kwargs or {}))


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for matrices and convolution kernels (as matrices [out, in·h·w]), AdamW for all other parameters.

    Muon orthogonalises the momentum, so that a step is as long in every direction of a weight matrix. A policy gradient
    is nearly all noise, and most of it lies in few directions, the inputs' mean above all; AdamW follows them further.
    Both are torch's own; Muon's steps are scaled to an RMS of 0.2·lr ("match_rms_adamw"), about that of AdamW's. torch
    orthogonalises in bfloat16; where a processor has no instructions for it, it is done in float32 here.

    Source: Jordan et al., 2024, https://kellerjordan.github.io/posts/muon; Liu et al., 2025,
    https://arxiv.org/abs/2502.16982 (the scale).

    Args:
        parameters: The parameters to train.
        lr: The learning rate of both.
        betas: AdamW's β₁ and β₂; the first is Muon's momentum too.
        weight_decay: The weight decay of both.
        eps: AdamW's ε.
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
        super().__init__(parameters, {"lr": lr})
        weights = self.param_groups[0]["params"]
        self._matrices = {
            weight: nn.Parameter(weight.detach().flatten(1).clone()) for weight in weights if weight.ndim >= 2
        }
        self._parts: list[tuple[torch.optim.Optimizer, list[int]]] = []
        if self._matrices:
            scale: dict[str, Any] = {"momentum": betas[0], "adjust_lr_fn": "match_rms_adamw"}
            muon = torch.optim.Muon(self._matrices.values(), lr=lr, weight_decay=weight_decay, **scale)
            self._parts.append((muon, [index for index, weight in enumerate(weights) if weight.ndim >= 2]))
        if others := [weight for weight in weights if weight.ndim < 2]:
            adamw = torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
            self._parts.append((adamw, [index for index, weight in enumerate(weights) if weight.ndim < 2]))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Apply the gradients of all parameters; those without one stay."""
        for parameter, matrix in self._matrices.items():
            matrix.copy_(parameter.flatten(1))
            matrix.grad = None if parameter.grad is None else parameter.grad.flatten(1)
        device = self.param_groups[0]["params"][0].device
        with contextlib.nullcontext() if has_fast_bf16(device) else _InFloat32():
            for part, _ in self._parts:
                part.param_groups[0]["lr"] = self.param_groups[0]["lr"]
                part.step()
        for parameter, matrix in self._matrices.items():
            parameter.copy_(matrix.view_as(parameter))
            matrix.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state of both optimizers, by the parameters' indices."""
        parts = [(part.state_dict()["state"], places) for part, places in self._parts]
        groups = [{**self.param_groups[0], "params": list(range(len(self.param_groups[0]["params"])))}]
        return {
            "state": {places[number]: values for state, places in parts for number, values in state.items()},
            "param_groups": groups,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.param_groups[0]["lr"] = state_dict["param_groups"][0]["lr"]
        state = state_dict["state"]
        for part, places in self._parts:
            part_state = {number: state[place] for number, place in enumerate(places) if place in state}
            part.load_state_dict({**part.state_dict(), "state": part_state})
