"""Ten independent runs of two updates each, in each precision, of LoRA layers and of all weights."""

import gymnasium as gym
import numpy as np
import pytest
import torch

import diffusion_gym  # noqa: F401
from agents import DDPOIS, Batch, DenoisingPolicy, Full, LoRA, Rollouts, collect
from diffusion_gym.models import load_model
from tests.gradients import assert_gradients_close
from tests.tiny import make_tiny_stable_diffusion

RATIO_BOUND = 1e-6  # measured: 0, for scoring repeats what sampling did


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    """Two steps of a UNet with 0.3 M random weights, both with a density."""
    folder = make_tiny_stable_diffusion(tmp_path_factory.mktemp("unet"), set_alpha_to_one=False, steps_offset=1)
    arguments = {"num_steps": 2, "reward": "brightness", "prompts": ["a fox", "a dog"]}
    return gym.make_vec("DenoisingMDP-v0", num_envs=2, model=load_model(str(folder)), **arguments)


def ratios(policy, rollout):
    """Return π/π_old of all transitions, scored in batches of the size in which they were sampled."""
    steps, lanes = np.nonzero(rollout.scored)
    assert len(steps) == 4
    return torch.cat(
        [
            torch.exp(
                policy.log_prob(rollout.observation(k, b), rollout.action(k, b), "mean") - rollout.log_probs[k, b]
            )
            for k, b in rollout.micro_batches(steps, lanes, 2)
        ]
    )


@pytest.mark.parametrize("adaptation", [Full(), LoRA()], ids=["full", "lora"])
@pytest.mark.parametrize("precision", [None, "bf16", "fp16"])
def test_the_ratio_begins_at_one_and_nothing_becomes_nan_in_ten_runs(env, precision, adaptation):
    for seed in range(10):
        policy = DenoisingPolicy(env.unwrapped.model, adaptation=adaptation, precision=precision, seed=seed)
        before = [p.detach().clone() for p in policy.parameters() if p.requires_grad]
        settings = {"rollouts": Rollouts(), "batch_size": 2, "advantages": Batch(), "seed": seed}
        learner = DDPOIS(policy, env, learning_rate=1e-3, **settings)
        rollout = collect(env, policy, seeds=[seed])
        with torch.no_grad():
            assert (ratios(policy, rollout) - 1).abs().max() <= RATIO_BOUND
        losses = []
        while learner.num_updates < 2:
            losses.append(learner.train(rollout)["loss"])
        assert torch.stack(losses).isfinite().all()
        assert len(losses) == 2 + learner.updates.guard.num_overflows
        assert len(losses) == 2 or precision == "fp16"
        after = [p for p in policy.parameters() if p.requires_grad]
        assert all(torch.isfinite(parameter).all() for parameter in after)
        assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


def first_gradient(env, **arguments):
    """Return the gradient of a first update, and how often the UNet's last block was computed for it."""
    compiled = arguments.pop("compiled", False)
    policy = DenoisingPolicy(env.unwrapped.model, seed=0, **arguments)
    if compiled:
        policy.denoiser.compile(backend="aot_eager")  # traced and differentiated as by default, but not made C++
    rollout = collect(env, policy, seeds=[0], reduction="mean")
    passes = []
    policy.denoiser.up_blocks[-1].resnets[0].register_forward_pre_hook(lambda *_: passes.append(1))
    steps, lanes = (torch.from_numpy(index) for index in np.nonzero(rollout.scored))
    log_prob = policy.log_prob(rollout.observation(steps, lanes), rollout.action(steps, lanes), "mean")
    (log_prob * torch.arange(1.0, 5.0)).sum().backward()
    return {name: p.grad for name, p in policy.denoiser.named_parameters() if p.requires_grad}, len(passes)


@pytest.mark.parametrize("adaptation", [Full(), LoRA()], ids=["full", "lora"])
def test_gradient_checkpointing_computes_twice_and_changes_nothing(env, adaptation):
    plain, once = first_gradient(env, adaptation=adaptation)
    checkpointed, twice = first_gradient(env, adaptation=adaptation, gradient_checkpointing=True)
    assert (once, twice) == (1, 2)
    assert_gradients_close([checkpointed[name] for name in plain], list(plain.values()))


def test_a_compiled_denoiser_has_the_same_gradient_and_names(env):
    plain, _ = first_gradient(env)
    compiled, _ = first_gradient(env, compiled=True)
    assert plain.keys() == compiled.keys()
    assert_gradients_close(list(compiled.values()), list(plain.values()))


def test_losses_are_scaled_wherever_the_arithmetic_is_fp16(tmp_path):
    """A latent's share of a mean over 16,384 numbers and 50 steps is below the least number of fp16."""
    folder = str(make_tiny_stable_diffusion(tmp_path))
    half, single = (load_model(folder, dtype=dtype) for dtype in ("float16", "float32"))
    assert DenoisingPolicy(half, adaptation=LoRA()).needs_loss_scaling
    assert DenoisingPolicy(single, precision="fp16").needs_loss_scaling
    assert not DenoisingPolicy(half).needs_loss_scaling  # a full copy is in float32
    assert not DenoisingPolicy(single, adaptation=LoRA()).needs_loss_scaling
