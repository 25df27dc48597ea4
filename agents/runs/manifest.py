"""Manifests, which tell whether a checkpoint is whole: lists of its files, with their sizes and hashes."""

import hashlib
import json
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MANIFEST_FILE = "manifest.json"
CHECKPOINT_PREFIX = "iteration_"

_BLOCK = 1 << 20
_HASHED_TOGETHER = 4
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)


def checkpoint_name(iteration: int) -> str:
    """Return the name of an iteration's checkpoint in a folder of checkpoints."""
    return f"{CHECKPOINT_PREFIX}{iteration:08d}"


def iteration_of(checkpoint: Path) -> int:
    """Return the iteration in a checkpoint's name, −1 if there is none."""
    match = re.fullmatch(rf"{CHECKPOINT_PREFIX}(\d+)", checkpoint.name)
    return int(match[1]) if match else -1


def find_checkpoints(folder: Path) -> list[Path]:
    """Return a folder's checkpoints, whole or not, the oldest first; none if there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if path.is_dir() and iteration_of(path) >= 0), key=iteration_of)


def write_manifest(folder: Path) -> None:
    """Write the sizes and SHA-256 hashes of all files of a checkpoint."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    with ThreadPoolExecutor(_HASHED_TOGETHER) as pool:  # hashing large blocks lets other threads run
        hashes = pool.map(_sha256, paths)
        files = {
            path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256}
            for path, sha256 in zip(paths, hashes, strict=True)
        }
    (folder / MANIFEST_FILE).write_text(json.dumps({"files": files}, indent=2))


def _read_manifest(folder: Path) -> list[tuple[str, int, str]]:
    """Return the name, size and SHA-256 hash of each file; raises one of `_UNREADABLE`."""
    files = json.loads((folder / MANIFEST_FILE).read_bytes())["files"]
    return [(str(name), int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()]


def top_level_names(folder: Path) -> set[str]:
    """Return the names at the top of a folder that its manifest lists, and the manifest's; none without a manifest."""
    try:
        return {MANIFEST_FILE, *(name.partition("/")[0] for name, _, _ in _read_manifest(folder))}
    except _UNREADABLE:
        return set()


def find_damage(folder: Path, *, hashes: bool = True) -> str | None:
    """Return the damage of a checkpoint in words, by its manifest; None if it is whole.

    Args:
        folder: The checkpoint.
        hashes: Check the files' contents too, and not their sizes alone.
    """
    try:
        expected = _read_manifest(folder)
    except FileNotFoundError:
        return f"it has no {MANIFEST_FILE}"
    except _UNREADABLE as error:
        return f"its {MANIFEST_FILE} cannot be read ({type(error).__name__}: {error})"
    for name, size, sha256 in expected:
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        try:
            if hashes and _sha256(file) != sha256:
                return f"the content of {name} is not what was written (its SHA-256 differs)"
        except OSError as error:
            return f"{name} cannot be read ({error})"
    return None


def whole_checkpoint(path: Path) -> Path:
    """Return a whole checkpoint: the path itself, or the newest whole one in it, with a warning for newer ones.

    Args:
        path: A checkpoint, or a folder of checkpoints.

    Raises:
        ValueError: the checkpoint is damaged, or all in the folder are.
        FileNotFoundError: the folder is neither.
    """
    checkpoints = find_checkpoints(path)
    if not checkpoints or (path / MANIFEST_FILE).exists():
        if not any(path.iterdir()):
            raise FileNotFoundError(f"there is no saved run at {path}: the folder is empty")
        damage = find_damage(path)
        if damage is not None:
            raise ValueError(f"{path} is not a whole checkpoint: {damage}; load an earlier one")
        return path
    damages: dict[Path, str] = {}
    for checkpoint in reversed(checkpoints):
        damage = find_damage(checkpoint)
        if damage is None:
            for damaged, reason in damages.items():
                warnings.warn(f"{damaged} is damaged: {reason}. Going on from {checkpoint}", stacklevel=3)
            return checkpoint
        damages[checkpoint] = damage
    listed = "".join(f"\n  {checkpoint.name}: {damage}" for checkpoint, damage in damages.items())
    raise ValueError(f"none of the {len(checkpoints)} checkpoints in {path} is whole:{listed}")


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
