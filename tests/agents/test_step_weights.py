"""Steps that are weighted by how loud their gradients are, and groups of images of one prompt."""

import itertools

import gymnasium as gym
import numpy as np
import pytest
import torch

from agents import DDPOIS, DDPOSF, RLOO, ContextFreeSchedule, DenoisingPolicy, collect
from diffusion_gym.models import load_model
from tests.gradients import assert_gradients_close

STEPS = 5


@pytest.fixture(scope="module")
def mixture():
    return load_model("mixture")


def make_env(model, num_envs=8, kind="DenoisingMDP-v0", **arguments):
    steps = {"num_steps": STEPS} if kind == "DenoisingMDP-v0" else {"max_steps": STEPS}
    arguments = {"autoreset_mode": "DISABLED"} | steps | arguments

    def position(images, prompts, metadata):
        return model.positions(images)[:, 0]

    return gym.make_vec(kind, num_envs=num_envs, model=model, reward=position, **arguments)


def make(algorithm, model, **arguments):
    own = {} if algorithm is RLOO else {"samples_per_epoch": 8, "batch_size": 8, "per_prompt_buffer_size": None}
    options = {"step_weights": "inverse_sensitivity", "learning_rate": 1e-3, "seed": 0} | own | arguments
    return algorithm(DenoisingPolicy(model, seed=0), make_env(model), **options)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_sensitivity_is_how_far_the_mean_moves(mixture, monkeypatch, prediction_type, eta):
    policy = DenoisingPolicy(mixture, eta=eta, guidance_scale=1.0, seed=0)
    monkeypatch.setattr(mixture, "prediction_type", prediction_type)
    env = make_env(mixture)
    observation, _ = env.reset(seed=0)
    times = mixture.schedule.timesteps(STEPS).float()
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
    sensitivity = DenoisingPolicy(emoji, use_lora=True).sensitivity(times[:-1], times[1:])
    assert int(sensitivity[:-1].argmax()) == 8
    assert float(sensitivity[8]) == pytest.approx(8.77, abs=0.01)
    assert float(sensitivity[:8].max()) < 2


def test_a_deterministic_step_is_infinitely_loud(mixture):
    times = mixture.schedule.timesteps(STEPS)
    assert DenoisingPolicy(mixture, eta=0.0).sensitivity(times[:1], times[1:2]).isinf().all()


@pytest.mark.parametrize("window", [None, 2])
def test_weights_undo_the_sensitivity_where_there_is_a_density(mixture, window):
    learner = make(RLOO, mixture, sde_window=window)
    rollout = collect(learner.env, learner.behaviour, seeds=[0])
    weights = learner.weights_of_steps(rollout)
    scored = torch.from_numpy(rollout.scored)
    assert int(scored.sum()) == 8 * (window or STEPS - 1)  # the last step goes to the clean end
    assert (weights[~scored] == 0).all()
    assert float(weights[scored].mean()) == pytest.approx(1)
    times = (rollout.changing[key][..., 0] for key in ("timestep", "next_timestep"))
    products = (weights * learner.policy.sensitivity(*times))[scored]
    torch.testing.assert_close(products, products[0].expand_as(products))


@pytest.mark.parametrize("algorithm", [DDPOSF, DDPOIS, RLOO])
def test_the_gradient_is_the_weighted_sum_of_the_steps_own(mixture, algorithm, monkeypatch):
    """Against one backward pass for each step, with the weights written out."""
    learner = make(algorithm, mixture, max_grad_norm=None)
    rollout = collect(learner.env, learner.policy, seeds=[0], reduction="mean")
    advantages = learner._advantages(rollout)
    parameters = [p for p in learner.policy.parameters() if p.requires_grad]
    times = mixture.schedule.timesteps(STEPS).double()
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
    found = []
    step = learner.optimizer_step
    monkeypatch.setattr(learner, "optimizer_step", lambda: found.extend(p.grad.clone() for p in parameters) or step())
    learner.train(rollout)
    assert_gradients_close(found, expected)


def test_a_loaded_run_keeps_its_weights(mixture, tmp_path):
    learner = make(DDPOIS, mixture, group_size=4)
    learner.learn(8 * STEPS)
    learner.save(tmp_path / "run")
    again = DDPOIS.load(tmp_path / "run", learner.env)
    assert (again.step_weights, again.group_size) == ("inverse_sensitivity", 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step_weights": "sigma"}, "step_weights must be one of .*got 'sigma'"),
        ({"kl_place": "exact", "kl_coefficient": 0.1}, 'give kl_place="loss" or "reward" with step_weights='),
        ({"ratio": "trajectory"}, 'step_weights go with ratio="step"'),
    ],
)
def test_wrong_arguments_are_named_with_what_is_allowed(mixture, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(RLOO, mixture, **arguments)


def test_times_have_no_sensitivity(mixture):
    env = make_env(mixture, kind="TimePredictionMDP-v0")
    with pytest.raises(ValueError, match="needs a DenoisingPolicy in DenoisingMDP-v0, got ContextFreeSchedule"):
        RLOO(ContextFreeSchedule([0.4] * STEPS), env, ratio="step", step_weights="inverse_sensitivity")


def test_groups_share_the_prompt_and_nothing_else(emoji):
    env = gym.make_vec("DenoisingMDP-v0", num_envs=8, num_steps=2, model=emoji)
    learner = DDPOSF(DenoisingPolicy(emoji, use_lora=True), env, samples_per_epoch=16, group_size=4, seed=0)
    seeds, options = zip(*(learner._starts().reset(0, batch) for batch in (range(8), range(8, 16))), strict=True)
    rollout = collect(env, learner.policy, seeds=seeds, options=options)
    groups = rollout.prompt_id.reshape(4, 4)
    assert (groups == groups[:, :1]).all()
    assert len(set(groups[:, 0])) > 1
    starts = rollout.changing["latents"][0].flatten(1)
    assert len(torch.unique(starts, dim=0)) == 16
    assert not np.array_equal(learner._starts().reset(1, range(8))[1]["prompt_id"], rollout.prompt_id[:8])


@pytest.mark.parametrize("group_size", [0, 3])
def test_groups_have_to_fill_the_lanes(mixture, group_size):
    with pytest.raises(ValueError, match=rf"(divide num_envs \(8\)|at least 1), got {group_size}"):
        make(DDPOIS, mixture, group_size=group_size)
