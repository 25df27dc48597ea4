"""SB3's stock PPO and A2C train our policies: the same distributions, the same updates, and zips that come back."""

import warnings
import zipfile

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy

from agents import DenoisingPolicy, LoRA
from agents.adapters.sb3 import DenoisingActorCriticPolicy, DiffusionVecEnv, TimePredictionActorCriticPolicy
from diffusion_gym.samplers import DDIM
from tests.agents.adapters.sb3.conftest import STEPS

WHOLE = {"gamma": 1.0, "gae_lambda": 1.0, "n_steps": STEPS, "seed": 0, "device": "cpu"}
ON_PPO = {**WHOLE, "batch_size": 6, "n_epochs": 1, "clip_range": 1e-4, "learning_rate": 1e-3}


def make(kind, env, model=None, algorithm=PPO, of_policy=(), **arguments):
    """Return a stock algorithm with one of our policies."""
    policy = DenoisingActorCriticPolicy if kind == "denoising" else TimePredictionActorCriticPolicy
    own = {"model": model} if kind == "denoising" else {"initial_concentration": 6}
    defaults = ON_PPO if algorithm is PPO else WHOLE
    return algorithm(policy, env, policy_kwargs={**own, **dict(of_policy)}, **{**defaults, **arguments})


def observed(env):
    env.seed(1)
    return {key: torch.as_tensor(value) for key, value in env.reset().items()}


def weights_of(module):
    return torch.cat([value.detach().flatten() for value in module.parameters()])


@pytest.mark.parametrize("algorithm", [PPO, A2C])
@pytest.mark.parametrize("kind", ["denoising", "times"])
def test_stock_algorithms_train_actor_and_critic(make_vec_env, mixture, kind, algorithm):
    learner = make(kind, make_vec_env(kind), mixture, algorithm)
    before = weights_of(learner.policy.actor), weights_of(learner.policy.critic)
    learner.learn(3 * 4 * STEPS)
    for old, new in zip(before, (weights_of(learner.policy.actor), weights_of(learner.policy.critic)), strict=True):
        assert torch.isfinite(new).all()
        assert not torch.equal(old, new)
    assert learner.ep_info_buffer[-1]["l"] <= 5


@pytest.mark.parametrize("kind", ["denoising", "times"])
def test_ratios_are_exactly_one_before_the_first_update(make_vec_env, mixture, kind):
    learner = make(kind, make_vec_env(kind), mixture, learning_rate=0.0, batch_size=4 * STEPS, clip_range=1e-9)
    learner.learn(4 * STEPS)
    logged = learner.logger.name_to_value
    assert abs(logged["train/approx_kl"]) < 1e-10
    assert logged["train/clip_fraction"] == 0 or kind == "times"  # where rows of a batch differ in the last bits


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_it_is_our_policy(make_vec_env, mixture, reduction):
    env = make_vec_env()
    ours = DenoisingPolicy(mixture, sampler=DDIM(0.7), guidance_scale=2.0, seed=0)
    arguments = {"sampler": DDIM(0.7), "guidance_scale": 2.0, "log_prob_reduction": reduction}
    policy = make("denoising", env, mixture, of_policy=arguments).policy
    seen = observed(env)
    torch.manual_seed(7)
    actions, values, log_prob = policy(seen)
    expected, expected_log_prob = ours.sample(seen, generators=torch.Generator().manual_seed(7), reduction=reduction)
    assert torch.equal(actions, expected)
    assert torch.equal(log_prob, expected_log_prob)
    assert values.shape == (4, 1)
    again = policy.evaluate_actions(seen, actions.flatten(1))
    assert torch.equal(again[1], log_prob)
    dimensions = actions[0].numel() if reduction == "mean" else 1
    torch.testing.assert_close(again[2], ours.distribution(seen).entropy() / dimensions)
    assert torch.equal(policy(seen, deterministic=True)[0], ours.distribution(seen).mode)


@pytest.mark.parametrize("kind", ["denoising", "times"])
def test_the_distribution_is_sb3s(make_vec_env, mixture, kind):
    env = make_vec_env(kind)
    policy = make(kind, env, mixture).policy
    seen = observed(env)
    distribution = policy.get_distribution(seen)
    torch.manual_seed(3)
    actions, log_prob = distribution.log_prob_from_params()
    torch.manual_seed(3)
    forwarded, _, forwarded_log_prob = policy(seen)
    torch.testing.assert_close(actions, forwarded)
    torch.testing.assert_close(log_prob, forwarded_log_prob)
    assert torch.equal(distribution.get_actions(deterministic=True), distribution.mode())
    assert distribution.proba_distribution() is distribution
    assert distribution.actions_from_params().shape == actions.shape
    with pytest.raises(NotImplementedError, match="the actor's own"):
        distribution.proba_distribution_net()


def test_the_same_seed_gives_the_same_training(make_vec_env, mixture):
    runs = [make("denoising", make_vec_env(), mixture, seed=seed).learn(2 * 4 * STEPS) for seed in (3, 3, 4)]
    first, second, other = (weights_of(run.policy) for run in runs)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_dropout_is_off_while_sb3_trains(make_vec_env, tiny):
    env = DiffusionVecEnv(gym.make_vec("DenoisingMDP-v0", num_envs=2, model=tiny, reward="brightness", num_steps=2))
    policy = make("denoising", env, tiny, n_steps=2, batch_size=4).policy
    policy.set_training_mode(True)
    assert not any(module.training for module in policy.actor.modules())


def test_the_critic_learns_faster_than_the_actor(make_vec_env, mixture):
    learner = make("denoising", make_vec_env(), mixture, of_policy={"critic_speed": 100.0}, learning_rate=1e-4)
    policy = learner.policy
    rates = []
    policy.optimizer.register_step_pre_hook(
        lambda optimizer, *_: rates.append([g["lr"] for g in optimizer.param_groups])
    )
    learner.learn(4 * STEPS)
    assert len(rates) == 2
    np.testing.assert_allclose(rates, [[1e-4, 1e-2]] * 2)
    np.testing.assert_allclose([group["lr"] for group in policy.optimizer.param_groups], 1e-4)


@pytest.mark.parametrize("algorithm", [PPO, A2C])
@pytest.mark.parametrize("kind", ["denoising", "times"])
def test_a_zip_comes_back(make_vec_env, mixture, tmp_path, kind, algorithm):
    env = make_vec_env(kind)
    learner = make(kind, env, mixture, algorithm).learn(4 * STEPS)
    learner.save(tmp_path / "run.zip")
    loaded = algorithm.load(tmp_path / "run.zip", env=env, device="cpu")
    assert torch.equal(weights_of(loaded.policy), weights_of(learner.policy))
    seen = {key: value.numpy() for key, value in observed(env).items()}
    predicted = [run.predict(seen, deterministic=True)[0] for run in (learner, loaded)]
    assert np.array_equal(*predicted)
    loaded.learn(4 * STEPS, reset_num_timesteps=False)
    assert loaded.num_timesteps == 2 * 4 * STEPS
    learner.policy.save(tmp_path / "policy")
    policy = type(learner.policy).load(tmp_path / "policy", device="cpu")
    assert torch.equal(weights_of(policy), weights_of(learner.policy))


def test_a_zip_holds_no_frozen_weight(tiny, tmp_path):
    env = DiffusionVecEnv(gym.make_vec("DenoisingMDP-v0", num_envs=2, model=tiny, reward="brightness", num_steps=2))
    learner = make("denoising", env, tiny, of_policy={"adaptation": LoRA(rank=2)}, n_steps=2, batch_size=4)
    learner.learn(4)
    learner.save(tmp_path / "run")
    with zipfile.ZipFile(tmp_path / "run.zip") as opened, opened.open("policy.pth") as file:
        state = torch.load(file, weights_only=True)
    names = [name for name in state if name.startswith("actor.")]
    assert names
    assert all("lora" in name for name in names)
    loaded = PPO.load(tmp_path / "run", env=env, device="cpu")
    assert torch.equal(weights_of(loaded.policy), weights_of(learner.policy))


def test_a_model_is_named_or_shared(make_vec_env, mixture, tmp_path):
    env = make_vec_env()
    shared = make("denoising", env, env.unwrapped.model)
    assert shared.policy.actor.model is mixture
    named = make("denoising", env, "mixture")
    assert named.policy.actor.model is not mixture
    assert torch.equal(weights_of(named.policy.actor), weights_of(shared.policy.actor))


def test_sb3s_evaluation_and_callbacks(make_vec_env, mixture, tmp_path):
    learner = make("denoising", make_vec_env(), mixture)
    rewards, lengths = evaluate_policy(learner, make_vec_env(), n_eval_episodes=6, return_episode_rewards=True)
    assert lengths == [STEPS] * 6
    assert all(0 <= reward <= 1 for reward in rewards)
    checkpoints = CheckpointCallback(STEPS, str(tmp_path / "checkpoints"))
    evaluation = EvalCallback(make_vec_env(), n_eval_episodes=4, eval_freq=STEPS, log_path=str(tmp_path), verbose=0)
    learner.learn(2 * 4 * STEPS, [checkpoints, evaluation])
    assert len(list((tmp_path / "checkpoints").glob("*.zip"))) == 2
    assert np.load(tmp_path / "evaluations.npz")["results"].shape == (2, 4)
    assert np.isfinite(evaluation.best_mean_reward)


def test_half_precision_is_rounded_before_it_is_scored(tmp_path, tiny):
    from diffusion_gym.models import load_model

    model = load_model(tiny.path, dtype="bfloat16")
    env = DiffusionVecEnv(gym.make_vec("DenoisingMDP-v0", num_envs=2, model=model, reward="brightness", num_steps=2))
    policy = make("denoising", env, model, n_steps=2, batch_size=4).policy
    observation = env.reset()
    actions, _, log_prob = policy({key: torch.as_tensor(value) for key, value in observation.items()})
    assert actions.dtype == torch.float32
    following, *_ = env.step(actions.detach().numpy())
    assert np.array_equal(following["latents"], actions.detach().numpy())
    assert torch.isfinite(log_prob).all()


@pytest.mark.parametrize(
    ("of_policy", "arguments", "error", "message"),
    [
        ({"critic_speed": 0}, {}, ValueError, "critic_speed must be .*, got 0"),
        ({"log_prob_reduction": "max"}, {}, ValueError, "log_prob_reduction must be .*, got 'max'"),
        ({"sampler": "ddim"}, {}, TypeError, "sampler must be a Sampler"),
        ({"precision": "fp16"}, {}, ValueError, "SB3 does not scale losses"),
        ({}, {"use_sde": True}, ValueError, "use_sde=True explores by noise of SB3's own"),
        ({"model": "emoji"}, {}, ValueError, "does not fit the environment: it needs latents"),
    ],
)
def test_wrong_arguments_are_refused(make_vec_env, mixture, of_policy, arguments, error, message):
    with pytest.raises(error, match=message):
        make("denoising", make_vec_env(), mixture, of_policy=of_policy, **arguments)


def test_an_actor_elsewhere_is_named(make_vec_env, mixture):
    env = make_vec_env()
    policy = make("denoising", env, mixture).policy
    elsewhere = {key: value.to("meta") for key, value in observed(env).items()}
    with pytest.raises(ValueError, match="the algorithm is on meta, its actor on cpu: give both the same"):
        policy(elsewhere)


def test_nothing_warns(make_vec_env, mixture):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make("denoising", make_vec_env(), mixture).learn(4 * STEPS)
