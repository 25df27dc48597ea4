import gymnasium as gym
import pytest
from stable_baselines3.common.vec_env import VecMonitor

import diffusion_gym  # noqa: F401
from agents.adapters.sb3 import DiffusionVecEnv

STEPS = 3
MODELS = {"denoising": "DenoisingMDP-v0", "times": "TimePredictionMDP-v0"}


@pytest.fixture
def make_vec_env(mixture, tiny):
    """Return SB3's environment over a small model: the mixture for latents, a random UNet for times."""

    def make(kind="denoising", num_envs=4, *, monitored=True, **arguments):
        lengths = {"num_steps": STEPS} if kind == "denoising" else {"max_steps": 5}
        model = mixture if kind == "denoising" else tiny
        arguments = {"model": model, "reward": "brightness", **lengths, **arguments}
        env = DiffusionVecEnv(gym.make_vec(MODELS[kind], num_envs=num_envs, **arguments))
        return VecMonitor(env) if monitored else env

    return make
