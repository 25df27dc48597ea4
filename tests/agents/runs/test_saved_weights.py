"""What is saved is loaded, all of it, or the loading says by name what is not there."""

import os
import shutil
import socket
import stat
import warnings

import gymnasium as gym
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import diffusion_gym  # noqa: F401
from agents import DDPOIS, Checkpoints, ContextFreeSchedule, DenoisingPolicy, FixedSchedule, TimePredictor
from agents.ddpo import DDPOSF
from agents.policies.base import Policy
from diffusion_gym.models import load_model
from tests.tiny import make_tiny_stable_diffusion

STEPS = 3


def make_env(**arguments):
    arguments = {
        "model": "mixture",
        "num_steps": STEPS,
        "reward": "brightness",
        "prompts": ["north", "west"],
        **arguments,
    }
    return gym.make_vec("DenoisingMDP-v0", num_envs=4, **arguments)


@pytest.fixture(scope="module")
def mixture():
    return load_model("mixture")


def half(tensors):
    return dict(list(tensors.items())[: len(tensors) // 2])


def nan(tensors):
    return {name: torch.full_like(tensor, float("nan")) for name, tensor in tensors.items()}


def make_policies(mixture):
    env = gym.make_vec("TimePredictionMDP-v0", num_envs=2, model=mixture, reward="brightness", prompts=["north"])
    return {
        "denoiser/diffusion_pytorch_model": DenoisingPolicy(mixture),
        "schedule": ContextFreeSchedule([0.5, 0.4]),
        "time_predictor": TimePredictor(env.single_observation_space, seed=0),
    }


@pytest.mark.parametrize("name", ["denoiser/diffusion_pytorch_model", "schedule", "time_predictor"])
@pytest.mark.parametrize(("damage", "message"), [(half, "are missing"), (nan, "are NaN or infinite")])
def test_weights_that_are_not_whole_are_refused_by_name(tmp_path, mixture, name, damage, message):
    policy = make_policies(mixture)[name]
    policy.save(tmp_path)
    file = tmp_path / f"{name}.safetensors"
    save_file(damage(load_file(file)), file)
    with pytest.raises(ValueError, match=rf"holds no weights for .*{message} \("):
        type(policy).load(tmp_path, mixture)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=f"{file} is damaged or not whole"):
        policy.load_weights(tmp_path)


def test_weights_of_another_shape_are_refused_by_name(tmp_path):
    ContextFreeSchedule([0.5, 0.4]).save(tmp_path / "free")
    FixedSchedule([0.5, 0.4]).save(tmp_path / "fixed")
    with pytest.raises(ValueError, match=r"logits \[2, 2\] instead of \[3, 2\]"):
        ContextFreeSchedule([0.5, 0.4, 0.3]).load_weights(tmp_path / "free")
    with pytest.raises(ValueError, match="has 2 ratios, this schedule 1"):
        FixedSchedule([0.5]).load_weights(tmp_path / "fixed")


@pytest.mark.parametrize(
    ("text", "message"), [("{", "policy.json is damaged"), ("{}", "policy.json does not say which")]
)
def test_a_damaged_description_of_a_policy_is_named(tmp_path, text, message):
    (tmp_path / "policy.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        FixedSchedule.load(tmp_path)


@pytest.mark.parametrize("use_lora", [True, False])
def test_another_model_of_the_same_shape_is_said(tmp_path, use_lora):
    first, second = (load_model(make_tiny_stable_diffusion(tmp_path / name)) for name in ("first", "second"))
    with torch.no_grad():
        for parameter in second.denoiser.parameters():
            parameter.mul_(1.05)
    DenoisingPolicy(first, use_lora=use_lora).save(tmp_path / "policy")
    with pytest.warns(UserWarning, match="trained on a model .*first.* whose denoiser has other weights than .*second"):
        DenoisingPolicy.load(tmp_path / "policy", second)
    DenoisingPolicy.load(tmp_path / "policy", load_model(first.path, dtype="bfloat16"))  # warnings are errors
    DenoisingPolicy.load(tmp_path / "policy", load_model(first.path, dtype="float16"))


def test_optimizer_state_of_other_weights_is_refused_by_name(tmp_path):
    env = make_env()
    model = env.unwrapped.model
    run = DDPOIS(DenoisingPolicy(model, trained=("bias",)), env, samples_per_epoch=4, batch_size=4, seed=0)
    run.learn(4 * STEPS, log_interval=0).save(tmp_path / "run")
    with pytest.raises(ValueError, match=r"optimizer\.safetensors is the state of other weights"):
        DDPOIS.load(tmp_path / "run", env, policy=DenoisingPolicy(model))


class WithCritic(DenoisingPolicy):
    """A policy with one more network, and one more argument."""

    def __init__(self, model, *, width=4, **options):
        super().__init__(model, **options)
        self.width = width
        self.critic = nn.Linear(2, width)

    def saved_arguments(self):
        return {"width": self.width}


class Forgetful(DenoisingPolicy):
    def __init__(self, model, *, temperature=1.0, **options):
        super().__init__(model, **options)


@pytest.mark.parametrize("use_lora", [True, False])
def test_a_policys_further_networks_and_arguments_are_saved_too(tmp_path, mixture, use_lora):
    policy = WithCritic(mixture, width=7, use_lora=use_lora)
    policy.save(tmp_path)
    again = WithCritic.load(tmp_path, mixture)
    assert again.width == 7
    assert torch.equal(again.critic.weight, policy.critic.weight)
    (tmp_path / "further_weights.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"further_weights.* holds no weights for WithCritic: of 2 weights 2 are missing"
    ):
        policy.load_weights(tmp_path)


def test_a_policys_arguments_that_would_be_lost_are_refused(tmp_path, mixture):
    with pytest.raises(TypeError, match=r"Forgetful would be loaded without its own arguments \['temperature'\]"):
        Forgetful(mixture, temperature=2.0).save(tmp_path)


def test_a_run_with_a_subclass_as_policy_goes_on_exactly(tmp_path):
    env = make_env()
    run = DDPOIS(WithCritic(env.unwrapped.model), env, samples_per_epoch=4, batch_size=4, seed=0)
    run.learn(4 * STEPS, log_interval=0).save(tmp_path / "run")
    with pytest.raises(ValueError, match=r"holds a WithCritic, which is none of .* policy=…"):
        DDPOIS.load(tmp_path / "run", env)
    again = DDPOIS.load(tmp_path / "run", env, policy=WithCritic(env.unwrapped.model))
    for one, other in zip(run.policy.parameters(), again.policy.parameters(), strict=True):
        assert torch.equal(one, other)


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
    run = DDPOIS(Own(DenoisingPolicy(env.unwrapped.model, seed=0)), env, samples_per_epoch=4, batch_size=4, seed=0)
    run.learn(4 * STEPS, log_interval=0).save(tmp_path / "run")
    with pytest.raises(ValueError, match=r"holds a Own, which is none of .*policy=…"):
        DDPOIS.load(tmp_path / "run", env)
    again = DDPOIS.load(tmp_path / "run", env, policy=Own(DenoisingPolicy(env.unwrapped.model)))
    for one, other in zip(run.policy.parameters(), again.policy.parameters(), strict=True):
        assert torch.equal(one, other)


class Scaled(DDPOSF):  # type: ignore[misc]
    def __init__(self, policy, env, *, factor=2.0, **options):
        super().__init__(policy, env, **options)
        self.factor = factor


class Remembered(Scaled):
    def __init__(self, policy, env, *, factor=2.0, **options):
        super().__init__(policy, env, factor=factor, **options)
        self.remember(factor=factor)


def test_an_algorithms_arguments_are_saved_or_the_run_is_refused_before_it_begins(tmp_path):
    env = make_env()
    run = Scaled(DenoisingPolicy(env.unwrapped.model), env, factor=1.5, samples_per_epoch=4)
    with pytest.raises(TypeError, match=r"Scaled would be loaded without its own arguments \['factor'\]"):
        run.learn(4 * STEPS, Checkpoints(tmp_path / "runs"), log_interval=0)
    assert run.num_timesteps == 0
    with pytest.raises(TypeError, match=r"self.remember\(factor=factor, …\)"):
        run.save(tmp_path / "run")
    Remembered(DenoisingPolicy(env.unwrapped.model), env, factor=1.5, samples_per_epoch=4).save(tmp_path / "run")
    assert Remembered.load(tmp_path / "run", env).factor == 1.5


def inverted(images, prompts, metadata):
    return -images.mean((1, 2, 3))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"reward": "incompressibility"}, "reward is 'incompressibility', and was 'brightness'"),
        ({"reward": inverted}, "reward is 'inverted', and was 'brightness'"),
        ({"prompts": ["west", "north"]}, "SHA-256 of the prompts"),
        ({"prompts": ["north"]}, "number of prompts is 1, and was 2"),
        ({"num_steps": 2}, "num_steps is 2, and was 3"),
        ({"negative_prompt": "south"}, "negative_prompt is 'south', and was ''"),
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16', and was 'float32'"),
    ],
)
def test_what_is_another_in_the_environment_of_a_resumed_run_is_said(tmp_path, changed, message):
    env = make_env()
    DDPOIS(DenoisingPolicy(env.unwrapped.model), env, samples_per_epoch=4, batch_size=4).save(tmp_path / "run")
    with pytest.warns(UserWarning, match=f"goes on in another environment: .*{message}"):
        DDPOIS.load(tmp_path / "run", make_env(**changed))


def test_the_same_environment_made_in_other_words_is_no_other(tmp_path, mixture):
    env = make_env()
    DDPOIS(DenoisingPolicy(env.unwrapped.model), env, samples_per_epoch=4, batch_size=4).save(tmp_path / "run")
    DDPOIS.load(
        tmp_path / "run",
        make_env(
            model=mixture,
            dtype="float32",
            negative_prompt="",
            device="cpu",
            autoreset_mode="DISABLED",
            prompts=("north", "west"),
        ),
    )  # warnings are errors


def without(kinds, number):
    fsync = os.fsync

    def refuse(descriptor):
        if kinds(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    return refuse


@pytest.mark.parametrize(
    ("kinds", "number"),
    [(stat.S_ISDIR, 22), (stat.S_ISDIR, 9), (stat.S_ISDIR, 95), (stat.S_ISREG, 22), (lambda _: True, 38)],
)
def test_runs_are_saved_where_disks_know_no_sync(tmp_path, monkeypatch, kinds, number):
    monkeypatch.setattr(os, "fsync", without(kinds, number))
    env = make_env()
    checkpoints = Checkpoints(tmp_path / "run")
    run = DDPOIS(DenoisingPolicy(env.unwrapped.model), env, samples_per_epoch=4, batch_size=4)
    run.learn(8 * STEPS, checkpoints, log_interval=0)
    assert (len(checkpoints.found()), checkpoints.failed) == (2, 0)


def test_folders_that_cannot_be_opened_are_not_synced(tmp_path, monkeypatch):
    """As on Windows."""
    opened = os.open

    def refuse(path, *arguments):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments)

    env = make_env()
    run = DDPOIS(DenoisingPolicy(env.unwrapped.model), env, samples_per_epoch=4, batch_size=4)
    with monkeypatch.context() as patch:
        patch.setattr("agents.runs.files.os.open", refuse)
        run.save(tmp_path / "run")
    assert DDPOIS.load(tmp_path / "run", env).seed == run.seed


@pytest.mark.parametrize(("kinds", "number"), [(stat.S_ISREG, 5), (stat.S_ISDIR, 28), (stat.S_ISREG, 9)])
def test_a_disk_that_did_not_write_is_an_error(tmp_path, monkeypatch, kinds, number):
    env = make_env()
    run = DDPOIS(DenoisingPolicy(env.unwrapped.model), env, samples_per_epoch=4, batch_size=4)
    run.save(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "before")
    run.seed += 1
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", without(kinds, number))
        with pytest.raises(OSError, match=os.strerror(number)):
            run.save(tmp_path / "run")
    assert (tmp_path / "run" / "manifest.json").read_bytes() == (tmp_path / "before" / "manifest.json").read_bytes()


@pytest.mark.parametrize("use_lora", [True, False])
def test_saving_and_loading_ask_no_network(tmp_path, monkeypatch, use_lora):
    folder = make_tiny_stable_diffusion(tmp_path / "tiny")
    env = make_env(model=str(folder), prompts=["a fox", "a cat"])

    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    with warnings.catch_warnings(record=True) as caught:
        policy = DenoisingPolicy(env.unwrapped.model, use_lora=use_lora)
        run = DDPOIS(policy, env, samples_per_epoch=4, batch_size=4)
        run.save(tmp_path / "run")
        DDPOIS.load(tmp_path / "run", env)
    assert not caught


def test_contents_of_older_checkpoints_are_not_read_again_when_a_training_starts(tmp_path, monkeypatch):
    env = make_env()
    run = DDPOIS(DenoisingPolicy(env.unwrapped.model), env, samples_per_epoch=4, batch_size=4)
    run.learn(8 * STEPS, Checkpoints(tmp_path / "run"), log_interval=0)
    hashed = []
    monkeypatch.setattr("agents.runs.manifest._sha256", lambda file: hashed.append(file))
    run.learn(0, Checkpoints(tmp_path / "run"), reset_num_timesteps=False, log_interval=0)
    assert hashed == []
