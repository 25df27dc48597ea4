import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict
from scipy import stats

import diffusion_gym  # noqa: F401
from agents import KL, RLOO, ContextFreeSchedule, DenoisingPolicy, FixedSchedule, Rollouts, TimePredictor, collect
from agents.policies import BetaDistribution, load_policy
from diffusion_gym.grids import MAX_RATIO, MIN_RATIO, karras_grid, step_ratios, uniform_grid
from diffusion_gym.models import load_model
from diffusion_gym.samplers import DDIM


@pytest.fixture
def env(tiny):
    arguments = {"model": tiny, "reward": "brightness", "autoreset_mode": "DISABLED"}
    return gym.make_vec("TimePredictionMDP-v0", num_envs=4, **arguments)


def beta(alpha=(3.0, 2.0), b=(2.0, 8.0)):
    return BetaDistribution(torch.tensor(alpha), torch.tensor(b))


def test_beta_is_scipys():
    ours, reference = beta(), stats.beta([3.0, 2.0], [2.0, 8.0])
    value = torch.tensor([[0.3], [0.7]])
    np.testing.assert_allclose(ours.log_prob(value).numpy(), reference.logpdf([0.3, 0.7]), rtol=1e-5)
    np.testing.assert_allclose(ours.entropy().numpy(), reference.entropy(), rtol=1e-4)
    grid = np.linspace(0.001, 0.999, 9999)
    for lane in range(2):
        density = stats.beta([3.0, 2.0][lane], [2.0, 8.0][lane]).pdf(grid)
        assert float(ours.mode[lane]) == pytest.approx(grid[density.argmax()], abs=2e-4)


def test_beta_kl_is_the_integral_and_zero_to_itself():
    one, other = beta(), beta((4.0, 3.0), (3.0, 3.0))
    r = torch.linspace(0, 1, 200_001, dtype=torch.float64)[1:-1]
    for lane in range(2):
        p, q = (torch.distributions.Beta(d.alpha[lane].double(), d.beta[lane].double()) for d in (one, other))
        integral = (p.log_prob(r).exp() * (p.log_prob(r) - q.log_prob(r))).mean()
        assert float(one.kl(other)[lane]) == pytest.approx(float(integral), rel=1e-3)
    torch.testing.assert_close(one.kl(one), torch.zeros(2), rtol=0, atol=1e-6)


def test_entropy_is_minus_the_mean_log_prob_of_draws():
    distribution = BetaDistribution(torch.full((100_000,), 3.0), torch.full((100_000,), 5.0))
    drawn = distribution.sample(torch.Generator().manual_seed(0))
    log_probs = distribution.log_prob(drawn)
    error = 4 * float(log_probs.std()) / math.sqrt(len(log_probs))
    assert -float(log_probs.mean()) == pytest.approx(float(distribution.entropy()[0]), abs=error)


def test_beta_draws_belong_to_their_generators_and_leave_torchs_alone():
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    one = beta().sample(torch.Generator().manual_seed(1))
    assert torch.equal(one, beta().sample(torch.Generator().manual_seed(1)))
    assert not torch.equal(one, beta().sample(torch.Generator().manual_seed(2)))
    lanes = beta().sample([torch.Generator().manual_seed(seed) for seed in (7, 8)])
    alone = beta((2.0,), (8.0,)).sample([torch.Generator().manual_seed(8)])
    assert torch.equal(lanes[1:], alone)
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(ValueError, match="one per sample: got 1 for 2"):
        beta().sample([torch.Generator()])


def test_draws_are_clipped_before_they_are_scored():
    sharp = BetaDistribution(torch.tensor([1e-3 + 1, 500.0]), torch.tensor([500.0, 1e-3 + 1]))
    drawn = sharp.sample(torch.Generator().manual_seed(0))
    assert ((drawn >= MIN_RATIO) & (drawn <= MAX_RATIO)).all()
    assert torch.isfinite(sharp.log_prob(drawn)).all()


def test_logits_say_mode_and_concentration():
    logits = BetaDistribution.logits_of(torch.tensor([0.2, 0.9]), 20.0)
    distribution = BetaDistribution.from_logits(logits)
    torch.testing.assert_close(distribution.mode, torch.tensor([[0.2], [0.9]]))
    torch.testing.assert_close(distribution.alpha + distribution.beta, torch.tensor([20.0, 20.0]))
    huge = BetaDistribution.from_logits(torch.tensor([[1e4, -1e4]]))
    assert torch.isfinite(huge.log_prob(torch.tensor([[0.5]]))).all()


def test_size_at_stable_diffusion_3s_width_is_tpdms():
    shapes = {"features": (3072, 16, 16), "time_embedding": (1536,)}
    predictor = TimePredictor(Dict({key: Box(-1, 1, shape) for key, shape in shapes.items()}))
    assert sum(parameter.numel() for parameter in predictor.parameters()) == 4_097_154


def test_untrained_predictor_walks_the_schedule_of_its_bias(env):
    predictor = TimePredictor(env.single_observation_space, initial_ratio=0.6, initial_concentration=30, seed=0)
    distribution = predictor.distribution(env.reset(seed=0)[0])
    torch.testing.assert_close(distribution.mode, torch.full((4, 1), 0.6))
    torch.testing.assert_close(distribution.alpha + distribution.beta, torch.full((4,), 30.0))
    rollout = collect(env, predictor, seeds=[0], deterministic=True)
    start = env.unwrapped.model.schedule.noise_ratio(torch.tensor([999.0]))
    assert rollout.lengths.tolist() == [math.ceil(math.log(0.1 / start) / math.log(0.6))] * 4


def test_untrained_predictor_walks_a_grid_from_a_mapping(env):
    schedule = env.unwrapped.model.schedule
    grid = karras_grid(schedule, 9)
    ratios = dict(zip(grid.tolist(), step_ratios(schedule, grid).tolist(), strict=False))
    predictor = TimePredictor(env.single_observation_space, initial_ratio=ratios, initial_concentration=30, seed=0)
    rollout = collect(env, predictor, seeds=[0], deterministic=True)
    assert rollout.lengths.tolist() == [9] * 4
    times = rollout.changing["timestep"][:, :, 0]
    torch.testing.assert_close(times, grid[:-1].float()[:, None].expand(-1, 4), rtol=1e-4, atol=1e-2)
    between = {"timestep": (grid[3:4] + grid[4:5]).float()[:, None] / 2}
    known = predictor._first_logits.flip(0)
    torch.testing.assert_close(predictor._initial(between)[0], (known[3] + known[4]) / 2)


def test_predictor_looks_at_features_time_and_prompt(env):
    predictor = TimePredictor(env.single_observation_space, seed=0)
    torch.nn.init.normal_(predictor.output.weight)
    observation, _ = env.reset(seed=0)
    before = predictor.distribution(observation).mode
    for key in ("features", "time_embedding", "prompt_embeds"):
        changed = {**observation, key: observation[key] + torch.randn(observation[key].shape)}
        assert not torch.allclose(predictor.distribution(changed).mode, before, atol=1e-5), key


def test_half_precision_features_give_float32_distributions(env):
    predictor = TimePredictor(env.single_observation_space, seed=0)
    observation = {k: v.half() if v.is_floating_point() else v for k, v in env.reset(seed=0)[0].items()}
    assert predictor.distribution(observation).alpha.dtype == torch.float32
    assert predictor.act(observation).dtype == torch.float32


def test_same_seed_same_predictor(env):
    one, two, other = (TimePredictor(env.single_observation_space, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.conv.weight, other.conv.weight)


def test_predictor_wants_features(tiny):
    env = gym.make_vec("DenoisingMDP-v0", num_envs=1, model=tiny)
    with pytest.raises(TypeError, match="TimePredictionMDP-v0"):
        TimePredictor(env.single_observation_space)


def test_predictor_wants_the_space_of_one_lane(env):
    with pytest.raises(TypeError, match="that of one lane"):
        TimePredictor(env.observation_space)


@pytest.mark.parametrize(
    "arguments",
    [{"initial_ratio": 1.0}, {"initial_ratio": {}}, {"initial_ratio": {9.0: 0.0}}, {"initial_concentration": 2.0}],
)
def test_wrong_numbers_of_the_predictor_are_refused(env, arguments):
    with pytest.raises(ValueError, match="initial_ratio must be in"):
        TimePredictor(env.single_observation_space, **arguments)


def test_context_free_schedule_depends_on_the_step_alone(env):
    schedule = ContextFreeSchedule([0.9, 0.5] + [0.3] * 26, initial_concentration=20)
    observation, _ = env.reset(seed=0)
    torch.testing.assert_close(schedule.distribution(observation).mode, torch.full((4, 1), 0.9))
    observation, *_ = env.step(torch.full((4, 1), 0.5))
    torch.testing.assert_close(schedule.distribution(observation).mode, torch.full((4, 1), 0.5))
    assert sum(parameter.numel() for parameter in schedule.parameters()) == 56


@pytest.mark.parametrize("make_grid", [uniform_grid, karras_grid])
@pytest.mark.parametrize("num_steps", [1, 5, 10, 18, 28])
def test_fixed_schedule_walks_its_grid(env, tiny, make_grid, num_steps):
    """Karras' grid ends at the noise ratio `t_min` itself."""
    grid = make_grid(tiny.schedule, num_steps)
    policy = FixedSchedule(step_ratios(tiny.schedule, grid), max_steps=28)
    rollout = collect(env, policy, seeds=[0])
    assert rollout.lengths.tolist() == [num_steps] * 4
    np.testing.assert_allclose(rollout.changing["timestep"][:, 0, 0].numpy(), grid[:-1].numpy(), atol=1e-2)
    assert not rollout.scored.any()
    assert (rollout.log_probs == 0).all()


def test_a_fixed_schedule_cannot_be_scored_or_too_long(env):
    policy = FixedSchedule([0.5, 0.1], max_steps=28)
    observation, _ = env.reset(seed=0)
    with pytest.raises(ValueError, match="nothing in it to train"):
        policy.log_prob(observation, torch.full((4, 1), 0.5))
    with pytest.raises(ValueError, match="1 to 2 numbers"):
        FixedSchedule([0.5] * 3, max_steps=2)
    env = gym.make_vec("TimePredictionMDP-v0", num_envs=2, model="mixture", autoreset_mode="DISABLED", max_steps=6)
    for policy in (FixedSchedule([0.5] * 3), ContextFreeSchedule([0.5] * 5)):
        with pytest.raises(ValueError, match=r"of episodes of at most [35] steps, the env's have 6"):
            collect(env, policy)
    for wrong in ([], [0.5, 1.0], [[0.5]]):
        with pytest.raises(ValueError, match="initial_ratios must be a vector"):
            ContextFreeSchedule(wrong)


def make_mixture_env(name):
    return gym.make_vec(f"{name}-v0", num_envs=2, model="mixture", reward="brightness", autoreset_mode="DISABLED")


OTHERS = {
    "denoiser": lambda tiny: DenoisingPolicy(load_model("mixture")),
    "another model's denoiser": lambda tiny: DenoisingPolicy(tiny),
    "predictor": lambda tiny: TimePredictor(make_mixture_env("TimePredictionMDP").single_observation_space),
    "another model's predictor": lambda tiny: TimePredictor(
        gym.make_vec("TimePredictionMDP-v0", num_envs=2, model=tiny).single_observation_space
    ),
    "schedule": lambda tiny: ContextFreeSchedule([0.5] * 28),
    "schedule of other episodes": lambda tiny: ContextFreeSchedule([0.5] * 3),
}


@pytest.mark.parametrize(
    ("environment", "policy", "message"),
    [
        ("TimePredictionMDP", "denoiser", r"DenoisingPolicy .* needs next_timestep of shape \(1,\), and there is none"),
        ("DenoisingMDP", "another model's denoiser", r"needs latents of shape \(4, 8, 8\), and there is \(2, 1, 1\)"),
        ("DenoisingMDP", "predictor", r"TimePredictor does not fit the environment: it needs features"),
        ("TimePredictionMDP", "another model's predictor", r"needs features of shape \(\d+, None, None\)"),
        ("DenoisingMDP", "schedule", r"needs step of shape \(1,\), and there is none"),
        ("TimePredictionMDP", "schedule of other episodes", "at most 3 steps, the env's have 28"),
    ],
)
@pytest.mark.parametrize("use", [collect, RLOO])
def test_policies_of_other_environments_are_refused(tiny, environment, policy, message, use):
    env, policy = make_mixture_env(environment), OTHERS[policy](tiny)
    with pytest.raises(ValueError, match=message):
        use(*((env, policy) if use is collect else (policy, env)))


def test_references_of_other_environments_are_refused():
    env = make_mixture_env("DenoisingMDP")
    policy = DenoisingPolicy(env.unwrapped.model)
    with pytest.raises(ValueError, match="ContextFreeSchedule does not fit the environment"):
        RLOO(policy, env, rollouts=Rollouts(group_size=2), kl=KL(0.1, reference=ContextFreeSchedule([0.5] * 28)))


def test_time_policies_answer_for_themselves(env):
    predictor = TimePredictor(env.single_observation_space)
    lengths = {
        predictor: None,
        ContextFreeSchedule([0.5] * 28): 28,
        FixedSchedule([0.5] * 3): 3,
        FixedSchedule([0.5] * 3, max_steps=28): 28,
    }
    t = torch.tensor([0.5])
    for policy, max_steps in lengths.items():
        assert policy.max_steps == max_steps
        assert not policy.moves_latents
        assert not policy.reference_is_free
        assert policy.model is None
        assert policy.sensitivity(t, t / 2) is None
        with pytest.raises(ValueError, match=f"steps of a {type(policy).__name__} cannot be made deterministic"):
            policy.windowed(1.0, 0.0)


def test_a_point_has_no_entropy_and_no_divergence(env):
    point = FixedSchedule([0.5], max_steps=28).distribution(env.reset(seed=0)[0])
    assert point.entropy().tolist() == [0.0] * 4
    with pytest.raises(ValueError, match="nothing in it to train"):
        point.kl(point)


def test_policies_come_back_from_their_folders(env, tiny, tmp_path):
    predictor = TimePredictor(env.single_observation_space, initial_ratio={0.0: 0.3, 999.0: 0.7}, seed=0)
    torch.nn.init.normal_(predictor.output.weight)
    policies = [
        predictor,
        ContextFreeSchedule(torch.linspace(0.1, 0.9, 28).tolist()),
        FixedSchedule([0.5, 0.4, 0.001], max_steps=28),
    ]
    for policy in policies:
        folder = tmp_path / type(policy).__name__
        policy.save(folder)
        again = load_policy(folder)
        assert type(again) is type(policy)
        one, other = (collect(env, p, seeds=[2], deterministic=True) for p in (policy, again))
        assert torch.equal(one.actions, other.actions)
        policy.load_weights(folder)
    DenoisingPolicy(tiny, sampler=DDIM(0.5)).save(tmp_path / "denoising")
    assert load_policy(tmp_path / "denoising", model=tiny).sampler == DDIM(0.5)
    (tmp_path / "denoising" / "policy.json").write_text('{"policy": "Mine"}')
    with pytest.raises(ValueError, match="holds a Mine, which is none of"):
        load_policy(tmp_path / "denoising")
    with pytest.raises(FileNotFoundError, match="not a saved policy"):
        load_policy(tmp_path)


def test_ratio_is_one_before_the_first_update(env):
    predictor = TimePredictor(env.single_observation_space, seed=0)
    torch.nn.init.normal_(predictor.output.weight, std=0.5)
    rollout = collect(env, predictor, seeds=[0, 1], reduction="sum")
    steps, lanes = (torch.from_numpy(index) for index in np.nonzero(rollout.scored))
    with torch.no_grad():
        again = predictor.log_prob(rollout.observation(steps, lanes), rollout.action(steps, lanes))
    torch.testing.assert_close(again, rollout.log_probs[steps, lanes], rtol=0, atol=1e-5)


def test_rollouts_of_different_lengths_are_whole(env):
    policy = ContextFreeSchedule([0.4] * 28, initial_concentration=4.0, seed=0)
    rollout = collect(env, policy, seeds=[0, 1, 2])
    assert len(set(rollout.lengths.tolist())) > 1
    assert rollout.num_steps == rollout.lengths.max()
    for lane, length in enumerate(rollout.lengths):
        assert rollout.scored[:length, lane].all()
        assert not rollout.scored[length:, lane].any()
        assert (rollout.log_probs[length:, lane] == 0).all()
        assert (rollout.changing["timestep"][: length - 1, lane].diff(dim=0) < 0).all()
    assert torch.equal(rollout.extras["reward/brightness"], rollout.returns)
    assert (rollout.returns > 0).all()
    torch.testing.assert_close(rollout.images.mean((1, 2, 3)), rollout.returns)


def test_lanes_that_reset_themselves_are_refused_where_lengths_differ(tiny):
    env = gym.make_vec("TimePredictionMDP-v0", num_envs=4, model=tiny, reward="brightness")
    with pytest.raises(ValueError, match="would favour the short ones"):
        collect(env, ContextFreeSchedule([0.4] * 28, initial_concentration=4.0, seed=0))


def test_mean_length_that_is_learnt_from_is_the_policys(env, tiny):
    """Against episodes played one by one; the first episodes to end in self-resetting lanes are shorter."""
    policy = ContextFreeSchedule([0.4] * 28, initial_concentration=4.0)
    learnt = collect(env, policy, seeds=list(range(0, 400, 4)), generators=torch.Generator().manual_seed(0)).lengths
    rng = np.random.default_rng(0)
    start = float(tiny.schedule.noise_ratio(torch.tensor([999.0])))
    produced = []
    for _ in range(4000):
        tau, length = start, 0
        while tau >= 0.1 and length < 28:
            tau *= np.clip(rng.beta(1 + 2 * 0.4, 1 + 2 * 0.6), MIN_RATIO, MAX_RATIO)
            length += 1
        produced.append(length)
    error = np.std(learnt) / math.sqrt(len(learnt)) + np.std(produced) / math.sqrt(len(produced))
    assert learnt.mean() == pytest.approx(np.mean(produced), abs=3 * error)

    env = gym.make_vec("TimePredictionMDP-v0", num_envs=64, model=tiny, reward="brightness")
    observation, _ = env.reset(seed=0)
    first_to_end, generator = [], torch.Generator().manual_seed(0)
    while len(first_to_end) < 32:
        observation, _, _, _, info = env.step(policy.act(observation, generators=generator))
        if "final_info" in info:
            first_to_end.extend(info["final_info"]["nfe"][info["_final_info"]].tolist())
    assert np.mean(first_to_end[:32]) < np.mean(produced) - 3 * error


@pytest.mark.parametrize("concentration", [2.0, float("nan"), float("inf")])
def test_a_concentration_out_of_range_is_said_at_once(concentration):
    with pytest.raises(ValueError, match=r"initial_concentration .*above 2 and finite"):
        ContextFreeSchedule([0.5], initial_concentration=concentration)


def test_another_default_precision_changes_no_head(emoji):
    env = gym.make_vec("TimePredictionMDP-v0", num_envs=2, model=emoji, max_steps=3, reward="brightness")
    expected = TimePredictor(env.single_observation_space, seed=0)
    torch.set_default_dtype(torch.float64)
    try:
        found = TimePredictor(env.single_observation_space, seed=0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert found.state_dict()[name].dtype == value.dtype == torch.float32
        torch.testing.assert_close(found.state_dict()[name], value, rtol=0, atol=1e-7)
