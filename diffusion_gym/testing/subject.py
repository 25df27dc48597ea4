"""The environment that is checked, with what all checks of it need."""

from collections.abc import Callable
from typing import Any

from gymnasium.vector import VectorEnv

from ..envs.contract import TorchVectorEnv
from .data import Row, row_of
from .playing import Episode, Player, unlike
from .report import Findings

Run = list[list[Episode]]
"""The episodes of each lane."""

SEED, OTHER_SEED = 7, 1_234_567


class Subject:
    """A vector environment under check.

    Args:
        env: The environment.
        findings: The findings.
        twin: A function that makes another one like it, or None.
        max_steps: Actions within which an episode must end.

    Attributes:
        player: The player of the environment.
        contract: The environment below its wrappers, where its data are torch and it is a `TorchVectorEnv`.
        tolerance: The difference that the same episode may have in another batch: networks round differently.
        varies: Whether the seed decides the first observation.
    """

    def __init__(
        self, env: VectorEnv, findings: Findings, *, twin: Callable[[], VectorEnv] | None, max_steps: int
    ) -> None:
        self.env, self.findings, self.twin, self.max_steps = env, findings, twin, max_steps
        self.player = Player(env, max_steps=max_steps)
        self.contract: TorchVectorEnv | None = self.player.contract
        self.tolerance = 1e-5 if self.player.like is None else 1e-2
        self.varies = True

    @property
    def is_bare(self) -> bool:
        """Whether there is a spec, and nothing around the environment that the spec does not know."""
        return self.env.unwrapped is self.env and self.env.spec is not None

    def reset(self, **arguments: Any) -> tuple[Any, dict[str, Any]]:
        """Return what a reset returns, checked."""
        start = self.env.reset(**arguments)
        self.player.check_start(start)
        return start

    def rows(self, observation: Any) -> list[Row]:
        """Return a batch of observations as one row for each lane."""
        return [row_of(self.player.space, observation, lane) for lane in range(self.env.num_envs)]

    def first_rows(self, **arguments: Any) -> list[Row]:
        """Return the first observations after a reset, one row for each lane."""
        return self.rows(self.reset(**arguments)[0])

    def play(self, **arguments: Any) -> Run:
        """Return the episodes from a reset with the seed on; the arguments are those of `Player.play`."""
        return self.player.play(self.reset(seed=SEED), **arguments)

    def leave_open(self, name: str, what: str) -> None:
        """Note what Gymnasium leaves open, but a `TorchVectorEnv` promises.

        Raises:
            AssertionError: it is one.
        """
        if self.contract is not None:
            raise AssertionError(f"{name}: {what}")
        self.findings.weakness(name, what)


def first_difference(run: Run, expected: Run, what: str, *, tolerance: float = 0.0) -> AssertionError | None:
    """Return the error that says where two runs differ first, of any lane; None where they do not."""
    for lane, other in zip(run, expected, strict=True):
        for got, episode in zip(lane, other, strict=False):
            fault = unlike(got, episode, what, tolerance=tolerance)
            if fault is not None:
                return fault
    return None


def said(error: Exception) -> str:
    """Return an error's type, and the beginning of what it says."""
    return f"{type(error).__name__} ({error!s:.120})"
