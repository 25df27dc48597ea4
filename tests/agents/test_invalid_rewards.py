"""Episodes without a valid reward are left out of advantages, losses and statistics, and counted."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.logger import KVWriter, Logger

import diffusion_gym  # noqa: F401
from agents import DDPOIS, DDPOSF, DPOK, GRPO, RLOO, RWR, AdamW, Batch, DenoisingPolicy, DiffusionNFT, Replay, Rollouts
from agents.advantages import group_advantages


class Lines(KVWriter):
    def __init__(self):
        self.lines = []

    def write(self, values, excluded, step=0):
        self.lines.append(dict(values))


def learner_on(mixture, algorithm, reward, *, on_invalid_reward="nan", async_rewards=False, **options):
    env = gym.make_vec("DenoisingMDP-v0", num_envs=8, num_steps=3, model=mixture, reward=reward,
                       autoreset_mode="DISABLED", on_invalid_reward=on_invalid_reward)  # fmt: skip
    rollouts = Rollouts(samples=16, group_size=4, async_rewards=async_rewards)
    sizes = {"rollouts": rollouts, "batch_size": 16, "learning_rate": 1e-2}
    learner = algorithm(DenoisingPolicy(mixture, seed=0), env, seed=0, **{**sizes, **options})
    log = Lines()
    learner.set_logger(Logger(None, [log]))
    return learner, log.lines


def failing(images, prompts, metadata):
    values = images.mean((1, 2, 3))
    values[1] = torch.nan
    values[5:7] = torch.inf
    return values


ALL = [DDPOSF, DDPOIS, RLOO, GRPO, DPOK, RWR, DiffusionNFT]


@pytest.mark.parametrize("async_rewards", [False, True])
@pytest.mark.parametrize("algorithm", ALL)
def test_a_training_goes_on_without_them(mixture, algorithm, async_rewards):
    learner, lines = learner_on(mixture, algorithm, failing, async_rewards=async_rewards)
    before = [parameter.detach().clone() for parameter in learner.policy.parameters()]
    learner.learn(3 * 48)
    assert [line["rollout/invalid_rewards"] for line in lines] == [6, 6, 6]
    numbers = [value for line in lines for value in line.values() if isinstance(value, float | int)]
    assert np.isfinite(numbers).all()
    after = list(learner.policy.parameters())
    assert all(parameter.isfinite().all() for parameter in after)
    assert any(not torch.equal(*pair) for pair in zip(before, after, strict=True))


@pytest.mark.parametrize("algorithm", ALL)
def test_by_default_they_end_the_training(mixture, algorithm):
    learner, _ = learner_on(mixture, algorithm, failing, on_invalid_reward="raise")
    with pytest.raises(ValueError, match="returned NaN or infinity"):
        learner.learn(48)


def test_a_rollout_without_any_valid_reward_ends_the_training(mixture):
    learner, _ = learner_on(mixture, DDPOIS, lambda images, *_: images.mean((1, 2, 3)) * torch.nan)
    with pytest.raises(ValueError, match="none of the 16 rewards of the rollout is a finite number"):
        learner.learn(48)


def test_the_others_are_learnt_from_as_if_they_were_alone(mixture):
    """Their advantages and the gradient are those of a rollout that never had the invalid ones."""
    raw = AdamW(max_grad_norm=None)
    learner, _ = learner_on(mixture, DDPOSF, failing, advantages=Batch(), optimizer=raw, learning_rate=0.0)
    rollouts, gradients = [], []
    learner.train, train = (lambda rollout: rollouts.append(rollout) or {}), learner.train
    learner.learn(1, log_interval=0)
    (rollout,) = rollouts
    assert np.flatnonzero(~rollout.valid).tolist() == [1, 5, 6, 9, 13, 14]
    assert not rollout.scored[:, ~rollout.valid].any()
    kept = torch.from_numpy(np.flatnonzero(rollout.valid))
    rewards = rollout.returns[kept]
    advantages = torch.zeros(16).index_copy(0, kept, (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-6))
    parameters = list(learner.policy.parameters())
    learner.updates.optimizer.register_step_pre_hook(lambda *_: gradients.extend(p.grad.clone() for p in parameters))
    train(rollout)
    steps, lanes = np.nonzero(rollout.scored)
    k, b = torch.from_numpy(steps), torch.from_numpy(lanes)
    log_prob = learner.policy.log_prob(rollout.observation(k, b), rollout.action(k, b), "mean")
    (-(advantages[b] * log_prob).sum() / len(k)).backward()
    for found, parameter in zip(gradients, parameters, strict=True):
        torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", ["none", "rollout", "global", "group"])
@pytest.mark.parametrize("baseline", ["leave_one_out", "group_mean"])
def test_a_group_with_a_gap_is_a_smaller_group(baseline, scale):
    nan = torch.nan
    rewards = torch.tensor([[1.0, nan, 4.0, 7.0], [2.0, 3.0, nan, 9.0], [nan, nan, nan, 5.0], [nan] * 4])
    found = group_advantages(rewards, baseline=baseline, scale=scale)
    whole = group_advantages(torch.tensor([[1.0, 4.0, 7.0], [2.0, 3.0, 9.0]]), baseline=baseline, scale="none")
    assert (found[rewards.isnan()] == 0).all()
    assert (found[2:] == 0).all()
    part = torch.stack([found[0, [0, 2, 3]], found[1, [0, 1, 3]]])
    if scale == "group":
        raw = torch.tensor([[1.0, 4.0, 7.0], [2.0, 3.0, 9.0]])
        torch.testing.assert_close(part, whole / raw.std(1, correction=0, keepdim=True), rtol=1e-3, atol=0)
    else:
        torch.testing.assert_close(part / part[0, 0], whole / whole[0, 0])


def test_a_replay_has_the_valid_samples_alone(mixture):
    learner, _ = learner_on(mixture, RWR, failing)
    rollouts = []
    learner.train = lambda rollout: rollouts.append(rollout) or {}
    learner.learn(1, log_interval=0)
    replay = Replay.from_rollout(rollouts[0])
    assert len(replay) == len(replay.latents) == len(replay.prompts) == 10
    assert replay.rewards.isfinite().all()
    assert torch.equal(replay.latents[1], rollouts[0].ends[2])
