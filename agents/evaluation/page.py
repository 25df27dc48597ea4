"""The page that shows an evaluation: one HTML file with its tables, charts and images."""

import io
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from PIL import Image

from .charts import COLOURS, data_uri, gains_chart, trade_chart, training_chart
from .curves import Curves
from .study import Comparison, percent, signed, spoken

_LARGEST_SIDE = 256
_SHOWN_PROMPTS = 24


def write_page(
    results: Mapping[str, Any], comparisons: Sequence[Comparison], curves: Curves, *, num_shown: int = _SHOWN_PROMPTS
) -> str:
    """Return the page as HTML.

    Args:
        results: The content of `results.json`.
        comparisons: The sets, in the order of `results["sets"]`.
        curves: The run's log.
        num_shown: The number of prompts of a set whose first image is shown: the first prompts, not the best.
    """
    reward, held_out = results["reward"], results["held_out"]
    unit = "" if results["unit"] == "1" else f" {results['unit']}"
    named = {"reward": reward, "unit": f", {results['unit']}" if unit else "", "held_out": held_out}
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    filters: dict[str, Callable[..., str]] = {
        "number": _number,
        "signed": lambda change: signed(change)[0],
        "interval": lambda change: " … ".join(signed(change)[1:]),
        "share": percent,
        "spoken": spoken,
    }
    environment.filters |= filters
    template = environment.from_string((files(__package__) / "page.html").read_text(encoding="utf-8"))
    return template.render(
        **{**results, "unit": unit},
        title=Path(results["run"]).name,
        facts=_facts(results),
        pixelated=comparisons[0].before.images.shape[3] <= _LARGEST_SIDE // 2,
        colours=COLOURS,
        gains_chart=gains_chart(results["sets"], **named),
        trade_chart=None if held_out is None else trade_chart(comparisons, **named),
        training_chart=training_chart(curves),
        galleries=[_gallery(comparison, num_shown) for comparison in comparisons],
    )


def _facts(results: Mapping[str, Any]) -> dict[str, object]:
    """Return the facts about the run that the page lists."""
    queries = results["reward_queries"]
    facts = {
        "algorithm": results["algorithm"],
        "images rewarded in training": queries and f"{queries:,}",
        "trained for": results["reward"],
        "held out": results["held_out"] or "nothing",
        "model": results["model"],
        "denoising steps": results["num_steps"],
        "guidance": results["guidance_scale"],
        "checkpoint": results["checkpoint"],
    }
    return {name: value for name, value in facts.items() if value is not None}


def _gallery(comparison: Comparison, num_shown: int) -> dict[str, Any]:
    """Return a set's first prompts, each with its first pair of images and their rewards."""
    before, after = comparison.before, comparison.after
    return {
        "name": comparison.name,
        "pairs": [
            {
                "prompt": before.prompts[index],
                "images": [_picture(samples.images[index, 0]) for samples in (before, after)],
                "rewards": [float(samples.rewards[index, 0]) for samples in (before, after)],
            }
            for index in range(min(num_shown, len(before.prompts)))
        ],
    }


def _picture(pixels: np.ndarray) -> str:
    """Return an image as PNG, or a large one as JPEG of at most 256 pixels."""
    image = Image.fromarray(pixels)
    stream = io.BytesIO()
    if max(image.size) <= _LARGEST_SIDE // 2:
        image.save(stream, format="PNG", optimize=True)
        return data_uri(stream.getvalue(), "image/png")
    image.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
    image.save(stream, format="JPEG", quality=90)
    return data_uri(stream.getvalue(), "image/jpeg")


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")
