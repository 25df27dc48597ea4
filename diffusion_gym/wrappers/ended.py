"""Which lanes have ended: said on the host, so that no wrapper waits for the device."""

from collections.abc import Mapping
from typing import Any

import numpy as np


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
