"""Copies between host and device: to the device without waiting for it, and the one function that waits."""

import numpy as np
import torch
from torch import Tensor


def to_device(values: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """Return a copy of host values on the device, without waiting for what is under way there.

    A plain copy to a CUDA device waits until all work queued on it is done; one from pinned memory is queued behind
    that work. (On Apple's GPUs a copy that does not wait may read memory that has been freed meanwhile.)

    Args:
        values: An array, which is copied at once so that it may change afterwards; or a tensor that nobody will change,
            on the host or already there.
        device: The device to copy to.
    """
    tensor = torch.from_numpy(values.copy()) if isinstance(values, np.ndarray) else values
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type != "mps")


def to_host(tensor: Tensor) -> np.ndarray:
    """Return a tensor as a numpy array, bfloat16 as float32: the one function here that waits for the device.

    A tensor that is on the host shares its memory with the array. A number is `to_host(tensor).item()`. Call it as
    `transfer.to_host(…)`, so that a test which replaces it here sees every wait.

    Args:
        tensor: A tensor of any shape and dtype, on any device.
    """
    host = tensor.detach().cpu()
    return (host.float() if host.dtype == torch.bfloat16 else host).numpy()


def is_same_device(device: torch.device, other: torch.device) -> bool:
    """Return whether two devices are one: "cuda" is "cuda:0"."""
    return device.type == other.type and (device.index or 0) == (other.index or 0)
