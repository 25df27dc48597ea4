"""What the RL Zoo asks of an environment, without the zoo: `make plug-ins` trains with it."""

from pathlib import Path

import gymnasium as gym
import numpy as np
import yaml
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

import diffusion_gym  # noqa: F401
from agents.adapters import sb3

HYPERPARAMETERS = Path(__file__).parents[4] / "examples" / "plug_ins" / "rl_zoo3_ppo.yml"


def test_the_lanes_are_those_of_one_vector_environment():
    arguments = {"model": "mixture", "num_steps": 3, "reward": "brightness"}
    single = make_vec_env("DenoisingMDP-v0", n_envs=1, env_kwargs=arguments)
    env = sb3.BatchedLanes(single, num_envs=3)
    assert env.num_envs == 3
    plain = gym.make_vec("DenoisingMDP-v0", num_envs=3, **arguments)
    env.seed(2)
    assert np.array_equal(env.reset()["latents"], plain.reset(seed=2)[0]["latents"].numpy())
    for _ in range(3):
        *_, dones, infos = env.step(np.zeros((3, 2, 1, 1), dtype=np.float32))
    assert dones.all()
    assert all(info["episode"]["l"] == 3 for info in infos)


def test_the_hyperparameters_are_of_what_is_there():
    for name, settings in yaml.safe_load(HYPERPARAMETERS.read_text()).items():
        policy = getattr(sb3, settings.pop("policy").removeprefix("agents.adapters.sb3."))
        ((wrapper, lanes),) = settings.pop("vec_env_wrapper")[0].items()
        assert getattr(sb3, wrapper.removeprefix("agents.adapters.sb3.")) is sb3.BatchedLanes
        assert settings.pop("n_timesteps") % (lanes["num_envs"] * settings["n_steps"]) == 0
        env = make_vec_env(name, settings.pop("n_envs"), env_kwargs=settings.pop("env_kwargs"))
        PPO(policy, sb3.BatchedLanes(env, **lanes), **settings, device="cpu")
