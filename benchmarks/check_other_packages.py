"""What `check_vector_env` finds of the vector environments of two other packages, ale-py's and envpool's.

    pip install ale-py envpool
    python benchmarks/check_other_packages.py    # 25 s of a CPU core

What it prints with ale-py 0.12.1 and envpool 1.2.5 is in docs/checkers_and_wrappers.md.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import envpool
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space

from diffusion_gym.testing import check_vector_env


class AddMasks(VectorWrapper):
    """Adds what SAME_STEP has to say at an episode's end beside `final_obs`, so that the check goes on."""

    def step(self, actions: Any) -> Any:
        *result, info = super().step(actions)
        if "final_obs" in info:
            ended = result[2] | result[3]
            final_info = {key: value for key, value in info.items() if key != "final_obs"}
            info = info | {"_final_obs": ended, "final_info": final_info, "_final_info": ended}
        return *result, info


class BatchSpaces(VectorWrapper):
    """Says the number of lanes, and the spaces of all of them, so that the check goes on."""

    def __init__(self, env: VectorEnv) -> None:
        super().__init__(env)
        self.single_observation_space, self.single_action_space = env.observation_space, env.action_space
        self.observation_space = batch_space(env.observation_space, self.num_envs)
        self.action_space = batch_space(env.action_space, self.num_envs)

    @property
    def num_envs(self) -> int:  # type: ignore[override]
        return self.env.config["num_envs"]  # type: ignore[attr-defined]


def atari(mode: AutoresetMode) -> VectorEnv:
    return AtariVectorEnv("breakout", num_envs=3, max_num_frames_per_episode=400, autoreset_mode=mode)


def cart_pole() -> VectorEnv:
    return envpool.make_gymnasium("CartPole-v1", num_envs=3, seed=7)


MAKERS: dict[str, Callable[[], VectorEnv]] = {
    "ale-py, NEXT_STEP": partial(atari, AutoresetMode.NEXT_STEP),
    "ale-py, SAME_STEP": partial(atari, AutoresetMode.SAME_STEP),
    "ale-py, SAME_STEP, with masks": lambda: AddMasks(atari(AutoresetMode.SAME_STEP)),
    "envpool": cart_pole,
    "envpool, with batched spaces": lambda: BatchSpaces(cart_pole()),
}


def main() -> None:
    for name, make in MAKERS.items():
        print(f"\n{name}:")
        try:
            print(check_vector_env(make(), twin=make))
        except AssertionError as error:
            print(f"AssertionError: {error}")


if __name__ == "__main__":
    main()
