"""The RL Zoo makes single environments; this puts the lanes of one vector environment in their place."""

import gymnasium as gym
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor

from .vec_env import DiffusionVecEnv


class BatchedLanes(VecMonitor):
    """The lanes of one vector environment, in the place of single environments of the same id and keywords.

    For rl-zoo3's `vec_env_wrapper`, with `n_envs: 1`, since what it is given is only looked at and closed:

        "vec_env_wrapper": [{BatchedLanes: {"num_envs": 32}}]

    Args:
        venv: SB3's environment of single ones, from `gym.make`.
        num_envs: The number of lanes.
    """

    def __init__(self, venv: DummyVecEnv, *, num_envs: int = 32) -> None:
        spec = venv.get_attr("spec")[0]
        venv.close()
        super().__init__(DiffusionVecEnv(gym.make_vec(spec.id, num_envs=num_envs, **spec.kwargs)))
