"""Which lanes a reset is of, and which have ended: known on the host, so that no wrapper waits for the device."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..envs.lanes import lanes_to_reset


def lanes_of_reset(options: Mapping[str, Any] | None, num_envs: int) -> np.ndarray:
    """Return the mask of the lanes that a reset with these options is of, [num_envs] bool.

    Raises:
        TypeError, ValueError: `options["reset_mask"]` is no such mask.
    """
    return lanes_to_reset(options, num_envs=num_envs)


def ended_lanes(info: Mapping[str, Any]) -> np.ndarray:
    """Return `info["ended"]`, [num_envs] bool.

    Raises:
        ValueError: the environment does not say it.
    """
    ended = info.get("ended")
    if not isinstance(ended, np.ndarray):
        raise ValueError(
            'info must have "ended", a numpy array [num_envs] bool that says which lanes are over: the environments of '
            "this package have it, and so has any NumPy environment behind diffusion_gym.wrappers.NumpyToTorch; got "
            f"info with {sorted(info)}"
        )
    return ended
