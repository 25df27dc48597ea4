"""No keyword of the consistency learners is without effect: each is changed alone, and the weights then differ."""

import inspect
from dataclasses import fields, replace

import pytest
import torch

from agents import AdamW, LoRA, Only
from agents.consistency import (
    L1,
    L2,
    LPIPS,
    Averaged,
    ConsistencyDistillation,
    ConsistencyTraining,
    DoublingLevels,
    DrawnGuidance,
    Euler,
    EveryIndex,
    FixedGuidance,
    GrowingAverage,
    GrowingLevels,
    Heun,
    InverseGap,
    Itself,
    KarrasLevels,
    LogNormalTimes,
    PseudoHuber,
    ShrinkingGap,
    UniformWeight,
)
from agents.training.learner import Cosine, Learner
from diffusion_gym.parts import Part

CD, CT = ConsistencyDistillation, ConsistencyTraining
LOG_NORMAL = LogNormalTimes()
PLANE = [
    (CD, {}, "batch_size", 6),
    (CD, {}, "learning_rate", 3e-2),
    (CD, {}, "optimizer", AdamW(max_grad_norm=1e-4)),
    (CD, {}, "adaptation", Only("last")),
    (CD, {}, "precision", "bf16"),
    (CD, {}, "seed", 5),
    (CD, {}, "solver", Euler()),
    (CD, {}, "target", Itself()),
    (CD, {}, "metric", L2()),
    (CD, {}, "weighting", InverseGap()),
    (CD, {}, "discretisation", KarrasLevels(5)),
    (CD, {"learning_rate": Cosine(1e-2)}, "learning_rate.peak", 2e-2),
    (CD, {"learning_rate": Cosine(1e-2)}, "learning_rate.end", 0.5),
    (CD, {"target": Averaged(0.5)}, "target.mu", 0.9),
    (CD, {"metric": PseudoHuber()}, "metric.c", 1.0),
    (CD, {"weighting": InverseGap()}, "weighting.least_gap", 10.0),
    (CD, {"discretisation": KarrasLevels(5)}, "discretisation.num_levels", 6),
    (CD, {"discretisation": KarrasLevels(5)}, "discretisation.rho", 3.0),
    (CD, {"discretisation": KarrasLevels(9)}, "discretisation.times", LOG_NORMAL),
    (CD, {"discretisation": KarrasLevels(9, times=LOG_NORMAL)}, "discretisation.times.mean", 2.0),
    (CD, {"discretisation": KarrasLevels(9, times=LOG_NORMAL)}, "discretisation.times.std", 0.2),
    (CT, {"target": GrowingAverage(0.5)}, "target.mu", 0.9),
    (CT, {"target": GrowingAverage(0.5)}, "target.first", 3),
    (CT, {"discretisation": GrowingLevels(2, 20)}, "discretisation.first", 3),
    (CT, {"discretisation": GrowingLevels(2, 20)}, "discretisation.last", 40),
    (CT, {"discretisation": GrowingLevels(9, 20)}, "discretisation.times", LOG_NORMAL),
    (CT, {"target": Itself(), "discretisation": DoublingLevels(3, 24)}, "discretisation.first", 6),
    (CT, {"target": Itself(), "discretisation": DoublingLevels(3, 24)}, "discretisation.last", 6),
    (CT, {"target": Itself(), "discretisation": DoublingLevels(9, 24)}, "discretisation.times", LogNormalTimes(2.0)),
    *(
        (CT, {"target": Itself(), "discretisation": ShrinkingGap(stages=2)}, f"discretisation.{name}", value)
        for name, value in (("base", 3.0), ("stages", 4), ("k", 2.0), ("b", 3.0), ("times", LogNormalTimes(2.0)))
    ),
]
LATENT = [
    ({}, "guidance", FixedGuidance(2.0)),
    ({}, "guidance.guidance_scale", 1.5),
    ({"guidance": DrawnGuidance(1.0, 6.0)}, "guidance.low", 3.0),
    ({"guidance": DrawnGuidance(1.0, 6.0)}, "guidance.high", 9.0),
    ({}, "discretisation.skip", 100),
    ({}, "discretisation.times", LogNormalTimes(0.0)),
    ({"metric": L1()}, "metric", L2()),
    ({"adaptation": LoRA(rank=2)}, "adaptation.rank", 3),
]
# Where it takes another network than the tests have: tests/agents/consistency/test_metrics.py has a stand-in.
ELSEWHERE = {(LPIPS, "network"), (LPIPS, "size")}


def changed(settings, keyword, value):
    name, _, of_part = keyword.partition(".")
    if not of_part:
        return {**settings, name: value}
    return {**settings, name: changed_part(settings[name], of_part, value)}


def changed_part(part, keyword, value):
    name, _, of_part = keyword.partition(".")
    return replace(part, **{name: changed_part(getattr(part, name), of_part, value) if of_part else value})


def trained(run):
    run.learn(run.batch_size * 4, log_interval=0)
    return torch.cat([weight.detach().flatten() for weight in run.network.parameters()])


def differ(first, second):
    return first.shape != second.shape or not torch.equal(first, second)


@pytest.mark.parametrize(("kind", "given", "keyword", "value"), PLANE)
def test_a_keyword_matters_on_the_plane(circle, kind, given, keyword, value):
    settings = {
        **{"batch_size": 4, "learning_rate": 1e-2, "optimizer": AdamW(epsilon=1e-3), "weighting": UniformWeight()},
        **({"solver": Heun()} if kind is CD else {}),
        **{"target": Averaged(0.5), "metric": PseudoHuber(), "discretisation": KarrasLevels(9), **given},
    }
    runs = (circle.learner(kind, **which) for which in (settings, changed(settings, keyword, value)))
    assert differ(*map(trained, runs))


@pytest.mark.parametrize(("given", "keyword", "value"), LATENT)
def test_a_keyword_matters_in_latents(latent, given, keyword, value):
    settings = {
        **{"batch_size": 2, "learning_rate": 1e-2, "seed": 0, "precision": None, "solver": Euler()},
        **{"guidance": FixedGuidance(4.0), "discretisation": EveryIndex(50), "optimizer": AdamW(), **given},
    }
    runs = (
        ConsistencyDistillation(latent.student, data=latent.data, teacher=latent.teacher, **which)
        for which in (settings, changed(settings, keyword, value))
    )
    assert differ(*map(trained, runs))


def test_every_keyword_and_every_field_of_a_part_is_tried():
    tried = {keyword for _, _, keyword, _ in PLANE if "." not in keyword}
    tried |= {keyword for _, keyword, _ in LATENT if "." not in keyword}
    keywords = {one.name for kind in (CD, CT) for one in fields(kind)}
    assert keywords - tried == {"model", "data", "teacher", "tensorboard_log", "verbose"}
    touched = {("learning_rate", "peak"), ("learning_rate", "end")}
    touched |= {tuple(keyword.split(".")[-2:]) for _, _, keyword, _ in PLANE}
    touched |= {tuple(keyword.split(".")[-2:]) for _, keyword, _ in LATENT}
    for part in parts():
        for one in fields(part):
            assert (part, one.name) in ELSEWHERE or any(name == one.name for *_, name in touched), (part, one.name)


def parts(kind=Part):
    for child in kind.__subclasses__():
        if not inspect.isabstract(child) and child.__module__.startswith(("agents.consistency", Learner.__module__)):
            yield child
        yield from parts(child)
