import gymnasium as gym
import numpy as np
import pytest
import torch

import diffusion_gym  # noqa: F401
from agents import DenoisingPolicy, FixedSchedule, evaluate
from agents.evaluation.measures import draw_samples, latent_features, make_features
from agents.experience.seeding import derived_generator
from diffusion_gym.prompts import PromptSet
from diffusion_gym.rewards import CallableReward
from diffusion_gym.samplers import DDIM

STEPS = 4


def make_env(model, num_envs):
    def east(images, prompts, metadata):
        return model.positions(images)[:, 0]

    prompts = PromptSet(("anything", *model.names[:2]), ({"weight": 1.0}, {"weight": 2.0}, {"weight": 3.0}))
    return gym.make_vec(
        "DenoisingMDP-v0", num_envs=num_envs, num_steps=STEPS, model=model, reward=east, prompts=prompts
    )


def trained(model, **options):
    """Return a policy whose weights are not the model's."""
    policy = DenoisingPolicy(model, seed=0, **options)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in policy.denoiser.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return policy


def draw(env, policy, **arguments):
    def weighted_north(images, prompts, metadata):
        weights = torch.tensor([entry["weight"] for entry in metadata])
        return weights * env.unwrapped.model.positions(images)[:, 1]

    return draw_samples(
        env,
        policy,
        prompts=tuple(env.unwrapped.prompts),
        samples_per_prompt=4,
        held_out=CallableReward(weighted_north),
        features=latent_features,
        **arguments,
    )


def test_samples_are_prompt_major_and_do_not_depend_on_the_lanes(mixture):
    policy = trained(mixture)
    env = make_env(mixture, 6)
    prompts = tuple(env.unwrapped.prompts)
    samples = draw(env, policy, reference=policy.reference())
    plain = evaluate(env, policy, seeds=range(12), prompts=prompts * 4)
    np.testing.assert_allclose(samples.rewards, plain.rewards.reshape(4, 3).T, atol=1e-5)
    north = mixture.positions(plain.images)[:, 1].numpy().reshape(4, 3).T
    np.testing.assert_allclose(samples.held_out, north * np.array([[1.0], [2.0], [3.0]]), atol=1e-4)
    assert samples.images.shape[:2] == (3, 4)
    np.testing.assert_allclose(np.linalg.norm(samples.features, axis=-1), 1, atol=1e-5)
    for num_envs in (5, 2):  # the last 3 of 15 lanes are for nothing; the first images of 3 prompts are in two batches
        other = draw(make_env(mixture, num_envs), policy, reference=policy.reference())
        np.testing.assert_allclose(other.rewards, samples.rewards, atol=1e-5)
        np.testing.assert_allclose(other.kl, samples.kl, rtol=1e-4)


def test_kl_is_that_along_the_path_of_each_prompts_first_image(mixture):
    """Against a loop over single episodes, with the density's own formula."""
    policy = trained(mixture)
    reference = policy.reference()
    samples = draw(make_env(mixture, 6), policy, reference=reference)
    env = make_env(mixture, 1)
    for index, prompt in enumerate(samples.prompts):
        observation, info = env.reset(seed=index, options={"prompt": prompt})
        generator, total = derived_generator(index), 0.0
        while not info["ended"].all():
            with torch.no_grad():
                own, other = policy.distribution(observation), reference.distribution(observation)
            if policy.scored(info).all():
                difference = (own.mean - other.mean).double()
                total += float((difference**2).sum() / (2 * own.std.double() ** 2))  # the variances are the same
            observation, _, _, _, info = env.step(policy.act(observation, generators=[generator]))
        assert samples.kl[index] == pytest.approx(total, rel=1e-3)
    assert (samples.kl > 0).all()


def test_an_untrained_policy_is_the_pretrained_model(mixture):
    policy = DenoisingPolicy(mixture, seed=0)
    env = make_env(mixture, 4)
    samples = draw(env, policy, reference=policy.reference())
    np.testing.assert_array_equal(samples.rewards, draw(env, policy.reference()).rewards)
    assert samples.kl == pytest.approx(0, abs=1e-6)
    assert draw(env, policy).kl is None


def test_a_policy_that_draws_nothing_has_no_kl(mixture):
    policy = trained(mixture, sampler=DDIM(0.0))
    assert draw(make_env(mixture, 5), policy, reference=policy.reference()).kl is None


def test_latents_of_images_are_features_where_actions_are_times(mixture):
    """The last actions are ratios there, and of lanes that rest."""
    env = gym.make_vec(
        "TimePredictionMDP-v0",
        num_envs=4,
        model=mixture,
        reward="brightness",
        prompts=[mixture.names[0], mixture.names[4]],
        max_steps=6,
        autoreset_mode="DISABLED",
    )
    policy = FixedSchedule([0.8, 0.6, 0.4, 0.3, 0.2], max_steps=6)
    samples = draw_samples(
        env,
        policy,
        prompts=tuple(env.unwrapped.prompts),
        samples_per_prompt=4,
        held_out=None,
        features=latent_features,
    )
    images = torch.from_numpy(samples.images).permute(0, 1, 4, 2, 3).flatten(0, 1) / 255
    expected = latent_features(images, mixture.positions(images)).reshape(2, 4, 2)
    np.testing.assert_allclose(samples.features, expected, atol=0.05)  # the images are in bytes here
    assert (np.einsum("kf,lf->kl", *samples.features) < 0).all()  # east and west


def test_unknown_features_are_named():
    with pytest.raises(ValueError, match=r"unknown features 'latent': allowed are .* Did you mean 'latents'\?"):
        make_features("latent")


def test_the_scorers_features_tell_prompts_apart(emoji):
    env = gym.make_vec("DenoisingMDP-v0", num_envs=4, num_steps=5, model=emoji, reward="brightness")
    policy, features = DenoisingPolicy(emoji), make_features("emoji_scorer")
    samples = draw_samples(
        env, policy, prompts=("a cat", "a frog"), samples_per_prompt=2, held_out=None, features=features
    )
    cosines = np.einsum("pkf,qlf->pqkl", samples.features, samples.features)
    assert samples.held_out is None
    assert cosines[0, 0].min() > cosines[0, 1].max()
