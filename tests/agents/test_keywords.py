"""No keyword is without effect: each one is changed alone, and then what a run does differs, or it is refused."""

import inspect
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import gymnasium as gym
import pytest
import torch
from stable_baselines3.common.logger import KVWriter, Logger

import diffusion_gym  # noqa: F401
from agents import (
    DDPOIS,
    DDPOSF,
    RLOO,
    RWR,
    ContextFreeSchedule,
    DenoisingPolicy,
    DiffusionNFT,
    FixedSchedule,
    TimePredictor,
)
from diffusion_gym.models import load_model
from tests.tiny import make_tiny_stable_diffusion


@pytest.fixture(scope="module")
def mixture():
    return load_model("mixture")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return load_model(make_tiny_stable_diffusion(tmp_path_factory.mktemp("tiny") / "model"))


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
    files: list[str] = field(default_factory=list)
    printed: str = ""

    def write(self, key_values, key_excluded, step=0):
        self.x_axis.append(step)
        self.pictures |= {name for name in key_values if name.startswith("images/")}


def weights_of(policy):
    return torch.cat([parameter.detach().flatten() for parameter in policy.parameters() if parameter.requires_grad])


def the_weights(trace):
    return trace.weights


@dataclass(frozen=True)
class Change:
    """Another value of a keyword, the settings under which it matters, and what then differs."""

    value: Any
    given: Mapping[str, Any] = field(default_factory=dict)
    sign: Callable[[Trace], Any] = the_weights
    refused: tuple[type[Exception], str] | None = None


TWICE = {"n_epochs": 2, "learning_rate": 0.1}
PENALISED = {"kl_coefficient": 0.5}
ALL = {
    "optimizer": Change("muon"),
    "learning_rate": Change(3e-3),
    "warmup_updates": Change(3),
    "samples_per_epoch": Change(32),
    "batch_size": Change(8),
    "group_size": Change(2),
    "prompt_sampling": Change("round_robin"),
    "async_rewards": Change(True, sign=lambda trace: trace.rewarded_in_threads),
    "micro_batch_size": Change(3, sign=lambda trace: trace.passes),
    "rollout_device": Change("cpu", sign=lambda trace: trace.learner.storage.device),
    "rollout_dtype": Change("bfloat16"),
    "max_grad_norm": Change(1e-3),
    "adam_beta1": Change(0.5),
    "adam_beta2": Change(0.5),
    "adam_weight_decay": Change(10.0),
    "adam_epsilon": Change(1.0),
    "use_8bit_adam": Change(True, refused=(ImportError, "pip install bitsandbytes")),
    "ema_decay": Change(0.5, sign=lambda trace: trace.average),
    "on_nonfinite": Change("skip", sign=lambda trace: trace.learner.guard.on_nonfinite),
    "tensorboard_log": Change("", sign=lambda trace: len(trace.files) > 0),  # the test's folder
    "log_x_axis": Change("reward_queries", sign=lambda trace: trace.x_axis),
    "log_images": Change(0, sign=lambda trace: trace.pictures),
    "verbose": Change(1, sign=lambda trace: trace.printed),
    "seed": Change(5),
}
TRAJECTORIES = ALL | {
    "timestep_fraction": Change(0.5),
    "step_weights": Change("inverse_sensitivity"),
    "sde_window": Change(2),
    "sde_window_range": Change((1, 3), {"sde_window": 1}),
    "kl_coefficient": Change(5.0),
    "kl_place": Change("exact", PENALISED),
    "reference": Change(ContextFreeSchedule([0.5]), PENALISED),  # made in the test: of the environment's model
    "target_kl": Change(1e-5, PENALISED | TWICE),
    "kl_horizon": Change(1.0, PENALISED | TWICE | {"target_kl": 1e-5}),
    "stop_kl": Change(1e-6, TWICE),
    "n_epochs": Change(2),
    "log_prob_reduction": Change("sum"),
    "advantage_clip": Change(0.1),
}
DDPO = TRAJECTORIES | {
    "center_advantages": Change(True, {"per_prompt_min_count": 2}),
    "per_prompt_buffer_size": Change(2, {"per_prompt_min_count": 2}),
    "per_prompt_min_count": Change(2),
}
FORWARD = ALL | {
    "n_epochs": Change(2),
    "noise_draws": Change(2),
    "time_range": Change((0.5, 1.0)),
    "common_noise": Change(True),
}
KEYWORDS = {
    DDPOSF: {name: change for name, change in DDPO.items() if name != "n_epochs"},
    DDPOIS: DDPO | {"clip_range": Change(1e-6, TWICE)},
    RLOO: TRAJECTORIES
    | {
        "same_noise": Change(False),
        "num_starts": Change(1),
        "ratio": Change("trajectory"),
        "clip_range": Change(0.3, TWICE),
        "baseline": Change("group_mean"),
        "advantage_scale": Change("group"),
        "log_prob_reduction": Change("sum", {"adam_epsilon": 1e-2}),
    },
    RWR: FORWARD
    | {
        "inverse_temperature": Change(3.0),
        "normalise_rewards": Change(False),
        "per_prompt": Change(True),
        "best_share": Change(0.25),
    },
    DiffusionNFT: FORWARD
    | {
        "beta": Change(0.5),
        "advantage_clip": Change(0.5),
        "kl_coefficient": Change(10.0),
        "max_decay": Change(0.0, {"learning_rate": 0.1}),
        "per_prompt_buffer_size": Change(4),
        "per_prompt_min_count": Change(16, {"per_prompt_buffer_size": 16}),
    },
}
CASES = [(kind, name) for kind, table in KEYWORDS.items() for name in table]


def keywords_of(kind):
    """Return the keywords of a class, those of its `**options` too."""
    names = set()
    for parameter in inspect.signature(kind).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            names.add(parameter.name)
        for options in get_args(parameter.annotation) if parameter.kind is parameter.VAR_KEYWORD else ():
            names |= options.__annotations__.keys()
    return names


@pytest.mark.parametrize("kind", KEYWORDS)
def test_the_table_has_every_keyword(kind):
    assert keywords_of(kind) == KEYWORDS[kind].keys()


def run(kind, model, capsys=None, folder=None, reference=None, **settings):
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
    sizes = {"samples_per_epoch": 16, "batch_size": 16, "group_size": 4, "learning_rate": 1e-2, "adam_epsilon": 1e-3}
    if reference is not None:
        settings["reference"] = reference
    learner = kind(policy, env, **{"seed": 0, **sizes, **settings})
    if folder is None and not settings.get("verbose"):
        learner.set_logger(Logger(None, [trace]))
    learner.learn(3 * 4 * learner.samples_per_epoch)
    trace.learner, trace.weights = learner, weights_of(policy)
    if learner.average is not None:
        with learner.averaged_weights():
            trace.average = weights_of(policy)
    if folder is not None:
        learner.logger.close()
        trace.files = [str(file) for file in folder.rglob("*") if file.is_file()]
    trace.printed = capsys.readouterr().out
    return trace


def differ(one, other):
    """Return whether two signs differ: weights by more than rounding could explain."""
    if isinstance(one, torch.Tensor):
        return one.shape != other.shape or float((one - other).abs().max()) > 1e-5
    return one != other


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_keyword_changes_what_a_run_does(mixture, capsys, tmp_path, kind, name):
    change = KEYWORDS[kind][name]
    value, folder, reference = change.value, None, None
    if name == "tensorboard_log":
        value = folder = tmp_path
        value = str(value)
    if name == "reference":
        reference = DenoisingPolicy(mixture, seed=0)
        reference.denoiser.last.bias.data += 0.5
        changed = {}
    else:
        changed = {name: value}
    if change.refused is not None:
        kind_of_error, message = change.refused
        with pytest.raises(kind_of_error, match=message):
            run(kind, mixture, capsys, **change.given, **changed)
        return
    before = run(kind, mixture, capsys, **change.given)
    after = run(kind, mixture, capsys, folder, reference, **{**change.given, **changed})
    assert differ(change.sign(before), change.sign(after))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (DDPOSF, {"kl_place": "exact"}, "kl_place='exact' has no effect: it needs a kl_coefficient above 0"),
        (DDPOIS, {"kl_horizon": 3.0}, "kl_horizon=3.0 has no effect: it needs target_kl"),
        (DDPOIS, {"kl_horizon": 3.0, "kl_coefficient": 0.1}, "kl_horizon=3.0 has no effect: it needs target_kl"),
        (
            DDPOIS,
            {"per_prompt_buffer_size": None, "per_prompt_min_count": 4},
            "per_prompt_min_count=4 has no effect: it needs the statistics of prompts",
        ),
        (
            DDPOSF,
            {"per_prompt_buffer_size": None, "center_advantages": True},
            "center_advantages=True has no effect: it needs the statistics of prompts",
        ),
        (RLOO, {"baseline": "group_mean", "advantage_scale": "rollout"}, "baseline='group_mean' has no effect"),
        (RWR, {"best_share": 0.1, "inverse_temperature": 2.0}, "inverse_temperature=2.0 has no effect: it needs soft"),
        (RWR, {"best_share": 0.1, "normalise_rewards": False}, "normalise_rewards=False has no effect: it needs soft"),
        (DiffusionNFT, {"per_prompt_min_count": 2}, "per_prompt_min_count=2 has no effect: it needs per_prompt_buffer"),
    ],
)
def test_what_would_have_no_effect_is_refused(mixture, capsys, kind, settings, message):
    with pytest.raises(ValueError, match=message):
        run(kind, mixture, capsys, **settings)


def test_rewards_that_nothing_hides_are_warned_of(mixture, capsys):
    with pytest.warns(UserWarning, match=r"async_rewards has no effect: .* \(8\) are drawn at once"):
        run(DDPOSF, mixture, capsys, samples_per_epoch=8, batch_size=8, async_rewards=True)


def test_adamws_numbers_are_refused_where_muon_takes_all_weights(mixture):
    env = gym.make_vec("DenoisingMDP-v0", num_envs=4, num_steps=2, model=mixture)
    policy = DenoisingPolicy(mixture, use_lora=True, seed=0)
    for name, value in (("adam_beta2", 0.9), ("adam_epsilon", 1e-6)):
        with pytest.raises(ValueError, match=f"{name}={value} has no effect: it needs a weight that is no matrix"):
            RWR(policy, env, optimizer="muon", **{name: value})


NUMBERS = {
    "max_grad_norm": (0.0, -1.0),
    "adam_beta1": (1.0, -0.1),
    "adam_beta2": (1.0, -0.1),
    "adam_weight_decay": (-0.1,),
    "adam_epsilon": (0.0,),
    "ema_decay": (0.0, 1.0),
    "learning_rate": (-1e-3,),
    "timestep_fraction": (0.0, 1.1),
    "kl_coefficient": (-0.1,),
    "target_kl": (0.0,),
    "kl_horizon": (0.5,),
    "stop_kl": (0.0,),
    "advantage_clip": (0.0,),
    "clip_range": (0.0,),
    "inverse_temperature": (0.0,),
    "best_share": (0.0, 1.1),
    "beta": (0.0,),
    "max_decay": (-0.1, 1.0),
}


def floats_of(kind):
    """Return the keywords of a class that take a float."""
    found = {}
    for parameter in inspect.signature(kind).parameters.values():
        found |= {parameter.name: parameter.annotation} if parameter.kind is parameter.KEYWORD_ONLY else {}
        for options in get_args(parameter.annotation) if parameter.kind is parameter.VAR_KEYWORD else ():
            found |= options.__annotations__
    floats = {name for name, annotation in found.items() if annotation is float or float in get_args(annotation)}
    return floats - {"time_range"}  # two of them


@pytest.mark.parametrize("kind", KEYWORDS)
def test_every_float_is_checked(mixture, kind):
    env = gym.make_vec("DenoisingMDP-v0", num_envs=4, num_steps=2, model=mixture, autoreset_mode="DISABLED")
    names = floats_of(kind)
    assert names <= NUMBERS.keys()
    for name in names:
        for value in (float("nan"), float("inf"), *NUMBERS[name]):
            sizes = {"samples_per_epoch": 4, "batch_size": 4}
            given = {"kl_coefficient": 0.1} if "kl_coefficient" in names and name != "kl_coefficient" else {}
            with pytest.raises(ValueError, match=rf"{name} must be .*got {value}"):
                kind(DenoisingPolicy(mixture, seed=0), env, **sizes, **given, **{name: value})


def test_what_a_schedule_returns_is_checked(mixture, capsys):
    for wrong in (float("nan"), -1.0):
        with pytest.raises(ValueError, match=f"learning_rate must be a finite number .*, got {wrong}"):
            run(RWR, mixture, capsys, learning_rate=lambda remaining, wrong=wrong: wrong if remaining < 1 else 0.1)


@pytest.mark.parametrize("kind", KEYWORDS)
def test_whole_numbers_are_whole(mixture, kind):
    env = gym.make_vec("DenoisingMDP-v0", num_envs=4, num_steps=2, model=mixture, autoreset_mode="DISABLED")
    for name in ("samples_per_epoch", "batch_size", "micro_batch_size", "group_size", "warmup_updates", "verbose"):
        for wrong in (1.5, 4.0, "4", True):
            with pytest.raises(ValueError, match=f"{name} must be an integer .*, got {wrong!r}"):
                kind(DenoisingPolicy(mixture, seed=0), env, **{name: wrong})
    with pytest.raises(ValueError, match="seed must be an integer of at least 0, got -1"):
        kind(DenoisingPolicy(mixture, seed=0), env, seed=-1)


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


LORA = {"use_lora": True, "seed": 0}
DENOISING = {
    "eta": (0.5, {}),
    "guidance_scale": (2.0, {}),
    "use_lora": (True, {}),
    "lora_rank": (2, LORA | {"lora_alpha": 4.0}),
    "lora_alpha": (8.0, LORA),
    "lora_targets": (("to_k",), LORA),
    "trained": (("bias",), {}),
    "mixed_precision": ("bf16", {}),
    "train_cfg": (False, {}),
    "seed": (1, {}),
}


def test_each_keyword_of_a_denoising_policy_has_an_effect(tiny):
    apart = {"gradient_checkpointing", "prompts", "negative_prompt"}
    assert keywords_of(DenoisingPolicy) == DENOISING.keys() | apart
    env = gym.make_vec("DenoisingMDP-v0", num_envs=2, num_steps=4, model=tiny)
    observation, _ = env.reset(seed=0)
    for name, (value, given) in DENOISING.items():
        before, after = (denoising_signs(tiny, observation, **{**given, **how}) for how in ({}, {name: value}))
        assert differ(before, after), name
    kept = [
        bytes_saved_for_the_backward_pass(DenoisingPolicy(tiny, seed=0, gradient_checkpointing=on), observation)
        for on in (False, True)
    ]
    assert kept[1] < kept[0] / 2
    texts = {"prompts": ["a cat", "a dog"], "observe_embeds": False}
    env = gym.make_vec("DenoisingMDP-v0", num_envs=2, num_steps=4, model=tiny, **texts)
    observation, _ = env.reset(seed=0, options={"prompt_id": [0, 1]})
    plain = {"prompts": texts["prompts"]}
    with pytest.raises(ValueError, match="the observation has no embeddings"):
        denoising_signs(tiny, observation)
    before, after = (denoising_signs(tiny, observation, **plain, negative_prompt=text) for text in ("", "a fox"))
    assert differ(before, after)


def test_what_would_have_no_effect_on_a_denoising_policy_is_refused(mixture):
    for name, value in (("lora_rank", 2), ("lora_alpha", 8.0), ("lora_targets", ("first",))):
        with pytest.raises(ValueError, match="need use_lora=True"):
            DenoisingPolicy(mixture, **{name: value})
    with pytest.raises(ValueError, match=r"train_cfg=False has no effect: it needs a guidance_scale above 1, got 1\.0"):
        DenoisingPolicy(mixture, train_cfg=False, guidance_scale=1.0)
    with pytest.raises(ValueError, match="negative_prompt='east' has no effect: it needs prompts"):
        DenoisingPolicy(mixture, negative_prompt="east")


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
