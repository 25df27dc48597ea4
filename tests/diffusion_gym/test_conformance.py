"""What must hold for every environment that is registered."""

import json
import pickle
import subprocess
import sys
import tempfile
import warnings
from functools import cache, partial
from inspect import Parameter, signature
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import load_env_creator
from gymnasium.spaces import Box
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import diffusion_gym  # noqa: F401
from diffusion_gym.testing import check_vector_env
from tests.tiny import make_tiny_latent_consistency

IDS = [spec.id for spec in gym.registry.values() if "diffusion_gym" in str(spec.entry_point)]
assert len(IDS) >= 2
STEPS = 3  # of the longest episode: a new environment needs no entry in a table

GYMNASIUM_SAYS = (
    "A Box observation space minimum value is -infinity",
    "A Box observation space maximum value is infinity",
    "A Box action space minimum value is -infinity",
    "A Box action space maximum value is infinity",
)
SB3_SAYS = (
    "It seems that your observation latents is an image",
    "It seems that your observation space latents is an image",
    "The minimal resolution for an image is 36x36",
    "Your observation latents has an unconventional shape",
    "It seems that your observation features is an image",
    "It seems that your observation space features is an image",
    "Treating image space as channels-last",
    "Your observation features has an unconventional shape",
    "Your observation prompt_embeds has an unconventional shape",
    "Your observation negative_prompt_embeds has an unconventional shape",
    "We recommend you to use a symmetric and normalized Box action space",
)

pytestmark = pytest.mark.parametrize("env_id", IDS)


@cache
def settings_of(env_id):
    """Return which of its keywords gives an environment short episodes, with their number, and a model that it takes.

    The mixture stands for any model; an environment that refuses it takes a small consistency model.
    """
    settings = {}
    try:
        env = gym.make_vec(env_id, model="mixture").unwrapped
    except ValueError:
        settings["model"] = make_tiny_latent_consistency(Path(tempfile.mkdtemp()) / "model")
        env = gym.make_vec(env_id, **settings).unwrapped
    return {"num_steps" if env.num_steps is not None else "max_steps": STEPS} | settings


def make(env_id, **arguments):
    return gym.make(env_id, **{**settings_of(env_id), **arguments})


def make_vec(env_id, num_envs, **arguments):
    return gym.make_vec(env_id, num_envs=num_envs, **{**settings_of(env_id), **arguments})


def unexpected(caught, expected):
    return [str(w.message) for w in caught if not any(text in str(w.message) for text in expected)]


@pytest.mark.parametrize("render_mode", [None, "rgb_array"])
def test_gymnasiums_checker_passes_without_unexpected_warnings(env_id, render_mode):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        env = make(env_id, render_mode=render_mode)
        check_env(env.unwrapped)
    assert unexpected(caught, GYMNASIUM_SAYS) == []


def test_stable_baselines3s_checker_passes_behind_finite_bounds(env_id):
    env = make(env_id)
    if not env.action_space.is_bounded():
        env = gym.wrappers.TransformAction(env, lambda action: action, Box(-1e3, 1e3, env.action_space.shape))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sb3_check_env(env)
    assert unexpected(caught, SB3_SAYS + GYMNASIUM_SAYS) == []


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_our_own_vector_checker_passes(env_id, mode, num_envs):
    check_vector_env(make_vec(env_id, num_envs, autoreset_mode=mode), strict=num_envs > 1)


def test_seeded_twins_are_equal_to_the_last_bit(env_id):
    twins = [make(env_id) for _ in range(2)]
    for twin in twins:
        twin.action_space.seed(5)
    steps = [[twin.reset(seed=5)] for twin in twins]
    for _ in range(3):
        for twin, log in zip(twins, steps, strict=True):
            log.append(twin.step(twin.action_space.sample()))
    for one, other in zip(*steps, strict=True):
        np.testing.assert_equal(one, other)


def test_a_vector_lane_is_the_single_environment(env_id):
    """Through two episodes: the second starts by autoreset on one side and by an unseeded reset on the other."""
    singles, vector = [make(env_id) for _ in range(3)], make_vec(env_id, 3)
    # What a network computes differs in the last bits between batch sizes; where it is the policy's there is none.
    tolerance = 0.0 if vector.unwrapped.action_is_next_latents else 1e-3
    close = partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    vector.action_space.seed(0)
    batch, _ = vector.reset(seed=11)
    alone = [env.reset(seed=11 + lane)[0] for lane, env in enumerate(singles)]
    played = np.zeros(3, dtype=int)
    while played.min() < 2:
        for lane, observation in enumerate(alone):
            for key, value in observation.items():
                close(batch[key][lane].numpy(), value, err_msg=key)
        actions = vector.action_space.sample()
        batch, rewards, terminated, _, info = vector.step(torch.from_numpy(actions))
        for lane, env in enumerate(singles):
            alone[lane], reward, over, _, single_info = env.step(actions[lane])
            assert rewards[lane].item() == pytest.approx(reward, abs=0.01)
            assert over == terminated[lane] == info["ended"][lane]
            if over:
                images = info["final_info"]["images"][lane].numpy()
                close(info["final_obs"]["latents"][lane].numpy(), alone[lane]["latents"])
                np.testing.assert_allclose(images, single_info["images"], atol=max(1e-5, tolerance))
                assert info["final_info"]["prompt_id"][lane] == single_info["prompt_id"]
                alone[lane] = env.reset()[0]
        played += info["ended"]


def test_start_does_not_depend_on_the_number_of_lanes(env_id):
    few, _ = make_vec(env_id, 2).reset(seed=4)
    many, _ = make_vec(env_id, 5).reset(seed=4)
    for key in ("latents", "prompt_id"):
        assert torch.equal(few[key], many[key][:2])


def test_environments_survive_pickling(env_id):
    for env in (make(env_id).unwrapped, make_vec(env_id, 2)):
        again = pickle.loads(pickle.dumps(env))
        one, other = env.reset(seed=3)[0], again.reset(seed=3)[0]
        for key in one:
            np.testing.assert_array_equal(np.asarray(one[key]), np.asarray(other[key]))


def test_spec_survives_json(env_id):
    env = make(env_id, reward="brightness", prompts=["a cat"])
    again = gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    assert again.unwrapped.prompts.texts == ("a cat",)
    assert again.spec.kwargs["reward"] == "brightness"
    vector = make_vec(env_id, 2, autoreset_mode="DISABLED")
    json.dumps(vector.spec.kwargs)
    remade = gym.make_vec(vector.spec)
    assert remade.num_envs == 2
    assert remade.unwrapped.autoreset_mode is AutoresetMode.DISABLED


def test_closing_twice_is_harmless_and_a_closed_environment_says_so(env_id):
    for env in (make(env_id).unwrapped, make_vec(env_id, 2)):
        env.reset()
        env.close()
        env.close()
        with pytest.raises(gym.error.ClosedEnvironmentError, match="was closed"):
            env.reset()


def test_step_before_reset_is_named(env_id):
    vector = make_vec(env_id, 2)
    with pytest.raises(gym.error.ResetNeeded, match=r"call reset\(\) before step\(\)"):
        vector.step(torch.zeros(2, *vector.single_action_space.shape))
    single = make(env_id).unwrapped
    with pytest.raises(gym.error.ResetNeeded, match=r"call reset\(\) before step\(\)"):
        single.step(single.action_space.sample())


def test_its_signature_shows_every_keyword_and_default(env_id):
    spec = gym.spec(env_id)
    single, vector = (
        signature(load_env_creator(point)).parameters for point in (spec.entry_point, spec.vector_entry_point)
    )
    assert vector.keys() - single.keys() == {"num_envs", "autoreset_mode"}
    assert single.keys() >= {"model", "reward", "prompts", "device", "dtype", *settings_of(env_id)}
    assert {parameter.kind for parameter in single.values()} == {Parameter.KEYWORD_ONLY}
    assert single["model"].default == vector["model"].default
    assert single["model"].default in ("emoji", "emoji_consistency")
    assert not any(parameter.default is Parameter.empty for parameter in vector.values())


def test_importing_the_package_is_light_and_makes_the_id_known(env_id):
    code = (
        "import sys, diffusion_gym, gymnasium\n"
        f"assert {env_id!r} in gymnasium.registry\n"
        "heavy = {'diffusers', 'transformers', 'torch', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_module_prefix_registers_without_an_import(env_id):
    model = str(settings_of(env_id).get("model", "emoji"))
    code = f"import gymnasium; print(gymnasium.make('diffusion_gym:{env_id}', model={model!r}).spec.id)"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == env_id
