"""Folders that are written whole or not at all, and optimizers without pickle."""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from diffusion_gym.models import sharding

from ..updates.updates import Updates
from .manifest import top_level_names

_OPTIMIZER_FILE = "optimizer.safetensors"
_AVERAGE_FILE = "averaged_weights.safetensors"
_PREVIOUS = ".previous"
_PARTIAL = ".partial"
_OF_EACH_WEIGHT = ("exp_avg", "exp_avg_sq", "momentum_buffer")
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
_NO_FOLDER_SYNC = (*_NO_SYNC, errno.EACCES, errno.EPERM, errno.EBADF, errno.EISDIR)


def _sync(path: Path) -> None:
    """Make a file or folder durable on the disk, where that can be asked for.

    Windows opens no folders, and some network and FUSE disks know no sync: nothing can be made durable sooner there,
    and files are as whole as elsewhere. All other errors are those of a disk that did not write.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in (_NO_FOLDER_SYNC if path.is_dir() else _NO_SYNC):
            raise


@contextlib.contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to write into; it takes the place of `path` when the block ends without an error.

    A crash, a full disk or a kill in between leaves what was at `path` whole: there, or (between the two renames)
    beside it under a name that `existing_folder` knows. Files and folders at `path` that its manifest does not list are
    somebody else's: they stay.

    Raises:
        FileExistsError: there is a file at `path`.
        OSError: the disk refused, in the block too: safetensors has an error of its own for that.
    """
    if path.is_file():
        raise FileExistsError(f"{path} is a file, and what is saved becomes a folder: give another path")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, previous = path.with_name(path.name + _PARTIAL), path.with_name(path.name + _PREVIOUS)
    _finish_replacement(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for written in [*partial.rglob("*"), partial]:
            _sync(written)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, SafetensorError) and (code := re.search(r"(?:os error |code: )(\d+)", str(error))):
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
        raise
    if path.exists():
        path.rename(previous)
    partial.rename(path)
    _sync(path.parent)
    _finish_replacement(path)


def _finish_replacement(path: Path) -> None:
    """Finish a replacement that was interrupted.

    Where nothing is at `path`, the previous folder comes back; otherwise only the files in it that are somebody else's
    do, and the rest is removed.
    """
    previous = path.with_name(path.name + _PREVIOUS)
    if not previous.exists():
        return
    if not path.exists():
        previous.rename(path)
        return
    written = top_level_names(previous)
    for entry in previous.iterdir():
        if entry.name not in written and not (path / entry.name).exists():
            entry.rename(path / entry.name)
    shutil.rmtree(previous, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder; a kill in between leaves it under the name of one that is not whole."""
    partial = path.with_name(path.name + _PARTIAL)
    path.rename(partial)
    shutil.rmtree(partial)


def clear_leftovers(folder: Path, prefix: str) -> None:
    """Remove the leftovers of killed calls of `replaced_folder` and `remove_folder`, whose names have a prefix."""
    for partial in folder.glob(f"{prefix}*{_PARTIAL}"):
        shutil.rmtree(partial)
    for previous in folder.glob(f"{prefix}*{_PREVIOUS}"):
        _finish_replacement(previous.with_name(previous.name.removesuffix(_PREVIOUS)))


def existing_folder(path: Path) -> Path:
    """Return the folder that `replaced_folder` wrote at `path`.

    Raises:
        FileNotFoundError: nothing was ever written there.
    """
    for candidate in (path, path.with_name(path.name + _PREVIOUS)):
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(f"there is no saved run at {path}")


def save_optimizer(optimizer: torch.optim.Optimizer, file: Path) -> None:
    """Write an optimizer's state as safetensors: "<parameter>.<name>", with the group settings in the header.

    All processes have to call it where the state is divided among them; the main one writes what is divided.
    """
    state = optimizer.state_dict()
    tensors = {
        f"{parameter}.{name}": torch.as_tensor(value)
        for parameter, values in state["state"].items()
        for name, value in values.items()
    }
    tensors = {name: value.contiguous() for name, value in sharding.whole_tensors(tensors).items()}
    save_file(tensors, file, metadata={"param_groups": json.dumps(state["param_groups"])})


def load_optimizer(optimizer: torch.optim.Optimizer, file: Path) -> None:
    """Read what `save_optimizer` wrote.

    Raises:
        ValueError: it is the state of other weights.
    """
    with safe_open(file, framework="pt") as opened:
        groups = json.loads(opened.metadata()["param_groups"])
    state: dict[int, dict[str, Any]] = {}
    for key, value in load_file(file).items():
        parameter, _, name = key.partition(".")
        state.setdefault(int(parameter), {})[name] = value
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    count = sum(len(group["params"]) for group in groups)
    if count != len(weights) or any(
        name in _OF_EACH_WEIGHT and value.numel() != weights[index].numel()
        for index, values in state.items()
        for name, value in values.items()
    ):
        raise ValueError(
            f"{file} is the state of other weights ({count}) than those that are trained ({len(weights)}): give the "
            "run's load a policy that trains the same ones"
        )
    for index, values in state.items():
        for name in values.keys() & set(_OF_EACH_WEIGHT):
            values[name] = sharding.like(weights[index], values[name])
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def save_updates(updates: Updates, folder: Path) -> None:
    """Write the optimizer's state, and the averaged weights where they are kept."""
    save_optimizer(updates.optimizer, folder / _OPTIMIZER_FILE)
    if updates.average is not None:
        updates.average.save(folder / _AVERAGE_FILE)


def load_updates(updates: Updates, folder: Path, state: Mapping[str, Any]) -> None:
    """Take back what `save_updates` wrote, and the counts in a run's state: `guard` and `num_updates`."""
    load_optimizer(updates.optimizer, folder / _OPTIMIZER_FILE)
    if updates.average is not None:
        updates.average.load(folder / _AVERAGE_FILE)
    updates.guard.load_state_dict(state["guard"])
    updates.num_updates = state["num_updates"]
