"""`check_vector_env` refuses torch environments that break the contract of `TorchVectorEnv`, each in one way."""

import re

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict
from gymnasium.vector import AutoresetMode, VectorWrapper

import diffusion_gym  # noqa: F401
from diffusion_gym.envs.contract import TorchVectorEnv, missing_members
from diffusion_gym.testing import check_vector_env
from diffusion_gym.wrappers import NumpyToTorch
from tests.diffusion_gym.testing.walk import Walk


class ReusesABuffer(VectorWrapper):
    def reset(self, **options):
        observation, info = super().reset(**options)
        self.buffer = observation["latents"].clone()
        return observation | {"latents": self.buffer}, info

    def step(self, actions):
        observation, *rest = super().step(actions)
        self.buffer.copy_(observation["latents"])
        return observation | {"latents": self.buffer}, *rest


class ChangesTheAction(VectorWrapper):
    def step(self, actions):
        result = super().step(actions)
        actions.zero_()
        return result


class ReturnsTheAction(VectorWrapper):
    def step(self, actions):
        observation, *rest = super().step(actions)
        return observation | {"latents": actions}, *rest


class IgnoresTheSeed(VectorWrapper):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=3, options=options)


class ForgetsTheMask(VectorWrapper):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed, options={})


class LiesAboutTheEnd(VectorWrapper):
    def step(self, actions):
        *rest, info = super().step(actions)
        return *rest, info | {"ended": np.zeros_like(info["ended"])}


class PaysInFloat64(VectorWrapper):
    def step(self, actions):
        observation, reward, *rest = super().step(actions)
        return observation, reward.double(), *rest


class SaysBytesAreInPlaceOfNumbers(VectorWrapper):
    def __init__(self, env):
        super().__init__(env)
        self.single_observation_space = Dict(
            {**env.single_observation_space, "latents": Box(0, 255, (2, 1, 1), np.uint8)}
        )


class FinalsAreOfTheStepBefore(VectorWrapper):
    def reset(self, **options):
        self.before, info = super().reset(**options)
        return self.before, info

    def step(self, actions):
        observation, *rest, info = super().step(actions)
        if "final_obs" in info:
            info = info | {"final_obs": self.before}
        self.before = observation
        return observation, *rest, info


class ForgetsToResetTheSteps(VectorWrapper):
    """The second episode of a lane has one step less."""

    def step(self, actions):
        *result, info = super().step(actions)
        if info["ended"].any():
            self.unwrapped._lanes.step[info["ended"]] = 1
        return *result, info


class SaysNothingInTheEnd(VectorWrapper):
    def step(self, actions):
        *result, info = super().step(actions)
        return *result, info | ({"final_info": {}} if "final_info" in info else {})


class AddsNoiseToTheAction(VectorWrapper):
    def step(self, actions):
        return super().step(actions + torch.randn_like(actions) / 10)


class AddsNoiseToTheReward(VectorWrapper):
    def step(self, actions):
        observation, reward, *rest = super().step(actions)
        return observation, reward + torch.rand_like(reward), *rest


class ReusesTheRewards(VectorWrapper):
    def step(self, actions):
        observation, reward, *rest = super().step(actions)
        self.__dict__.setdefault("rewards", torch.zeros_like(reward)).copy_(reward)
        return observation, self.rewards, *rest


class PaysNothingThatIsANumber(VectorWrapper):
    def step(self, actions):
        observation, reward, *rest = super().step(actions)
        return observation, torch.where(reward == 0, reward, torch.nan), *rest


class PaysWithAGradient(VectorWrapper):
    def step(self, actions):
        observation, reward, *rest = super().step(actions)
        return observation, reward.clone().requires_grad_(), *rest


class RepeatsItself(VectorWrapper):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=11 if seed is None else seed, options=options)


class SeedsEveryLane(VectorWrapper):
    """A masked reset with a seed seeds the lanes outside the mask too."""

    def reset(self, *, seed=None, options=None):
        result = super().reset(seed=seed, options=options)
        if options and seed is not None:
            for lane, generator in enumerate(self.unwrapped._lanes._generators):
                generator.manual_seed(seed + lane)
        return result


class GoesOnAfterItsEnd(VectorWrapper):
    def close(self, **options):
        pass


class DropsTheFirstAction(VectorWrapper):
    """The first action of the second episode is ignored too, not only that of the step which resets."""

    def reset(self, **options):
        self.last, info = super().reset(**options)
        self.dropped = np.zeros(self.num_envs, dtype=int)
        return self.last, info

    def step(self, actions):
        dropping = torch.from_numpy(self.dropped == 1)[:, None, None, None]
        self.dropped[self.dropped > 0] -= 1
        observation, *rest, info = super().step(torch.where(dropping, self.last["latents"], actions))
        self.dropped[info["ended"]] = 2
        self.last = observation
        return observation, *rest, info


CONSTANT = frozenset({"prompt_id", "prompt_embeds", "negative_prompt_embeds"})


class SaysOf(VectorWrapper):
    """An environment that says something else of itself."""

    def __init__(self, env, **said):
        super().__init__(env)
        for name, value in said.items():
            setattr(env.unwrapped, name, value)


SAME_STEP, NEXT_STEP, DISABLED = AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED
ALL = (SAME_STEP, NEXT_STEP, DISABLED)
TWINS = "two runs with one seed and the same actions: got"
BROKEN = {
    ReusesABuffer: (ALL, r"observation\['latents'\]: was changed by a later step"),
    ChangesTheAction: (ALL, "step 1, action: step must not change the caller's action"),
    ReturnsTheAction: (ALL, r"step 1, observation\['latents'\]: shares memory with the caller's action"),
    IgnoresTheSeed: (ALL, "reset: the seeds 7 and 1234567 must give different observations"),
    ForgetsTheMask: (ALL, "lane 1, .*: a reset of lane 0 must leave the others|of lanes .* must leave the others"),
    LiesAboutTheEnd: (
        ALL,
        r"step 2, info\['ended'\]: is \[False, False, False\], but the flags say \[True, True, True\]",
    ),
    PaysInFloat64: (ALL, "step 1, reward: must be float32, got torch.float64"),
    SaysBytesAreInPlaceOfNumbers: (ALL, r"reset, observation\['latents'\]: is torch.float32, the space says uint8"),
    FinalsAreOfTheStepBefore: ((SAME_STEP,), "step 2, lane 0: a step must change the observation, and the last one is"),
    ForgetsToResetTheSteps: (
        (SAME_STEP,),
        r"step 3, lane 0, observation\['timestep'\]: an episode after autoreset must be",
    ),
    SaysNothingInTheEnd: ((SAME_STEP,), r"info\['final_info'\]: must have what info has, but lacks \['ended'.*'nfe'"),
    AddsNoiseToTheAction: (ALL, r"step 1, lane 0, observation\['latents'\]: must be the action: got .*, expected"),
    AddsNoiseToTheReward: ((SAME_STEP, DISABLED), f"step 1, lane 0, reward: {TWINS}"),
    ReusesTheRewards: (ALL, "reward: (was changed by a later step|shares memory with reward of step 1)"),
    PaysNothingThatIsANumber: (ALL, "step 2, lane 0, reward: must be finite, got nan"),
    PaysWithAGradient: (ALL, "step 1, reward: carries a gradient: return it detached"),
    RepeatsItself: (ALL, "a reset without a seed must draw another episode, got the same again"),
    SeedsEveryLane: (ALL, "streams: lane 1 draws another episode after a reset of lane 0"),
    GoesOnAfterItsEnd: (ALL, r"closing: env.closed is not True after close\(\)"),
    DropsTheFirstAction: ((NEXT_STEP,), "a step must change the observation|must be the action"),
}
CASES = [(broken, mode) for broken, (modes, _) in BROKEN.items() for mode in modes]


@pytest.mark.parametrize(
    ("broken", "mode"), CASES, ids=lambda part: getattr(part, "__name__", getattr(part, "name", ""))
)
def test_broken_environments_are_refused(broken, mode):
    env = gym.make_vec("DenoisingMDP-v0", num_envs=3, model="mixture", num_steps=2, autoreset_mode=mode)
    with pytest.raises(AssertionError, match=BROKEN[broken][1]):
        check_vector_env(broken(env), max_steps=5)


@pytest.mark.parametrize("mode", ALL)
def test_twins_must_be_equal_to_the_last_bit(mode):
    """Where nothing says what an action does, only the twin shows that it is changed on its way."""
    ratios = gym.make_vec("TimePredictionMDP-v0", num_envs=3, model="mixture", max_steps=3, autoreset_mode=mode)
    with pytest.raises(AssertionError, match=f"step 1, lane 0, .*: {TWINS}"):
        check_vector_env(AddsNoiseToTheAction(ratios), max_steps=5)


def test_episodes_have_to_end():
    env = gym.make_vec("DenoisingMDP-v0", num_envs=3, model="mixture", num_steps=5)
    with pytest.raises(AssertionError, match="no episode ended within 3 steps: see max_steps"):
        check_vector_env(env, max_steps=3)


def test_the_environment_behind_an_idle_wrapper_passes():
    check_vector_env(VectorWrapper(gym.make_vec("DenoisingMDP-v0", num_envs=3, model="mixture", num_steps=2)))


@pytest.mark.parametrize("mode", ALL)
@pytest.mark.parametrize("num_steps", [1, 3])
def test_short_episodes_pass(mode, num_steps):
    check_vector_env(
        gym.make_vec("DenoisingMDP-v0", num_envs=2, model="mixture", num_steps=num_steps, autoreset_mode=mode)
    )


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"num_steps": 2.0}, r"num_steps: must be of type int \| None, got 2.0"),
        ({"max_steps": 1}, "max_steps: is 1, but an episode took 2 actions"),
        ({"times": (999.0, 0.0)}, "times: are 2, but num_steps is 2"),
        ({"times": [999.0, 499.0, 0.0]}, "times: must be of type tuple"),
        ({"device": "cpu"}, "device: must be of type device, got 'cpu'"),
        ({"dtype": "float32"}, "dtype: must be of type dtype"),
        ({"prompts": ["north"]}, "prompts: must be of type PromptSet"),
        ({"constant_keys": {"prompt_id"}}, "constant_keys: must be of type frozenset, got"),
        ({"constant_keys": frozenset({"prompt"})}, r"constant_keys: must be keys of the observation.* no \['prompt'\]"),
        (
            {"constant_keys": CONSTANT | {"timestep"}},
            r"observation\['timestep'\]: is of constant_keys, but changed within an episode: got",
        ),
        ({"large_keys": frozenset({"pixels"})}, r"large_keys: must be keys of the observation.* no \['pixels'\]"),
        ({"autoreset_mode": NEXT_STEP}, "autoreset_mode: must be the metadata's"),
    ],
)
def test_what_an_environment_says_of_itself_is_checked(said, message):
    env = gym.make_vec("DenoisingMDP-v0", num_envs=2, model="mixture", num_steps=2)
    with pytest.raises(AssertionError, match=message):
        check_vector_env(SaysOf(env, **said), max_steps=5)


def test_episodes_that_differ_in_length_have_no_number_of_steps():
    env = gym.make_vec("TimePredictionMDP-v0", num_envs=2, model="mixture", max_steps=3)
    with pytest.raises(AssertionError, match=r"num_steps: is 4, but an episode took \d actions"):
        check_vector_env(SaysOf(env, num_steps=4), max_steps=5)


def test_an_action_that_is_not_the_next_latents_is_refused():
    env = gym.make_vec("TimePredictionMDP-v0", num_envs=2, model="mixture", max_steps=3)
    with pytest.raises(AssertionError, match="must be the action: got"):
        check_vector_env(SaysOf(env, action_is_next_latents=True), max_steps=5)


def test_what_another_packages_torch_environment_lacks_is_in_the_report():
    report = check_vector_env(NumpyToTorch(Walk(SAME_STEP)))
    lacks = report.unchecked["members of a TorchVectorEnv"]
    assert re.search("it lacks action_is_next_latents, .*, reward_seconds.*contract.TorchVectorEnv", lacks)


@pytest.mark.parametrize(
    ("env_id", "num_steps", "max_steps", "large"),
    [
        ("DenoisingMDP-v0", 20, None, {"latents"}),
        ("TimePredictionMDP-v0", None, 28, {"latents", "features", "time_embedding"}),
    ],
)
@pytest.mark.parametrize("observe_embeds", [False, True])
def test_environments_say_what_they_are(env_id, num_steps, max_steps, large, observe_embeds):
    env = gym.make_vec(env_id, model="mixture", observe_embeds=observe_embeds).unwrapped
    assert isinstance(env, TorchVectorEnv)
    assert (env.num_steps, env.max_steps) == (num_steps, max_steps)
    assert env.action_is_next_latents == (env_id == "DenoisingMDP-v0")
    assert env.large_keys == large
    embeds = {"prompt_embeds", "negative_prompt_embeds"} if observe_embeds else set()
    assert env.constant_keys == {"prompt_id"} | embeds
    assert set(env.metadata) == {"autoreset_mode", "render_modes", "render_fps"}
    assert missing_members(env) == []
