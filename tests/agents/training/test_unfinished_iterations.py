"""An iteration that an error, Ctrl-C or a callback ends has not been."""

import weakref

import gymnasium as gym
import pytest
import torch

import diffusion_gym  # noqa: F401
from agents import DDPOIS, RLOO, RWR, DenoisingPolicy, DiffusionNFT, Log, PerPrompt, Rollouts
from agents.training.algorithm import Algorithm
from diffusion_gym.rewards import CallableReward, Normalised


class Broken:
    """A reward that fails, or is interrupted, when it is told to."""

    def __init__(self):
        self.error = None

    def __call__(self, images, prompts, metadata):
        if self.error is not None:
            raise self.error
        return images.mean((1, 2, 3))


def learner_on(mixture, algorithm=DDPOIS, *, reward="brightness", async_rewards=False, **options):
    env = gym.make_vec(
        "DenoisingMDP-v0", num_envs=4, num_steps=3, model=mixture, reward=reward, autoreset_mode="DISABLED"
    )
    rollouts = Rollouts(
        samples=8, group_size=2, same_noise=algorithm is RLOO, async_rewards=async_rewards, micro_batch_size=4
    )
    if algorithm in (DDPOIS, DiffusionNFT):
        options["advantages"] = PerPrompt(16, 2)
    shared = {"rollouts": rollouts, "batch_size": 8, "learning_rate": 1e-2, "seed": 0}
    return algorithm(DenoisingPolicy(mixture, seed=0), env, **{**shared, **options})


def weights(learner):
    return torch.cat([parameter.detach().flatten() for parameter in learner.policy.parameters()])


@pytest.mark.parametrize("algorithm", [DDPOIS, RLOO, RWR, DiffusionNFT])
def test_an_interrupted_update_leaves_nothing_behind(mixture, algorithm, monkeypatch):
    """Neither a gradient, nor rewards that count twice, nor counts."""
    interrupted, unbroken = (learner_on(mixture, algorithm, reward=Normalised(CallableReward(Broken()))) for _ in "ab")
    unbroken.learn(72, log_interval=0)
    interrupted.learn(24, log_interval=0)
    backward, calls = torch.Tensor.backward, []

    def pressed(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        backward(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", pressed)
    with pytest.raises(KeyboardInterrupt):
        interrupted.learn(48, reset_num_timesteps=False, log_interval=0)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    assert len(calls) == 2
    assert (interrupted.num_timesteps, interrupted.reward_queries, interrupted.iteration) == (24, 8, 1)
    assert all(parameter.grad is None for parameter in interrupted.policy.parameters())
    interrupted.learn(48, reset_num_timesteps=False, log_interval=0)
    assert (interrupted.num_timesteps, interrupted.reward_queries) == (72, 24)
    assert torch.equal(weights(interrupted), weights(unbroken))
    assert interrupted.env.unwrapped.reward.state_dict() == unbroken.env.unwrapped.reward.state_dict()


@pytest.mark.parametrize("error", [RuntimeError("the server is down"), KeyboardInterrupt()])
@pytest.mark.parametrize("async_rewards", [False, True])
def test_a_failing_reward_leaves_the_counts_where_the_iteration_began(mixture, error, async_rewards):
    reward = Broken()
    learner = learner_on(mixture, reward=reward, async_rewards=async_rewards)
    unbroken = learner_on(mixture, reward=reward).learn(48, log_interval=0)
    learner.learn(24, log_interval=0)
    reward.error = error
    with pytest.raises(type(error)):
        learner.learn(24, reset_num_timesteps=False, log_interval=0)
    reward.error = None
    assert (learner.num_timesteps, learner.reward_queries) == (24, 8)
    learner.learn(48 - learner.num_timesteps, reset_num_timesteps=False, log_interval=0)
    assert torch.equal(weights(learner), weights(unbroken))


def test_a_callback_that_ends_a_rollout_leaves_the_counts_where_it_began(mixture):
    learner = learner_on(mixture)
    steps = []
    learner.learn(1000, lambda local, _: steps.append(learner.num_timesteps) or len(steps) < 8, log_interval=0)
    assert steps == [4, 8, 12, 16, 20, 24, 28, 32]
    assert (learner.num_timesteps, learner.reward_queries, learner.iteration) == (24, 8, 1)


def test_the_rollout_before_is_let_go_before_the_next_is_collected(mixture):
    learner = learner_on(mixture)
    rollouts, alive, train = [], [], learner.train
    learner.train = lambda rollout: rollouts.append(weakref.ref(rollout)) or train(rollout)
    learner.learn(72, lambda *_: alive.append([one for one in rollouts if one() is not None]) or True, log_interval=0)
    assert (len(rollouts), alive) == (3, [[]] * 18)


# the schedule, the counts, the doors
def test_a_linear_schedule_ends_at_zero(mixture):
    """SB3's PPO takes the progress after the rollout, and so do these."""
    learner, rates = learner_on(mixture, learning_rate=lambda remaining: remaining), []
    optimizer = learner.updates.optimizer
    optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
    learner.learn(4 * 24, log_interval=0)
    assert rates == [0.75, 0.5, 0.25, 0.0]
    learner.learn(30, log_interval=0)  # the last rollout is finished, beyond the total
    assert rates[4:] == [pytest.approx(0.2), 0.0]


class ByHand(Algorithm):
    """A user's algorithm that steps the optimizer itself."""

    def train(self, rollout):
        next(iter(self.policy.parameters())).sum().backward()
        self.updates.optimizer.step()
        return {}


def test_an_algorithm_that_steps_the_optimizer_itself_is_told_of_the_door(mixture):
    env = learner_on(mixture).env
    learner = ByHand(DenoisingPolicy(mixture), env)
    message = r"ByHand\.train stepped the optimizer itself \(1 times\).*self\.updates\.apply\(\)"
    with pytest.warns(UserWarning, match=message):
        learner.learn(1, log_interval=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda: {"n_epochs": 1.5}, "n_epochs must be an integer of at least 1, got 1.5"),
        (lambda: {"seed": -1}, "seed must be .*at least 0, got -1"),
        (lambda: {"rollouts": Rollouts(samples=8.0)}, "samples must be .*at least 1, got 8.0"),
        (lambda: {"rollouts": Rollouts(micro_batch_size=0)}, "micro_batch_size must be .*at least 1, got 0"),
        (lambda: {"log": Log(images=-1)}, "images must be .*at least 0, got -1"),
        (lambda: {"batch_size": 0}, "batch_size must be .*at least 1, got 0"),
        (lambda: {"verbose": -1}, "verbose must be .*at least 0, got -1"),
    ],
)
def test_numbers_that_are_none_are_said_at_once(mixture, options, message):
    env = learner_on(mixture).env
    with pytest.raises(ValueError, match=message):
        DDPOIS(DenoisingPolicy(mixture), env, **{"rollouts": Rollouts(samples=4), "batch_size": 4, **options()})


def test_a_total_that_is_no_number_is_said_at_once(mixture):
    with pytest.raises(ValueError, match="total_timesteps must be an integer, got '10'"):
        learner_on(mixture).learn("10")
