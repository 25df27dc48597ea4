"""Saving and loading of a learner from data, as safetensors and JSON."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_gym.parts import Part, made

from .files import existing_folder, load_updates, replaced_folder, save_updates
from .manifest import whole_checkpoint, write_manifest
from .saving import STATE_FILE

if TYPE_CHECKING:
    from ..training.learner import Learner

_NETWORK = "network"


def save_learner(learner: "Learner", path: str | Path) -> None:
    """Write a learner's weights, and all else that is needed to go on, into a folder; its data are given again.

    The folder takes the place of an earlier one only when it is whole. The main process alone writes.

    Raises:
        FileExistsError: there is a file at `path`.
        OSError: the disk is full, or the like; an earlier checkpoint at `path` is still there.
        RuntimeError: the network has its averaged weights.
    """
    updates = learner.updates
    if updates.average is not None and updates.average.is_applied:
        raise RuntimeError("within averaged_weights() the run cannot be saved: save_pipeline writes these weights")
    if not learner.processes.is_main:
        return
    with replaced_folder(Path(path)) as folder:
        for name, network in {_NETWORK: learner.network, **learner.networks()}.items():
            (folder / name).mkdir()
            learner.adaptation.save(network, folder / name, model=learner.model)
        save_updates(updates, folder)
        state = {
            "learner": type(learner).__name__,
            "hyperparameters": learner.hyperparameters(),
            "seed": learner.run_seed,
            "log_identity": learner.log_identity,
            "num_timesteps": learner.num_timesteps,
            "iteration": learner.iteration,
            "num_updates": learner.num_updates,
            "guard": updates.guard.state_dict(),
            "callbacks": learner.callback_states,
        }
        (folder / STATE_FILE).write_text(json.dumps(state, indent=2))
        write_manifest(folder)


def saved_keywords(
    cls: "type[Learner]", path: str | Path, learning_rate: float | Callable[[float], float] | None
) -> dict[str, Any]:
    """Return the keywords with which a saved learner was made, but for its model and its data.

    Args:
        cls: The learner's class.
        path: What `save_learner` was given; or a folder of checkpoints, of which the newest whole one is taken.
        learning_rate: The one that takes the saved one's place; needed where it was a function.

    Raises:
        FileNotFoundError: there is no saved run.
        ValueError: it is damaged, one of another learner, or its learning rate is missing.
    """
    folder = whole_checkpoint(existing_folder(Path(path)))
    state = json.loads((folder / STATE_FILE).read_text())
    if state.get("learner") != cls.__name__:
        raise ValueError(f"{folder} is a run of {state.get('learner', 'an algorithm')}, not of {cls.__name__}")
    saved = {
        name: made(value, Part) if isinstance(value, Mapping) else value
        for name, value in state["hyperparameters"].items()
    }
    if learning_rate is not None:
        saved["learning_rate"] = learning_rate
    if "learning_rate" not in saved:
        raise ValueError(f"the learning rate of {folder} was a function: give it again, load(…, learning_rate=…)")
    return {**saved, "seed": state["seed"]}


def restore_learner(learner: "Learner", path: str | Path) -> None:
    """Take back the weights, the optimizer and the counts of a saved learner with the same keywords.

    Raises:
        ValueError: they are those of another network.
    """
    folder = whole_checkpoint(existing_folder(Path(path)))
    state = json.loads((folder / STATE_FILE).read_text())
    for name, network in {_NETWORK: learner.network, **learner.networks()}.items():
        learner.adaptation.load(network, folder / name, model=learner.model, trained_on=learner.model.source)
    load_updates(learner.updates, folder, state)
    learner.num_timesteps, learner.iteration = state["num_timesteps"], state["iteration"]
    learner.callback_states, learner.log_identity = state["callbacks"], state["log_identity"]
