"""The files of a saved run: its policy, its log and its settings."""

import json
from pathlib import Path
from typing import Any

from ..policies import DenoisingPolicy, load_policy
from ..runs.manifest import find_checkpoints, whole_checkpoint
from ..runs.saving import STATE_FILE
from .curves import Curves, read_curves


def policy_folder(run: Path) -> Path:
    """Return the folder of a run's policy: the run itself, its newest whole checkpoint, or its `model/`.

    Raises:
        FileNotFoundError: it is in none of them.
    """
    for folder in (run, run / "model"):
        if find_checkpoints(folder):
            return whole_checkpoint(folder)
        if (folder / "policy.json").is_file():
            return folder
    raise FileNotFoundError(
        f"{run} has no saved policy: expected policy.json in it or in its model/, or checkpoints (iteration_…) in it"
    )


def load_denoiser(folder: Path, device: str) -> DenoisingPolicy:
    """Return the policy of a folder.

    Raises:
        ValueError: it is no `DenoisingPolicy`.
    """
    policy = load_policy(folder, device=device)
    if not policy.moves_latents:
        raise ValueError(
            f"{folder} holds a {type(policy).__name__}: only a DenoisingPolicy has a model to compare with"
        )
    return policy  # type: ignore[return-value]


def training_state(folder: Path) -> dict[str, Any]:
    """Return the training state that was saved beside the policy; empty where only the policy was saved."""
    file = folder / STATE_FILE
    return json.loads(file.read_text()) if file.is_file() else {}


def find_curves(run: Path) -> Curves:
    """Return the scalars of the newest log in the run's folder, or beside it where the run is a `model/`."""
    return read_curves(run) or (read_curves(run.parent) if run.name == "model" else {})
