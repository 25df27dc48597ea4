"""A network whose weights are divided among the processes that were launched together: torch's FSDP, version 2.

`shard` leaves an ordinary module whose parameters are shards (DTensors): it is copied, adapted, saved and loaded like
any other, and parameters that several modules have in common are divided once. Only a pass needs whole layers: `runner`
is the module's counterpart that gathers each of them, and frees it again; it has the very same shards.

Nothing of this is imported, and no function but `is_asked_for` and `is_shard` called, where one process works alone.

Source: Zhao et al., 2023, https://arxiv.org/abs/2304.11277; torch.distributed.fsdp.fully_shard.
"""

import copy
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_REFUSED = {
    "FSDP_VERSION": ("2", "--fsdp_version 2"),
    "FSDP_RESHARD_AFTER_FORWARD": ("true", "--fsdp_reshard_after_forward true"),
    "FSDP_OFFLOAD_PARAMS": ("false", "--fsdp_offload_params false"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false", "DenoisingPolicy(gradient_checkpointing=True)"),
}


def is_asked_for() -> bool:
    """Return whether this process was launched with others to share weights: `accelerate launch --use_fsdp`.

    Raises:
        ValueError: it was launched with options of accelerate's that are not understood here.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true" or os.environ.get("WORLD_SIZE", "1") in ("", "1"):
        return False
    for name, (allowed, cure) in _REFUSED.items():
        value = os.environ.get(name, allowed).lower()
        if value != allowed:
            raise ValueError(
                f"{name} must be {allowed!r} to divide weights among processes, got {value!r}: give {cure}"
            )
    return True


def is_shard(tensor: object) -> "TypeGuard[DTensor]":
    """Return whether a tensor is divided among the processes."""
    if not dist.is_available() or not dist.is_initialized():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def shard(network: nn.Module, device: torch.device) -> None:
    """Replace a network's parameters, which are whole in every process, by their shards; buffers stay whole.

    Each parameter is divided along its first dimension, as `fully_shard` does.

    Args:
        network: The network, on the CPU: only shares go to the device.
        device: The device of the shards.

    Raises:
        RuntimeError: the processes have not met.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    if not dist.is_initialized():
        raise RuntimeError(
            "the denoiser's weights are to be divided among the processes that --use_fsdp launched, and these have not "
            "met: create agents.Processes() first, and the model on its device"
        )
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    shards: dict[int, nn.Parameter] = {}  # modules may have a weight in common
    for module in network.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
        for name, whole in module._parameters.items():
            if whole is None:
                continue
            if id(whole) not in shards:
                part = _part_of(whole.detach(), device)
                shape, stride = whole.shape, whole.stride()
                divided = DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
                shards[id(whole)] = nn.Parameter(divided, requires_grad=whole.requires_grad)
            module._parameters[name] = shards[id(whole)]


def _part_of(whole: Tensor, device: torch.device) -> Tensor:
    """Return a copy of this process's share of the rows, some or none, on a device."""
    parts, rank = whole.chunk(dist.get_world_size()), dist.get_rank()
    return (parts[rank] if rank < len(parts) else whole[:0]).to(device, copy=True).contiguous()


def runner(network: nn.Module) -> nn.Module:
    """Return the counterpart of a divided network that can be called.

    Every process has to make the same passes in the same order. The layers that are gathered as one are those that
    diffusers names `_no_split_modules`; what is in none of them is gathered at the beginning of a pass. Gradients are
    summed over the processes, and stand in the shards' `grad`. Parameters that are whole (LoRA's) are used as they are.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    shards = {id(weight): weight for weight in network.parameters() if is_shard(weight)}
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    counterpart = copy.deepcopy(network, shared | {key: _without_memory(weight) for key, weight in shards.items()})
    mesh = next(iter(shards.values())).device_mesh
    ignored = {weight for weight in counterpart.parameters() if not weight.is_meta}
    units = {module for module in counterpart.modules() if type(module).__name__ in _unit_names(network)}
    for module in reversed(list(counterpart.modules())):  # the innermost first
        if module in units or module is counterpart:
            fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)
            assert isinstance(module, FSDPModule)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    counterpart.load_state_dict(network.state_dict(keep_vars=True), assign=True)
    return counterpart


def _without_memory(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(
        torch.empty(weight.shape, dtype=weight.dtype, device="meta"), requires_grad=weight.requires_grad
    )


def _unit_names(network: nn.Module) -> Iterable[str]:
    return network._no_split_modules or ()  # type: ignore[return-value]


def whole_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the whole values of tensors: of divided ones on the CPU of the main process, and left out in the others.

    All processes have to call it where some are divided.
    """
    values = {}
    for name, tensor in tensors.items():
        if not is_shard(tensor):
            values[name] = tensor
            continue
        value = tensor.full_tensor().detach()
        if dist.get_rank() == 0:
            values[name] = value.cpu()
    return values


def whole_network(network: nn.Module) -> nn.Module | None:
    """Return a network with whole weights: itself, or of a divided one a copy, on the CPU of the main process.

    All processes have to call it for a divided one; in the others it is None.
    """
    parameters = dict(network.named_parameters())
    if not any(map(is_shard, parameters.values())):
        return network
    values = whole_tensors(parameters)
    if len(values) < len(parameters):
        return None
    memo = {id(parameters[name]): nn.Parameter(value, requires_grad=False) for name, value in values.items()}
    return copy.deepcopy(network, memo)


def like(tensor: Tensor, values: Tensor) -> Tensor:
    """Return whole values divided as another tensor of their shape is, if it is; every process has them."""
    if not is_shard(tensor):
        return values
    from torch.distributed.tensor import DTensor

    part = _part_of(values, tensor.to_local().device)
    return DTensor.from_local(
        part, tensor.device_mesh, tensor.placements, run_check=False, shape=values.shape, stride=values.stride()
    )


def load_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Read whole weights into a network, divided or not; `weights` has all of its state."""
    state = network.state_dict()
    network.load_state_dict({name: like(state[name], values) for name, values in weights.items()})
