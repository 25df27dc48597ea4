"""Vector environments of which each breaks the contract in one way, with the message that says so."""

from dataclasses import dataclass

import numpy as np
from gymnasium.spaces import Box, Dict
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from tests.diffusion_gym.testing.walk import Walk

SAME_STEP, NEXT_STEP, DISABLED = AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED
ALL = (SAME_STEP, NEXT_STEP, DISABLED)


@dataclass(frozen=True)
class Broken:
    """A fault: the environment that has it, the message, the modes in which it makes sense, and whether Gymnasium
    leaves it open, so that it is no error but a line of the report."""

    env: type
    message: str
    modes: tuple[AutoresetMode, ...] = ALL
    is_weakness: bool = False


ZOO = []


def broken(message, *modes, is_weakness=False):
    """Put a class into the zoo."""

    def enter(env):
        ZOO.append(Broken(env, message, modes or ALL, is_weakness))
        return env

    return enter


# What comes back


@broken(r"observation: keys \['position'\] came, the space has \['position', 'progress'\]")
class LacksAKey(Walk):
    def observe(self):
        return {"position": super().observe()["position"]}


@broken(r"reset, observation\['position'\]: is float64, the space says float32")
class ObservesInFloat64(Walk):
    def observe(self):
        observation = super().observe()
        return observation | {"position": observation["position"].astype(np.float64)}


@broken(r"reset, observation\['position'\]: has shape \(3, 1\), the space says \(3, 2\)")
class ObservesHalf(Walk):
    def observe(self):
        observation = super().observe()
        return observation | {"position": observation["position"][:, :1]}


@broken(r"step 1, lane 0, observation\['progress'\]: array\(\[1.25\], dtype=float32\) is outside Box")
class LeavesItsSpace(Walk):
    def observe(self):
        observation = super().observe()
        return observation | {"progress": observation["progress"] * 5}


@broken(r"step 1, lane 2, reward: must be finite, got nan")
class PaysNaN(Walk):
    def step(self, actions):
        observation, reward, *rest = super().step(actions)
        reward[2] = np.nan
        return observation, reward, *rest


@broken(r"step 1, reward: has shape \(3, 1\), expected \(3,\)")
class PaysAColumn(Walk):
    def step(self, actions):
        observation, reward, *rest = super().step(actions)
        return observation, reward[:, None], *rest


@broken("step 1, reward: must be a numpy array as the observations are, got list")
class PaysAList(Walk):
    def step(self, actions):
        observation, reward, *rest = super().step(actions)
        return observation, list(reward), *rest


@broken("rewards are floating-point numbers: they are integers", is_weakness=True)
class PaysIntegers(Walk):
    def step(self, actions):
        observation, reward, *rest = super().step(actions)
        return observation, reward.astype(int), *rest


@broken("step 1, terminated: must be bool, got int64")
class FlagsAreNumbers(Walk):
    def step(self, actions):
        observation, reward, terminated, *rest = super().step(actions)
        return observation, reward, terminated.astype(int), *rest


@broken(r"step 1: must return \(observation, reward, terminated, truncated, info\)")
class ReturnsFour(Walk):
    def step(self, actions):
        observation, reward, terminated, _, info = super().step(actions)
        return observation, reward, terminated, info


@broken(r"reset, info\['_steps'\]: a mask must be bool of shape \(3,\), got int64 \(3,\)")
class MasksAreNumbers(Walk):
    def info(self):
        return super().info() | {"_steps": np.ones(self.num_envs, int)}


@broken(r"reset, info\['_speed'\]: is a mask without an entry 'speed'")
class MaskOfNothing(Walk):
    def info(self):
        return super().info() | {"_speed": np.ones(self.num_envs, bool)}


@broken(r'metadata\["autoreset_mode"\]: must be an AutoresetMode, got None')
class SaysNoMode(Walk):
    def __init__(self, mode):
        super().__init__(mode)
        self.metadata = {}


@broken("observation_space: must be single_observation_space, 3 times")
class SpaceOfTwoLanes(Walk):
    def __init__(self, mode):
        super().__init__(mode)
        self.observation_space = Box(0, 1, (2, 2), np.float32)


@broken(r"observation\['position'\]: is float32, the space says uint8")
class SaysBytesAreInPlaceOfNumbers(Walk):
    def __init__(self, mode):
        super().__init__(mode)
        spaces = self.single_observation_space.spaces
        self.single_observation_space = Dict(spaces | {"position": Box(0, 255, (2,), np.uint8)})
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)


# Memory


@broken(r"reset, observation\['position'\]: shares memory with observation\['position'\] of the reset before")
class ReusesABuffer(Walk):
    def observe(self):
        observation = super().observe()
        buffer = self.__dict__.setdefault("buffer", np.zeros_like(observation["position"]))
        buffer[:] = observation["position"]
        return observation | {"position": buffer}


@broken(r"observation\['position'\]: (was changed by a later step|shares memory with)")
class ReusesTwoBuffersInTurn(Walk):
    turn = 0

    def observe(self):
        observation = super().observe()
        self.turn += 1
        buffers = self.__dict__.setdefault("buffers", np.zeros((2, *observation["position"].shape), np.float32))
        buffers[self.turn % 2] = observation["position"]
        return observation | {"position": buffers[self.turn % 2]}


@broken("reward: (was changed by a later step|shares memory with reward of step 1)")
class ReusesTheRewards(Walk):
    def step(self, actions):
        observation, reward, *rest = super().step(actions)
        self.__dict__.setdefault("rewards", np.zeros_like(reward))[:] = reward
        return observation, self.rewards, *rest


@broken(r"reset, info\['steps'\]: was changed by a later step")
class ReusesTheInfo(Walk):
    def info(self):
        return super().info() | {"steps": self.steps}


@broken(r"step 1, observation\['position'\]: shares memory with the caller's action: return a copy")
class ReturnsTheAction(Walk):
    def step(self, actions):
        observation, *rest = super().step(actions)
        return observation | {"position": actions}, *rest


@broken("step 1, action: step must not change the caller's action")
class ChangesTheAction(Walk):
    def move(self, actions):
        actions *= 2
        super().move(actions)


@broken(r"info\['final_obs'\]\['position'\]: was changed by a later step", SAME_STEP)
class FinalIsTheState(Walk):
    def step(self, actions):
        *result, info = super().step(actions)
        if "final_obs" in info:
            self.finals = self.__dict__.get("finals", info["final_obs"]["position"])
            self.finals[:] = info["final_obs"]["position"]
            info["final_obs"]["position"] = self.finals
        return *result, info


# Seeds and determinism


@broken("two resets with one seed must give the same")
class IgnoresTheSeed(Walk):
    def seed_lanes(self, seed, mask):
        pass


@broken("seeds: the first observation is the same whatever the seed", is_weakness=True)
class StartsAlikeAlways(Walk):
    def start(self, lane):
        super().start(lane)
        self.position[lane] = 1


@broken("reset: a reset without a seed must draw another episode, got the same again")
class RepeatsItself(Walk):
    def reset(self, *, seed=None, options=None):
        self.last = seed if seed is not None else self.__dict__.get("last", 0)
        return super().reset(seed=self.last, options=options)


@broken("reset: lanes must be seeded differently, but all start alike")
class SeedsLanesAlike(Walk):
    def seed_lanes(self, seed, mask):
        super().seed_lanes([seed] * self.num_envs, mask)


@broken(r"seeds of lanes: reset\(seed=\[7, 8, 9\]\) raises TypeError", is_weakness=True)
class TakesOneSeed(Walk):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed if seed is None else seed + 0, options=options)


@broken(r"seeds of lanes: reset\(seed=7\) must seed lane 0 with 7", is_weakness=True)
class SeedsLanesAtOwnWill(Walk):
    def seed_lanes(self, seed, mask):
        super().seed_lanes(seed + 1 if isinstance(seed, int) else seed, mask)


@broken(r"step 1, lane 0, .*: two runs with one seed and the same actions: got [-\d.]+, expected [-\d.]+ at \[0\]$")
class AddsNoiseToTheAction(Walk):
    noise = np.random.default_rng(0)

    def move(self, actions):
        super().move(actions + self.noise.normal(size=actions.shape).astype(np.float32))


@broken(r"step 1, lane 0, reward: two runs with one seed and the same actions")
class AddsNoiseToTheReward(Walk):
    noise = np.random.default_rng(0)

    def step(self, actions):
        observation, reward, *rest = super().step(actions)
        return observation, np.where(reward < 0, reward + self.noise.random(), 0.0), *rest


@broken("two runs with one seed .* draws from a global generator of Python, NumPy or torch")
class DrawsFromTheGlobalGenerator(Walk):
    def seed_lanes(self, seed, mask):
        super().seed_lanes(seed, mask)
        np.random.seed(seed if isinstance(seed, int) else seed[0])  # noqa: NPY002

    def move(self, actions):
        super().move(actions + np.float32(np.random.random()))  # noqa: NPY002


@broken("lane 0, .*another environment made like it must do the same")
class CountsItself(Walk):
    made = 0

    def __init__(self, mode):
        super().__init__(mode)
        type(self).made += 1
        self.speed = np.float32(type(self).made)

    def move(self, actions):
        super().move(actions * self.speed)


# Lanes


@broken(r"step 1, lane 0, .*: a lane must not depend on the actions of others")
class MovesTogether(Walk):
    def move(self, actions):
        super().move(actions + actions.mean(0))


@broken("lanes draw from streams of their own: .*a later episode depends on others", is_weakness=True)
class SharesTheStream(Walk):
    def start(self, lane):
        self.generators = [self.generators[0]] * self.num_envs
        super().start(lane)

    def move(self, actions):
        super().move(actions)
        if actions[1, 0] > 0 and not self.over[1]:
            self.generators[0].random()


@broken("resets of some lanes: .*is not followed: reset, lane 1", SAME_STEP, NEXT_STEP, is_weakness=True)
@broken(r"step 2, lane 0, .*: a reset of lanes \[1, 2\] must leave the others: got", DISABLED)
class ForgetsTheMask(Walk):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)


@broken("lane 0, .*: an episode after autoreset must be as one after a reset: got", DISABLED)
@broken(
    "resets of some lanes: step 2, lane 1, .*: must not feel a reset of lane 0", SAME_STEP, NEXT_STEP, is_weakness=True
)
class ResetsTheDriftOfAll(Walk):
    def reset(self, *, seed=None, options=None):
        if options:
            self.drift[:] = 0
        return super().reset(seed=seed, options=options)


@broken("streams: lane 1 draws another episode after a reset of lane 0", is_weakness=True)
class SeedsLanesOutsideTheMask(Walk):
    def seed_lanes(self, seed, mask):
        super().seed_lanes(seed, np.ones_like(mask))


@broken("the caller's options are left alone: reset takes reset_mask out of them", is_weakness=True)
class TakesTheMaskOut(Walk):
    def reset(self, *, seed=None, options=None):
        result = super().reset(seed=seed, options=options)
        (options or {}).pop("reset_mask", None)
        return result


# Ends of episodes


@broken("no episode ended within 20 steps: see max_steps")
class NeverEnds(Walk):
    def start(self, lane):
        super().start(lane)
        self.length[lane] = 100

    def observe(self):
        return super().observe() | {"progress": np.zeros((self.num_envs, 1), np.float32)}


@broken("an episode after autoreset must be as one after a reset: .*took . steps, expected .")
class ForgetsToResetTheSteps(Walk):
    """The observation does not show them."""

    def observe(self):
        return super().observe() | {"progress": np.zeros((self.num_envs, 1), np.float32)}

    def restart(self, lane):
        super().restart(lane)
        self.steps[lane] = 1


@broken(r"lane ., observation\['position'\]: an episode after autoreset must be as one after a reset: got")
class KeepsTheDrift(Walk):
    def restart(self, lane):
        drift = self.drift[lane].copy()
        super().restart(lane)
        self.drift[lane] = drift


@broken(r"step ., info\['final_obs'\]: SAME_STEP must give it and its mask where a lane ends; info has", SAME_STEP)
class HasNoFinals(Walk):
    def step(self, actions):
        *result, info = super().step(actions)
        return *result, {key: value for key, value in info.items() if "final" not in key}


@broken(r"step ., info\['final_obs'\]: mask is \[True, True, True\], the lanes that ended are", SAME_STEP)
class SaysThatAllEnded(Walk):
    def step(self, actions):
        *result, info = super().step(actions)
        return *result, info | ({"_final_obs": np.ones(3, bool)} if "final_obs" in info else {})


@broken(r"step ., info\['final_info'\]: SAME_STEP must give it and its mask", SAME_STEP)
class SaysNothingInTheEnd(Walk):
    def step(self, actions):
        *result, info = super().step(actions)
        info.pop("final_info", None)
        info.pop("_final_info", None)
        return *result, info


@broken(r"step ., info\['final_obs'\]: (NEXT_STEP|DISABLED) has no final_obs", NEXT_STEP, DISABLED)
class HasFinals(Walk):
    def step(self, actions):
        *result, info = super().step(actions)
        return *result, info | {"final_obs": self.observe(), "_final_obs": result[2].copy()}


@broken("SAME_STEP: the last observation of each episode is the next one's first", SAME_STEP)
class FinalsAreOfTheNextEpisode(Walk):
    def step(self, actions):
        *result, info = super().step(actions)
        return *result, info | ({"final_obs": self.observe()} if "final_obs" in info else {})


@broken("NEXT_STEP: the last observation of each episode is the next one's first", NEXT_STEP)
class ResetsTooEarly(Walk):
    def step(self, actions):
        before = self.over.copy()
        result = super().step(actions)
        for lane in np.flatnonzero(result[2] & ~before):
            self.start(lane)
        return self.observe(), *result[1:]

    def restart(self, lane):
        pass


@broken(": the last observation of each episode is the one before its last step", SAME_STEP, NEXT_STEP, DISABLED)
class FinalsAreOfTheStepBefore(Walk):
    def step(self, actions):
        before = self.observe()
        observation, reward, ended, truncated, info = super().step(actions)
        if "final_obs" in info:
            info["final_obs"] = before
        elif self.mode is not SAME_STEP:
            for key, value in observation.items():
                value[ended] = before[key][ended]
        return observation, reward, ended, truncated, info


@broken(r"lane ., reward: NEXT_STEP's step that resets must give 0, got 1.0", NEXT_STEP)
class PaysForTheReset(Walk):
    def step(self, actions):
        waiting = self.over.copy()
        observation, reward, *rest = super().step(actions)
        return observation, np.where(waiting, 1.0, reward), *rest


@broken("lane .: NEXT_STEP's step that resets must not end an episode", NEXT_STEP)
class EndsWithTheReset(Walk):
    def step(self, actions):
        waiting = self.over.copy()
        observation, reward, ended, *rest = super().step(actions)
        return observation, reward, ended | waiting, *rest


@broken("the step that resets must ignore its action", NEXT_STEP)
class MovesInTheReset(Walk):
    def step(self, actions):
        waiting = self.over.copy()
        result = super().step(actions)
        self.position[waiting] += actions[waiting]
        return self.observe(), *result[1:]


@broken("(SAME_STEP must give it and its mask|NEXT_STEP has no final_obs|DISABLED has no final_obs)")
class SaysAnotherMode(Walk):
    def __init__(self, mode):
        super().__init__(NEXT_STEP if mode is SAME_STEP else SAME_STEP)
        self.metadata = {"autoreset_mode": mode}


@broken(r"closing: (reset|step) after close\(\) does not raise ClosedEnvironmentError", is_weakness=True)
class GoesOnAfterItsEnd(Walk):
    def step(self, actions):
        self.closed = False
        return super().step(actions)


@broken(r"closing: env.closed is not True after close\(\)", is_weakness=True)
class ForgetsThatItIsClosed(Walk):
    def close(self, **options):
        pass
