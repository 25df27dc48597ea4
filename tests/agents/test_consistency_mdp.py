"""Every algorithm of the package learns in ConsistencyMDP-v0, from all actions but the last."""

import inspect
import warnings

import gymnasium as gym
import pytest
import torch

import agents
import diffusion_gym  # noqa: F401
from agents import KL, RLOO, Algorithm, DenoisingPolicy, Regression, Rollouts, Steps, Window, collect
from agents.steps import inverse_sensitivities
from diffusion_gym.models import load_model
from tests.tiny import make_tiny_latent_consistency

ALGORITHMS = [
    kind
    for kind in vars(agents).values()
    if inspect.isclass(kind) and issubclass(kind, Algorithm) and not inspect.isabstract(kind)
]
assert len(ALGORITHMS) >= 7


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(make_tiny_latent_consistency(tmp_path_factory.mktemp("lcm") / "tiny"))


def make_env(model, **arguments):
    return gym.make_vec("ConsistencyMDP-v0", num_envs=4, model=model, reward="brightness", **arguments)


def learner(kind, model, env=None, **arguments):
    env = make_env(model, num_steps=3) if env is None else env
    rollouts = Rollouts(samples=4, group_size=4)
    policy = DenoisingPolicy(model, seed=0)
    return kind(policy, env, **{"learning_rate": 1e-3, "batch_size": 4, "rollouts": rollouts, "seed": 0, **arguments})


def moved(algorithm):
    """Return how far learning from one rollout moved the trained weights."""
    before = [parameter.detach().clone() for parameter in algorithm.policy.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a random model's rewards may be ties
        algorithm.learn(4 * algorithm.env.unwrapped.num_steps, log_interval=0)
    after = list(algorithm.policy.parameters())
    assert all(bool(torch.isfinite(parameter).all()) for parameter in after)
    return max(float((new.detach() - old).abs().max()) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("kind", ALGORITHMS, ids=lambda kind: kind.__name__)
def test_every_algorithm_learns(model, kind):
    assert moved(learner(kind, model)) > 0


@pytest.mark.parametrize("kind", [kind for kind in ALGORITHMS if not issubclass(kind, Regression)])
def test_policy_gradients_learn_with_weighted_steps_and_a_pull_to_the_model(model, kind):
    steps = Steps(weights="inverse_sensitivity")
    assert moved(learner(kind, model, steps=steps, kl=KL(0.1))) > 0


@pytest.mark.parametrize("kind", [kind for kind in ALGORITHMS if not issubclass(kind, Regression)])
def test_one_step_has_nothing_to_learn_from(model, kind):
    algorithm = learner(kind, model, make_env(model, num_steps=1))
    with pytest.raises(ValueError, match="none of the actions to learn from has a density"):
        moved(algorithm)


def test_all_actions_count_but_the_last(model):
    env, policy = make_env(model, num_steps=4), DenoisingPolicy(model, seed=0)
    rollout = collect(env, policy)
    assert rollout.scored.tolist() == [[True] * 4] * 3 + [[False] * 4]
    assert (rollout.log_probs[3] == 0).all()
    weights = inverse_sensitivities(policy, rollout)
    assert (weights[:3] > 0).all()
    assert (weights[3] == 0).all()


def test_a_window_lies_on_the_environments_own_times(model):
    env = make_env(model, times=(900, 500, 100, 20))
    algorithm = learner(RLOO, model, env, steps=Steps(window=Window(1, within=(1, 2))))
    view = algorithm.steps.window.of_iteration(algorithm.policy, env.unwrapped, seed=0, iteration=0)
    assert (view.sampler.noisy, view.sampler.clean) == (500.0, 100.0)
    assert moved(algorithm) > 0
    with pytest.raises(ValueError, match=r"without a density: steps \[3\] have none"):
        learner(RLOO, model, env, steps=Steps(window=Window(1, within=(3, 4))))
