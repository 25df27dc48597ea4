"""The report of many trials: leaderboards as text, and one HTML page with its charts and images."""

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from ..evaluation.charts import COLOURS, data_uri
from .charts import curves_chart, front_chart, named, profile_chart
from .score import Standing, Trial, standings


def tasks_of(trials: Sequence[Trial]) -> list[str]:
    """Return the tasks that trials are of, in the order in which they come."""
    return list(dict.fromkeys(trial.run["task"]["name"] for trial in trials))


def leaderboard(trials: Sequence[Trial]) -> str:
    """Return the leaderboards of all tasks as Markdown."""
    parts = []
    for task in tasks_of(trials):
        parts += [f"### {task}", "", "| algorithm | seeds | score, % | interval | queries to it | at any price, % |"]
        parts += ["|---|---|---|---|---|---|"]
        for one in standings(trials, task):
            mark = " (!)" if one.problems else ""
            parts.append(
                f"| {one.algorithm}{mark} | {len(one.trials)} | {one.score.mean:+.1f} | {one.score.low:+.1f} … "
                f"{one.score.high:+.1f} | {one.queries:,.0f} | {one.unconstrained.mean:+.1f} |"
            )
        parts += [""]
    return "\n".join(parts)


def write_report(trials: Sequence[Trial]) -> str:
    """Return the page as HTML."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    filters: dict[str, Callable[..., str]] = {
        "named": named,
        "signed": lambda value, digits=1: f"{value:+.{digits}f}".replace("-", "−"),
        "number": lambda value: "–" if value != value else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}",
    }
    environment.filters |= filters
    template = environment.from_string((files(__package__) / "report.html").read_text(encoding="utf-8"))
    return template.render(
        protocol=max(trial.run["protocol"] for trial in trials),
        sections=[_section(trials, task) for task in tasks_of(trials)],
        versions=sorted({json.dumps(trial.run["versions"], sort_keys=True) for trial in trials}),
        machines=sorted({f"Python {trial.run['python']}, {trial.run['machine']}" for trial in trials}),
    )


def _section(trials: Sequence[Trial], task: str) -> Mapping[str, Any]:
    board = standings(trials, task)
    description = board[0].trials[0].run["task"]
    colours = {one.algorithm: COLOURS[index % len(COLOURS)] for index, one in enumerate(board)}
    return {
        "task": description,
        "unit": board[0].trials[0].run["unit"],
        "board": board,
        "colours": colours,
        "curves": curves_chart(board, colours),
        "front": front_chart(board, colours),
        "profile": profile_chart(board, colours) if len(board[0].trials) > 1 else None,
        "galleries": [gallery for one in board if (gallery := _gallery(one)) is not None],
    }


def _gallery(standing: Standing) -> Mapping[str, Any] | None:
    """Return images of the first seed before the training, where it scored and at its end; None: there are none."""
    trial = standing.trials[0]
    queries = trial.curve["queries"].astype(int)
    shown = {"pretrained": 0, f"scored, {queries[trial.best]:,} queries": trial.best, "end": len(queries) - 1}
    rows = []
    for label, index in shown.items():
        file = trial.folder / f"images_{queries[index]}.png"
        if file.exists():
            caption = f"{trial.gains[index]:+.1f} %, held-out {trial.curve['held_out_change'][index]:+.3f}"
            rows.append({"label": label, "picture": data_uri(file.read_bytes(), "image/png"), "caption": caption})
    return {"algorithm": standing.algorithm, "rows": rows} if rows else None
