import threading

import gymnasium as gym
import pytest
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import TransformReward

from agents import DDPOIS, DenoisingPolicy, Rollouts, TimePredictor, collect
from diffusion_gym.rewards import Normalised


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_rollout_is_the_same(emoji, make_env, mode):
    def play(async_rewards):
        env = make_env(autoreset_mode=mode, reward={"brightness": 1.0, "incompressibility": 0.5})
        return collect(env, DenoisingPolicy(emoji, seed=1), seeds=[5, 6, 7], async_rewards=async_rewards)

    waited, deferred = play(False), play(True)
    assert float(waited.returns.abs().min()) > 0
    assert torch.equal(waited.returns, deferred.returns)
    assert set(waited.extras) == set(deferred.extras)
    for name, values in waited.extras.items():
        assert torch.equal(values, deferred.extras[name])
    assert torch.equal(waited.images, deferred.images)


@pytest.mark.parametrize("reward", ["reference_distance", "incompressibility"])
def test_episodes_of_different_lengths_pay_for_their_own_steps(mixture, reward):
    def play(async_rewards):
        env = gym.make_vec(
            "TimePredictionMDP-v0",
            num_envs=4,
            model=mixture,
            reward=reward,
            **({"reference_steps": 2} if reward == "reference_distance" else {}),
            max_steps=12,
            step_cost="linear",
            step_cost_weight=0.1,
            autoreset_mode="DISABLED",
        )
        policy = TimePredictor(env.single_observation_space, initial_ratio=0.4, initial_concentration=4.0, seed=0)
        return collect(env, policy, seeds=[0, 1], async_rewards=async_rewards)

    waited, deferred = play(False), play(True)
    assert len(set(waited.lengths.tolist())) > 1
    assert torch.equal(waited.returns, deferred.returns)


def test_wrappers_that_see_the_rewards_are_refused(emoji, make_env):
    wrapped = TransformReward(make_env(), lambda rewards: 100 * rewards)
    assert collect(wrapped, DenoisingPolicy(emoji, seed=1)).num_episodes == 4
    with pytest.raises(ValueError, match="async_rewards comes too late for TransformReward"):
        collect(wrapped, DenoisingPolicy(emoji, seed=1), async_rewards=True)


def test_next_episodes_begin_while_the_reward_is_computed(emoji, make_env):
    next_has_begun = threading.Event()

    def patient(images, prompts, metadata):
        assert next_has_begun.wait(60), "the rollout waited for the reward"
        return torch.full((len(images),), 2.0)

    env = make_env(reward=patient)
    steps = iter(range(1, 7))

    def after_step(lanes):
        if next(steps) == 4:
            next_has_begun.set()
        return True

    rollout = collect(env, DenoisingPolicy(emoji), seeds=[0, 1], async_rewards=True, after_step=after_step)
    assert rollout.returns.tolist() == [2.0] * 8


def test_what_the_reward_raises_is_raised(emoji, make_env):
    env = make_env(reward=lambda images, prompts, metadata: torch.full((len(images),), float("nan")))
    with pytest.raises(ValueError, match="returned NaN or infinity"):
        collect(env, DenoisingPolicy(emoji), seeds=[0, 1], async_rewards=True)
    with pytest.raises(ValueError, match="returned NaN or infinity"):
        collect(env, DenoisingPolicy(emoji), seeds=[0])


def test_training_is_the_same_with_a_reward_that_learns(mixture, make_env):
    def train(async_rewards):
        options = {"batch_size": 4, "learning_rate": 1e-4, "seed": 3}
        env, rollouts = (
            make_env(model=mixture, reward=Normalised("brightness")),
            Rollouts(samples=8, async_rewards=async_rewards),
        )
        learner = DDPOIS(DenoisingPolicy(mixture, seed=0), env, rollouts=rollouts, **options)
        learner.learn(24, log_interval=0)
        return list(learner.policy.parameters()), env.unwrapped.reward.state_dict()

    (waited, statistics), (deferred, again) = train(False), train(True)
    assert statistics == again
    assert all(torch.equal(one, other) for one, other in zip(waited, deferred, strict=True))
