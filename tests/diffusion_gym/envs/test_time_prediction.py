import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.error import InvalidAction
from gymnasium.vector import AutoresetMode

import diffusion_gym  # noqa: F401
from diffusion_gym.envs.reference import ReferenceDistance
from diffusion_gym.envs.step_cost import StepCost
from diffusion_gym.envs.time_prediction import TimePredictionVectorEnv
from diffusion_gym.grids import step_ratios, uniform_grid
from diffusion_gym.models import load_model
from diffusion_gym.rewards import Reward, RewardOutput
from tests.tiny import make_tiny_stable_diffusion


def make_vec(model, num_envs=3, **arguments):
    arguments = {"reward": "brightness", "autoreset_mode": "DISABLED", **arguments}
    return gym.make_vec("TimePredictionMDP-v0", num_envs=num_envs, model=model, **arguments)


def ratios_of(rows, device="cpu"):
    return torch.tensor(rows, dtype=torch.float32, device=device)[:, None]


def play(env, policy, seed=0, **reset):
    """Run whole episodes; return the last observation, the returns, the last info and every lane's images."""
    observation, info = env.reset(seed=seed, **reset)
    returns, images = torch.zeros(env.num_envs), None
    while not info["ended"].all():
        observation, reward, _, _, info = env.step(policy(observation))
        returns += reward
        if "images" in info:
            mask = torch.from_numpy(info["_images"])[:, None, None, None]
            images = info["images"] if images is None else torch.where(mask & (images == 0), info["images"], images)
    return observation, returns, info, images


def uneven(observation):
    """Each lane has a pace of its own, so that they end at different steps."""
    return torch.linspace(0.2, 0.7, len(observation["step"]))[:, None]


class Calls:
    """Counts the latents that the denoiser is asked about."""

    def __init__(self, model, monkeypatch):
        self.rows = []
        denoise = model.denoise

        def counted(latents, *args, **kwargs):
            self.rows.append(len(latents))
            return denoise(latents, *args, **kwargs)

        monkeypatch.setattr(model, "denoise", counted)


def test_every_action_costs_one_network_call_and_ended_lanes_none(tiny, monkeypatch):
    calls = Calls(tiny, monkeypatch)
    _, _, info, _ = play(make_vec(tiny), uneven)
    assert len(set(info["nfe"].tolist())) == 3
    assert sum(calls.rows) == info["nfe"].sum()
    assert calls.rows[0] == 3
    assert calls.rows[-1] == 1


def test_x_moves_by_the_deterministic_step_and_ends_clean(tiny):
    """Against a loop in float64 over one lane, from the formulas."""
    env = make_vec(tiny, num_envs=1, guidance_scale=2.0)
    start, _ = env.reset(seed=3)
    rows = [0.5, 0.3, 0.6, 0.02]
    schedule = tiny.schedule
    conditioning = {k: start[k] for k in ("prompt_embeds", "negative_prompt_embeds")}
    x, tau = start["latents"], schedule.noise_ratio(torch.tensor([999.0], dtype=torch.float64))
    for k, r in enumerate(rows):
        t = schedule.time_of(tau)
        prediction = tiny.denoise(x, t.float(), conditioning, guidance_scale=2.0)
        tau = tau * float(np.float32(r))
        alpha = (1 + tau**2) ** -0.5
        x = (alpha * prediction.x0.double() + tau * alpha * prediction.epsilon.double()).float()
        observation, reward, terminated, _, info = env.step(ratios_of([r]))
        last = k == len(rows) - 1
        assert bool(terminated) == last == (float(tau) < 0.1)
        expected = prediction.x0 if last else x
        torch.testing.assert_close(observation["latents"], expected, rtol=1e-4, atol=1e-4)
        assert float(observation["timestep"]) == pytest.approx(-1 if last else float(schedule.time_of(tau)), abs=1e-2)
        assert float(observation["step"]) == pytest.approx((k + 1) / 28)
    torch.testing.assert_close(info["images"], tiny.decode(prediction.x0), rtol=0, atol=1e-4)
    assert reward.item() == pytest.approx(float(tiny.decode(prediction.x0).mean()), abs=1e-4)


def test_features_are_the_hidden_layers_of_the_denoiser(tiny):
    env = make_vec(tiny, num_envs=2, guidance_scale=3.0)
    observation, _ = env.reset(seed=0)
    unet = tiny.denoiser
    seen = {}
    hooks = [
        unet.conv_in.register_forward_hook(lambda m, a, out: seen.update(first=out)),
        unet.conv_norm_out.register_forward_hook(lambda m, a, out: seen.update(last=out)),
        unet.time_embedding.register_forward_hook(lambda m, a, out: seen.update(time=out)),
    ]
    expected = []
    for key in ("negative_prompt_embeds", "prompt_embeds"):
        unet(observation["latents"], observation["timestep"][:, 0], encoder_hidden_states=observation[key])
        expected.append(torch.cat([seen["first"], seen["last"]], 1))
    for hook in hooks:
        hook.remove()
    guided = expected[0] + 3.0 * (expected[1] - expected[0])
    torch.testing.assert_close(observation["features"], guided, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(observation["time_embedding"], seen["time"], rtol=1e-5, atol=1e-5)
    assert not unet.conv_in._forward_hooks


def test_terminal_observation_has_no_features(tiny):
    observation, _, info, _ = play(make_vec(tiny), uneven)
    assert (observation["features"] == 0).all()
    assert (observation["time_embedding"] == 0).all()
    assert info["times"].shape == (3, 29)
    for lane, nfe in enumerate(info["nfe"]):
        visited = info["times"][lane]
        assert (visited[nfe:] == -1).all()
        assert visited[0] == 999
        assert (np.diff(visited[: nfe + 1]) < 0).all()


def test_reaching_max_steps_terminates_and_is_said(tiny):
    env = make_vec(tiny, max_steps=4)
    _, _, info, images = play(env, lambda o: ratios_of([0.9, 0.99, 0.01]))
    assert info["nfe"].tolist() == [4, 4, 2]
    assert info["max_steps_reached"].tolist() == [True, True, False]
    assert (images != 0).flatten(1).any(1).all()


def test_raw_last_step_keeps_the_noise(tiny):
    env = make_vec(tiny, num_envs=1, last_step="raw")
    env.reset(seed=0)
    before, _, _, _, info = env.step(ratios_of([0.5]))
    conditioning = {k: before[k] for k in ("prompt_embeds", "negative_prompt_embeds")}
    t = before["timestep"][:, 0]
    prediction = tiny.denoise(before["latents"], t, conditioning, guidance_scale=tiny.default_guidance_scale)
    after, _, terminated, _, info = env.step(ratios_of([0.002]))
    tau = 0.002 * tiny.schedule.noise_ratio(t)
    assert terminated.all()
    assert info["times"][0, 2] == pytest.approx(float(tiny.schedule.time_of(tau)), abs=1e-2)
    expected = (prediction.x0 + tau * prediction.epsilon) / (1 + tau**2).sqrt()
    torch.testing.assert_close(after["latents"], expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(after["latents"], prediction.x0, atol=1e-4)


def test_lanes_do_not_depend_on_each_other(tiny):
    """Retired lanes, lock-step masking and single lanes give the same images."""

    class LockStep(TimePredictionVectorEnv):
        def _before_observing(self):
            self._unseen[:] = self._unseen.any()
            super()._before_observing()

    _, returns, info, images = play(make_vec(tiny), uneven)
    masked = LockStep(3, model=tiny, reward="brightness", autoreset_mode="DISABLED")
    _, masked_returns, masked_info, masked_images = play(masked, uneven)
    assert masked_info["nfe"].tolist() == info["nfe"].tolist()
    torch.testing.assert_close(masked_images, images, rtol=0, atol=1e-5)
    torch.testing.assert_close(masked_returns, returns, rtol=0, atol=1e-5)
    for lane, pace in enumerate([0.2, 0.45, 0.7]):
        _, alone, _, image = play(make_vec(tiny, num_envs=1), lambda o, pace=pace: ratios_of([pace]), seed=lane)
        torch.testing.assert_close(image[0], images[lane], rtol=0, atol=1e-5)
        assert alone.item() == pytest.approx(returns[lane].item(), abs=1e-5)


def test_same_step_starts_a_lane_anew_while_the_others_go_on(tiny):
    env = make_vec(tiny, autoreset_mode=AutoresetMode.SAME_STEP)
    env.reset(seed=0)
    env.step(ratios_of([0.5, 0.5, 0.5]))
    observation, reward, terminated, _, info = env.step(ratios_of([0.5, 0.001, 0.5]))
    assert terminated.tolist() == [False, True, False]
    assert info["final_info"]["nfe"][1] == 2
    assert info["final_obs"]["timestep"][1] == -1
    assert (info["final_obs"]["features"][1] == 0).all()
    assert observation["timestep"][1] == 999
    assert info["nfe"].tolist() == [2, 0, 2]
    assert reward[1] != 0
    assert (observation["features"].flatten(1).std(1) > 0).all()


def test_step_costs_are_the_formulas():
    rewards, nfe = torch.tensor([2.0, 2.0, 0.5]), torch.tensor([1, 10, 28])
    for gamma in (0.97, 0.9):
        expected = [r * sum(gamma ** (n - k) for k in range(1, n + 1)) / n for r, n in zip(rewards, nfe, strict=True)]
        found = StepCost("discount", gamma=gamma)(rewards, nfe)
        torch.testing.assert_close(found, torch.stack(expected))
    assert float(StepCost("discount", gamma=0.97)(torch.ones(1), torch.tensor([20]))) == pytest.approx(0.760, abs=5e-4)
    assert torch.equal(StepCost("discount", gamma=1.0)(rewards, nfe), rewards)
    assert torch.equal(StepCost("none")(rewards, nfe), rewards)
    assert StepCost("linear", weight=0.1)(rewards, nfe).tolist() == pytest.approx([1.9, 1.0, -2.3])


def test_linear_cost_is_taken_from_the_return_and_the_raw_reward_reported(tiny):
    env = make_vec(tiny, num_envs=2, step_cost="linear", step_cost_weight=0.5)
    env.reset(seed=0)
    env.step(ratios_of([0.5, 0.5]))
    _, reward, _, _, info = env.step(ratios_of([0.001, 0.001]))
    torch.testing.assert_close(reward, info["reward/brightness"] - 1.0)


def test_a_discount_that_would_pay_for_steps_is_refused(tiny):
    class Signed(Reward):
        name, range = "signed", (-1.0, 1.0)

        def __call__(self, images, prompts, metadata=None):
            return RewardOutput(-torch.ones(len(images)))

    with pytest.raises(ValueError, match=r"pays for more steps where the reward is negative.*allow_negative=True"):
        make_vec(tiny, reward=Signed(), step_cost="discount")
    with pytest.raises(ValueError, match="pays for more steps"):
        make_vec(tiny, reward="reference_distance", step_cost="discount")
    make_vec(tiny, reward="brightness", step_cost="discount")
    env = make_vec(tiny, reward=Signed(), step_cost="discount", allow_negative=True)
    _, returns, info, _ = play(env, uneven)
    assert (returns.diff() > 0).all()
    assert (np.diff(info["nfe"]) > 0).all()


def test_reference_distance_is_that_to_the_many_step_sample_and_is_remembered(tiny, monkeypatch):
    calls = Calls(tiny, monkeypatch)
    env = make_vec(tiny, num_envs=2, reward="reference_distance", reference_steps=12, max_steps=12)
    ratios = step_ratios(tiny.schedule, uniform_grid(tiny.schedule, 12)).float()

    def walk(observation):
        return ratios[(observation["step"][:, 0] * 12).round().long()][:, None]

    _, returns, info, _ = play(env, walk)
    assert info["nfe"].tolist() == [12, 12]
    torch.testing.assert_close(returns, torch.zeros(2), rtol=0, atol=1e-8)
    assert sum(calls.rows) == 24 + 24
    calls.rows.clear()
    _, returns, info, images = play(env, lambda o: torch.full((2, 1), 0.3))
    assert sum(calls.rows) == info["nfe"].sum()
    assert (returns < 0).all()
    _, _, _, references = play(env, walk)
    torch.testing.assert_close(returns, -(images - references).square().mean((1, 2, 3)), rtol=1e-3, atol=1e-9)
    assert torch.equal(info["reward/reference_distance"], returns)


def test_reference_distance_can_be_the_root(tiny):
    rewards = {root: ReferenceDistance(num_steps=12, root=root) for root in (False, True)}
    squares, roots = (play(make_vec(tiny, reward=reward), uneven)[1] for reward in rewards.values())
    torch.testing.assert_close(-roots.square(), squares)
    assert [reward.unit for reward in rewards.values()] == ["−MSE", "−RMSE"]


def test_reference_distance_belongs_to_environments(tiny):
    env = make_vec(tiny, reward="reference_distance")
    with pytest.raises(TypeError, match="only an environment knows it"):
        env.unwrapped.reward(torch.zeros(1, 3, 16, 16), ["a cat"])


@pytest.mark.parametrize("config", [{"prediction_type": "v_prediction"}, {"rescale_betas_zero_snr": True}])
def test_other_processes_and_predictions_run(tmp_path, config):
    config = {"prediction_type": "v_prediction", **config}
    model = load_model(make_tiny_stable_diffusion(tmp_path / "model", **config))
    _, returns, info, _ = play(make_vec(model), uneven)
    assert torch.isfinite(returns).all()
    assert info["times"][0, 0] == (998 if "rescale_betas_zero_snr" in config else 999)


def test_latents_and_ratios_stay_float32_around_a_half_precision_denoiser(tmp_path):
    model = load_model(make_tiny_stable_diffusion(tmp_path / "model"), dtype="bfloat16")
    env = make_vec(model)
    observation, returns, _, _ = play(env, uneven)
    assert observation["latents"].dtype == torch.float32
    assert observation["features"].dtype == torch.float32
    assert torch.isfinite(returns).all()
    env.reset()
    with pytest.raises(InvalidAction, match=r"torch.float32"):
        env.step(torch.full((3, 1), 0.5, dtype=torch.bfloat16))


def test_ratios_are_clipped(tiny):
    env = make_vec(tiny)
    env.reset(seed=0)
    _, _, terminated, _, info = env.step(ratios_of([-1.0, 2.0, 1.0]))
    assert terminated.tolist() == [True, False, False]
    assert info["times"][1, 1] == info["times"][2, 1] < 999


def test_a_ratio_that_is_not_a_number_is_named(tiny):
    env = make_vec(tiny)
    env.reset(seed=0)
    with pytest.raises(InvalidAction, match=r"lanes \[1\] were NaN"):
        env.step(ratios_of([0.5, float("nan"), 0.5]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_steps": 0}, "max_steps must be an integer of at least 1, got 0"),
        ({"last_step": "noisy"}, "last_step must be one of .*clean.*got 'noisy'"),
        ({"step_cost": "square"}, "step_cost must be one of .*got 'square'"),
        ({"step_cost": "discount", "gamma": 1.5}, r"gamma must be a finite number in \(0, 1\], got 1.5"),
        (
            {"step_cost": "linear", "step_cost_weight": -1},
            r"step_cost_weight must be a finite number in \[0, inf\), got -1",
        ),
        ({"step_cost_weight": 10.0}, "step_cost_weight=10.0 needs step_cost=\"linear\", got 'none'"),
        ({"step_cost": "discount", "step_cost_weight": 1}, "needs step_cost=\"linear\", got 'discount'"),
        ({"gamma": 0.9}, "gamma=0.9 needs step_cost=\"discount\", got 'none'"),
        ({"step_cost": "linear", "gamma": 1.0}, "needs step_cost=\"discount\", got 'linear'"),
        ({"t_min": 100.0}, r"t_min must be a finite number in \(0, [\d.]+\), got 100.0"),
        ({"reward": {"reference_distance": 1, "brightness": 1}}, "by itself, not as a part of another reward"),
        (
            {"reward": "reference_distance", "reference_steps": 0},
            "reference_steps must be an integer of at least 1, got 0",
        ),
    ],
)
def test_wrong_arguments_are_named_with_what_is_allowed(tiny, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_vec(tiny, **arguments)


def test_stock_ppo_runs_on_the_single_environment(tiny):
    from stable_baselines3 import PPO

    env = gym.make("TimePredictionMDP-v0", model=tiny, reward="brightness", max_steps=4)
    before = PPO("MultiInputPolicy", env, n_steps=8, batch_size=8, n_epochs=1, seed=0, device="cpu")
    weights = [p.detach().clone() for p in before.policy.parameters()]
    before.learn(16)
    assert before.num_timesteps == 16
    assert any(not torch.equal(a, b) for a, b in zip(weights, before.policy.parameters(), strict=True))
