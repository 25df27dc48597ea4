"""A small NumPy vector environment that keeps the contract, with hooks for those that break it."""

import numpy as np
from gymnasium.error import ClosedEnvironmentError
from gymnasium.spaces import Box, Dict
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space


class Walk(VectorEnv):
    """Points that walk on the plane for two to four steps; the action is added, the reward is minus the distance."""

    def __init__(self, mode, num_envs=3):
        self.mode, self.num_envs = mode, num_envs
        self.metadata = {"autoreset_mode": mode}
        self.single_observation_space = Dict(
            position=Box(-np.inf, np.inf, (2,), np.float32), progress=Box(0, 1, (1,), np.float32)
        )
        self.single_action_space = Box(-1, 1, (2,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.generators = [np.random.default_rng() for _ in range(num_envs)]
        self.position = np.zeros((num_envs, 2), np.float32)
        self.drift = np.zeros((num_envs, 2), np.float32)
        self.steps, self.length = np.zeros((2, num_envs), int)
        self.over = np.zeros(num_envs, bool)

    def start(self, lane):
        """Begin an episode in a lane."""
        self.position[lane] = self.generators[lane].normal(size=2)
        self.length[lane] = self.generators[lane].integers(2, 5)
        self.drift[lane] = 0
        self.steps[lane] = 0

    def restart(self, lane):
        """Begin the episode after one that has ended, without a full reset."""
        self.start(lane)

    def observe(self):
        return {"position": self.position.copy(), "progress": (self.steps / 4)[:, None].astype(np.float32)}

    def info(self):
        return {"steps": self.steps.copy(), "_steps": np.ones(self.num_envs, bool)}

    def seed_lanes(self, seed, mask):
        seeds = seed if isinstance(seed, list) else [seed + lane for lane in range(self.num_envs)]
        for lane in np.flatnonzero(mask):
            self.generators[lane] = np.random.default_rng(seeds[lane])

    def reset(self, *, seed=None, options=None):
        if self.closed:
            raise ClosedEnvironmentError
        masked = (options or {}).get("reset_mask")
        mask = np.ones(self.num_envs, bool) if masked is None else masked
        if seed is not None:
            self.seed_lanes(seed, mask)
        for lane in np.flatnonzero(mask):
            self.start(lane) if masked is None else self.restart(lane)
        self.over &= ~mask
        return self.observe(), self.info()

    def move(self, actions):
        self.drift += 0.1
        self.position = self.position + actions + self.drift

    def step(self, actions):
        if self.closed:
            raise ClosedEnvironmentError
        waiting = self.over.copy()
        kept = [self.position[waiting].copy(), self.drift[waiting].copy()]
        self.move(actions)
        self.position[waiting], self.drift[waiting] = kept
        self.steps[~waiting] += 1
        reward = np.where(waiting, 0, -np.linalg.norm(self.position, axis=1))
        ended = (self.steps >= self.length) & ~waiting
        final = {}
        if self.mode is AutoresetMode.SAME_STEP and ended.any():
            final = {"final_obs": self.observe(), "_final_obs": ended.copy()}
            final |= {"final_info": self.info(), "_final_info": ended.copy()}
            for lane in np.flatnonzero(ended):
                self.restart(lane)
        if self.mode is AutoresetMode.NEXT_STEP:
            for lane in np.flatnonzero(waiting):
                self.restart(lane)
            self.over = ended.copy()
        if self.mode is AutoresetMode.DISABLED:
            self.over |= ended
        return self.observe(), reward, ended, np.zeros_like(ended), self.info() | final
