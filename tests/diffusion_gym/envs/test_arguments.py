"""Arguments of every kind are taken or named, and none is without effect."""

import pickle
from inspect import signature

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode

import diffusion_gym  # noqa: F401
from diffusion_gym.envs.denoising import DenoisingVectorEnv
from diffusion_gym.envs.reference import ReferenceDistance
from diffusion_gym.envs.step_cost import StepCost
from diffusion_gym.envs.time_prediction import TimePredictionVectorEnv
from diffusion_gym.models import load_model
from diffusion_gym.rewards import Reward, RewardOutput
from diffusion_gym.schedules import KarrasSchedule

CLASSES = {"DenoisingMDP-v0": DenoisingVectorEnv, "TimePredictionMDP-v0": TimePredictionVectorEnv}
NEEDED = {"gamma": {"step_cost": "discount"}, "step_cost_weight": {"step_cost": "linear"}}


def make(env_id, model, num_envs=2, **arguments):
    return gym.make_vec(env_id, num_envs=num_envs, model=model, **{"reward": "brightness", **arguments})


def arguments_of(kind):
    """Return (id, name) of each argument whose type is `kind`, or None."""
    for env_id, cls in CLASSES.items():
        for name, parameter in signature(cls.__init__).parameters.items():
            if parameter.annotation in (kind, kind | None):
                yield env_id, name


FLOATS, INTEGERS = list(arguments_of(float)), list(arguments_of(int))
assert {name for _, name in FLOATS} == {"guidance_scale", "t_min", "gamma", "step_cost_weight"}
assert {name for _, name in INTEGERS} == {"num_envs", "num_steps", "max_steps", "reference_steps"}


@pytest.mark.parametrize(("env_id", "name"), FLOATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, True, "2"])
def test_numbers_that_are_not_finite_or_out_of_range_are_named(mixture, env_id, name, value):
    with pytest.raises(ValueError, match=f"{name} must be a finite number"):
        make(env_id, mixture, **{name: value, **NEEDED.get(name, {})})


@pytest.mark.parametrize(("env_id", "name"), INTEGERS)
def test_integers_of_numpy_are_taken_and_booleans_named(mixture, env_id, name):
    needed = {"reward": "reference_distance"} if name == "reference_steps" else {}
    env = make(env_id, mixture, **{name: np.int64(3), **needed})
    env.reset(seed=0)
    env.step(torch.full((env.num_envs, *env.single_action_space.shape), 0.5))
    for wrong in (True, 2.0, 0, "3"):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got {wrong!r}"):
            make(env_id, mixture, **{name: wrong, **needed})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reference_steps": 20}, 'reference_steps=20 needs reward="reference_distance"'),
        ({"reference_steps": 20, "reward": ReferenceDistance()}, r"ReferenceDistance itself takes num_steps"),
        ({"allow_negative": True}, "allow_negative=True needs step_cost=\"discount\", got 'none'"),
        ({"negative_prompt": "north", "guidance_scale": 1.0}, "negative_prompt='north' needs guidance"),
    ],
)
def test_arguments_without_effect_are_named(mixture, arguments, message):
    with pytest.raises(ValueError, match=message):
        make("TimePredictionMDP-v0", mixture, **arguments)


def test_seeds_of_every_kind_are_taken_or_named(mixture):
    env = make("DenoisingMDP-v0", mixture)
    first = env.reset(seed=7)[0]["latents"]
    for same in (np.int64(7), [7, 8], (7, np.uint8(8)), np.array([7, 8]), torch.tensor([7, 8]), 2**64 + 7):
        assert torch.equal(env.reset(seed=same)[0]["latents"], first)
    for wrong in (1.0, True, "7", [7, 1.5], [7, -1]):
        with pytest.raises(ValueError, match="seed must be an integer"):
            env.reset(seed=wrong)


@pytest.mark.parametrize("env_id", CLASSES)
def test_another_default_dtype_changes_nothing(emoji, env_id):
    def returns_of():
        env = make(env_id, emoji, num_envs=1, **{"DenoisingMDP-v0": {"num_steps": 2}}.get(env_id, {"max_steps": 2}))
        env.reset(seed=0)
        for _ in range(2):
            actions = torch.full((1, *env.single_action_space.shape), 0.5, dtype=torch.float32)
            observation, reward, *_ = env.step(actions)
        return observation, reward

    expected, expected_reward = returns_of()
    torch.set_default_dtype(torch.float64)
    try:
        observation, reward = returns_of()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(reward, expected_reward)
    for key, value in expected.items():
        assert observation[key].dtype == value.dtype
        torch.testing.assert_close(observation[key], value)


@pytest.mark.parametrize("step_cost", ["linear", "discount"])
def test_step_costs_in_another_default_dtype(step_cost):
    torch.set_default_dtype(torch.float64)
    try:
        cost = StepCost(step_cost, weight=0.5 if step_cost == "linear" else 0)
        assert cost(torch.ones(2, dtype=torch.float32), torch.tensor([1, 5])).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


class Encoded:
    """Notes which texts a model was asked to encode."""

    def __init__(self, model, monkeypatch):
        self.texts = []
        encode = model.encode_prompts

        def noted(prompts, negative_prompt=""):
            self.texts.append(list(prompts))
            return encode(prompts, negative_prompt)

        monkeypatch.setattr(model, "encode_prompts", noted)


@pytest.mark.parametrize("env_id", CLASSES)
def test_only_the_lanes_prompts_are_encoded(emoji, monkeypatch, env_id):
    encoded = Encoded(emoji, monkeypatch)
    env = make(env_id, emoji, prompts=[f"a fox number {i}" for i in range(500)])
    assert [len(texts) for texts in encoded.texts] == [1]
    encoded.texts.clear()
    _, info = env.reset(seed=0)
    lanes = {env.unwrapped.prompts[i] for i in info["prompt_id"]}
    assert [set(texts) for texts in encoded.texts] == [lanes]
    encoded.texts.clear()
    env.reset(options={"prompt": ["a red car", "a fox number 3"]})
    assert encoded.texts == [["a fox number 3", "a red car"]]


def test_without_observed_embeddings_the_text_encoder_is_not_loaded():
    model = load_model("emoji")
    env = make("DenoisingMDP-v0", model, num_steps=1, observe_embeds=False)
    env.reset(seed=0)
    env.step(torch.zeros(2, 4, 16, 16))
    assert "_text_encoder" not in vars(model)


def test_a_text_of_ones_own_has_no_index(mixture):
    env = make("DenoisingMDP-v0", mixture)
    _, info = env.reset(options={"prompt": ["north", "north and south"]})
    with pytest.raises(IndexError, match="prompt_id -1 is none of the set"):
        env.unwrapped.prompts[info["prompt_id"][1]]


def play(env, seed=0):
    _, info = env.reset(seed=seed)
    while not info["ended"].all():
        _, reward, _, _, info = env.step(torch.full((env.num_envs, 1), 0.5))
    return reward


def test_references_are_remembered_by_all_that_they_depend_on(emoji):
    """One reward shared by environments that differ in one thing each pays as a reward of their own does."""
    sizes = {"num_envs": 2, "max_steps": 2, "autoreset_mode": "DISABLED", "t_min": 1e-3}
    other = load_model("emoji")
    next(other.denoiser.parameters()).data.mul_(1.5)
    shared = ReferenceDistance(num_steps=3)
    for model, arguments in (
        (emoji, {}),
        (other, {}),
        (emoji, {"guidance_scale": 1.5}),
        (emoji, {"negative_prompt": "a cat"}),
        (emoji, {}),
    ):
        environments = (
            make("TimePredictionMDP-v0", model, **sizes, **arguments, reward=reward)
            for reward in (shared, ReferenceDistance(num_steps=3))
        )
        one, alone = (play(env) for env in environments)
        torch.testing.assert_close(one, alone, rtol=0, atol=1e-9)
    copy = pickle.loads(pickle.dumps(shared))
    torch.testing.assert_close(play(make("TimePredictionMDP-v0", emoji, **sizes, reward=copy)), one, rtol=0, atol=1e-9)


def test_initial_latents_have_the_std_of_the_process():
    model = load_model("mixture")
    plain = make("DenoisingMDP-v0", model).reset(seed=0)[0]["latents"]
    model.schedule = KarrasSchedule(sigma_max=14.0)
    wide = make("DenoisingMDP-v0", model).reset(seed=0)[0]["latents"]
    torch.testing.assert_close(wide, 14 * plain)


@pytest.mark.parametrize("env_id", CLASSES)
def test_spec_survives_json_with_what_is_no_json(env_id, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("north\nsouth\n")
    name = "num_steps" if env_id == "DenoisingMDP-v0" else "max_steps"
    arguments = {"model": "mixture", "prompts": file, "dtype": torch.float32, name: np.int64(3)}
    vector = gym.make_vec(env_id, num_envs=2, autoreset_mode=AutoresetMode.NEXT_STEP, **arguments)
    again = gym.make_vec(EnvSpec.from_json(vector.spec.to_json()))
    assert again.unwrapped.autoreset_mode is AutoresetMode.NEXT_STEP
    single = gym.make(env_id, **arguments)
    assert gym.make(EnvSpec.from_json(single.spec.to_json())).unwrapped.prompts.texts == ("north", "south")


def test_time_prediction_takes_any_prompt_without_showing_its_embedding(emoji):
    """The denoiser is the environment's, so an embedding that nobody observes is used all the same."""
    images = []
    for prompt in ("a red car", "a blue house"):
        env = make("TimePredictionMDP-v0", emoji, num_envs=1, max_steps=1, observe_embeds=False)
        env.reset(seed=0, options={"prompt": prompt})
        images.append(env.step(torch.full((1, 1), 0.5))[4]["final_info"]["images"])
    assert not torch.equal(*images)


def test_an_extra_that_is_named_as_the_reward_does_not_replace_it(mixture):
    class Named(Reward):
        name = "named"

        def __call__(self, images, prompts, metadata=None):
            return RewardOutput(torch.ones(len(images)), {"named": torch.zeros(len(images))})

    env = make("DenoisingMDP-v0", mixture, num_steps=1, reward=Named())
    env.reset(seed=0)
    _, reward, _, _, info = env.step(torch.zeros(2, *env.single_action_space.shape))
    assert reward.tolist() == info["final_info"]["reward/named"].tolist() == [1, 1]
