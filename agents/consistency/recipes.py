"""Published settings of `ConsistencyTraining`, as the parts that make them: `ConsistencyTraining(…, **improved())`."""

from typing import TypedDict

from .metrics import InverseGap, Metric, PseudoHuber, Weighting
from .targets import Itself, Target
from .times import Discretisation, DoublingLevels, LogNormalTimes, ShrinkingGap


class Recipe(TypedDict):
    """The parts of a setting."""

    discretisation: Discretisation
    target: Target
    metric: Metric
    weighting: Weighting


def improved(*, first: int = 10, last: int = 1280, mean: float = -1.1, std: float = 2.0) -> Recipe:
    """Return the parts of improved consistency training (iCT).

    No average, pseudo-Huber distances, weights 1/(τ_t − τ_s), log-normal times, levels that double.

    Source: Song & Dhariwal, 2024, https://arxiv.org/abs/2310.14189.

    Args:
        first: s_0.
        last: s_1; for few images take fewer, such as 160.
        mean: P_mean of ln τ.
        std: P_std.
    """
    return Recipe(
        discretisation=DoublingLevels(first, last, LogNormalTimes(mean, std)),
        target=Itself(),
        metric=PseudoHuber(),
        weighting=InverseGap(),
    )


def easy(*, stages: int = 8, c: float = 0.06, mean: float = -1.1, std: float = 2.0) -> Recipe:
    """Return the parts of easy consistency tuning (ECT), which starts from a diffusion model's weights.

    Source: Geng et al., 2024, https://arxiv.org/abs/2406.14548.

    Args:
        stages: How often the gap is halved.
        c: Of the pseudo-Huber distance.
        mean: P_mean of ln τ.
        std: P_std.
    """
    return Recipe(
        discretisation=ShrinkingGap(stages=stages, times=LogNormalTimes(mean, std)),
        target=Itself(),
        metric=PseudoHuber(c),
        weighting=InverseGap(),
    )
