"""What `collect` returns is what happened in the environment."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

import diffusion_gym  # noqa: F401
from agents import DenoisingPolicy, Replay, collect
from diffusion_gym.models import load_model
from tests.tiny import make_tiny_stable_diffusion


def naive_rollout(env, policy, seed):
    """The same episodes by hand, everything written down."""
    observation, info = env.reset(seed=seed)
    seen, actions, log_probs = [], [], []
    while not info["ended"].all():
        with torch.no_grad():
            action, log_prob = policy.sample(observation, reduction="mean")
        seen.append(observation)
        actions.append(action)
        log_probs.append(log_prob)
        observation, reward, *_, info = env.step(action)
    return seen, actions, log_probs, reward


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_rollout_is_what_happened(emoji, make_env, mode):
    env = make_env(autoreset_mode=mode)
    seen, actions, log_probs, reward = naive_rollout(env, DenoisingPolicy(emoji, seed=1), seed=5)
    rollout = collect(env, DenoisingPolicy(emoji, seed=1), seeds=[5])
    assert (rollout.num_steps, rollout.num_episodes) == (3, 4)
    assert torch.equal(rollout.returns, reward)
    lanes = torch.arange(4)
    for step in range(3):
        steps = torch.full((4,), step)
        observation = rollout.observation(steps, lanes)
        assert set(observation) == set(seen[step])
        for key, value in seen[step].items():
            assert torch.equal(observation[key], value), key
        assert torch.equal(rollout.action(steps, lanes), actions[step])
        assert torch.equal(rollout.log_probs[step], log_probs[step])
    assert rollout.images.shape == (4, 3, 64, 64)
    torch.testing.assert_close(rollout.images, emoji.decode(rollout.actions[-1]), rtol=0, atol=1e-5)
    assert torch.equal(rollout.extras["reward/brightness"], rollout.returns)


def test_only_as_many_images_are_kept_as_are_wanted(emoji, make_env):
    rollout = collect(make_env(num_steps=1), DenoisingPolicy(emoji, seed=0), seeds=[0, 4, 8], max_images=6)
    everything = collect(make_env(num_steps=1), DenoisingPolicy(emoji, seed=0), seeds=[0, 4, 8], max_images=12)
    assert torch.equal(rollout.images, everything.images[:6])
    assert collect(make_env(num_steps=1), DenoisingPolicy(emoji), max_images=0).images.shape == (0, 3, 64, 64)


def test_a_rollout_of_ends_has_the_same_ends_and_rewards(emoji, make_env):
    whole, ends = (
        collect(make_env(), DenoisingPolicy(emoji, seed=0), seeds=[0, 4], keep=keep) for keep in ("steps", "ends")
    )
    for name in ("ends", "returns", "images"):
        assert torch.equal(getattr(ends, name), getattr(whole, name))
    assert (ends.changing, ends.actions.shape[0], ends.scored.any()) == ({}, 1, False)
    assert ends.lengths.tolist() == whole.lengths.tolist()
    one, other = (Replay.from_rollout(rollout) for rollout in (whole, ends))
    for (latents, constants), (expected, others) in [(one.inputs(torch.arange(8)), other.inputs(torch.arange(8)))]:
        assert torch.equal(latents, expected)
        assert all(torch.equal(constants[key], others[key]) for key in others)


def test_batches_lie_side_by_side(emoji, make_env):
    env = make_env()
    both = collect(env, DenoisingPolicy(emoji, seed=0), seeds=[3, 8])
    first = collect(env, DenoisingPolicy(emoji, seed=0), seeds=[3])
    assert both.num_episodes == 8
    assert both.actions.shape == (3, 8, 4, 16, 16)
    assert torch.equal(both.actions[:, :4], first.actions)
    assert both.lengths.tolist() == [3] * 8
    assert torch.equal(both.returns[:4], first.returns)
    assert not torch.equal(both.actions[:, 4:], first.actions)
    np.testing.assert_array_equal(both.prompt_id, both.constants["prompt_id"][:][:, 0].numpy())


def test_rollout_holds_no_graph(emoji, make_env):
    rollout = collect(make_env(), DenoisingPolicy(emoji, seed=0), seeds=[0])
    assert not any(t.requires_grad for t in (rollout.actions, rollout.log_probs, rollout.returns))


def test_deterministic_steps_are_marked_and_cost_no_density(tmp_path):
    model = load_model(make_tiny_stable_diffusion(tmp_path / "clean"))  # set_alpha_to_one: ends at the clean end
    env = gym.make_vec("DenoisingMDP-v0", num_envs=2, num_steps=4, model=model, reward="brightness")
    rollout = collect(env, DenoisingPolicy(model, seed=0), seeds=[0])
    assert rollout.scored.tolist() == [[True] * 2] * 3 + [[False] * 2]
    assert (rollout.log_probs[-1] == 0).all()
    assert (rollout.log_probs[:-1] != 0).all()


def test_collection_can_be_stopped(emoji, make_env):
    calls = []
    stopped = collect(make_env(), DenoisingPolicy(emoji), after_step=lambda n: calls.append(n) or len(calls) < 2)
    assert stopped is None
    assert calls == [4, 4]


def test_other_environments_are_refused(emoji):
    with pytest.raises(TypeError, match="env must be a torch vector environment"):
        collect(gym.make_vec("CartPole-v1", num_envs=2), DenoisingPolicy(emoji))
