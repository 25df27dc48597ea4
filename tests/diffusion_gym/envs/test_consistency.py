"""RLCM's MDP: a consistency model's own few times, a clean last action, and no other model; and times of one's own."""

import gymnasium as gym
import pytest
import torch

import diffusion_gym  # noqa: F401
from agents import DenoisingPolicy
from diffusion_gym.models import load_model
from diffusion_gym.predictions import broadcast_to
from diffusion_gym.rewards import make_reward
from tests.tiny import make_tiny_latent_consistency

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@pytest.fixture(scope="module", params=PREDICTION_TYPES)
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lcm") / request.param
    return load_model(make_tiny_latent_consistency(folder, prediction_type=request.param))


def make_vec(model, **arguments):
    arguments = {"num_envs": 3, "reward": "brightness", "autoreset_mode": "DISABLED", **arguments}
    return gym.make_vec("ConsistencyMDP-v0", model=model, **arguments)


def test_an_episode_has_the_models_own_four_times_and_a_clean_end(model):
    env = make_vec(model).unwrapped
    assert env.num_steps == 4
    assert env.times == (*model.schedule.timesteps(4).tolist()[:-1], model.schedule.clean)
    assert make_vec(model, num_steps=2).unwrapped.times == (999.0, 499.0, -1.0)
    assert gym.make("ConsistencyMDP-v0", model=model).unwrapped.lane.times == env.times


@pytest.mark.parametrize("make", [gym.make, gym.make_vec])
@pytest.mark.parametrize("name", ["emoji", "emoji_flow", "mixture"])
def test_a_model_that_is_no_consistency_model_is_refused(make, name):
    with pytest.raises(ValueError, match=f"needs a consistency model, .*'{name}' is sampled by DDIM.*DenoisingMDP-v0"):
        make("ConsistencyMDP-v0", model=name)


def test_actions_are_draws_around_the_noised_consistency_function_and_the_last_is_it(model):
    """N(α_s·f, σ_s²), from f = c_skip·x + c_out·x̂_0 as LCM has it; the reward is that of the last f."""
    env = make_vec(model, num_steps=3)
    policy = DenoisingPolicy(model, seed=0)
    schedule, generator = model.schedule, torch.Generator().manual_seed(0)
    observation, info = env.reset(seed=0)
    for step in range(3):
        t, s = observation["timestep"][:, 0], observation["next_timestep"][:, 0]
        latents = observation["latents"]
        with torch.no_grad():
            distribution = policy.distribution(observation)
            embeds = {"prompt_embeds": observation["prompt_embeds"]}
            output = model._model_output(model.denoiser, latents, t, embeds, 8.5)
        alpha, sigma = (broadcast_to(level(t), latents) for level in (schedule.alpha, schedule.sigma))
        pred_x0 = {
            "epsilon": (latents - sigma * output) / alpha,
            "v_prediction": alpha * latents - sigma * output,
            "sample": output,
        }[model.prediction_type]
        c_skip, c_out = (
            broadcast_to(c, latents) for c in (0.25 / (100 * t**2 + 0.25), 10 * t / (100 * t**2 + 0.25).sqrt())
        )
        f = c_skip * latents + c_out * pred_x0
        torch.testing.assert_close(distribution.mean, broadcast_to(schedule.alpha(s), f) * f, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(distribution.std, schedule.sigma(s))
        assert policy.scored(info).tolist() == [step < 2] * 3
        observation, reward, _, _, info = env.step(distribution.sample(generator))
    torch.testing.assert_close(observation["latents"], f, rtol=1e-5, atol=1e-5)
    assert torch.equal(reward, make_reward("brightness")(model.decode(observation["latents"]), [""] * 3).values)


@pytest.mark.parametrize("shape", [(4,), (2, 4)])
def test_the_sensitivity_counts_the_scaling_of_the_output(model, shape):
    """∂mean/∂output over std: α_s·c_out/σ_s times σ_t/α_t for ε, σ_t for v, 1 for x_0; infinite at the clean end."""
    schedule, policy = model.schedule, DenoisingPolicy(model)
    t = torch.tensor([999.0, 499.0, 19.0, 0.02], dtype=torch.float64).expand(shape)
    s = torch.tensor([499.0, 19.0, 0.01, -1.0], dtype=torch.float64).expand(shape)
    c_out = 10 * t / (100 * t**2 + 0.25).sqrt()
    of_output = {
        "epsilon": schedule.sigma(t) / schedule.alpha(t),
        "v_prediction": schedule.sigma(t),
        "sample": torch.ones_like(t),
    }[model.prediction_type]
    expected, sensitivity = schedule.alpha(s) * c_out * of_output / schedule.sigma(s), policy.sensitivity(t, s)
    torch.testing.assert_close(sensitivity[..., :-1], expected[..., :-1])
    assert sensitivity[..., -1].isinf().all()


def test_times_of_ones_own_end_where_the_models_own_do(emoji, model):
    for env_id, one, end in (("DenoisingMDP-v0", emoji, 0.0), ("ConsistencyMDP-v0", model, -1.0)):
        for times in ((801, 401), [650.5]):
            env = gym.make_vec(env_id, num_envs=2, model=one, times=times, reward="brightness").unwrapped
            assert (env.num_steps, env.times) == (len(times), (*times, end))
            observation, _ = env.reset(seed=0)
            seen = [observation["timestep"][0].item()]
            for _ in times:
                observation, _, terminated, _, info = env.step(torch.zeros(2, *one.latent_shape))
                final = info.get("final_obs", observation)
                seen.append(final["timestep"][0].item())
            assert terminated.all()
            assert tuple(seen) == env.times


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"times": (401, 801)}, ValueError, r"times must fall from at most 999, .*got \(401, 801\)"),
        ({"times": (1000, 1)}, ValueError, "times must fall from at most 999"),
        ({"times": (801, -1)}, ValueError, "all of them above -1"),
        ({"times": ()}, ValueError, r"times must fall .*got \(\)"),
        ({"times": (float("nan"), 1)}, ValueError, "times must fall"),
        ({"times": "801"}, TypeError, "times must be a sequence of numbers"),
        ({"times": (801, "401")}, TypeError, "times must be a sequence of numbers"),
        ({"times": 801}, TypeError, "times must be a sequence of numbers"),
        ({"times": (801, 401), "num_steps": 3}, ValueError, "num_steps=3 differs from the 2 times"),
    ],
)
def test_other_times_are_named(model, arguments, error, message):
    with pytest.raises(error, match=message):
        make_vec(model, **arguments)
