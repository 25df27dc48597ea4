"""`check_vector_env` refuses environments that break the contract, each in one way."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper

import diffusion_gym  # noqa: F401
from diffusion_gym.envs.contract import TorchVectorEnv, missing_members
from diffusion_gym.testing import check_vector_env


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


class SaysOf(VectorWrapper):
    """An environment that says something else of itself."""

    def __init__(self, env, **said):
        super().__init__(env)
        for name, value in said.items():
            setattr(env.unwrapped, name, value)


SAME_STEP, NEXT_STEP, DISABLED = AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED
ALL = (SAME_STEP, NEXT_STEP, DISABLED)
TWINS = "two runs with one seed and the same actions must give equal"
BROKEN = {
    ReusesABuffer: (ALL, "'latents' was changed after it was returned"),
    ChangesTheAction: (ALL, "must not change the caller's action"),
    ReturnsTheAction: (ALL, "'latents' shares memory with the action"),
    IgnoresTheSeed: (ALL, "a reset without a seed must draw another episode"),
    ForgetsTheMask: (ALL, "of a lane outside the mask was changed"),
    LiesAboutTheEnd: (ALL, "must say which lanes ended"),
    PaysInFloat64: (ALL, "the reward must be float32, got torch.float64"),
    SaysBytesAreInPlaceOfNumbers: (ALL, "'latents' must be of kind 'u', got torch.float32"),
    FinalsAreOfTheStepBefore: ((SAME_STEP,), "the last one be in final_obs"),
    ForgetsToResetTheSteps: ((SAME_STEP,), "an episode after autoreset took 1 steps, but 2 after a reset"),
    SaysNothingInTheEnd: ((SAME_STEP,), r"final_info must have what info has, but \['ended'.*'nfe'"),
    AddsNoiseToTheAction: (ALL, "the latents that are observed must be the action"),
    AddsNoiseToTheReward: ((SAME_STEP, DISABLED), f"{TWINS} rewards"),
    ReusesTheRewards: (ALL, "the reward (was changed after it was returned|shares memory with the last one)"),
    PaysNothingThatIsANumber: (ALL, "the reward must be finite"),
    PaysWithAGradient: (ALL, "the reward must not carry a gradient"),
    RepeatsItself: (ALL, "a reset without a seed must draw another episode"),
    SeedsEveryLane: (ALL, "a masked reset must not seed lanes outside the mask"),
    GoesOnAfterItsEnd: (ALL, r"reset after close\(\) must raise ClosedEnvironmentError"),
    DropsTheFirstAction: ((NEXT_STEP,), "a step must change what a lane observes|must be the action"),
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
    with pytest.raises(AssertionError, match=f"{TWINS} observations"):
        check_vector_env(AddsNoiseToTheAction(ratios), max_steps=5)


def test_episodes_have_to_end():
    env = gym.make_vec("DenoisingMDP-v0", num_envs=3, model="mixture", num_steps=5)
    with pytest.raises(AssertionError, match="no episode ended within 3 steps"):
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
        ({"num_steps": 2.0}, r"num_steps must be of type int \| None, got 2.0"),
        ({"max_steps": 1}, "max_steps is 1, but an episode took 2 actions"),
        ({"times": (999.0, 0.0)}, "has num_steps=2, but 2 times"),
        ({"times": [999.0, 499.0, 0.0]}, "times must be of type tuple"),
        ({"device": "cpu"}, "device must be of type device, got 'cpu'"),
        ({"dtype": "float32"}, "dtype must be of type dtype"),
        ({"prompts": ["north"]}, "prompts must be of type PromptSet"),
        ({"constant_keys": {"prompt_id"}}, "constant_keys must be of type frozenset, got"),
        ({"constant_keys": frozenset({"prompt"})}, r"constant_keys must be keys of the observation.* no \['prompt'\]"),
        ({"constant_keys": frozenset({"timestep"})}, "'timestep' is of constant_keys, but changed within an episode"),
        ({"large_keys": frozenset({"pixels"})}, r"large_keys must be keys of the observation.* no \['pixels'\]"),
        ({"autoreset_mode": NEXT_STEP}, "env.autoreset_mode must be the metadata's"),
    ],
)
def test_what_an_environment_says_of_itself_is_checked(said, message):
    env = gym.make_vec("DenoisingMDP-v0", num_envs=2, model="mixture", num_steps=2)
    with pytest.raises(AssertionError, match=message):
        check_vector_env(SaysOf(env, **said), max_steps=5)


def test_episodes_that_differ_in_length_have_no_number_of_steps():
    env = gym.make_vec("TimePredictionMDP-v0", num_envs=2, model="mixture", max_steps=3)
    with pytest.raises(AssertionError, match=r"num_steps is 4, but an episode took \d actions"):
        check_vector_env(SaysOf(env, num_steps=4), max_steps=5)


def test_an_action_that_is_not_the_next_latents_is_refused():
    env = gym.make_vec("TimePredictionMDP-v0", num_envs=2, model="mixture", max_steps=3)
    with pytest.raises(AssertionError, match="the latents that are observed must be the action"):
        check_vector_env(SaysOf(env, action_is_next_latents=True), max_steps=5)


def test_what_another_packages_environment_lacks_is_listed():
    class Plain(VectorEnv):
        metadata = {"autoreset_mode": SAME_STEP}  # noqa: RUF012
        num_envs = 2
        device = torch.device("cpu")

    with pytest.raises(AssertionError, match=r"Plain lacks action_is_next_latents, .*, reward_seconds, .*contract"):
        check_vector_env(Plain())


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
