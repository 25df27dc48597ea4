"""A loaded run is the run that was saved: its parts, its weights, its numbers to the last bit; what is not is said."""

import dataclasses
import json
import socket
import warnings
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import pytest
import torch

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
    Batch,
    Best,
    Checkpoints,
    ContextFreeSchedule,
    Critic,
    DenoisingPolicy,
    DiffusionNFT,
    Full,
    Groups,
    Log,
    LoRA,
    Muon,
    Noising,
    Only,
    PerPrompt,
    Policy,
    PromptMeans,
    Rollouts,
    Softmax,
    Steps,
    Window,
)
from agents.runs.manifest import MANIFEST_FILE, write_manifest
from agents.runs.saving import STATE_FILE
from diffusion_gym.samplers import CPS, DDIM
from tests.agents.policies_of_others import WithCritic
from tests.tiny import make_tiny_stable_diffusion

LANES, STEPS = 4, 4
FOUR = {"rollouts": Rollouts(samples=4), "batch_size": 4}


def make_env(**arguments):
    arguments = {
        "model": "mixture",
        "num_steps": STEPS,
        "reward": "brightness",
        "prompts": ["north", "west"],
        "autoreset_mode": "DISABLED",
        **arguments,
    }
    return gym.make_vec("DenoisingMDP-v0", num_envs=LANES, **arguments)


def make(algorithm=DDPOIS, *, seed=3, policy=None, **arguments):
    env = make_env()
    return algorithm(policy or DenoisingPolicy(env.unwrapped.model, seed=0), env, seed=seed, **{**FOUR, **arguments})


def trained(run):
    return [parameter.detach() for parameter in run.policy.parameters() if parameter.requires_grad]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(trained(one), trained(other), strict=True))


def learn(run, iterations):
    return run.learn(iterations * run.sizes.samples * STEPS, log_interval=0, reset_num_timesteps=False)


def rewrite(folder, change):
    """Change what a checkpoint's state file says, and let its manifest agree."""
    state = json.loads((folder / STATE_FILE).read_text())
    change(state)
    (folder / STATE_FILE).write_text(json.dumps(state))
    (folder / MANIFEST_FILE).unlink()
    write_manifest(folder)


# parts of every kind
PARTS = [
    (
        DDPOIS,
        {"sampler": DDIM(0.5), "adaptation": LoRA(rank=2, alpha=3.0)},
        {
            "optimizer": Muon(
                weight_decay=1e-3, betas=(0.8, 0.999), warmup_updates=2, max_grad_norm=0.5, ema_decay=0.9
            ),
            "advantages": PerPrompt(8, 2, clip=3.0, center=True),
            "steps": Steps(window=Window(2, within=(0, 3))),
            "kl": KL(0.1, target=0.5, horizon=5.0),
            "rollouts": Rollouts(
                8, group_size=2, prompt_sampling="round_robin", device="cpu", dtype="float16", micro_batch_size=3
            ),
            "log": Log(images=2, x_axis="reward_queries"),
            "stop_kl": 10.0,
            "log_prob_reduction": "sum",
            "n_epochs": 2,
        },
    ),
    (DDPOSF, {}, {"advantages": Batch(clip=None), "steps": Steps(fraction=0.5), "kl": KL(0.1, place="exact")}),
    (
        RLOO,
        {"adaptation": Only("bias")},
        {
            "advantages": Groups(scale="group", clip=2.0),
            "ratio": "step",
            "clip_range": 0.01,
            "rollouts": Rollouts(8, group_size=2, same_noise=True, num_starts=3, async_rewards=True),
        },
    ),
    (GRPO, {"sampler": CPS(0.6)}, {"rollouts": Rollouts(4, group_size=2), "kl": KL(0.1, place="reward")}),
    (DPOK, {}, {"rollouts": Rollouts(4), "advantages": Critic(16, n_epochs=2, seed=3)}),
    (DPOK, {}, {"rollouts": Rollouts(4, group_size=2), "steps": Steps(weights="inverse_sensitivity")}),
    (RWR, {}, {"weights": Softmax(0.5, normalise=False, per_prompt=True), "noising": Noising(time_range=(0.1, 0.9))}),
    (RWR, {}, {"weights": Best(0.5), "noising": Noising(draws=2, common=True, guidance_scale=1.0)}),
    (
        DiffusionNFT,
        {"sampler": DDIM(0.0)},
        {"advantages": PromptMeans(2.0), "beta": 0.5, "optimizer": AdamW(on_nonfinite="skip")},
    ),
    (DiffusionNFT, {}, {"advantages": PerPrompt(8, 2), "kl_coefficient": 0.0, "max_decay": 0.1}),
]


@pytest.mark.filterwarnings("ignore:some prompts have one image")
@pytest.mark.parametrize(("algorithm", "of_policy", "parts"), PARTS)
def test_a_loaded_run_has_equal_parts_and_goes_on_bit_for_bit(mixture, tmp_path, algorithm, of_policy, parts):
    """Weights, average, optimizer, statistics, coefficient: all files of the checkpoints that follow are the same."""
    run = make(algorithm, policy=DenoisingPolicy(mixture, seed=0, **of_policy), learning_rate=1e-3, **parts)
    start = [weight.clone() for weight in trained(run)]
    learn(run, 2).save(tmp_path / "run")
    again = algorithm.load(tmp_path / "run", make_env())
    for field in dataclasses.fields(algorithm):
        if field.name not in ("policy", "env", "_"):
            assert getattr(again, field.name) == getattr(run, field.name), field.name
    for name, part in parts.items():
        assert getattr(again, name) == part, name
    for name in ("sampler", "adaptation", "guidance_scale", "precision"):
        assert getattr(again.policy, name) == getattr(run.policy, name), name
    assert again.sizes == run.sizes
    for name, one in (("whole", run), ("resumed", again)):
        learn(one, 2).save(tmp_path / name)
    assert not all(torch.equal(one, other) for one, other in zip(trained(run), start, strict=True))
    assert (tmp_path / "resumed" / MANIFEST_FILE).read_text() == (tmp_path / "whole" / MANIFEST_FILE).read_text()


def test_a_manifest_lists_all_files_of_a_checkpoint(tmp_path):
    make(optimizer=AdamW(ema_decay=0.9)).save(tmp_path / "run")
    listed = json.loads((tmp_path / "run" / MANIFEST_FILE).read_text())["files"]
    files = {path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert files == {*listed, MANIFEST_FILE}
    assert {STATE_FILE, "optimizer.safetensors", "averaged_weights.safetensors", "policy.json"} < files


@pytest.mark.parametrize("name", ["Adam", "AdamWeight", "Rollout", "subprocess.Popen"])
def test_a_part_that_there_is_not_is_refused_by_its_name(tmp_path, name):
    make().save(tmp_path / "run")
    rewrite(tmp_path / "run", lambda state: state["hyperparameters"]["optimizer"].update(part=name))
    with pytest.raises(ValueError, match=f"unknown Part '{name}': allowed are .*'AdamW'"):
        DDPOIS.load(tmp_path / "run", make_env())


@pytest.mark.parametrize(
    ("algorithm", "names"),
    [(DDPOIS, ["optimizer", "rollouts", "advantages", "steps", "kl"]), (RWR, ["weights", "noising", "log"])],
)
def test_a_part_of_another_kind_is_refused(tmp_path, algorithm, names):
    make(algorithm).save(tmp_path / "run")
    saved = json.loads((tmp_path / "run" / STATE_FILE).read_text())["hyperparameters"]
    for name in names:
        wrong = {**saved, name: {"part": "Window", "size": 2, "within": None}}
        rewrite(tmp_path / "run", lambda state, wrong=wrong: state.update(hyperparameters=wrong))
        with pytest.raises(TypeError, match=rf"{name} must be .*got Window\(size=2\)"):
            algorithm.load(tmp_path / "run", make_env())


def test_what_is_given_to_load_takes_the_place_of_what_was_saved(tmp_path):
    make(learning_rate=lambda remaining: 1e-3 * remaining).save(tmp_path / "run")
    env = make_env()
    with pytest.raises(ValueError, match=r"the learning rate of .* was a callable: give it again"):
        DDPOIS.load(tmp_path / "run", env)
    rollouts = Rollouts(samples=8, group_size=2)
    run = DDPOIS.load(tmp_path / "run", env, learning_rate=2e-3, batch_size=2, rollouts=rollouts, verbose=1)
    assert (run.learning_rate, run.batch_size, run.rollouts, run.verbose, run.seed) == (2e-3, 2, rollouts, 1, 3)


def test_a_run_of_another_algorithm_is_named(tmp_path):
    make().save(tmp_path / "run")
    with pytest.raises(ValueError, match="is a run of DDPOIS, not of DDPOSF"):
        DDPOSF.load(tmp_path / "run", make_env())


def test_what_is_saved_is_numbers_and_text(tmp_path):
    """Nothing that could run code; numpy's numbers are Python's."""
    run = make(learning_rate=np.float64(1e-3), clip_range=np.float32(0.5), n_epochs=np.int64(2))
    run.save(tmp_path / "run.zip")  # SB3's CheckpointCallback adds that
    assert not (tmp_path / "run.zip").exists()
    kinds = {path.suffix for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert kinds == {".json", ".safetensors"}
    again = DDPOIS.load(tmp_path / "run.zip", make_env())
    assert (again.learning_rate, again.clip_range, again.n_epochs) == (1e-3, 0.5, 2)


# the reference of a KL divergence
def moved(model):
    """Return a policy that is not the model's."""
    policy = DenoisingPolicy(model, seed=1)
    with torch.no_grad():
        policy.denoiser.last.bias += 0.1
    return policy


@pytest.mark.parametrize("place", ["loss", "exact", "reward"])
def test_a_reference_that_was_given_is_given_again(mixture, tmp_path, place):
    env = make_env(model=mixture)
    kl = KL(1.0, place=place, reference=moved(mixture), target=0.5)
    run = DDPOIS(DenoisingPolicy(mixture, seed=0), env, learning_rate=1e-3, kl=kl, seed=3, **FOUR)
    learn(run, 1).save(tmp_path / "run")
    with pytest.raises(ValueError, match=r"KL divergence is to a policy that was given to it: give it again, refere"):
        DDPOIS.load(tmp_path / "run", env)
    reference = moved(mixture)
    again = DDPOIS.load(tmp_path / "run", env, reference=reference)
    assert again.penalty.reference is reference
    assert again.kl == dataclasses.replace(kl, reference=reference)
    assert again.penalty.coefficient == run.penalty.coefficient != kl.coefficient
    other = DDPOIS.load(tmp_path / "run", env, reference=DenoisingPolicy(mixture))
    assert same(learn(run, 1), learn(again, 1))
    assert not same(run, learn(other, 1))


@pytest.mark.parametrize("algorithm", [DDPOIS, RWR])
def test_a_reference_of_a_run_that_is_pulled_to_none_is_refused(mixture, tmp_path, algorithm):
    make(algorithm).save(tmp_path / "run")
    with pytest.raises(ValueError, match="has no KL divergence: reference= has no effect"):
        algorithm.load(tmp_path / "run", make_env(model=mixture), reference=moved(mixture))


def test_a_copy_that_is_the_reference_is_part_of_the_checkpoint(mixture, tmp_path):
    """A schedule's own first numbers are nowhere else."""
    env = gym.make_vec(
        "TimePredictionMDP-v0", num_envs=4, model=mixture, max_steps=3, reward="brightness", autoreset_mode="DISABLED"
    )
    arguments = {"rollouts": Rollouts(group_size=2), "kl": KL(0.1), "learning_rate": 0.1, "seed": 3}
    run = RLOO(ContextFreeSchedule([0.5] * 3, seed=0), env, **arguments).learn(1, log_interval=0)
    run.save(tmp_path / "run")
    assert (tmp_path / "run" / "reference" / "policy.json").is_file()
    again = RLOO.load(tmp_path / "run", env)
    kept, expected = (list(one.penalty.reference.parameters()) for one in (again, run))
    assert all(torch.equal(one, other) for one, other in zip(kept, expected, strict=True))
    assert not all(torch.equal(one, other) for one, other in zip(kept, trained(again), strict=True))
    for one in (run, again):
        one.learn(1, log_interval=0, reset_num_timesteps=False)
    assert same(run, again)


# what subclasses add
def test_a_run_with_a_subclass_as_policy_goes_on_exactly(tmp_path):
    env = make_env()
    run = learn(DDPOIS(WithCritic(env.unwrapped.model), env, seed=0, **FOUR), 1)
    run.save(tmp_path / "run")
    with pytest.raises(ValueError, match=r"holds a WithCritic, which is none of .* policy=…"):
        DDPOIS.load(tmp_path / "run", env)
    assert same(run, DDPOIS.load(tmp_path / "run", env, policy=WithCritic(env.unwrapped.model)))


class Own(Policy):
    """A policy whose author knows nothing of `write_config`."""

    def __init__(self, policy):
        super().__init__(seed=0)
        self.inner = policy
        self.device = policy.device

    def distribution(self, observation):
        return self.inner.distribution(observation)

    def save(self, folder):
        torch.save(self.inner.denoiser.state_dict(), folder / "own.pt")

    def load_weights(self, folder):
        self.inner.denoiser.load_state_dict(torch.load(folder / "own.pt", weights_only=True))

    @classmethod
    def load(cls, folder, model=None, device="cpu"):
        raise NotImplementedError


def test_an_own_policy_needs_no_more_than_save_and_load_weights(tmp_path):
    env = make_env()
    run = learn(DDPOIS(Own(DenoisingPolicy(env.unwrapped.model, seed=0)), env, seed=0, **FOUR), 1)
    run.save(tmp_path / "run")
    with pytest.raises(ValueError, match=r"holds a Own, which is none of .*policy=…"):
        DDPOIS.load(tmp_path / "run", env)
    assert same(run, DDPOIS.load(tmp_path / "run", env, policy=Own(DenoisingPolicy(env.unwrapped.model))))


class Scaled(DDPOSF):  # type: ignore[misc]
    """An algorithm whose argument is no field."""

    def __init__(self, policy, env, *, factor=2.0, **options):
        super().__init__(policy, env, **options)
        self.factor = factor


@dataclass(kw_only=True, eq=False, repr=False)
class WithField(DDPOSF):  # type: ignore[misc]
    """An algorithm whose argument is one."""

    factor: float = 2.0


def test_an_algorithms_arguments_are_saved_or_the_run_is_refused_before_it_begins(tmp_path):
    env = make_env()
    run = Scaled(DenoisingPolicy(env.unwrapped.model), env, factor=1.5, **FOUR)
    with pytest.raises(TypeError, match=r"Scaled would be loaded without its own arguments \['factor'\]"):
        run.learn(4 * STEPS, Checkpoints(tmp_path / "runs"), log_interval=0)
    assert run.num_timesteps == 0
    with pytest.raises(TypeError, match=r"make them fields, with @dataclass\(kw_only=True"):
        run.save(tmp_path / "run")
    WithField(DenoisingPolicy(env.unwrapped.model), env, factor=1.5, **FOUR).save(tmp_path / "run")
    assert WithField.load(tmp_path / "run", env).factor == 1.5


def test_optimizer_state_of_other_weights_is_refused_by_name(tmp_path):
    env = make_env()
    model = env.unwrapped.model
    learn(DDPOIS(DenoisingPolicy(model, adaptation=Only("bias")), env, seed=0, **FOUR), 1).save(tmp_path / "run")
    with pytest.raises(ValueError, match=r"optimizer\.safetensors is the state of other weights"):
        DDPOIS.load(tmp_path / "run", env, policy=DenoisingPolicy(model))


# environments of other kinds
@pytest.mark.parametrize(
    ("make_other", "error", "message"),
    [
        (
            lambda tiny: gym.make_vec("DenoisingMDP-v0", num_envs=4, model=tiny),
            ValueError,
            "saved from one of 'mixture'",
        ),
        (lambda _: gym.make_vec("TimePredictionMDP-v0", num_envs=4, model="mixture"), ValueError, "does not fit"),
        (lambda _: gym.make("DenoisingMDP-v0", model="mixture"), TypeError, "env must be a torch vector environment"),
    ],
)
def test_a_run_is_not_loaded_into_another_kind_of_environment(tmp_path, make_other, error, message):
    make(learning_rate=1e-3).save(tmp_path / "run")
    other = make_other(make_tiny_stable_diffusion(tmp_path / "tiny"))
    with pytest.raises(error, match=message):
        DDPOIS.load(tmp_path / "run", other)


def inverted(images, prompts, metadata):
    return -images.mean((1, 2, 3))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"reward": "incompressibility"}, "reward is 'incompressibility', and was 'brightness'"),
        ({"reward": inverted}, "reward is 'inverted', and was 'brightness'"),
        ({"prompts": ["west", "north"]}, "SHA-256 of the prompts"),
        ({"prompts": ["north"]}, "number of prompts is 1, and was 2"),
        ({"num_steps": 2}, "num_steps is 2, and was 4"),
        ({"negative_prompt": "south"}, "negative_prompt is 'south', and was ''"),
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16', and was 'float32'"),
    ],
)
def test_what_is_another_in_the_environment_of_a_resumed_run_is_said(tmp_path, changed, message):
    make().save(tmp_path / "run")
    with pytest.warns(UserWarning, match=f"goes on in another environment: .*{message}"):
        DDPOIS.load(tmp_path / "run", make_env(**changed))


def test_the_same_environment_made_in_other_words_is_no_other(tmp_path, mixture):
    make().save(tmp_path / "run")
    DDPOIS.load(
        tmp_path / "run",
        make_env(
            model=mixture,
            dtype="float32",
            negative_prompt="",
            device="cpu",
            autoreset_mode="NEXT_STEP",
            prompts=("north", "west"),
        ),
    )  # warnings are errors


# networks
@pytest.mark.parametrize("adaptation", [LoRA(), Full()])
def test_saving_and_loading_ask_no_network(tmp_path, monkeypatch, adaptation):
    folder = make_tiny_stable_diffusion(tmp_path / "tiny")
    env = make_env(model=str(folder), prompts=["a fox", "a cat"])

    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    with warnings.catch_warnings(record=True) as caught:
        policy = DenoisingPolicy(env.unwrapped.model, adaptation=adaptation)
        DDPOIS(policy, env, **FOUR).save(tmp_path / "run")
        DDPOIS.load(tmp_path / "run", env)
    assert not caught
