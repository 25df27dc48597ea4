"""Which steps of an episode are stochastic and learnt from, and how much each counts."""

import itertools
import re

import gymnasium as gym
import numpy as np
import pytest
import torch

import diffusion_gym  # noqa: F401
from agents import (
    DDPOIS,
    DDPOSF,
    DPOK,
    GRPO,
    KL,
    RLOO,
    AdamW,
    Batch,
    ContextFreeSchedule,
    DenoisingPolicy,
    LoRA,
    Rollouts,
    Steps,
    Window,
    collect,
)
from diffusion_gym.samplers import DDIM
from tests.gradients import applied_gradients, assert_gradients_close

NUM_STEPS = 5
WEIGHTED = Steps(weights="inverse_sensitivity")


def make_env(model, num_envs=8, kind="DenoisingMDP-v0", **arguments):
    steps = {"num_steps": NUM_STEPS} if kind == "DenoisingMDP-v0" else {"max_steps": NUM_STEPS}
    arguments = {"autoreset_mode": "DISABLED"} | steps | arguments

    def position(images, prompts, metadata):
        return model.positions(images)[:, 0]

    return gym.make_vec(kind, num_envs=num_envs, model=model, reward=position, **arguments)


def make(algorithm, model, *, steps=WEIGHTED, num_steps=NUM_STEPS, **arguments):
    """Return a learner from 8 episodes."""
    own = {}
    if algorithm in (DDPOIS, DDPOSF):
        own = {"rollouts": Rollouts(samples=8), "batch_size": 8, "advantages": Batch()}
    env = make_env(model, num_steps=num_steps)
    return algorithm(
        DenoisingPolicy(model, seed=0), env, **{"steps": steps, "learning_rate": 1e-3, "seed": 0, **own, **arguments}
    )


def choose(steps, scored, lanes, seed=0):
    return steps.choose(np.asarray(scored), np.asarray(lanes), np.random.default_rng(seed))


def rollouts_of(learner, num_rollouts):
    """Return the rollouts that a learner learns from."""
    rollouts, train = [], learner.train
    learner.train = lambda rollout: rollouts.append(rollout) or train(rollout)
    for _ in range(num_rollouts):
        learner.learn(1, log_interval=0, reset_num_timesteps=False)
    return rollouts


# What is learnt from


def test_all_steps_with_a_density_come_in_the_order_of_time():
    scored = np.ones((4, 3), dtype=bool)
    scored[3] = scored[1, 2] = False
    steps, lanes = choose(Steps(), scored, [2, 0])
    assert steps.tolist() == [0, 0, 1, 2, 2]
    assert lanes.tolist() == [2, 0, 0, 2, 0]


def test_a_fraction_takes_that_share_of_each_episode():
    scored = np.ones((10, 4), dtype=bool)
    scored[9] = False
    steps, lanes = choose(Steps(fraction=0.5), scored, [0, 2])
    for lane in (0, 2):
        mine = steps[lanes == lane]
        assert len(set(mine.tolist())) == len(mine) == 4
        assert 9 not in mine
    assert set(lanes) == {0, 2}
    assert set(steps[lanes == 0]) != set(steps[lanes == 2])


def test_a_small_fraction_keeps_one_step():
    steps, lanes = choose(Steps(fraction=0.01), np.ones((3, 4), dtype=bool), [0, 2])
    assert (len(steps), lanes.tolist()) == (2, [0, 2])


def test_a_fraction_is_that_of_the_window():
    scored = np.zeros((4, 8), dtype=bool)
    scored[1:3] = True
    steps, lanes = choose(Steps(fraction=0.5, window=Window(2)), scored, np.arange(8))
    assert sorted(lanes) == list(range(8))
    assert set(steps) == {1, 2}


def test_a_fraction_is_taken_of_the_steps_that_have_a_density(mixture):
    steps = Steps(fraction=0.25)
    learner = make(DDPOSF, mixture, steps=steps, num_steps=4, batch_size=2, log_prob_reduction="sum")
    learner.learn(12 * 8 * 4, log_interval=0)  # where it took the last step alone, it raised
    assert learner.num_updates == 48


def test_without_a_density_there_is_nothing_to_learn_from(mixture):
    with pytest.raises(ValueError, match=r"none of the actions .* has a density: give the policy a stochastic sampler"):
        choose(Steps(), np.zeros((3, 2), dtype=bool), [0, 1])
    learner = DDPOIS(
        DenoisingPolicy(mixture, sampler=DDIM(eta=0.0)), make_env(mixture), batch_size=8, rollouts=Rollouts(samples=8)
    )
    with pytest.raises(ValueError, match="give the policy a stochastic sampler"):
        learner.learn(1)


# How much each step counts


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_sensitivity_is_how_far_the_mean_moves(mixture, monkeypatch, prediction_type, eta):
    policy = DenoisingPolicy(mixture, sampler=DDIM(eta), guidance_scale=1.0, seed=0)
    monkeypatch.setattr(mixture, "prediction_type", prediction_type)
    env = make_env(mixture)
    observation, _ = env.reset(seed=0)
    times = mixture.schedule.timesteps(NUM_STEPS).float()
    for t, s in itertools.pairwise(times[:-1]):
        observation |= {"timestep": t.expand(8, 1), "next_timestep": s.expand(8, 1)}
        transitions = []
        for output in (0.25, 1.25):
            monkeypatch.setattr(mixture, "_model_output", lambda network, x, *_, out=output: torch.full_like(x, out))
            transitions.append(policy.distribution(observation))
        moved = (transitions[1].mean - transitions[0].mean) / transitions[0].std.reshape(-1, 1, 1, 1)
        expected = policy.sensitivity(t, s).expand_as(moved)
        torch.testing.assert_close(moved.abs(), expected, rtol=1e-4, atol=1e-5)


def test_the_last_but_one_of_ten_steps_is_the_loudest(emoji):
    times = emoji.schedule.timesteps(10)
    sensitivity = DenoisingPolicy(emoji, adaptation=LoRA()).sensitivity(times[:-1], times[1:])
    assert int(sensitivity[:-1].argmax()) == 8
    assert float(sensitivity[8]) == pytest.approx(8.77, abs=0.01)
    assert float(sensitivity[:8].max()) < 2


def test_a_deterministic_step_is_infinitely_loud(mixture):
    times = mixture.schedule.timesteps(NUM_STEPS)
    assert DenoisingPolicy(mixture, sampler=DDIM(eta=0.0)).sensitivity(times[:1], times[1:2]).isinf().all()


@pytest.mark.parametrize("size", [None, 2])
def test_weights_undo_the_sensitivity_where_there_is_a_density(mixture, size):
    window = None if size is None else Window(size)
    learner = make(RLOO, mixture, steps=Steps(weights="inverse_sensitivity", window=window))
    rollout = collect(learner.env, learner.behaviour, seeds=[0])
    weights = learner.weights_of_steps(rollout)
    scored = torch.from_numpy(rollout.scored)
    assert int(scored.sum()) == 8 * (size or NUM_STEPS - 1)  # the last step goes to the clean end
    assert (weights[~scored] == 0).all()
    assert float(weights[scored].mean()) == pytest.approx(1)
    times = (rollout.changing[key][..., 0] for key in ("timestep", "next_timestep"))
    products = (weights * learner.policy.sensitivity(*times))[scored]
    torch.testing.assert_close(products, products[0].expand_as(products))


@pytest.mark.parametrize("algorithm", [DDPOSF, DDPOIS, RLOO, GRPO])
def test_the_gradient_is_the_weighted_sum_of_the_steps_own(mixture, algorithm):
    """Against one backward pass for each step, with the weights written out."""
    learner = make(algorithm, mixture, optimizer=AdamW(max_grad_norm=None))
    rollout = collect(learner.env, learner.policy, seeds=[0], reduction="mean")
    advantages = learner.advantages_of(rollout)
    parameters = [p for p in learner.policy.parameters() if p.requires_grad]
    times = mixture.schedule.timesteps(NUM_STEPS).double()
    inverse = [1 / float(learner.policy.sensitivity(t, s)) for t, s in itertools.pairwise(times[:-1])]
    expected = [torch.zeros_like(p) for p in parameters]
    lanes = torch.arange(8)
    for step, weight in enumerate(inverse):
        k = torch.full((8,), step)
        log_prob = learner.policy.log_prob(rollout.observation(k, lanes), rollout.action(k, lanes), "mean")
        for total, gradient in zip(
            expected, torch.autograd.grad((advantages * log_prob).sum(), parameters), strict=True
        ):
            total -= weight / sum(inverse) * gradient / 8
    applied = applied_gradients(learner)
    learner.train(rollout)
    (found,) = applied
    assert_gradients_close(found, expected)


def test_a_loaded_run_keeps_its_steps(mixture, tmp_path):
    steps = Steps(fraction=0.5, weights="inverse_sensitivity", window=Window(2, within=(1, 4)))
    learner = make(DDPOIS, mixture, steps=steps, rollouts=Rollouts(samples=8, group_size=4))
    learner.learn(8 * NUM_STEPS, log_interval=0)
    learner.save(tmp_path / "run")
    again = DDPOIS.load(tmp_path / "run", learner.env)
    assert (again.steps, again.sizes.group) == (steps, 4)


# The stochastic window


def test_a_window_of_steps_is_stochastic_and_learnt_from(mixture):
    window = Window(2, within=(0, 4))
    learner = make(RLOO, mixture, steps=Steps(window=window), num_steps=4, learning_rate=0.0)
    deterministic = DenoisingPolicy(mixture, sampler=DDIM(eta=0.0))
    windows = set()
    for rollout in rollouts_of(learner, 12):
        assert (rollout.scored == rollout.scored[:, :1]).all()
        windows.add(tuple(np.flatnonzero(rollout.scored[:, 0])))
        steps, lanes = (torch.from_numpy(index.ravel()) for index in np.indices(rollout.scored.shape))
        straight = deterministic.act(rollout.observation(steps, lanes))
        away = (rollout.action(steps, lanes) - straight).flatten(1).norm(dim=1)
        assert ((away > 1e-5).numpy() == rollout.scored.ravel()).all()
    assert windows == {(0, 1), (1, 2), (2,)}  # the fourth step goes to the clean end


def test_the_ratio_is_one_within_a_window(mixture):
    learner = make(GRPO, mixture, steps=Steps(window=Window(2)), kl=KL(0.1, place="exact"))
    metrics = learner.train(collect(learner.env, learner.behaviour, seeds=[0]))
    assert float(metrics["approx_kl"]) == pytest.approx(0, abs=1e-9)
    assert float(metrics["kl"]) == pytest.approx(0, abs=1e-6)


def test_a_window_lies_in_the_first_half_unless_said_otherwise():
    assert Window(2).bounds(10) == (0, 5)
    assert Window(3).bounds(4) == (0, 3)
    assert Window(2, within=(1, 4)).bounds(10) == (1, 4)


def test_a_window_needs_a_density(mixture):
    with pytest.raises(
        ValueError, match=r"\(0, 4\) allows a window of 1 steps without a density: steps \[3\] have none"
    ):
        make(RLOO, mixture, steps=Steps(window=Window(1, within=(0, 4))), num_steps=4)


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (Window(0), "must be of at least 1 step and lie within the 4 steps of an episode; got 0 steps"),
        (Window(2, within=(3, 4)), r"got 2 steps within \(3, 4\)"),
        (Window(2, within=(2, 5)), r"got 2 steps within \(2, 5\)"),
        (Window(5), r"got 5 steps within \(0, 5\)"),
    ],
)
def test_a_window_fits_into_the_episode(mixture, window, message):
    with pytest.raises(ValueError, match=message):
        make(RLOO, mixture, steps=Steps(window=window), num_steps=4)


@pytest.mark.parametrize(("size", "within"), [(2.5, None), (2, 3), (2, (0, 2.5)), (1, (0, 1, 2)), ("2", None)])
def test_a_window_is_counted_in_steps(size, within):
    with pytest.raises(TypeError, match=re.escape(f"got {size!r} and {within!r}")):
        Window(size, within)


def test_times_have_neither_a_window_nor_a_sensitivity(mixture):
    env, policy = make_env(mixture, kind="TimePredictionMDP-v0"), ContextFreeSchedule([0.4] * NUM_STEPS)
    with pytest.raises(ValueError, match=r"a window .* needs a policy that moves latents, .* got ContextFreeSchedule"):
        RLOO(policy, env, steps=Steps(window=Window(2)))
    with pytest.raises(ValueError, match=r"needs a policy that moves latents, .* got ContextFreeSchedule"):
        RLOO(policy, env, ratio="step", steps=WEIGHTED)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"fraction": 0.0}, ValueError, r"fraction must be a finite number in \(0, 1\], got 0.0"),
        ({"fraction": 1.1}, ValueError, r"fraction must be a finite number in \(0, 1\], got 1.1"),
        ({"weights": "sigma"}, ValueError, "weights must be one of .*got 'sigma'"),
        ({"window": 2}, TypeError, "window must be None or a Window, .* got 2"),
    ],
)
def test_wrong_values_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        Steps(**arguments)


@pytest.mark.parametrize("algorithm", [RLOO, GRPO, DPOK])
def test_weights_do_not_go_with_the_gradient_of_one_objective(mixture, algorithm):
    with pytest.raises(ValueError, match='place="loss" or "reward" with weights='):
        make(algorithm, mixture, kl=KL(0.1, place="exact"))
