"""Resets of some lanes, lanes that rest, and closing."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium.error import ClosedEnvironmentError
from gymnasium.vector import AutoresetMode

from .data import Row, difference, is_equal, on_host
from .report import fault
from .subject import SEED, Subject, said

_FIRST_SEED, _MASKED_SEED = 3, 99


def check_partial_reset(subject: Subject, name: str) -> None:
    """Check that a reset of lane 0 starts it, and leaves the others and their random numbers alone."""
    lanes = subject.env.num_envs
    if lanes == 1:
        return subject.findings.cannot(name, "it has one lane")
    must_hold = subject.contract is not None or subject.player.mode is AutoresetMode.DISABLED
    seeded = subject.first_rows(seed=_MASKED_SEED)[0]
    before, expected = _two_starts(subject, None)
    options = {"reset_mask": np.arange(lanes) == 0}
    try:
        after, later = _two_starts(subject, options)
    except Exception as error:
        if must_hold:
            raise
        return subject.findings.weakness(name, f'options={{"reset_mask": …}} raises {said(error)}')
    for lane in range(lanes):
        what = "a reset of lane 0 must leave the others" if lane else "must be reset, with its seed"
        tolerance = 0.0 if lane else subject.tolerance
        found = difference(after[lane], before[lane] if lane else seeded, tolerance=tolerance)
        if found:
            ignored = fault(f"{what}: {found[1]}", step=0, lane=lane, key=found[0])
            if must_hold:
                raise ignored
            return subject.findings.weakness(name, f'options={{"reset_mask": …}} is not followed: {ignored}')
    for lane in range(1, lanes):
        found = difference(later[lane], expected[lane])
        if found:
            what = f"lane {lane} draws another episode after a reset of lane 0: {found[0]}: {found[1]}"
            return subject.leave_open("a reset of some lanes leaves the others' streams", what)
    if "reset_mask" not in options:
        subject.leave_open("the caller's options are left alone", "reset takes reset_mask out of them")
    if subject.contract is not None:
        again, _ = _two_starts(subject, {"reset_mask": torch.arange(lanes) == 0})
        if not is_equal(again[0], after[0]):
            raise fault("torch and numpy masks must do the same", step=0, lane=0)
    return _check_while_playing(subject, name, must_hold=must_hold)


def _two_starts(subject: Subject, options: dict[str, Any] | None) -> tuple[list[Row], list[Row]]:
    """Return the first observations after a reset, of some lanes where there are options; and those of the next."""
    rows = subject.first_rows(seed=_FIRST_SEED)
    if options is not None:
        rows = subject.first_rows(seed=_MASKED_SEED, options=options)
    return rows, subject.first_rows()


def _check_while_playing(subject: Subject, name: str, *, must_hold: bool) -> None:
    """Check that lanes which are in an episode go on as if lane 0 had not been reset beside them."""
    lanes, runs = subject.env.num_envs, []
    for is_reset in (False, True):
        subject.reset(seed=_FIRST_SEED)
        places = [[(lane, 0, step, 0) for lane in range(lanes)] for step in range(2)]
        _, _, terminated, truncated, _ = subject.env.step(subject.player.actions(places[0]))
        if (on_host(terminated) | on_host(truncated)).any():
            return None
        if is_reset:
            subject.reset(options={"reset_mask": np.arange(lanes) == 0})
        observation, reward, *_ = subject.env.step(subject.player.actions(places[1]))
        rewards = on_host(reward)
        runs.append([row | {"reward": rewards[lane]} for lane, row in enumerate(subject.rows(observation))])
    for lane in range(1, lanes):
        found = difference(runs[1][lane], runs[0][lane], tolerance=subject.tolerance)
        if found:
            error = fault(f"must not feel a reset of lane 0: {found[1]}", step=2, lane=lane, key=found[0])
            if must_hold:
                raise error
            return subject.findings.weakness(name, str(error))
    return None


def check_rest(subject: Subject) -> None:
    """Check that in DISABLED a lane that ended rests while others go on."""
    lanes = subject.env.num_envs
    subject.reset(seed=5)
    ended, step, observation = np.zeros(lanes, dtype=bool), 0, None
    while not ended.any() and step < subject.max_steps:
        if step == 1:  # lane 0 is a step behind the others
            subject.reset(options={"reset_mask": np.arange(lanes) == 0})
        action = subject.player.actions([(lane, 0, step, 0) for lane in range(lanes)])
        observation, _, terminated, truncated, _ = subject.env.step(action)
        ended, step = on_host(terminated) | on_host(truncated), step + 1
    if ended.all():
        return
    before = subject.rows(observation)
    action = subject.player.actions([(lane, 1, 0, 0) for lane in range(lanes)])
    rested, reward, still, *_ = subject.env.step(action)
    for lane in np.flatnonzero(ended).tolist():
        found = difference(subject.rows(rested)[lane], before[lane])
        if found:
            raise fault(f"a lane that ended must rest: {found[1]}", step=step + 1, lane=lane, key=found[0])
        if not on_host(still)[lane] or on_host(reward)[lane] != 0:
            what = "a lane that ended must stay ended and earn nothing until it is reset"
            raise fault(what, step=step + 1, lane=lane)


def check_closing(subject: Subject, name: str) -> None:
    """Check that closing twice is harmless, and that a closed environment is not used."""
    env = subject.env
    subject.reset(seed=SEED)
    action = subject.player.actions([(lane, 0, 0, 0) for lane in range(env.num_envs)])
    env.close()
    env.close()
    if not env.closed:
        return subject.leave_open(name, "env.closed is not True after close()")
    calls: dict[str, Callable[[], object]] = {"reset": env.reset, "step": lambda: env.step(action)}
    for called, call in calls.items():
        does = "does not raise"
        try:
            call()
        except ClosedEnvironmentError:
            continue
        except Exception as error:
            does = f"raises {said(error)}, not"
        return subject.leave_open(name, f"{called} after close() {does} ClosedEnvironmentError")
    return None
