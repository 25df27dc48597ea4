"""How many episodes a rollout, an update, a pass and a group have."""

import gymnasium as gym
import pytest

import diffusion_gym  # noqa: F401
from agents import DDPOIS, GRPO, RLOO, DenoisingPolicy, Rollouts
from agents.training.sizes import Sizes


def resolved(batch_size=None, num_envs=4, num_processes=1, **rollouts):
    return Sizes.resolved(Rollouts(**rollouts), batch_size, num_envs=num_envs, num_processes=num_processes)


def test_sizes_that_are_not_given_follow_the_lanes():
    assert resolved() == Sizes(samples=4, batch=4, micro_batch=4, group=1)
    assert resolved(num_processes=3) == Sizes(samples=12, batch=12, micro_batch=4, group=1)


def test_sizes_that_are_given_are_taken():
    given = resolved(8, samples=16, group_size=2, micro_batch_size=5)
    assert given == Sizes(samples=16, batch=8, micro_batch=5, group=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 6}, r"samples must be a multiple of the environment's num_envs \(4\), got 6"),
        ({"samples": 8, "num_processes": 3}, r"num_envs \(4\) × 3 processes, got 8"),
        ({"batch_size": 3}, r"batch_size must divide the rollout's samples \(4\), got 3"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"batch_size": 2.0}, r"batch_size must be an integer of at least 1, got 2\.0"),
        ({"group_size": 3}, r"group_size must divide num_envs \(4\), got 3"),
    ],
)
def test_sizes_that_do_not_divide_each_other_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        resolved(**arguments)


@pytest.mark.parametrize(
    ("algorithm", "num_envs", "arguments", "message"),
    [
        (DDPOIS, 48, {}, r"multiple of .* \(48\), got 256; .* default.*: give rollouts=Rollouts\(samples=…"),
        (DDPOIS, 4, {"rollouts": Rollouts(samples=16)}, r"samples \(16\), got 64; .* default.*: .* batch_size"),
        (RLOO, 2, {}, r"divide num_envs \(2\), got 4; .* default.*: .* group_size"),
        (GRPO, 2, {}, r"divide num_envs \(2\), got 4; .* default.*: .* group_size"),
    ],
)
def test_sizes_that_nobody_gave_are_said_to_be_defaults(algorithm, num_envs, arguments, message):
    env = gym.make_vec("DenoisingMDP-v0", num_envs=num_envs, model="mixture", autoreset_mode="DISABLED")
    with pytest.raises(ValueError, match=message):
        algorithm(DenoisingPolicy(env.unwrapped.model), env, **arguments)


def test_rewards_that_nothing_hides_are_warned_of():
    with pytest.warns(UserWarning, match=r"async_rewards has no effect: .* \(4\) are drawn at once"):
        resolved(async_rewards=True)
    resolved(samples=8, async_rewards=True)
