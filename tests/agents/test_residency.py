"""The loop stays on the device: proven on a fake accelerator, where mixing devices or waiting raises.

Under `FakeTensorMode` nothing is computed, `device="lazy"` is a device other than the CPU, and every operation that
mixes it with CPU tensors or reads a value from it raises.
"""

import contextlib
import traceback

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

import diffusion_gym  # noqa: F401
from agents import DDPOIS, DDPOSF, DenoisingPolicy
from agents.ddpo import _DDPO
from agents.logs import reports
from agents.updates.guard import GradientGuard
from diffusion_gym.envs.core import DiffusionVectorEnv
from diffusion_gym.envs.lanes import Lanes
from diffusion_gym.envs.time_prediction import TimePredictionVectorEnv
from diffusion_gym.transfer import to_device

DEVICE = "lazy"


def move(module):
    """Put a module's weights on the fake device (`module.to` cannot)."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=DEVICE)
                part._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=DEVICE)


def on_the_host(monkeypatch, owner, name):
    """Let a method that works on host values alone compute really, not in the fake mode."""
    method = getattr(owner, name)

    def real(*args, **kwargs):
        with unset_fake_temporarily():
            return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, real)


@pytest.fixture
def on_device(monkeypatch):
    """Return a function that enters the fake mode and puts an environment (and a policy) on its device."""
    with contextlib.ExitStack() as stack:
        on_the_host(monkeypatch, Lanes, "_draw")
        on_the_host(monkeypatch, DenoisingPolicy, "scored")

        def enter(env, policy=None):
            model = env.unwrapped.model
            networks = [model._vae, model._text_encoder, policy.denoiser if policy else model.denoiser]
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            model._rows.clear()
            model.schedule._tables.clear()
            for network in networks:
                move(network)
            for owner in (model, env.unwrapped, policy):
                if owner is not None:
                    owner.device = torch.device(DEVICE)

        yield enter


@pytest.fixture
def named_places(monkeypatch):
    """Stand in for the places that may wait, the reward, the update and the log, and count the visits."""
    visits = {"reward": 0, "update": 0, "log": 0}

    def visit(place, value):
        def read(*_):
            visits[place] += 1
            return value

        return read

    def read_numbers(tensors):
        visits["log"] += 1
        assert {tensor.device.type for tensor in tensors.values()} == {DEVICE}
        return {name: np.zeros(tuple(tensor.shape)) for name, tensor in tensors.items()}

    def read_flags(self, flags):
        visits["reward"] += 1
        assert flags.device.type == DEVICE
        return np.ones(tuple(flags.shape), dtype=bool)

    monkeypatch.setattr(DiffusionVectorEnv, "_read_flags", read_flags)
    monkeypatch.setattr(_DDPO, "_read_rewards", staticmethod(visit("reward", [0.1, 0.2, 0.3])))
    monkeypatch.setattr(GradientGuard, "_read_flags", staticmethod(visit("update", [True, True])))
    monkeypatch.setattr(reports, "read_numbers", read_numbers)
    return visits


class BlockingCopies(TorchDispatchMode):
    """Notes the copies from the host to the device that wait until all work queued there is done."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is torch.ops.aten._to_copy.default:
            source, target, waits = args[0], result, not kwargs.get("non_blocking", False)
        elif func is torch.ops.aten.copy_.default:
            target, source = args[:2]
            waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        else:
            return result
        if waits and source.device.type == "cpu" and target.device.type == DEVICE:
            self.found.append("".join(traceback.format_stack()[-40:]))
        return result


def make(reward="brightness", **arguments):
    return gym.make_vec("DenoisingMDP-v0", num_envs=3, num_steps=2, reward=reward, **arguments)


def test_fake_device_catches_what_it_should(on_device):
    """The proof below is worth something: a mixed device and a wait both raise."""
    on_device(make())
    values = torch.empty(3, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"(?i)device"):
        _ = values + torch.empty(3)
    with pytest.raises(DataDependentOutputException):
        bool(values.sum() > 0)


def test_blocking_copies_are_seen(on_device):
    on_device(make())
    with BlockingCopies() as copies:
        torch.zeros(3).to(DEVICE, non_blocking=True)
        assert not copies.found
        torch.zeros(3).to(DEVICE)
        torch.empty(3, device=DEVICE).copy_(torch.zeros(3))
    assert len(copies.found) == 2


def test_no_blocking_copy_in_a_middle_step_of_denoising(on_device, named_places):
    """Neither in the environment nor in a policy that draws its noise on the host."""
    env = gym.make_vec("DenoisingMDP-v0", num_envs=3, num_steps=4, reward="brightness")
    policy = DenoisingPolicy(env.unwrapped.model, seed=0)
    on_device(env, policy)
    observation, _ = env.reset(seed=0)
    with torch.no_grad():
        observation, *_ = env.step(policy.act(observation))  # the schedule's tables are sent once
    with BlockingCopies() as copies, torch.no_grad():
        for draws in (None, [torch.Generator().manual_seed(lane) for lane in range(3)]):
            observation, *_ = env.step(policy.act(observation, generators=draws))
    assert copies.found == []


def test_no_blocking_copy_in_a_middle_step_of_time_prediction(on_device, named_places, monkeypatch):
    monkeypatch.setattr(TimePredictionVectorEnv, "_read_ratios", lambda self, actions: np.full(3, 0.5))
    on_the_host(monkeypatch, TimePredictionVectorEnv, "_time_of")
    env = gym.make_vec("TimePredictionMDP-v0", num_envs=3, reward="brightness")
    on_device(env)
    env.reset(seed=0)
    env.step(torch.empty(3, 1, device=DEVICE))
    with BlockingCopies() as copies:
        env.step(torch.empty(3, 1, device=DEVICE))
    assert copies.found == []


def test_to_cuda_the_copies_are_pinned(monkeypatch):
    """Without pinned memory a copy to CUDA waits, whatever it is told; there is none here, so the calls are noted."""
    calls = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: calls.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, *, non_blocking: calls.append((device, non_blocking)))
    for device in ("cuda:0", "mps", "xpu"):
        to_device(np.zeros(3), torch.device(device))
    assert calls == [
        "pinned",
        (torch.device("cuda:0"), True),
        (torch.device("mps"), False),
        (torch.device("xpu"), True),
    ]


@pytest.mark.parametrize("mode", ["SAME_STEP", "NEXT_STEP", "DISABLED"])
def test_residency_of_a_random_rollout(on_device, named_places, mode):
    env = make(autoreset_mode=mode)
    on_device(env)
    observation, info = env.reset(seed=0)
    for _ in range(2):
        assert not info["ended"].any()
        assert {value.device.type for value in observation.values()} == {DEVICE}
        observation, reward, terminated, truncated, info = env.step(torch.empty(3, 4, 16, 16, device=DEVICE))
        assert {reward.device.type, terminated.device.type, truncated.device.type} == {DEVICE}
    assert info["ended"].all()
    assert named_places == {"reward": 2, "update": 0, "log": 0}  # the actions' flag, the reward's flag


def test_residency_of_time_prediction(on_device, named_places, monkeypatch):
    """One wait a step, for the ratios; the lanes of the fake device all walk at one pace."""
    waits = []
    monkeypatch.setattr(TimePredictionVectorEnv, "_read_ratios", lambda self, a: waits.append(1) or np.full(3, 0.01))
    on_the_host(monkeypatch, TimePredictionVectorEnv, "_time_of")
    env = gym.make_vec("TimePredictionMDP-v0", num_envs=3, reward="brightness", autoreset_mode="DISABLED")
    on_device(env)
    env.unwrapped.reset(seed=0)
    for _ in range(2):
        observation, reward, _, _, info = env.step(torch.empty(3, 1, device=DEVICE))
        assert {value.device.type for value in (*observation.values(), reward)} == {DEVICE}
    assert info["ended"].all()
    assert len(waits) == 2
    assert named_places == {"reward": 2, "update": 0, "log": 0}


@pytest.mark.parametrize("use_lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("per_prompt", [None, 16])
@pytest.mark.parametrize("algorithm", [DDPOIS, DDPOSF])
def test_residency_of_a_rollout_and_an_update(on_device, named_places, algorithm, per_prompt, use_lora):
    env = make()
    policy = DenoisingPolicy(env.unwrapped.model, seed=0, use_lora=use_lora)
    on_device(env, policy)
    learner = algorithm(
        policy, env, samples_per_epoch=3, batch_size=3, micro_batch_size=2, per_prompt_buffer_size=per_prompt, seed=0
    )
    learner.learn(6, log_interval=1 if per_prompt is None else 2)
    assert learner.num_updates == 1
    assert {p.grad is None for p in policy.parameters()} == {True}
    assert learner.optimizer.state_dict()["state"][0]["exp_avg"].device.type == DEVICE
    assert named_places["reward"] == (2 if per_prompt is None else 3)
    assert named_places["update"] == 1
    assert named_places["log"] == (1 if per_prompt is None else 0)


def test_residency_of_an_update_with_a_kl_penalty_and_a_window(on_device, named_places, monkeypatch):
    on_the_host(monkeypatch, DDPOIS, "_window")
    on_the_host(monkeypatch, DDPOIS, "_window_range")
    env = make()
    policy = DenoisingPolicy(env.unwrapped.model, seed=0)
    reference = policy.reference()
    on_device(env, policy)
    move(reference.denoiser)
    reference.device = torch.device(DEVICE)
    sizes = {"samples_per_epoch": 3, "batch_size": 3, "micro_batch_size": 2, "per_prompt_buffer_size": None}
    learner = DDPOIS(policy, env, sde_window=1, kl_coefficient=0.1, kl_place="exact", reference=reference, **sizes)
    learner.learn(6)
    assert learner.num_updates == 1
    assert (named_places["reward"], named_places["update"]) == (2, 1)


def test_residency_of_an_update_with_weighted_steps(on_device, named_places):
    env = make()
    policy = DenoisingPolicy(env.unwrapped.model, seed=0)
    on_device(env, policy)
    sizes = {"samples_per_epoch": 3, "batch_size": 3, "group_size": 3, "per_prompt_buffer_size": None}
    learner = DDPOIS(policy, env, step_weights="inverse_sensitivity", seed=0, **sizes)
    learner.learn(6, log_interval=0)
    assert (named_places["reward"], named_places["update"]) == (2, 1)


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_a_rollout_on_the_host_comes_back_in_micro_batches(on_device, named_places, monkeypatch, dtype):
    env = make()
    policy = DenoisingPolicy(env.unwrapped.model, seed=0)
    on_device(env, policy)
    sizes = {"samples_per_epoch": 3, "batch_size": 3, "micro_batch_size": 2, "per_prompt_buffer_size": None}
    learner = DDPOIS(policy, env, rollout_device="cpu", rollout_dtype=dtype, seed=0, **sizes)
    rollouts, train = [], learner.train
    monkeypatch.setattr(learner, "train", lambda rollout: rollouts.append(rollout) or train(rollout))
    learner.learn(6)
    kept = (rollouts[0].actions, rollouts[0].changing["latents"])
    assert {values.device.type for values in kept} == {"cpu"}
    assert {values.dtype for values in kept} == {torch.float32 if dtype is None else torch.float16}
    assert {values.device.type for values in (rollouts[0].log_probs, rollouts[0].ends)} == {DEVICE}
    assert learner.num_updates == 1


def test_a_reward_that_waits_is_caught(on_device, named_places):
    def impatient(images, prompts, metadata):
        return images.mean((1, 2, 3)) * float(images.max())

    env = make(impatient)
    on_device(env)
    env.reset(seed=0)
    env.step(torch.empty(3, 4, 16, 16, device=DEVICE))
    with pytest.raises(DataDependentOutputException):
        env.step(torch.empty(3, 4, 16, 16, device=DEVICE))
