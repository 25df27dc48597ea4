"""Learners on the times or on the latents of a small model, to compare gradients with."""

import gymnasium as gym
import torch

import diffusion_gym  # noqa: F401
from agents import RLOO, DenoisingPolicy, LoRA, Rollouts, TimePredictor

MAX_STEPS = 8


def time_env(model, num_envs=4, **arguments):
    """Return an environment of episodes that differ in length."""
    arguments = {"reward": "brightness", "autoreset_mode": "DISABLED", "max_steps": MAX_STEPS, **arguments}
    return gym.make_vec("TimePredictionMDP-v0", num_envs=num_envs, model=model, **arguments)


def latent_env(model, num_envs=4, **arguments):
    """Return an environment of episodes of three steps."""
    arguments = {"reward": "brightness", "autoreset_mode": "DISABLED", "num_steps": 3, **arguments}
    return gym.make_vec("DenoisingMDP-v0", num_envs=num_envs, model=model, **arguments)


def predictor_for(env, seed=0):
    """Return a time predictor that is away from where it starts, so that what it says depends on the features."""
    policy = TimePredictor(env.single_observation_space, initial_ratio=0.4, initial_concentration=6, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    policy.output.weight.data = 0.3 * torch.randn(policy.output.weight.shape, generator=generator)
    return policy


def pairs(**arguments):
    """Return rollouts of groups of two that begin alike."""
    return Rollouts(group_size=2, same_noise=True, **arguments)


def learner_on(model, kind, **arguments):
    """Return RLOO on the "times" or the "latents" of a model."""
    if kind == "times":
        env = time_env(model)
        policy = predictor_for(env)
    else:
        env = latent_env(model)
        policy = DenoisingPolicy(model, adaptation=LoRA(), seed=0)
    return RLOO(policy, env, **{"rollouts": pairs(), "seed": 3, "learning_rate": 1e-3, **arguments})


def trained(learner):
    """Return the parameters that are trained."""
    return [parameter for parameter in learner.policy.parameters() if parameter.requires_grad]
