"""The algorithms learn, on the embedded models."""

import math
from functools import partial

import gymnasium as gym
import pytest

from agents import (
    DDPOIS,
    RLOO,
    DenoisingPolicy,
    FixedSchedule,
    Groups,
    Muon,
    PerPrompt,
    Rollouts,
    Steps,
    TimePredictor,
    Window,
    evaluate,
)
from diffusion_gym.grids import karras_grid, power_grid, shifted_grid, step_ratios, uniform_grid
from diffusion_gym.models import load_model


@pytest.mark.slow
def test_brightness_rises_on_held_out_seeds(emoji):
    """128 images: the first two of five steps learnt from, with Muon."""
    env = gym.make_vec("diffusion_gym:DenoisingMDP-v0", num_envs=32, num_steps=5, model=emoji, reward="brightness")
    policy = DenoisingPolicy(emoji, precision="auto", seed=0)
    learner = DDPOIS(
        policy,
        env,
        learning_rate=1e-3,
        batch_size=32,
        optimizer=Muon(warmup_updates=2),
        rollouts=Rollouts(samples=32, group_size=8),
        advantages=PerPrompt(8, min_count=8),
        steps=Steps(weights="inverse_sensitivity", window=Window(2, within=(0, 2))),
        seed=0,
    )
    before = evaluate(env, policy, seeds=range(32))
    learner.learn(4 * 32 * 5, log_interval=0)
    gain, error = evaluate(env, policy, seeds=range(32)).gain_over(before)
    assert gain > 5 * error
    assert gain > 0.05


def test_a_time_predictor_beats_every_fixed_grid_on_the_mixture():
    """At the same number of calls or fewer, on starts that it has not seen: its error against the best grid's."""
    model = load_model("mixture")

    def make_env(num_envs, **arguments):
        arguments = {"model": model, "reward": "reference_distance", "autoreset_mode": "DISABLED", **arguments}
        return gym.make_vec("diffusion_gym:TimePredictionMDP-v0", num_envs=num_envs, **arguments)

    env = make_env(256, step_cost="linear", step_cost_weight=1e-6)
    policy = TimePredictor(env.single_observation_space, initial_ratio=0.58, initial_concentration=20.0, seed=0)
    algorithm = RLOO(
        policy,
        env,
        learning_rate=3e-3,
        n_epochs=2,
        rollouts=Rollouts(group_size=8, same_noise=True, num_starts=512),
        advantages=Groups(scale="rollout"),
        seed=0,
    )
    held_out = {"seeds": range(512), "prompts": ["anything"] * 512, "deterministic": True}
    judge = make_env(512)

    def evaluated(policy):
        return evaluate(judge, policy, **held_out)

    untrained = evaluated(policy)
    algorithm.learn(40_000, log_interval=0)
    trained = evaluated(policy)
    calls = math.ceil(trained.lengths.mean())
    for make_grid in (uniform_grid, karras_grid, partial(power_grid, rho=0.7), partial(shifted_grid, shift=1.5)):
        ratios = step_ratios(model.schedule, make_grid(model.schedule, calls))
        gain, error = trained.gain_over(evaluated(FixedSchedule(ratios, max_steps=28)))
        assert gain > 5 * error
    assert untrained.lengths.std() == 0
    assert trained.lengths.std() > 0.3
