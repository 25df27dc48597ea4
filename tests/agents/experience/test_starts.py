"""An episode is itself, however many lanes and batches draw it with others."""

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch

import diffusion_gym  # noqa: F401
from agents import DDPOIS, RLOO, RWR, DenoisingPolicy, Rollouts, Steps, Window
from agents.training.sizes import Sizes
from agents.updates.distributed import Processes

ROLLOUTS = Rollouts()


def learner_on(mixture, algorithm, num_envs, *, rollouts=ROLLOUTS, **options):
    env = gym.make_vec(
        "DenoisingMDP-v0", num_envs=num_envs, num_steps=4, model=mixture, reward="brightness", autoreset_mode="DISABLED"
    )
    options = {"batch_size": 4, "learning_rate": 1e-2, **options}
    rollouts = replace(rollouts, samples=rollouts.samples or 8, micro_batch_size=8)
    return algorithm(DenoisingPolicy(mixture, seed=0), env, rollouts=rollouts, seed=0, **options)


def watched(learner):
    """Return the rollouts that a learner will learn from, in a list that fills."""
    rollouts, train = [], learner.train
    learner.train = lambda rollout: rollouts.append(rollout) or train(rollout)
    return rollouts


SETTINGS = [
    (DDPOIS, {}),
    (DDPOIS, {"rollouts": Rollouts(group_size=2, prompt_sampling="round_robin")}),
    (RLOO, {"rollouts": Rollouts(group_size=2, same_noise=True)}),
    (RLOO, {"rollouts": Rollouts(group_size=2), "steps": Steps(window=Window(2))}),
    (RWR, {"rollouts": Rollouts(group_size=2)}),
]


@pytest.mark.parametrize(("algorithm", "options"), SETTINGS)
def test_the_number_of_lanes_changes_nothing(mixture, algorithm, options):
    """8 lanes, 4 lanes twice and 2 lanes four times: the same episodes, updates and weights."""
    learners = [learner_on(mixture, algorithm, lanes, **options) for lanes in (8, 4, 2)]
    rollouts = [watched(learner) for learner in learners]
    for learner in learners:
        learner.learn(3 * 32, log_interval=0)
    for several in zip(*rollouts, strict=True):
        for one in several[1:]:
            np.testing.assert_array_equal(one.prompt_id, several[0].prompt_id)
            torch.testing.assert_close(one.ends, several[0].ends, rtol=0, atol=1e-4)
    first, *others = (torch.cat([p.detach().flatten() for p in one.policy.parameters()]) for one in learners)
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=1e-4)


@pytest.mark.parametrize("same_noise", [True, False])
def test_two_processes_draw_the_episodes_of_one(mixture, same_noise, monkeypatch):
    """Each with its share of the lanes; the first rollout's starts and draws, without launching anything."""

    def drawn(num_envs, rank, count):
        monkeypatch.setattr(
            Processes, "__init__", lambda self: self.__dict__.update(rank=rank, count=count, device=None)
        )
        monkeypatch.setattr(Processes, "totals", lambda self, *values: values)
        monkeypatch.setattr(Processes, "from_main", lambda self, value: value)
        monkeypatch.setattr("agents.training.algorithm.gathered", lambda rollout, processes: rollout)
        learner = learner_on(mixture, RLOO, num_envs, rollouts=Rollouts(group_size=2, same_noise=same_noise))
        rollouts = []
        learner.train = lambda rollout: rollouts.append(rollout) or {}
        learner.learn(1, log_interval=0)
        return rollouts[0]

    alone = drawn(8, 0, 1)
    halves = [drawn(4, rank, 2) for rank in (0, 1)]
    assert [len(half.prompt_id) for half in halves] == [4, 4]
    assert np.concatenate([half.prompt_id for half in halves]).tolist() == alone.prompt_id.tolist()
    torch.testing.assert_close(torch.cat([half.actions for half in halves], 1), alone.actions, rtol=0, atol=1e-5)


def test_updates_have_as_many_episodes_of_each_part_of_a_rollout(mixture):
    sizes = {"rollouts": Rollouts(samples=64), "batch_size": 16}
    learner = learner_on(mixture, DDPOIS, 8, **sizes)
    order = learner.shuffled(np.arange(64), np.random.default_rng(0))
    assert sorted(order) == list(range(64))
    assert (np.sort(order.reshape(4, 16)) // 4 == np.arange(16)).all()  # one of each four side by side
    again = learner_on(mixture, DDPOIS, 2, **sizes)
    assert (again.shuffled(np.arange(64), np.random.default_rng(0)) == order).all()


def test_a_run_goes_on_with_other_lanes_and_sizes(mixture, tmp_path):
    unbroken = learner_on(mixture, DDPOIS, 4).learn(64, log_interval=0)
    learner_on(mixture, DDPOIS, 4).learn(32, log_interval=0).save(tmp_path / "run")
    wide = learner_on(mixture, DDPOIS, 8).env
    resumed = DDPOIS.load(tmp_path / "run", wide).learn(32, reset_num_timesteps=False, log_interval=0)
    for one, other in zip(unbroken.policy.parameters(), resumed.policy.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    wider = learner_on(mixture, DDPOIS, 16, rollouts=Rollouts(samples=16)).env
    with pytest.raises(ValueError, match=r"multiple of the environment's num_envs \(16\), got 8.* to load too"):
        DDPOIS.load(tmp_path / "run", wider)
    rollouts = Rollouts(samples=16, micro_batch_size=2, group_size=4)
    larger = DDPOIS.load(tmp_path / "run", wider, rollouts=rollouts, batch_size=8)
    assert larger.sizes == Sizes(samples=16, batch=8, micro_batch=2, group=4)
