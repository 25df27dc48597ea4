"""The page's charts, as SVG in data URIs."""

import base64
import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .curves import Curves
from .statistics import mean_interval
from .study import Comparison, spoken

COLOURS = ("#0b6e99", "#c2571a", "#4f8a3c", "#7a4fa3", "#8a6d1f", "#a33a5b")
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8f98",
    "axes.grid": True,
    "grid.color": "#e6e8eb",
    "axes.axisbelow": True,
    "svg.hashsalt": "evaluation",
}
_CURVES = {
    "reward in training": "rollout/ep_rew_mean",
    "held-out gain in training": "evaluation/held_out_gain",
    "KL to the pretrained model, nats": "evaluation/kl",
    "diversity of latents in training": "rollout/latent_diversity",
    "approximate KL of an update": "train/approx_kl",
    "gradient norm": "train/grad_norm",
}
_BAND = ("rollout/ep_rew_q05", "rollout/ep_rew_q95")
_MOST_CURVES = 4


def data_uri(content: bytes, kind: str) -> str:
    """Return a file's content as a data URI, which a page shows without any other file."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def as_svg(figure: Figure) -> str:
    """Return a figure as SVG in a data URI."""
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return data_uri(stream.getvalue(), "image/svg+xml")


def gains_chart(summaries: Sequence[Mapping[str, Any]], *, reward: str, unit: str, held_out: str | None) -> str:
    """Return a chart of the sets' gains with their intervals, in the reward and beside it in the held-out reward."""
    kinds = [("reward", f"gain in {reward}{unit}")]
    if held_out is not None:
        kinds.append(("held_out", f"gain in {held_out} (held out)"))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11.5, 0.8 + 0.42 * len(summaries)), layout="constrained")
        rows = np.arange(len(summaries))[::-1]
        for number, (key, label) in enumerate(kinds):
            axes = figure.add_subplot(1, len(kinds), number + 1)
            for row, summary, colour in zip(rows, summaries, itertools.cycle(COLOURS), strict=False):
                gain = summary[key]["gain"]
                axes.plot([gain["low"], gain["high"]], [row, row], color=colour, lw=2.5, solid_capstyle="round")
                axes.plot(gain["mean"], row, "o", color=colour, ms=7)
            axes.axvline(0, color="#5b6069", lw=1)
            names = [spoken(summary["name"]) for summary in summaries]
            axes.set(xlabel=label, yticks=rows, yticklabels=names if number == 0 else [], ylim=(-0.6, len(rows) - 0.4))
            axes.tick_params(axis="y", length=0)
        return as_svg(figure)


def trade_chart(comparisons: Sequence[Comparison], *, reward: str, unit: str, held_out: str) -> str:
    """Return a chart of each prompt's gain in the held-out reward against its gain in the reward."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11.5, 4.6), layout="constrained")
        axes = figure.add_subplot()
        for comparison, colour in zip(comparisons, itertools.cycle(COLOURS), strict=False):
            gains, others = comparison.gains, comparison.held_out_gains
            assert others is not None
            axes.scatter(gains, others, s=14, alpha=0.45, color=colour, lw=0)
            reward_gain, held_out_gain = mean_interval(gains), mean_interval(others)
            axes.errorbar(
                reward_gain.mean,
                held_out_gain.mean,
                xerr=reward_gain.high - reward_gain.mean,
                yerr=held_out_gain.high - held_out_gain.mean,
                fmt="o",
                ms=9,
                mec="white",
                color=colour,
                capsize=3,
                label=spoken(comparison.name),
            )
        axes.axhline(0, color="#5b6069", lw=1)
        axes.axvline(0, color="#5b6069", lw=1)
        right, bottom = axes.get_xlim()[1], axes.get_ylim()[0]
        if right > 0 > bottom:
            axes.axvspan(
                0, right, ymin=0, ymax=-bottom / (axes.get_ylim()[1] - bottom), color="#c0392b", alpha=0.06, lw=0
            )
            axes.text(right, bottom, "over-optimised ", ha="right", va="bottom", color="#c0392b")
            axes.set(xlim=(None, right), ylim=(bottom, None))
        axes.set(xlabel=f"gain in {reward}{unit}", ylabel=f"gain in {held_out} (held out)")
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        return as_svg(figure)


def training_chart(curves: Curves) -> str | None:
    """Return a chart of up to four curves of the run's log; None: the log has none of these curves."""
    changing = {name for name, (_, y) in curves.items() if len(y) > 1 and np.ptp(y) > 0}
    shown = [(label, name) for label, name in _CURVES.items() if name in changing][:_MOST_CURVES]
    if not shown:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11.5, 2.8 * -(-len(shown) // 2)), layout="constrained")
        for number, (label, name) in enumerate(shown):
            axes = figure.add_subplot(-(-len(shown) // 2), min(2, len(shown)), number + 1)
            x, y = curves[name]
            axes.plot(x, y, color=COLOURS[0], lw=1.8, marker="o" if len(x) < 30 else None, ms=3.5)
            if name == "rollout/ep_rew_mean" and all(bound in curves for bound in _BAND):
                low, high = (curves[bound][1] for bound in _BAND)
                axes.fill_between(x, low, high, color=COLOURS[0], alpha=0.12, lw=0)
                label += ", 5 to 95 % of the images"
            _finish(axes, label)
        return as_svg(figure)


def _finish(axes: Axes, label: str) -> None:
    axes.set_title(label, fontsize=10, loc="left")
    axes.set_xlabel("images rewarded")
