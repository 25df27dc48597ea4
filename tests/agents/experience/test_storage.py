"""What is kept rounded, or elsewhere, comes back as it was seen."""

import gymnasium as gym
import pytest
import torch

import diffusion_gym  # noqa: F401
from agents import DDPOIS, DenoisingPolicy, LoRA, Rollouts, TimePredictor, collect
from agents.experience.storage import Storage


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_rounded_rollout_holds_what_was_seen_and_scored(emoji, make_env, monkeypatch, dtype):
    """The policy's log-probs of what is stored are those that it acted with, to the last bit."""
    env = make_env()
    policy = DenoisingPolicy(emoji, seed=0)
    seen = []
    sample = policy.distribution
    monkeypatch.setattr(policy, "distribution", lambda observation: seen.append(observation) or sample(observation))
    rollout = collect(env, policy, seeds=[0], reduction="mean", storage=Storage(dtype=dtype))
    assert rollout.actions.dtype == rollout.changing["latents"].dtype == dtype
    assert rollout.ends.dtype == torch.float32
    lanes = torch.arange(4)
    for step in range(3):
        steps = torch.full((4,), step)
        observation = rollout.observation(steps, lanes)
        assert observation.keys() == seen[step].keys()
        assert all(torch.equal(observation[key], seen[step][key]) for key in observation)
        log_prob = policy.log_prob(observation, rollout.action(steps, lanes), "mean")
        if rollout.scored[step, 0]:
            assert torch.equal(log_prob, rollout.log_probs[step])
    assert not torch.equal(collect(env, policy, seeds=[0]).ends, rollout.ends)


def test_features_are_rounded_and_times_are_not(emoji):
    env = gym.make_vec(
        "TimePredictionMDP-v0", num_envs=2, model=emoji, max_steps=3, reward="brightness", autoreset_mode="DISABLED"
    )
    policy = TimePredictor(env.unwrapped.single_observation_space, seed=0)
    rollout = collect(env, policy, seeds=[0], storage=Storage(dtype=torch.bfloat16))
    dtypes = {key: rollout.changing[key].dtype for key in ("latents", "features", "timestep")}
    assert dtypes == {"latents": torch.bfloat16, "features": torch.bfloat16, "timestep": torch.float32}
    assert rollout.actions.dtype == torch.float32
    steps, lanes = torch.zeros(2, dtype=torch.long), torch.arange(2)
    log_prob = policy.log_prob(rollout.observation(steps, lanes), rollout.action(steps, lanes))
    torch.testing.assert_close(log_prob, rollout.log_probs[0], rtol=0, atol=1e-6)


def test_a_training_from_the_host_is_the_same(emoji, make_env):
    """Here the policy is on the host as well: that nothing else changes is all that can be seen."""
    weights = []
    for device in (None, "cpu"):
        policy = DenoisingPolicy(emoji, adaptation=LoRA(), seed=0)
        rollouts = Rollouts(samples=4, device=device)
        learner = DDPOIS(policy, make_env(), rollouts=rollouts, batch_size=4, seed=0)
        learner.learn(12, log_interval=0)
        weights.append([p.detach().clone() for p in policy.parameters() if p.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


def test_a_device_that_is_not_there_is_named(emoji, make_env):
    storage = Storage(torch.device("cuda:99"))
    with pytest.raises(ValueError, match=r"device 'cuda:99' cannot be used here \(.*\): \"cpu\" always can"):
        collect(make_env(), DenoisingPolicy(emoji, adaptation=LoRA()), storage=storage)


def test_rounding_what_is_rounded_already_is_refused(emoji, make_env):
    env = make_env(dtype="bfloat16", model="emoji")
    rollouts = Rollouts(samples=4, dtype="float16")
    with pytest.raises(ValueError, match=r"cannot be stored in torch\.float16: the environment's latents are"):
        DDPOIS(DenoisingPolicy(env.unwrapped.model, seed=0), env, rollouts=rollouts, batch_size=4)
    with pytest.raises(ValueError, match=r"dtype must be one of .*got 'float64'"):
        Rollouts(samples=4, dtype="float64")
