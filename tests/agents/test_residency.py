"""The training loop stays on the device: on a fake one, where mixing devices and waits outside `to_host` raise."""

import ast
import contextlib
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import agents
import diffusion_gym  # noqa: F401
from agents import DDPOIS, DDPOSF, KL, Batch, DenoisingPolicy, Full, Log, LoRA, PerPrompt, Rollouts, Steps, Window
from diffusion_gym.envs.lanes import Lanes
from tests.fake_device import DEVICE, BlockingCopies, Waits, move, on_the_host
from tests.tiny import make_tiny_stable_diffusion

ROOMS = Path(agents.__file__).parent
# What many processes gather are tensors on the host.
ON_THE_HOST = {"distributed.py", "data.py"}  # the second keeps what a learner learns from
SIZES = {"rollouts": Rollouts(samples=3, micro_batch_size=2), "batch_size": 3, "seed": 0}
REWARDED = [(2, 3), (3,)]  # whether actions and images are finite, and whether rewards are
UPDATED = [(2,)]  # whether losses and the gradient are finite


@pytest.fixture
def on_device(monkeypatch):
    """Return a function that enters the fake mode and puts an environment and a policy on its device."""
    with contextlib.ExitStack() as stack:
        on_the_host(monkeypatch, Lanes, "_draw")
        on_the_host(monkeypatch, DenoisingPolicy, "scored")

        def enter(env, policy):
            model = env.unwrapped.model
            networks = [model._vae, model._text_encoder, policy.denoiser]
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            model._rows.clear()
            model.schedule._tables.clear()
            for network in networks:
                move(network)
            for owner in (model, env.unwrapped, policy):
                owner.device = torch.device(DEVICE)

        yield enter


@pytest.fixture
def waits(monkeypatch):
    return Waits(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_tiny_stable_diffusion(tmp_path_factory.mktemp("tiny") / "model"))


@pytest.fixture
def make(folder):
    """Return a function that makes an environment and a policy of a model that no other test has."""

    def made(num_steps=2, observe_embeds=True, **arguments):
        env = gym.make_vec(
            "DenoisingMDP-v0",
            num_envs=3,
            num_steps=num_steps,
            model=folder,
            reward="brightness",
            observe_embeds=observe_embeds,
        )
        prompts = () if observe_embeds else env.unwrapped.prompts.texts
        return env, DenoisingPolicy(env.unwrapped.model, prompts=prompts, seed=0, **arguments)

    return made


@pytest.mark.parametrize("path", sorted(ROOMS.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOMS)))
def test_nothing_else_reads_a_tensor_from_the_device(path):
    """`.cpu()` stands in `to_host` alone, and nobody imports that function past its module, where tests replace it."""
    tree = ast.parse(path.read_text())
    called = {node.func.attr for node in ast.walk(tree) if isinstance(node, ast.Call) and hasattr(node.func, "attr")}
    assert "cpu" not in called or path.name in ON_THE_HOST
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert "to_host" not in {name.name for node in imports for name in node.names}


def test_no_blocking_copy_in_a_middle_step_of_a_policy_that_draws_on_the_host(make, on_device, waits):
    env, policy = make(num_steps=4)
    on_device(env, policy)
    observation, _ = env.reset(seed=0)
    with torch.no_grad():
        observation, *_ = env.step(policy.act(observation))  # the schedule's tables are sent once
    with BlockingCopies() as copies, torch.no_grad():
        for draws in (None, [torch.Generator().manual_seed(lane) for lane in range(3)]):
            observation, *_ = env.step(policy.act(observation, generators=draws))
    assert copies.found == waits.shapes == []


@pytest.mark.parametrize("adaptation", [Full(), LoRA()], ids=["full", "lora"])
@pytest.mark.parametrize("advantages", [Batch(), PerPrompt()], ids=["batch", "per_prompt"])
@pytest.mark.parametrize("algorithm", [DDPOIS, DDPOSF])
def test_a_rollout_and_an_update_wait_in_named_places(make, on_device, waits, algorithm, advantages, adaptation):
    env, policy = make(adaptation=adaptation)
    on_device(env, policy)
    learner = algorithm(policy, env, advantages=advantages, log=Log(images=0), **SIZES)
    learner.learn(6, log_interval=0)
    assert learner.num_updates == 1
    assert {p.grad is None for p in policy.parameters()} == {True}
    assert learner.updates.optimizer.state_dict()["state"][0]["exp_avg"].device.type == DEVICE
    assert waits.shapes == [*REWARDED, *([(3,)] if advantages == PerPrompt() else []), *UPDATED]


def test_prompts_are_looked_up_without_a_wait(make, on_device, waits):
    env, policy = make(observe_embeds=False)
    on_device(env, policy)
    DDPOIS(policy, env, advantages=Batch(), log=Log(images=0), **SIZES).learn(6, log_interval=0)
    assert waits.shapes == [*REWARDED, *UPDATED]


def test_a_log_waits_once(make, on_device, waits):
    env, policy = make()
    on_device(env, policy)
    DDPOIS(policy, env, advantages=Batch(), log=Log(images=0), **SIZES).learn(6)
    *before, log = waits.shapes
    assert before == [*REWARDED, *UPDATED]
    assert len(log) == 1  # all numbers at once


def test_an_update_with_a_kl_penalty_and_a_window_waits_no_more(make, on_device, waits, monkeypatch):
    on_the_host(monkeypatch, Window, "check")
    on_the_host(monkeypatch, Window, "of_iteration")
    env, policy = make()
    reference = policy.reference()
    on_device(env, policy)
    move(reference.denoiser)
    reference.device = torch.device(DEVICE)
    kl = KL(0.1, place="exact", reference=reference)
    learner = DDPOIS(policy, env, advantages=Batch(), steps=Steps(window=Window(1)), kl=kl, **SIZES)
    learner.learn(6, log_interval=0)
    assert learner.num_updates == 1
    assert waits.shapes == [*REWARDED, *UPDATED]


def test_an_update_with_weighted_steps_waits_no_more(make, on_device, waits):
    env, policy = make()
    on_device(env, policy)
    steps = Steps(weights="inverse_sensitivity")
    DDPOIS(policy, env, advantages=Batch(), steps=steps, **SIZES).learn(6, log_interval=0)
    assert waits.shapes == [*REWARDED, *UPDATED]


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_a_rollout_on_the_host_comes_back_in_micro_batches(make, on_device, waits, monkeypatch, dtype):
    env, policy = make()
    on_device(env, policy)
    rollouts = Rollouts(samples=3, micro_batch_size=2, device="cpu", dtype=dtype)
    learner = DDPOIS(policy, env, advantages=Batch(), **{**SIZES, "rollouts": rollouts})
    drawn, train = [], learner.train
    monkeypatch.setattr(learner, "train", lambda rollout: drawn.append(rollout) or train(rollout))
    learner.learn(6, log_interval=0)
    kept = (drawn[0].actions, drawn[0].changing["latents"])
    assert {values.device.type for values in kept} == {"cpu"}
    assert {values.dtype for values in kept} == {torch.float32 if dtype is None else torch.float16}
    assert {values.device.type for values in (drawn[0].log_probs, drawn[0].ends)} == {DEVICE}
    assert learner.num_updates == 1
