"""No keyword is without effect: each one is changed alone, and then what a run does differs, or it is refused.

A keyword is an argument of an algorithm or a policy ("learning_rate"), or a field of a part that it is given
("optimizer.weight_decay").
"""

import contextlib
import inspect
import io
import threading
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import gymnasium as gym
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter

import agents
import diffusion_gym  # noqa: F401
from agents import (
    DDPOIS,
    DDPOSF,
    DPOK,
    GRPO,
    KL,
    RLOO,
    RWR,
    AdamW,
    Algorithm,
    Batch,
    Best,
    ContextFreeSchedule,
    Critic,
    DenoisingPolicy,
    DiffusionNFT,
    FixedSchedule,
    Full,
    Groups,
    Log,
    LoRA,
    Muon,
    Noising,
    Only,
    PerPrompt,
    PolicyGradient,
    PromptMeans,
    Rollouts,
    Steps,
    TimePredictor,
    Window,
)
from diffusion_gym.parts import Part
from diffusion_gym.samplers import CPS, DDIM, FlowSDE, Windowed
from diffusion_gym.schedules import FlowSchedule


@dataclass
class Trace(KVWriter):
    """What a run did, as far as somebody could see."""

    weights: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    average: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    passes: list[int] = field(default_factory=list)
    x_axis: list[int] = field(default_factory=list)
    pictures: set[str] = field(default_factory=set)
    rewarded_in_threads: bool = False
    learner: Any = None
    files: int = 0
    printed: str = ""

    def write(self, key_values, key_excluded, step=0):
        self.x_axis.append(step)
        self.pictures |= {name for name in key_values if name.startswith("images/")}

    def close(self):
        pass


class Watch(BaseCallback):
    """Adds a trace to the outputs of the log."""

    def __init__(self, trace):
        super().__init__()
        self.trace = trace

    def _on_training_start(self):
        self.logger.output_formats.append(self.trace)

    def _on_step(self):
        return True


def the_weights(trace):
    return trace.weights


@dataclass(frozen=True)
class Change:
    """Another value of a keyword, the settings under which it matters, and what then differs.

    A value that is a function is called with the model.
    """

    keyword: str
    value: Any
    given: Mapping[str, Any] = field(default_factory=dict)
    sign: Callable[[Trace], Any] = the_weights
    refused: tuple[type[Exception], str] | None = None


def another_policy(model):
    policy = DenoisingPolicy(model, seed=0)
    policy.denoiser.last.bias.data += 0.5
    return policy


def optimizer(given):
    return [
        Change("optimizer.weight_decay", 10.0, given),
        Change("optimizer.betas", (0.5, 0.999), given),
        Change("optimizer.betas", (0.9, 0.5), given),
        Change("optimizer.epsilon", 1.0, given),
        Change("optimizer.warmup_updates", 3, given),
        Change("optimizer.max_grad_norm", 1e-3, given),
        Change("optimizer.on_nonfinite", "skip", given, lambda trace: trace.learner.updates.guard.on_nonfinite),
        Change("optimizer.ema_decay", 0.5, given, lambda trace: trace.average),
    ]


TWICE = {"n_epochs": 2, "learning_rate": 0.1}
COUNTED = {"advantages": PerPrompt(16, min_count=2)}
PENALISED = {"kl": KL(0.5)}
ALL = [
    Change("learning_rate", 3e-3),
    Change("batch_size", 8),
    Change("n_epochs", 2),
    Change("optimizer", Muon()),
    Change("rollouts", Rollouts(samples=32, group_size=4)),
    Change("log", Log(images=0), sign=lambda trace: trace.pictures),
    Change("tensorboard_log", "log", sign=lambda trace: trace.files > 0),
    Change("verbose", 1, sign=lambda trace: trace.printed),
    Change("seed", 5),
]
PARTS_OF_ALL = [
    *optimizer({}),
    Change("optimizer.eight_bit", True, refused=(ImportError, "pip install bitsandbytes")),
    *optimizer({"optimizer": Muon()}),
    Change("rollouts.samples", 32),
    Change("rollouts.group_size", 2),
    Change("rollouts.prompt_sampling", "round_robin"),
    Change("rollouts.same_noise", True),
    Change("rollouts.num_starts", 1),
    Change("rollouts.async_rewards", True, sign=lambda trace: trace.rewarded_in_threads),
    Change("rollouts.device", "cpu", sign=lambda trace: trace.learner.storage.device),
    Change("rollouts.dtype", "bfloat16"),
    Change("rollouts.micro_batch_size", 3, sign=lambda trace: trace.passes),
    Change("log.images", 0, sign=lambda trace: trace.pictures),
    Change("log.x_axis", "reward_queries", sign=lambda trace: trace.x_axis),
]
TRAJECTORIES = [
    *ALL,
    Change("advantages", Batch(clip=0.1)),
    Change("steps", Steps(window=Window(2))),
    Change("kl", KL(5.0)),
    Change("stop_kl", 1e-6, TWICE),
    Change("log_prob_reduction", "sum", {"optimizer": AdamW(epsilon=1e-2)}),
]
PER_PROMPT = [
    Change("advantages.buffer_size", 2, COUNTED),
    Change("advantages.min_count", 2, {"advantages": PerPrompt(16)}),
    Change("advantages.center", True, COUNTED),
    Change("advantages.clip", 0.1, COUNTED),
]
JUDGED = {"advantages": Critic()}
CRITIC = [
    Change("advantages.width", 16, JUDGED),
    Change("advantages.learning_rate", 0.1, JUDGED),
    Change("advantages.n_epochs", 40, JUDGED),
    Change("advantages.batch_size", 4, JUDGED),
    Change("advantages.clip", 0.1, JUDGED),
    Change("advantages.seed", 1, JUDGED),
]
PROMPT_MEANS = [Change("advantages.clip", 0.1, {"advantages": PromptMeans()})]
PARTS_OF_TRAJECTORIES = [
    *PER_PROMPT,
    *CRITIC,
    *PROMPT_MEANS,
    Change("advantages.clip", 0.1, {"advantages": Batch()}),
    Change("advantages.clip", 0.1, {"advantages": Groups()}),
    Change("advantages.baseline", "group_mean", {"advantages": Groups()}),
    Change("advantages.scale", "group", {"advantages": Groups()}),
    Change("steps.fraction", 0.5),
    Change("steps.weights", "inverse_sensitivity"),
    Change("steps.window", Window(2)),
    Change("steps.window.size", 2, {"steps": Steps(window=Window(1))}),
    Change("steps.window.within", (1, 3), {"steps": Steps(window=Window(1))}),
    Change("kl.coefficient", 5.0, PENALISED),
    Change("kl.place", "exact", PENALISED),
    Change("kl.reference", another_policy, PENALISED),
    Change("kl.target", 1e-5, PENALISED | TWICE),
    Change("kl.horizon", 1.0, {"kl": KL(0.5, target=1e-5), **TWICE}),
]
FORWARD = [
    *ALL,
    *PARTS_OF_ALL,
    Change("noising", Noising(draws=2)),
    Change("noising.draws", 2),
    Change("noising.time_range", (0.5, 1.0)),
    Change("noising.common", True),
    Change("noising.guidance_scale", 3.0),
]
CLIPPED = Change("clip_range", 0.3, TWICE)
KEYWORDS = {
    DDPOIS: [*TRAJECTORIES, *PARTS_OF_ALL, *PARTS_OF_TRAJECTORIES, CLIPPED],
    DDPOSF: TRAJECTORIES,
    RLOO: [*TRAJECTORIES, CLIPPED, Change("ratio", "trajectory")],
    GRPO: [*TRAJECTORIES, CLIPPED],
    DPOK: [*TRAJECTORIES, CLIPPED],
    RWR: [
        *FORWARD,
        Change("weights", Best(0.25)),
        Change("weights.inverse_temperature", 3.0),
        Change("weights.normalise", False),
        Change("weights.per_prompt", True),
        Change("weights.share", 0.25, {"weights": Best()}),
        Change("weights.per_prompt", True, {"weights": Best()}),
    ],
    DiffusionNFT: [
        *FORWARD,
        *PER_PROMPT,
        *PROMPT_MEANS,
        Change("advantages", Batch(clip=0.1)),
        Change("beta", 0.5),
        Change("advantage_clip", 0.5),
        Change("kl_coefficient", 10.0),
        Change("max_decay", 0.0, {"learning_rate": 0.1}),
    ],
}
SAMPLERS = [
    Change("eta", 0.5, DDIM()),
    Change("nu", 0.5, CPS()),
    Change("a", 0.5, FlowSDE()),
    Change("sampler", CPS(), Windowed(DDIM(), 0.7, 0.2)),
    Change("noisy", 0.4, Windowed(DDIM(), 0.7, 0.2)),
    Change("clean", 0.6, Windowed(DDIM(), 0.7, 0.2)),
]
ADAPTED = {"adaptation": LoRA(alpha=4.0)}
DENOISING = [
    Change("sampler", CPS()),
    Change("adaptation", LoRA()),
    Change("adaptation.rank", 2, ADAPTED),
    Change("adaptation.alpha", 8.0, ADAPTED),
    Change("adaptation.targets", ("to_k",), ADAPTED),
    Change("adaptation.names", ("bias",), {"adaptation": Only("weight")}),
    Change("guidance_scale", 2.0),
    Change("precision", "bf16"),
    Change("seed", 1),
]


def settings_of(kind):
    """Return what an algorithm is given here: its defaults, but for sizes that take moments."""
    defaults = {one.name: one.default for one in fields(kind) if one.init and one.default is not MISSING}
    sizes = {"rollouts": Rollouts(samples=16, group_size=4), "batch_size": 16, "learning_rate": 1e-2, "seed": 0}
    return {**defaults, **sizes, "optimizer": AdamW(epsilon=1e-3)}


def changed(owner, keyword, value):
    """Return settings, or a part, with another value of a keyword."""
    name, _, of_part = keyword.partition(".")
    values = dict(owner) if isinstance(owner, dict) else vars(owner)
    values = {**values, name: changed(values[name], of_part, value) if of_part else value}
    return values if isinstance(owner, dict) else owner.from_fields(values)


def owner_of(kind, change):
    """Return the class that has a keyword, and what it is called there."""
    *parts, name = change.keyword.split(".")
    owner, settings = kind, {**(settings_of(kind) if kind in KEYWORDS else {}), **change.given}
    for part in parts:
        settings = settings[part] if isinstance(settings, dict) else getattr(settings, part)
        owner = type(settings)
    return owner, name


def keywords_of(kind):
    """Return the keywords of a class."""
    parameters = inspect.signature(kind).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def test_the_table_has_every_algorithm():
    assert set(KEYWORDS) == {kind for kind in vars(agents).values() if is_algorithm(kind)}


def is_algorithm(kind):
    """Return whether it is an algorithm that can be made."""
    return isinstance(kind, type) and issubclass(kind, Algorithm) and not inspect.isabstract(kind)


@pytest.mark.parametrize("kind", KEYWORDS)
def test_the_table_has_every_keyword(kind):
    assert keywords_of(kind) == {change.keyword for change in KEYWORDS[kind] if "." not in change.keyword}


def test_the_tables_have_every_field_of_every_part():
    """Fields of parts are tried with one policy gradient, for all have the same loop, and with each regression."""
    assert {kind.train for kind in KEYWORDS if issubclass(kind, PolicyGradient)} == {PolicyGradient.train}
    tried = {owner_of(kind, change) for kind, changes in KEYWORDS.items() for change in changes}
    tried |= {owner_of(DenoisingPolicy, change) for change in DENOISING}
    tried |= {(type(change.given), change.keyword) for change in SAMPLERS}
    assert {(part, one.name) for part in parts() for one in fields(part)} <= tried


# Learners from data, and edits: see consistency/test_keywords.py, and test_operators.py.
LEARNERS = ("agents.consistency.", "agents.training.learner", "diffusion_gym.consistency.")


def parts(kind=Part):
    """Return all parts of the two packages that algorithms and policies are given."""
    for child in kind.__subclasses__():
        is_of_learners = child.__module__.startswith(LEARNERS)
        is_here = child.__module__.startswith(("agents.", "diffusion_gym.")) and not is_of_learners
        if not inspect.isabstract(child) and is_here:
            yield child
        yield from parts(child)


def run(kind, model, settings):
    """Train for three rollouts of the mixture model; return what was seen."""
    trace = Trace()

    def reward(images, prompts, metadata):
        trace.rewarded_in_threads |= threading.current_thread() is not threading.main_thread()
        return model.positions(images)[:, 0] + torch.tensor([len(prompt) for prompt in prompts])

    env = gym.make_vec(
        "DenoisingMDP-v0", num_envs=8, num_steps=4, model=model, reward=reward, autoreset_mode="DISABLED"
    )
    policy = DenoisingPolicy(model, seed=0)
    policy.denoiser.register_forward_hook(lambda module, inputs, output: trace.passes.append(len(inputs[0])))
    learner = kind(policy, env, **settings)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        learner.learn(3 * 4 * learner.sizes.samples, Watch(trace))
    learner.logger.close()
    trace.learner, trace.weights, trace.printed = learner, weights_of(policy), printed.getvalue()
    if learner.updates.average is not None:
        with learner.averaged_weights():
            trace.average = weights_of(policy)
    trace.files = sum(file.is_file() for file in Path("log").rglob("*"))
    return trace


def weights_of(policy):
    return torch.cat([parameter.detach().flatten() for parameter in policy.parameters() if parameter.requires_grad])


def differ(one, other):
    """Return whether two signs differ: weights by more than rounding could explain."""
    if isinstance(one, torch.Tensor):
        return one.shape != other.shape or float((one - other).abs().max()) > 1e-5
    return one != other


@pytest.fixture(scope="module")
def unchanged(mixture):
    """Return a function that runs an algorithm before a change; once, however many changes are tried."""
    traces = {}

    def before(kind, given):
        key = (kind, repr(given))
        if key not in traces:
            traces[key] = run(kind, mixture, {**settings_of(kind), **given})
        return traces[key]

    return before


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        pytest.param(kind, change, id=f"{kind.__name__}-{owner_of(kind, change)[0].__name__}.{change.keyword}")
        for kind, changes in KEYWORDS.items()
        for change in changes
    ],
)
def test_a_keyword_changes_what_a_run_does(mixture, unchanged, tmp_path, monkeypatch, kind, change):
    monkeypatch.chdir(tmp_path)
    value = change.value(mixture) if callable(change.value) else change.value
    settings = changed({**settings_of(kind), **change.given}, change.keyword, value)
    if change.refused is not None:
        error, message = change.refused
        with pytest.raises(error, match=message):
            run(kind, mixture, settings)
        return
    assert differ(change.sign(unchanged(kind, change.given)), change.sign(run(kind, mixture, settings)))


@pytest.mark.parametrize("change", SAMPLERS, ids=lambda change: f"{type(change.given).__name__}.{change.keyword}")
def test_a_field_of_a_sampler_changes_its_steps(change):
    t, s = torch.tensor([0.8, 0.5, 0.3]), torch.tensor([0.5, 0.3, 0.1])

    def steps(sampler):
        scales = sampler.scales(FlowSchedule(), t, s)
        return torch.stack([scales.x0, scales.epsilon, scales.std])

    assert differ(steps(change.given), steps(changed(change.given, change.keyword, change.value)))


@pytest.mark.parametrize(
    ("kind", "settings", "error", "message"),
    [
        (
            DDPOIS,
            {"advantages": Groups(), "rollouts": Rollouts(samples=16)},
            ValueError,
            "group_size must be at least 2, got 1",
        ),
        (DiffusionNFT, {"advantages": Groups()}, TypeError, r"advantages must compare samples by their prompts"),
        (RLOO, {"ratio": "trajectory", "steps": Steps(fraction=0.5)}, ValueError, 'go with ratio="step"'),
        (
            GRPO,
            {"kl": KL(1.0, place="exact"), "steps": Steps(weights="inverse_sensitivity")},
            ValueError,
            "one objective",
        ),
        (RWR, {"weights": 0.1}, TypeError, r"weights must be Softmax\(…\) or Best\(…\), got 0.1"),
        (RWR, {"optimizer": "adamw"}, TypeError, r"optimizer must be a part, .* got 'adamw'"),
        (DDPOSF, {"advantages": 5.0}, TypeError, r"advantages must be a part, .* got 5\.0"),
    ],
)
def test_what_cannot_have_its_effect_is_refused(mixture, kind, settings, error, message):
    with pytest.raises(error, match=message):
        run(kind, mixture, {**settings_of(kind), **settings})


def test_fields_that_would_have_no_effect_are_refused():
    with pytest.raises(ValueError, match=r"horizon=3\.0 has no effect: it needs target"):
        KL(0.1, horizon=3.0)
    with pytest.raises(ValueError, match="baseline='group_mean' has no effect"):
        Groups("group_mean", scale="rollout")


def test_rewards_that_nothing_hides_are_warned_of(mixture):
    settings = {**settings_of(DDPOSF), "rollouts": Rollouts(async_rewards=True), "batch_size": None}
    with pytest.warns(UserWarning, match=r"async_rewards has no effect: .* \(8\) are drawn at once"):
        run(DDPOSF, mixture, settings)


def test_adamws_numbers_are_refused_where_muon_takes_all_weights(mixture):
    policy = DenoisingPolicy(mixture, adaptation=LoRA(), seed=0)
    env = gym.make_vec("DenoisingMDP-v0", num_envs=4, num_steps=2, model=mixture)
    for optimizer, name in ((Muon(betas=(0.9, 0.9)), r"betas\[1\]=0\.9"), (Muon(epsilon=1e-6), "epsilon=1e-06")):
        with pytest.raises(ValueError, match=f"{name} has no effect: it needs a weight that is no matrix"):
            RWR(policy, env, optimizer=optimizer)


OUTSIDE = {
    **dict.fromkeys(("max_grad_norm", "epsilon", "target", "stop_kl", "clip", "clip_range"), (0.0, -1.0)),
    **dict.fromkeys(("coefficient", "inverse_temperature", "beta", "advantage_clip", "alpha"), (0.0, -1.0)),
    **dict.fromkeys(("weight_decay", "kl_coefficient", "learning_rate", "guidance_scale", "a"), (-0.1,)),
    **dict.fromkeys(("betas", "max_decay"), (-0.1, 1.0)),
    **dict.fromkeys(("eta", "nu", "time_range"), (-0.1, 1.1)),
    **dict.fromkeys(("fraction", "share"), (0.0, 1.1)),
    "ema_decay": (0.0, 1.0),
    "horizon": (0.5,),
    "noisy": (),
    "clean": (),
}
LEAST = {"verbose": 0, "seed": 0, "images": 0, "warmup_updates": 0}


def numbers(*kinds):
    """Return the keywords of algorithms, policies and parts that take numbers of some kinds, once each."""
    found = {}
    for algorithm, changes in [*KEYWORDS.items(), (DenoisingPolicy, DENOISING)]:
        for change in changes:
            found.setdefault(owner_of(algorithm, change), (algorithm, change))
    for change in SAMPLERS:
        found[type(change.given), change.keyword] = (None, change)
    for (owner, name), (algorithm, change) in found.items():
        hint = get_type_hints(owner.__init__)[name]
        if owner is not Window and set(kinds) & {hint, *get_args(hint)}:
            yield pytest.param(algorithm, change, get_origin(hint) is tuple, id=f"{owner.__name__}.{name}")


def given_wrongly(mixture, algorithm, change, value):
    if algorithm is None:
        return changed(change.given, change.keyword, value)
    env = gym.make_vec("DenoisingMDP-v0", num_envs=8, num_steps=4, model=mixture, autoreset_mode="DISABLED")
    policy = DenoisingPolicy(mixture, seed=0)
    if algorithm is DenoisingPolicy:
        return DenoisingPolicy(mixture, **changed(dict(change.given), change.keyword, value))
    return algorithm(policy, env, **changed({**settings_of(algorithm), **change.given}, change.keyword, value))


@pytest.mark.parametrize(("algorithm", "change", "is_pair"), [*numbers(float)])
def test_every_float_is_checked(mixture, algorithm, change, is_pair):
    name = change.keyword.rpartition(".")[2]
    for value in (float("nan"), float("inf"), *OUTSIDE[name]):
        with pytest.raises(ValueError, match=rf"{name} must be .*got {value}"):
            given_wrongly(mixture, algorithm, change, (value, value) if is_pair else value)


@pytest.mark.parametrize(("algorithm", "change", "is_pair"), [*numbers(int)])
def test_whole_numbers_are_whole(mixture, algorithm, change, is_pair):
    name = change.keyword.rpartition(".")[2]
    for wrong in (1.5, 4.0, "4", True, LEAST.get(name, 1) - 1):
        with pytest.raises(ValueError, match=f"{name} must be an integer .*, got {wrong!r}"):
            given_wrongly(mixture, algorithm, change, wrong)


def test_what_a_schedule_returns_is_checked(mixture):
    for wrong in (float("nan"), -1.0):
        schedule = lambda remaining, wrong=wrong: wrong if remaining < 1 else 0.1  # noqa: E731
        with pytest.raises(ValueError, match=f"learning_rate must be a finite number .*, got {wrong}"):
            run(RWR, mixture, {**settings_of(RWR), "learning_rate": schedule})


def bytes_saved_for_the_backward_pass(policy, observation):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: saved.append(one.numel()) or one, lambda one: one):
        policy.log_prob(observation, observation["latents"])
    return sum(saved)


def denoising_signs(model, observation, **settings):
    """Return what a policy does with one observation: its draw, its density and that density's gradient."""
    policy = DenoisingPolicy(model, **{"seed": 0, **settings})
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05  # LoRA's second layer begins at 0
    action = policy.act(observation)
    policy.log_prob(observation, torch.zeros_like(action)).sum().backward()
    gradients = [p.grad for p in policy.parameters() if p.requires_grad]
    return torch.cat([action.flatten(), *(gradient.flatten() for gradient in gradients)])


@pytest.fixture(scope="module")
def observation(tiny):
    return gym.make_vec("DenoisingMDP-v0", num_envs=2, num_steps=4, model=tiny).reset(seed=0)[0]


@pytest.mark.parametrize("change", DENOISING, ids=lambda change: change.keyword)
def test_a_keyword_of_a_denoising_policy_has_an_effect(tiny, observation, change):
    settings = {"seed": 0, "adaptation": Full(), **change.given}
    before, after = settings, changed(settings, change.keyword, change.value)
    assert differ(denoising_signs(tiny, observation, **before), denoising_signs(tiny, observation, **after))


def test_gradient_checkpointing_saves_memory(tiny, observation):
    kept = [
        bytes_saved_for_the_backward_pass(DenoisingPolicy(tiny, seed=0, gradient_checkpointing=on), observation)
        for on in (False, True)
    ]
    assert kept[1] < kept[0] / 2


def test_prompts_are_looked_up_where_no_embeddings_are_observed(tiny):
    apart = {"gradient_checkpointing", "prompts", "negative_prompt"}
    assert keywords_of(DenoisingPolicy) == {change.keyword for change in DENOISING if "." not in change.keyword} | apart
    texts = {"prompts": ["a cat", "a dog"], "observe_embeds": False}
    env = gym.make_vec("DenoisingMDP-v0", num_envs=2, num_steps=4, model=tiny, **texts)
    observation, _ = env.reset(seed=0, options={"prompt_id": [0, 1]})
    plain = {"prompts": texts["prompts"]}
    with pytest.raises(ValueError, match="the observation has no embeddings"):
        denoising_signs(tiny, observation)
    before, after = (denoising_signs(tiny, observation, **plain, negative_prompt=text) for text in ("", "a fox"))
    assert differ(before, after)
    with pytest.raises(ValueError, match="negative_prompt='east' has no effect: it needs prompts"):
        DenoisingPolicy(tiny, negative_prompt="east")


def test_each_keyword_of_a_time_policy_has_an_effect(tiny):
    env = gym.make_vec("TimePredictionMDP-v0", num_envs=2, model=tiny, max_steps=4, autoreset_mode="DISABLED")
    observation, _ = env.reset(seed=0)

    def signs(policy):
        return torch.cat([policy.act(observation).flatten(), policy.distribution(observation).mode.detach().flatten()])

    def shapes(policy):
        return [tuple(parameter.shape) for parameter in policy.parameters()]

    space = env.single_observation_space
    kinds = {
        TimePredictor: (lambda **how: TimePredictor(space, **{"seed": 0, **how}), {"hidden_channels": 8}),
        ContextFreeSchedule: (lambda **how: ContextFreeSchedule([0.4] * 4, **{"seed": 0, **how}), {}),
    }
    for kind, (make, shaping) in kinds.items():
        acting = {"initial_concentration": 50.0, "seed": 1}
        if kind is TimePredictor:
            acting["initial_ratio"] = 0.3
        assert keywords_of(kind) == acting.keys() | shaping.keys() | {"device"}
        for name, value in acting.items():
            assert differ(signs(make()), signs(make(**{name: value}))), name
        for name, value in shaping.items():
            assert shapes(make()) != shapes(make(**{name: value})), name
        assert make(device="meta").device.type == "meta"
    assert keywords_of(FixedSchedule) == {"max_steps", "device"}
    assert FixedSchedule([0.5], max_steps=4).max_steps != FixedSchedule([0.5]).max_steps
    assert FixedSchedule([0.5], device="meta").ratios.is_meta
