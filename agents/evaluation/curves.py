"""The curves of a run's own log: scalars from TensorBoard's events or from SB3's progress.csv."""

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Curves = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""name -> ([N] positions on the x-axis, [N] values)."""

_X = "time/reward_queries"


def read_curves(folder: Path) -> Curves:
    """Return the scalars of the newest log in a folder, over the images rewarded so far; empty: there is no log."""
    logs = sorted([*folder.rglob("events.out.tfevents.*"), *folder.rglob("progress.csv")], key=_age)
    if not logs:
        return {}
    return _from_csv(logs[-1]) if logs[-1].suffix == ".csv" else _from_events(logs[-1])


def _age(file: Path) -> float:
    return file.stat().st_mtime


def _from_events(file: Path) -> Curves:
    log = EventAccumulator(str(file), size_guidance={"scalars": 0})
    log.Reload()
    names = log.Tags()["scalars"]
    queries = {event.step: event.value for event in log.Scalars(_X)} if _X in names else {}
    curves = {}
    for name in names:
        points = [(queries.get(event.step, event.step), event.value) for event in log.Scalars(name)]
        curves[name] = (np.array([x for x, _ in points]), np.array([y for _, y in points]))
    return curves


def _from_csv(file: Path) -> Curves:
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    curves = {}
    for name in rows[0] if rows else ():
        points = [(float(row.get(_X) or number), float(row[name])) for number, row in enumerate(rows) if row[name]]
        curves[name] = (np.array([x for x, _ in points]), np.array([y for _, y in points]))
    return curves
