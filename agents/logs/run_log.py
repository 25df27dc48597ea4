"""The log of a run, in a folder of its own, which a resumed run goes on with."""

import re
import secrets
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final, get_args

from stable_baselines3.common.logger import HumanOutputFormat, KVWriter, Logger, TensorBoardOutputFormat
from stable_baselines3.common.utils import get_latest_run_id

from diffusion_gym.checks import checked_integer
from diffusion_gym.parts import Part

LogXAxis = Literal["timesteps", "reward_queries"]

_IDENTITY_FILE = "run_identity"


@final
@dataclass(frozen=True, kw_only=True)
class Log(Part):
    """The settings of the log: images beside the scalars, and the x-axis.

    Args:
        images: Images of each logged rollout in TensorBoard, at most 256 pixels wide each; 0: none.
        x_axis: TensorBoard's x-axis: environment steps, as in SB3, or images rewarded so far, by which
            algorithms of different step counts compare.

    Raises:
        ValueError: a value is none of those.
    """

    images: int = 16
    x_axis: LogXAxis = "timesteps"

    def __post_init__(self) -> None:
        checked_integer("images", self.images, at_least=0)
        if self.x_axis not in get_args(LogXAxis):
            raise ValueError(f"x_axis must be one of {get_args(LogXAxis)}, got {self.x_axis!r}")


def new_identity() -> str:
    """Return a random identity, by which a run is told from all others."""
    return secrets.token_hex(8)


@final
class RunLogger(Logger):
    """SB3's logger with another x-axis: callbacks that dump it pass the number of environment steps.

    Args:
        folder: The folder of TensorBoard's files; None: there are none.
        printed: Print a table.
        x: A function that returns the run's place on the x-axis; None: the step that `dump` is given.
    """

    def __init__(self, folder: Path | None, *, printed: bool, x: Callable[[], int] | None = None) -> None:
        outputs: list[KVWriter] = [HumanOutputFormat(sys.stdout)] if printed else []
        if folder is not None:
            outputs.append(TensorBoardOutputFormat(str(folder)))
        super().__init__(None if folder is None else str(folder), outputs)
        self._x = x
        if folder is not None:
            self.log(f"Logging to {folder}")

    def dump(self, step: int = 0) -> None:
        """Write what was recorded."""
        super().dump(step if self._x is None else self._x())


def own_folder(root: Path | str, identity: str, *, name: str, given: bool) -> Path:
    """Return the log folder of a run: the one that it has, or a new one, `name_1`, `name_2` ….

    Args:
        root: The folder of all runs' logs.
        identity: The run's identity, which its folder has in a file.
        name: The name of a new folder, before its number.
        given: The user chose the name: a folder of the run with another name is then another log.
    """
    root = Path(root)
    for file in root.glob(f"*/{_IDENTITY_FILE}"):
        folder = file.parent
        is_named_so = not given or folder.name == name or re.sub(r"_\d+$", "", folder.name) == name
        if file.read_text() == identity and is_named_so:
            return folder
    while True:
        folder = root / f"{name}_{get_latest_run_id(str(root), name) + 1}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:  # another run took the number in the meantime
            continue
        (folder / _IDENTITY_FILE).write_text(identity)
        return folder
