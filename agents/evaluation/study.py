"""The comparison of a trained policy with the pretrained model on several sets of prompts.

Source: the studies of generalisation and over-optimisation in Black et al., 2023, https://arxiv.org/abs/2305.13301.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .measures import Samples
from .statistics import Interval, distance_between, distance_within, mean_interval, ratio_interval


@dataclass(frozen=True, eq=False)
class Comparison:
    """The pretrained model's and the trained policy's images of one set of prompts, from the same noise.

    Args:
        name: The set's name.
        trained_on: Whether the training saw these prompts (never these seeds).
        before: The pretrained model's images.
        after: The trained policy's images, with its KL divergence to the pretrained model.
    """

    name: str
    trained_on: bool
    before: Samples
    after: Samples

    @property
    def gains(self) -> np.ndarray:
        """The rise of each prompt's mean reward, [P]."""
        return (self.after.rewards - self.before.rewards).mean(1)

    @property
    def held_out_gains(self) -> np.ndarray | None:
        """The rise of each prompt's mean held-out reward, [P]; None: there is no such reward."""
        if self.after.held_out is None or self.before.held_out is None:
            return None
        return (self.after.held_out - self.before.held_out).mean(1)

    @property
    def is_over_optimised(self) -> bool:
        """Whether the reward rose and the held-out reward fell, both beyond their 95 % intervals."""
        held_out = self.held_out_gains
        return held_out is not None and mean_interval(self.gains).low > 0 and mean_interval(held_out).high < 0

    def summary(self, trained_on: "Comparison") -> dict[str, Any]:
        """Return the numbers of the set, as JSON can hold them.

        Args:
            trained_on: The set that was trained on: `carry_over` is this set's share of its gain.
        """
        before, after = self.before, self.after
        held_out = diversity = None
        if self.held_out_gains is not None:
            held_out = _change(before.held_out, after.held_out, self.held_out_gains)
        if after.rewards.shape[1] > 1:
            within = [distance_within(samples.features) for samples in (before, after)]
            diversity = _change(within[0], within[1], within[1] - within[0])
        return {
            "name": self.name,
            "trained_on": self.trained_on,
            "num_prompts": len(after.prompts),
            "samples_per_prompt": after.rewards.shape[1],
            "reward": _change(before.rewards, after.rewards, self.gains),
            "held_out": held_out,
            "carry_over": None if self is trained_on else _as_dict(ratio_interval(self.gains, trained_on.gains)),
            "diversity": diversity,
            "feature_distance": _as_dict(mean_interval(distance_between(before.features, after.features))),
            "kl": None if after.kl is None else _as_dict(mean_interval(after.kl)),
            "over_optimised": self.is_over_optimised,
            "prompts": [{"prompt": prompt} | self._rewards(row) for row, prompt in enumerate(after.prompts)],
        }

    def _rewards(self, row: int) -> dict[str, list[float]]:
        """Return the rewards of a prompt's images, [K] each."""
        values = {"reward": (self.before.rewards, self.after.rewards)}
        if self.before.held_out is not None and self.after.held_out is not None:
            values["held_out"] = (self.before.held_out, self.after.held_out)
        return {
            f"{name}_{when}": rewards[row].tolist()
            for name, pair in values.items()
            for when, rewards in zip(("before", "after"), pair, strict=True)
        }


def _as_dict(interval: Interval | None) -> dict[str, float] | None:
    return None if interval is None else interval._asdict()


def _change(before: np.ndarray | None, after: np.ndarray | None, gains: np.ndarray) -> dict[str, Any]:
    """Return both means, and the mean paired difference with its interval over prompts."""
    assert before is not None
    assert after is not None
    return {"before": float(before.mean()), "after": float(after.mean()), "gain": _as_dict(mean_interval(gains))}


def findings(summaries: Sequence[Mapping[str, Any]], *, reward: str, unit: str, held_out: str | None) -> list[str]:
    """Return the findings in words, a sentence or two for each set; the first set was trained on."""
    change = _change_of(summaries[0]["reward"]["gain"])
    sentences = []
    for summary in summaries:
        gain, share, held_out_change = summary["reward"]["gain"], summary["carry_over"], summary["held_out"]
        where = f"{spoken(summary['name'])}, which were {'' if summary['trained_on'] else 'not '}trained on"
        sentence = f"On {where}, {reward} {_verb(gain)}: {_said(gain)}{unit}"
        if share is not None:
            sentence += f", {percent(share['mean'])} of the {change} on the training prompts"
            sentence += f" ({percent(share['low'])} to {percent(share['high'])})"
        if held_out_change is not None:
            sentence += f". {held_out}, held out, {_verb(held_out_change['gain'])}: {_said(held_out_change['gain'])}"
            sentence += ", so the training has over-optimised here" if summary["over_optimised"] else ""
        sentences.append(f"{sentence}.")
    return sentences


def spoken(name: str) -> str:
    """Return a set's name as it is written in a sentence."""
    return name.replace("_", " ")


def signed(change: Mapping[str, float]) -> tuple[str, str, str]:
    """Return a change's mean and its interval's ends, signed, with as many decimals as give the largest 3 digits."""
    values = [change[key] for key in ("mean", "low", "high")]
    largest = max(abs(value) for value in values)
    decimals = 2 if largest == 0 else max(0, 2 - math.floor(math.log10(largest)))
    mean, low, high = (f"{value:+.{decimals}f}".replace("-", "−") for value in values)
    return mean, low, high


def percent(share: float) -> str:
    """Return a share in percent."""
    return f"{share:.0%}".replace("-", "−")


def _said(change: Mapping[str, float]) -> str:
    mean, low, high = signed(change)
    return f"{mean} ({low} to {high})"


def _change_of(gain: Mapping[str, float]) -> str:
    return "fall" if gain["mean"] < 0 else "gain"


def _verb(change: Mapping[str, float]) -> str:
    if change["low"] > 0:
        return "rose"
    return "fell" if change["high"] < 0 else "did not change for sure"
