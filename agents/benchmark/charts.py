"""The charts of the report, as SVG in data URIs: lines differ by dashes too, so that they can be told in grey."""

import itertools
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from ..evaluation.charts import STYLE, as_svg
from .score import Standing, interquartile_mean, profile

_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))


def _lines(board: Sequence[Standing]) -> "itertools.cycle[object]":
    return itertools.cycle(_DASHES)


def curves_chart(board: Sequence[Standing], colours: Mapping[str, str]) -> str:
    """Return the gain over reward queries and over seconds, and beside it the held-out reward over queries."""
    task = board[0].trials[0].run["task"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11.5, 4.2), layout="constrained")
        axes = figure.subplots(1, 3)
        for one, dash in zip(board, _lines(board), strict=False):
            length = min(len(trial.curve["queries"]) for trial in one.trials)
            queries = one.trials[0].curve["queries"][:length]
            gains = np.stack([trial.gains[:length] for trial in one.trials])
            changes = np.stack([trial.curve["held_out_change"][:length] for trial in one.trials])
            seconds = np.stack([trial.curve["cpu_seconds"][:length] for trial in one.trials]).mean(0)
            style = {"color": colours[one.algorithm], "ls": dash, "lw": 1.8}
            for ax, x, y in ((axes[0], queries, gains), (axes[1], seconds, gains), (axes[2], queries, changes)):
                ax.plot(x, interquartile_mean(y, axis=0), label=one.algorithm, **style)
                if len(y) > 1:
                    ax.fill_between(x, y.min(0), y.max(0), color=colours[one.algorithm], alpha=0.08, lw=0)
        axes[0].set(xlabel="reward queries", title=f"gain in {named(task['reward'])}, %")
        axes[1].set(xlabel="CPU seconds of training", title=f"gain in {named(task['reward'])}, %")
        axes[2].set(xlabel="reward queries", title=f"change of {named(task['held_out'])} (held out)")
        axes[2].axhline(-task["tolerance"], color="#b23326", lw=1)
        axes[2].annotate("−δ", (0, -task["tolerance"]), color="#b23326", va="bottom")
        for ax in axes:
            ax.title.set_fontsize(10)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        return as_svg(figure)


def front_chart(board: Sequence[Standing], colours: Mapping[str, str]) -> str:
    """Return the gain against the change of the held-out reward: who gains most before it pays."""
    task = board[0].trials[0].run["task"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11.5, 4.6), layout="constrained")
        ax = figure.add_subplot()
        for one, dash in zip(board, _lines(board), strict=False):
            length = min(len(trial.curve["queries"]) for trial in one.trials)
            gains = interquartile_mean(np.stack([trial.gains[:length] for trial in one.trials]), axis=0)
            changes = np.stack([trial.curve["held_out_change"][:length] for trial in one.trials])
            middle = interquartile_mean(changes, axis=0)
            ax.plot(gains, middle, ls=dash, marker="o", ms=4, color=colours[one.algorithm], label=one.algorithm)
        ax.axhline(-task["tolerance"], color="#b23326", lw=1)
        ax.axhline(0, color="#5b6069", lw=0.8)
        ax.set(
            xlabel=f"gain in {named(task['reward'])}, %",
            ylabel=f"change of {named(task['held_out'])} (held out)",
        )
        ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        return as_svg(figure)


def profile_chart(board: Sequence[Standing], colours: Mapping[str, str]) -> str:
    """Return the performance profiles: the share of seeds whose score is above each level."""
    highest = max(max(one.scores) for one in board)
    levels = np.linspace(0, max(highest, 1.0) * 1.05, 200)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11.5, 3.6), layout="constrained")
        ax = figure.add_subplot()
        for one, dash in zip(board, _lines(board), strict=False):
            ax.plot(levels, profile(one.scores, levels), ls=dash, color=colours[one.algorithm], label=one.algorithm)
        ax.set(xlabel="score, %", ylabel="share of seeds above it", ylim=(-0.02, 1.02))
        ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        return as_svg(figure)


def named(reward: str | Mapping[str, float]) -> str:
    """Return a reward's name as it is shown: without the module that it comes from."""
    return reward.rpartition(":")[2] if isinstance(reward, str) else " + ".join(reward)
