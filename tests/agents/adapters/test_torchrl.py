"""TorchRL's environment, actor and critic are ours; its own check passes, and its ClipPPOLoss trains."""

import gymnasium as gym
import pytest
import torch
from torchrl.collectors import Collector
from torchrl.envs.utils import ExplorationType, check_env_specs, set_exploration_type
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

import diffusion_gym  # noqa: F401
from agents import DenoisingPolicy, LoRA, TimePredictor, ValueNetwork
from agents.adapters.torchrl import (
    DiffusionTorchRLEnv,
    RatioDistribution,
    TransitionDistribution,
    critic_of,
    denoising_actor,
    time_prediction_actor,
)
from agents.policies import BetaDistribution
from diffusion_gym.models import load_model
from diffusion_gym.samplers import DDIM
from diffusion_gym.transitions import GaussianTransition

KINDS = ["DenoisingMDP-v0", "TimePredictionMDP-v0"]


@pytest.fixture
def make(mixture, tiny):
    def make(name, num_envs=4, **arguments):
        own = {"model": mixture, "num_steps": 3} if name.startswith("D") else {"model": tiny, "max_steps": 5}
        arguments = {"reward": "brightness", "autoreset_mode": "DISABLED", **own, **arguments}
        return DiffusionTorchRLEnv(gym.make_vec(name, num_envs=num_envs, **arguments))

    return make


def actor_and_critic(env, seed=0, **arguments):
    space = env.env.single_observation_space
    critic = critic_of(ValueNetwork(space), env)
    if "features" in space.spaces:
        return time_prediction_actor(TimePredictor(space, initial_concentration=6, seed=seed), env), critic
    return denoising_actor(DenoisingPolicy(env.model, seed=seed), env, **arguments), critic


@pytest.mark.parametrize("name", KINDS)
def test_torchrls_own_check_passes(make, name):
    check_env_specs(make(name), seed=0)


@pytest.mark.parametrize("name", KINDS)
def test_it_is_the_torch_environment(make, name):
    """Step by step, with the lanes that ended reset as one would by hand."""
    env = make(name)
    plain = gym.make_vec(env.env.spec)
    env.set_seed(5)
    now, (expected, info) = env.reset(), plain.reset(seed=5)
    generator = torch.Generator().manual_seed(0)
    ended = 0
    for _ in range(9):
        assert all(torch.equal(now[key], expected[key]) for key in expected)
        action = torch.rand(4, *plain.single_action_space.shape, generator=generator)
        stepped, now = env.step_and_maybe_reset(now.set("action", action))
        expected, reward, terminated, _, info = plain.step(action)
        assert all(torch.equal(stepped["next", key], expected[key]) for key in expected)
        assert torch.equal(stepped["next", "reward"], reward[:, None])
        assert torch.equal(stepped["next", "done"], terminated[:, None])
        assert not stepped["next", "truncated"].any()
        if info["ended"].any():
            ended += int(info["ended"].sum())
            expected, info = plain.reset(options={"reset_mask": info["ended"]})
    assert ended >= 4


def test_options_of_a_reset_are_passed_on(make):
    env = make(KINDS[0])
    assert env.reset(prompt_id=1)["prompt_id"].flatten().tolist() == [1] * 4


@pytest.mark.parametrize("name", KINDS)
def test_the_actor_is_our_policy(make, name):
    env = make(name)
    actor, critic = actor_and_critic(env)
    env.set_seed(1)
    seen = env.reset()
    distribution = actor.get_dist(seen)
    policy = actor[0].module.policy
    observation = {key: seen[key] for key in env.env.single_observation_space.spaces}
    ours = policy.distribution(observation)
    torch.manual_seed(3)
    drawn = actor(seen.clone())
    torch.manual_seed(3)
    assert torch.equal(drawn["action"], ours.sample())
    reduction = "mean" if policy.moves_latents else "sum"
    assert torch.equal(drawn["action_log_prob"], ours.log_prob(drawn["action"], reduction))
    dimensions = drawn["action"][0].numel() if policy.moves_latents else 1
    torch.testing.assert_close(distribution.entropy(), ours.entropy() / dimensions)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        assert torch.equal(actor(seen.clone())["action"], ours.mode)
    assert critic(seen.clone())["state_value"].shape == (4, 1)


@pytest.mark.parametrize("name", KINDS)
def test_leading_dimensions_are_free(make, name):
    env = make(name)
    actor, critic = actor_and_critic(env)
    rollout = env.rollout(4, actor, break_when_any_done=False)
    folded = actor.get_dist(rollout).log_prob(rollout["action"])
    assert folded.shape == (4, 4)
    torch.testing.assert_close(folded, rollout["action_log_prob"], rtol=1e-4, atol=1e-5)
    assert critic(rollout)["state_value"].shape == (4, 4, 1)


def losses_of(env, actor, critic, *, learning_rate, frames=24, total=48):
    loss = ClipPPOLoss(actor, critic, clip_epsilon=1e-4, entropy_bonus=False, normalize_advantage=True)
    gae = GAE(gamma=1.0, lmbda=1.0, value_network=critic)
    optimizer = torch.optim.Adam(loss.parameters(), learning_rate)
    collector = Collector(
        env, actor, frames_per_batch=frames, total_frames=total, auto_register_policy_transforms=False
    )
    for batch in collector:
        with torch.no_grad():
            gae(batch)
        found = loss(batch.reshape(-1))
        (found["loss_objective"] + found["loss_critic"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield batch, found
    collector.shutdown()


@pytest.mark.parametrize("name", KINDS)
def test_clip_ppo_trains_actor_and_critic(make, name):
    env = make(name)
    actor, critic = actor_and_critic(env)
    before = [[value.detach().clone() for value in module.parameters()] for module in (actor, critic)]
    for _, found in losses_of(env, actor, critic, learning_rate=1e-2):
        assert torch.isfinite(found["loss_objective"])
    for old, module in zip(before, (actor, critic), strict=True):
        assert any(not torch.equal(*pair) for pair in zip(old, module.parameters(), strict=True))
    assert not any(value.requires_grad for value in env.model.denoiser.parameters())


@pytest.mark.parametrize("name", KINDS)
def test_ratios_are_one_before_the_first_update_and_returns_are_the_rewards(make, name):
    env = make(name)
    actor, critic = actor_and_critic(env)
    for batch, found in losses_of(env, actor, critic, learning_rate=0.0):
        assert float(found["max_ratio"]) == pytest.approx(1, abs=1e-5)
        assert batch["next", "reward"].shape == (*batch.shape, 1)
        last = batch["next", "done"]
        torch.testing.assert_close(batch["value_target"][last], batch["next", "reward"][last])
        assert (batch["next", "reward"][~last] == 0).all()
        first_episode = batch["value_target"][:, : int(last[0, :, 0].nonzero()[0]) + 1, 0]
        if name == KINDS[0]:  # all end together: each state's return is what its image earned
            assert (first_episode == first_episode[:, -1:]).all()


def test_lora_trains_through_clip_ppo(tiny):
    env = DiffusionTorchRLEnv(
        gym.make_vec(
            "DenoisingMDP-v0", num_envs=2, model=tiny, num_steps=2, reward="brightness", autoreset_mode="DISABLED"
        )
    )
    policy = DenoisingPolicy(tiny, adaptation=LoRA(rank=2), seed=0)
    actor, critic = denoising_actor(policy, env), critic_of(ValueNetwork(env.env.single_observation_space), env)
    before = {name: value.clone() for name, value in policy.named_parameters()}
    for _ in losses_of(env, actor, critic, learning_rate=1e-2, frames=4, total=8):
        pass
    changed = {name for name, value in policy.named_parameters() if not torch.equal(before[name], value)}
    assert changed
    assert all("lora" in name for name in changed)


def test_distributions_are_ours_with_any_leading_dimensions():
    generator = torch.Generator().manual_seed(0)
    mean, std = torch.randn(2, 3, 4, 5, 5, generator=generator), torch.rand(2, 3, generator=generator)
    value = torch.randn(2, 3, 4, 5, 5, generator=generator)
    ours = GaussianTransition(mean.flatten(0, 1), std.flatten())
    for reduction in ("mean", "sum"):
        log_prob = TransitionDistribution(mean, std, reduction).log_prob(value)
        assert torch.equal(log_prob, ours.log_prob(value.flatten(0, 1), reduction).reshape(2, 3))
    alpha = 1 + torch.rand(2, 3, generator=generator)
    ratio = torch.rand(2, 3, 1, generator=generator)
    expected = BetaDistribution(alpha.flatten(), alpha.flatten()).log_prob(ratio.flatten(0, 1))
    distribution = RatioDistribution(alpha, alpha)
    assert torch.equal(distribution.log_prob(ratio), expected.reshape(2, 3))
    assert distribution.sample().shape == distribution.mode.shape == (2, 3, 1)
    with pytest.raises(ValueError, match=r"one draw at a time: .* got \(2,\)"):
        distribution.sample(torch.Size((2,)))


def test_what_does_not_fit_is_refused(make, mixture, tiny):
    with pytest.raises(ValueError, match='autoreset_mode="DISABLED", got SAME_STEP'):
        make(KINDS[0], autoreset_mode="SAME_STEP")
    with pytest.raises(TypeError, match="env must be a torch vector environment"):
        DiffusionTorchRLEnv(gym.make(KINDS[0], model=mixture))
    with pytest.raises(ValueError, match="would be rounded after they were scored"):
        make(KINDS[0], model=load_model(tiny.path, dtype="bfloat16"))
    env = make(KINDS[0])
    with pytest.raises(ValueError, match="is deterministic and has no density"):
        denoising_actor(DenoisingPolicy(mixture, sampler=DDIM(0.0)), env)
    with pytest.raises(ValueError, match="does not fit the environment: it needs latents"):
        denoising_actor(DenoisingPolicy(tiny), env)
