"""Many processes that train one policy, launched by Hugging Face accelerate: each draws a share of every rollout.

Their number changes nothing but the speed. All sizes are those of all processes together. Small data (rewards, prompts,
the mask of steps) are gathered from all, in one order, so that every process computes the same advantages and the same
shuffles. Large data (latents, embeddings) stay in the process that drew them, which computes their gradients. Gradients
are summed before they are clipped.

Launched with `--use_fsdp` the processes also share one denoiser (`diffusion_gym.models.sharding`), which sums the
gradients of its shards itself. Each pass then needs all of them: they make the same number of passes, some of nothing.
"""

import logging
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import final

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn

from diffusion_gym import transfer
from diffusion_gym.models import sharding

from ..experience.rollouts import Rollout

_BUCKET = 2**24
_BESIDE_WORLD_SIZE = ("RANK", "MASTER_ADDR", "MASTER_PORT")
_PATIENCE = 20.0  # seconds until it is said that somebody is missing


def _launched() -> int:
    """Return the number of processes that a launcher started, this one included, by its environment variables."""
    size = os.environ.get("WORLD_SIZE") or "1"
    missing = [name for name in _BESIDE_WORLD_SIZE if not os.environ.get(name)]
    if not size.isdigit() or (size != "1" and missing):
        problem = f"{', '.join(missing)} are not set" if missing else "that is no number"
        raise RuntimeError(
            f"WORLD_SIZE={size} says that this process was launched with others, but {problem}: unset WORLD_SIZE to "
            "train alone, or launch with `accelerate launch --multi_gpu` or `torchrun`"
        )
    return int(size)


def _say_who_is_missing(launched: int) -> None:
    where = ":".join(os.environ[name] for name in _BESIDE_WORLD_SIZE[1:])
    logging.getLogger(__name__).warning(
        "still waiting at %s for all of the %d processes that WORLD_SIZE tells of; if none were launched with this "
        "one, unset WORLD_SIZE, %s",
        where,
        launched,
        ", ".join(_BESIDE_WORLD_SIZE),
    )


@final
class Processes:
    """This process among those that were launched together; alone, every method returns its argument.

    The first object that is made joins the group of the launcher (`accelerate launch`, `torchrun`), whose size is
    `WORLD_SIZE`. Every process has to call the methods, in the same order.

    Attributes:
        rank: The index of this process, from 0.
        count: The number of processes.
        device: The device that accelerate gave to this process; None alone.
        share_weights: They were launched with `--use_fsdp`: a denoiser's weights are divided among them.

    Raises:
        RuntimeError: `WORLD_SIZE` is no number, or there without what else a launcher sets; or accelerate does not see
            the processes that were launched.
        ValueError: options of `--use_fsdp` are not understood here.
    """

    share_weights: bool = False

    def __init__(self) -> None:
        self.rank, self.count = 0, 1
        self.share_weights = sharding.is_asked_for()
        self.device: torch.device | None = None
        launched = _launched()
        if launched == 1:
            return
        if self.share_weights:
            # transformers would leave the text encoders of all processes but the first without weights.
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        # accelerate itself would let the processes of a machine without a GPU train alone, each for itself.
        on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not (
            torch.cuda.is_available() or torch.xpu.is_available()
        )
        reminder = threading.Timer(_PATIENCE, _say_who_is_missing, [launched])
        reminder.daemon = True
        reminder.start()
        try:
            state = PartialState(cpu=on_cpu)
        finally:
            reminder.cancel()
        if state.num_processes != launched:
            raise RuntimeError(
                f"WORLD_SIZE is {launched}, but accelerate sees {state.num_processes} process: create Processes() "
                "before any other object of accelerate, or launch with `accelerate launch --multi_gpu`"
            )
        self.rank, self.count = state.process_index, state.num_processes
        self.device = torch.device("cpu") if state.device.type == "cpu" else state.device  # accelerate's is "cpu:0"

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes logs and files."""
        return self.rank == 0

    def share(self, total: int) -> range:
        """Return this process's share of `total` things: a contiguous range, about as long in every process."""
        return range(total * self.rank // self.count, total * (self.rank + 1) // self.count)

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.count > 1:
            dist.barrier()

    def gather(self, values: Tensor) -> Tensor:
        """Return the values of all processes, equal in shape, one after the other along the first dimension."""
        if self.count == 1:
            return values
        local_values = values.to(self.device).contiguous()
        parts = [torch.empty_like(local_values) for _ in range(self.count)]
        dist.all_gather(parts, local_values)
        return torch.cat(parts).to(values.device)

    def concatenate(self, values: Tensor) -> Tensor:
        """Return the values of all processes, [M]; their numbers may differ between processes."""
        if self.count == 1:
            return values
        sizes = self.gather(torch.tensor([len(values)])).tolist()
        rows = self.gather(F.pad(values, (0, max(sizes) - len(values)))[None])
        return torch.cat([row[:size] for row, size in zip(rows, sizes, strict=True)])

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over the processes, of the values' shape."""
        if self.count == 1:
            return values
        total = values.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(values.device)

    def sums(self, metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the sum over the processes of each scalar; all have the same names."""
        if self.count == 1:
            return dict(metrics)
        return dict(zip(metrics, self.sum(torch.stack([value.float() for value in metrics.values()])), strict=True))

    def from_main(self, value: int) -> int:
        """Return the main process's number."""
        return value if self.count == 1 else int(self.gather(torch.tensor([value]))[0])

    def totals(self, *values: int) -> tuple[int, ...]:
        """Return the sum over the processes of each number."""
        return values if self.count == 1 else tuple(self.sum(torch.tensor(values)).tolist())

    def most(self, value: int) -> int:
        """Return the largest of the processes' numbers."""
        return value if self.count == 1 else int(self.gather(torch.tensor([value])).max())

    def join(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give parameters the main process's values; those that are divided are one already.

        Raises:
            ValueError: they are not on the device that accelerate gave to this process.
        """
        if self.device is None or not parameters:
            return
        policy_device = parameters[0].device
        if not transfer.is_same_device(policy_device, self.device):
            raise ValueError(
                f"process {self.rank} is to compute on {self.device}, but its policy is on {policy_device}: make the "
                "environment with device=Processes().device"
            )
        for parameter in parameters:
            if not sharding.is_shard(parameter):
                dist.broadcast(parameter.data, src=0)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its sum over the processes; None where none of them has one.

        Those of divided parameters are sums already.
        """
        parameters = [parameter for parameter in parameters if not sharding.is_shard(parameter)]
        if self.count == 1 or not parameters:
            return
        bucket: list[nn.Parameter] = []
        for parameter in parameters:
            if bucket and sum(member.numel() for member in bucket) + parameter.numel() > _BUCKET:
                self._sum_bucket(bucket)
                bucket = []
            bucket.append(parameter)
        self._sum_bucket(bucket)

    def _sum_bucket(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace the gradients of some parameters by their sums, with one exchange between the processes."""
        has_gradient = torch.tensor(
            [float(weight.grad is not None) for weight in parameters], device=parameters[0].device
        )
        gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in parameters]
        flat = torch.cat([has_gradient, *(gradient.float().flatten() for gradient in gradients)])
        dist.all_reduce(flat)
        counts, *sums = flat.split([len(parameters), *(weight.numel() for weight in parameters)])
        for parameter, count, total in zip(parameters, counts.tolist(), sums, strict=True):
            parameter.grad = total.view_as(parameter).to(parameter.dtype) if count else None


def gathered(rollout: Rollout, processes: Processes) -> Rollout:
    """Return the rollout of all processes: small data of all, observations and actions of this process alone.

    Args:
        rollout: The rollout of this process; all drew as many episodes.
        processes: The processes.
    """
    if processes.count == 1:
        return rollout
    longest = int(processes.gather(torch.tensor([rollout.num_steps])).max())

    def on_the_host(values: np.ndarray) -> np.ndarray:
        return processes.gather(torch.from_numpy(values)).numpy()

    def time_major(values: Tensor) -> Tensor:
        return processes.gather(F.pad(values.T, (0, longest - rollout.num_steps))).T

    return replace(
        rollout,
        log_probs=time_major(rollout.log_probs),
        scored=time_major(torch.from_numpy(rollout.scored.astype(np.uint8))).numpy().astype(bool),
        lengths=on_the_host(rollout.lengths),
        returns=processes.gather(rollout.returns),
        valid=on_the_host(rollout.valid.astype(np.uint8)).astype(bool),
        prompt_id=on_the_host(rollout.prompt_id),
        extras={name: processes.gather(values) for name, values in rollout.extras.items()},
        ends=processes.gather(rollout.ends),
        # The first episodes are the main process's: others' images are needed only if it has too few.
        images=processes.gather(rollout.images) if len(rollout.images) == rollout.num_episodes else rollout.images,
        first_episode=processes.rank * rollout.num_episodes,
        are_passes_shared=processes.share_weights,
    )
