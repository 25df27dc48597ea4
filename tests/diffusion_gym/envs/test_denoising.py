import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

import diffusion_gym  # noqa: F401
from diffusion_gym.models import load_model
from diffusion_gym.rewards import RewardOutput, make_reward, to_uint8

SHAPE = (4, 16, 16)


def make_vec(num_envs=2, num_steps=2, **arguments):
    arguments = {"reward": "brightness", **arguments}
    return gym.make_vec("DenoisingMDP-v0", num_envs=num_envs, num_steps=num_steps, **arguments)


def actions(num_envs=2, seed=0):
    return torch.randn(num_envs, *SHAPE, generator=torch.Generator().manual_seed(seed))


def test_random_play_never_builds_the_denoiser():
    env = make_vec()
    env.reset(seed=0)
    for _ in range(3):
        env.step(actions())
    assert "denoiser" not in env.unwrapped.model.__dict__


def test_return_is_the_reward_of_the_decoded_last_action(emoji):
    env = make_vec(model=emoji, reward="incompressibility", num_steps=3)
    env.reset(seed=0)
    total = torch.zeros(2)
    for step in range(3):
        action = actions(seed=step) / 2
        _, reward, *_ = env.step(action)
        total += reward
        assert (reward == 0).all() == (step < 2)
    expected = make_reward("incompressibility")(emoji.decode(action), ["", ""]).values
    assert torch.equal(total, expected)


def test_observation_walks_the_schedule(emoji):
    env = make_vec(model=emoji, num_steps=4, autoreset_mode="DISABLED")
    grid = emoji.schedule.timesteps(4).tolist()
    observation, info = env.reset(seed=0)
    for step in range(5):
        assert observation["timestep"].flatten().tolist() == [grid[step]] * 2
        assert observation["next_timestep"].flatten().tolist() == [grid[min(step + 1, 4)]] * 2
        assert info["nfe"].tolist() == [step] * 2
        if step < 4:
            action = actions(seed=step)
            observation, _, terminated, truncated, info = env.step(action)
            assert torch.equal(observation["latents"], action)
            assert not truncated.any()
            assert terminated.all() == (step == 3)


def test_prompt_and_its_embedding_belong_to_the_id(emoji):
    env = make_vec(model=emoji, num_envs=6)
    observation, info = env.reset(seed=0)
    ids = observation["prompt_id"].flatten().tolist()
    assert info["prompt_id"].tolist() == ids
    assert len(set(ids)) > 1
    for lane, prompt_id in enumerate(ids):
        expected = emoji.encode_prompts([env.unwrapped.prompts[prompt_id]])
        torch.testing.assert_close(observation["prompt_embeds"][lane], expected["prompt_embeds"][0])
        torch.testing.assert_close(observation["negative_prompt_embeds"][lane], expected["negative_prompt_embeds"][0])


def test_prompts_are_drawn_uniformly():
    env = make_vec(num_envs=200, prompts=["a cat", "a dog", "a cow", "a pig"], observe_embeds=False)
    counts = np.bincount(env.reset(seed=0)[1]["prompt_id"], minlength=4)
    assert counts.min() > 30


def test_initial_latents_are_standard_normal():
    latents = make_vec(num_envs=100, observe_embeds=False).reset(seed=0)[0]["latents"]
    assert abs(float(latents.mean())) < 0.01
    assert float(latents.std()) == pytest.approx(1, abs=0.01)


def test_reset_options_fix_prompt_and_latents(emoji):
    env = make_vec(model=emoji, num_steps=2)
    latents = actions(seed=9)
    observation, info = env.reset(seed=0, options={"prompt": ["a cat", "a dragon on the moon"], "latents": latents})
    assert info["prompt_id"].tolist() == [0, -1]
    assert torch.equal(observation["latents"], latents)
    expected = emoji.encode_prompts(["a dragon on the moon"])["prompt_embeds"][0]
    torch.testing.assert_close(observation["prompt_embeds"][1], expected)
    observation, info = env.reset(options={"prompt_id": 7, "latents": latents[0]})
    assert info["prompt_id"].tolist() == [7, 7]
    assert torch.equal(observation["latents"][1], latents[0])
    single = gym.make("DenoisingMDP-v0", model=emoji, num_steps=2)
    observation, info = single.reset(options={"prompt": "a cat", "latents": latents[0].numpy()})
    np.testing.assert_array_equal(observation["latents"], latents[0].numpy())
    assert info["prompt_id"] == 0


def test_options_do_not_shift_the_lanes_streams(emoji):
    env = make_vec(model=emoji)
    env.reset(seed=0)
    plain = env.reset()[0]["latents"]
    env.reset(seed=0, options={"prompt_id": 3, "latents": torch.zeros(SHAPE)})
    assert torch.equal(env.reset()[0]["latents"], plain)


def test_reward_is_told_prompts_and_metadata(tmp_path, emoji):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "two cats", "count": 2}\n{"prompt": "three dogs", "count": 3}\n')
    seen = []

    def count(images, prompts, metadata):
        seen.append((list(prompts), [entry.get("count", 0) for entry in metadata]))
        return torch.tensor([float(entry.get("count", 0)) for entry in metadata])

    env = make_vec(model=emoji, prompts=file, reward=count, num_envs=3, num_steps=1)
    env.reset(options={"prompt": ["three dogs", "two cats", "a bird"]})
    _, reward, _, _, info = env.step(actions(3))
    assert reward.tolist() == [3, 2, 0]
    assert seen == [(["three dogs", "two cats", "a bird"], [3, 2, 0])]
    assert info["final_info"]["reward/count"].tolist() == [3, 2, 0]


def test_weighted_reward_reports_its_parts(emoji):
    env = make_vec(model=emoji, reward={"brightness": 10, "incompressibility": 0.5}, num_steps=1)
    env.reset(seed=0)
    _, reward, _, _, info = env.step(actions())
    final = info["final_info"]
    torch.testing.assert_close(reward, 10 * final["reward/brightness"] + 0.5 * final["reward/incompressibility"])


def out_of_phase(env):
    """Bring lane 0 one step ahead of lane 1 in episodes of two steps."""
    env.reset(seed=0)
    env.step(actions())
    env.reset(seed=5, options={"reset_mask": np.array([False, True])})
    return env.step(actions(seed=1))


def test_same_step_returns_the_next_episode_and_keeps_the_last_one_in_info():
    env = make_vec()
    observation, reward, terminated, _, info = out_of_phase(env)
    assert terminated.tolist() == [True, False]
    assert info["ended"].tolist() == [True, False]
    assert observation["timestep"].flatten().tolist() == [501, 1]
    assert info["final_obs"]["timestep"].flatten().tolist() == [0, 1]
    assert torch.equal(info["final_obs"]["latents"], actions(seed=1))
    assert info["_final_obs"].tolist() == [True, False]
    assert reward[0] == info["final_info"]["reward/brightness"][0] != 0
    assert reward[1] == 0
    assert info["final_info"]["_reward/brightness"].tolist() == [True, False]
    assert (info["final_info"]["images"][1] == 0).all()


def test_next_step_resets_one_step_later_and_ignores_that_action():
    env = make_vec(autoreset_mode=AutoresetMode.NEXT_STEP)
    observation, reward, terminated, *_ = out_of_phase(env)
    assert observation["timestep"].flatten().tolist() == [0, 1]
    assert terminated.tolist() == [True, False]
    ignored = actions(seed=2)
    ignored[0] = torch.nan
    observation, reward, terminated, _, info = env.step(ignored)
    assert observation["timestep"].flatten().tolist() == [501, 0]
    assert terminated.tolist() == [False, True]
    assert info["ended"].tolist() == [False, True]
    assert reward[0] == 0 != reward[1]
    assert torch.isfinite(observation["latents"]).all()
    assert info["reward/brightness"][1] == reward[1]


def test_disabled_lanes_rest_until_they_are_reset():
    env = make_vec(autoreset_mode="Disabled")
    observation, reward, terminated, *_ = out_of_phase(env)
    last = observation["latents"][0]
    observation, reward, terminated, _, info = env.step(actions(seed=2))
    assert terminated.tolist() == info["ended"].tolist() == [True, True]
    assert reward[0] == 0 != reward[1]
    assert torch.equal(observation["latents"][0], last)
    with pytest.raises(gym.error.ResetNeeded, match="every lane has ended"):
        env.step(actions(seed=3))
    observation, info = env.reset(options={"reset_mask": np.array([True, False])})
    assert observation["timestep"].flatten().tolist() == [501, 0]
    assert info["ended"].tolist() == [False, True]
    _, _, terminated, _, info = env.step(actions(seed=4))
    assert terminated.tolist() == [False, True]


def test_rewards_are_decoded_for_finished_lanes_only(emoji, monkeypatch):
    env = make_vec(model=emoji, num_envs=2)
    decoded = []
    decode = type(emoji).decode
    monkeypatch.setattr(
        type(emoji), "decode", lambda self, latents: decoded.append(len(latents)) or decode(self, latents)
    )
    out_of_phase(env)
    assert decoded == [1]


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_render_shows_x_t_and_on_a_done_step_x_0(emoji, mode):
    env = make_vec(model=emoji, render_mode="rgb_array", autoreset_mode=mode)
    observation, _ = env.reset(seed=0)
    frames = env.render()
    assert len(frames) == 2
    assert frames[0].shape == (64, 64, 3)
    assert frames[0].dtype == np.uint8
    np.testing.assert_array_equal(np.stack(frames), to_uint8(emoji.decode(observation["latents"])).numpy())
    env.step(actions())
    action = actions(seed=1)
    env.step(action)
    np.testing.assert_array_equal(np.stack(env.render()), to_uint8(emoji.decode(action)).numpy())
    observation, _ = env.reset(seed=1)
    np.testing.assert_array_equal(np.stack(env.render()), to_uint8(emoji.decode(observation["latents"])).numpy())


def test_single_environment_renders_one_frame_and_records_video_frames(emoji):
    env = gym.make("DenoisingMDP-v0", model=emoji, num_steps=2, render_mode="rgb_array_list")
    env.reset(seed=0)
    for _ in range(2):
        env.step(env.action_space.sample())
    assert [frame.shape for frame in env.render()] == [(64, 64, 3)] * 3


def test_render_without_its_mode_warns():
    env = make_vec()
    env.reset()
    with pytest.warns(UserWarning, match="render_mode"):
        assert env.render() is None


def test_half_precision_latents(emoji):
    env = make_vec(dtype="bfloat16")
    observation, _ = env.reset(seed=0)
    assert observation["latents"].dtype == torch.bfloat16
    assert env.single_observation_space["latents"].dtype == np.float32
    reference = make_vec(model=emoji).reset(seed=0)[0]["latents"]
    assert torch.equal(observation["latents"], reference.bfloat16())
    with pytest.raises(gym.error.InvalidAction, match=r"torch.bfloat16, on cpu; got .* torch.float32"):
        env.step(actions())
    env.step(actions().bfloat16())
    _, reward, *_ = env.step(actions().bfloat16())
    assert reward.dtype == torch.float32


def test_a_loaded_model_is_shared_and_must_fit_the_other_arguments(emoji):
    env = make_vec(model=emoji)
    assert env.unwrapped.model is emoji
    with pytest.raises(ValueError, match=r"dtype=torch.bfloat16 differs from the loaded model's torch.float32"):
        make_vec(model=emoji, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"image_size=\(128, 128\) differs from the loaded model's \(64, 64\)"):
        make_vec(model=emoji, image_size=128)


def test_larger_images():
    env = make_vec(num_steps=1, image_size=96, render_mode="rgb_array")
    env.reset(seed=0)
    *_, info = env.step(torch.randn(2, 4, 24, 24))
    assert info["final_info"]["images"].shape == (2, 3, 96, 96)


def test_embeddings_can_be_left_out(emoji):
    env = make_vec(model=emoji, observe_embeds=False)
    assert set(env.reset()[0]) == {"latents", "timestep", "next_timestep", "prompt_id"}


def test_environment_keeps_no_graph_of_the_action(emoji):
    env = make_vec(model=emoji, num_steps=2)
    env.reset()
    observation, *_ = env.step(actions().requires_grad_())
    assert not observation["latents"].requires_grad
    _, reward, *_ = env.step(actions().requires_grad_())
    assert not reward.requires_grad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reward": "incompressable"}, r"unknown reward 'incompressable': .* Did you mean 'incompressibility'\?"),
        ({"reward": "reference_distance"}, "'reference_distance' needs the noise .* of TimePredictionMDP-v0"),
        ({"reward": {}}, "at least one"),
        ({"reward": 3}, "must be a name, a Reward, a callable"),
        ({"prompts": "simple_animal"}, r"unknown prompt set .* Did you mean 'simple_animals'\?"),
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": ["a", 3]}, "a prompt must be a string"),
        ({"num_steps": 0}, "num_steps must be an integer of at least 1, got 0"),
        ({"num_steps": 2000}, "num_steps must be between 1 and 1000, got 2000"),
        ({"num_steps": True}, "num_steps must be an integer of at least 1, got True"),
        ({"num_envs": 2.0}, "num_envs must be an integer of at least 1, got 2.0"),
        ({"num_envs": 0}, "num_envs must be an integer of at least 1"),
        ({"render_mode": "human"}, "render_mode must be None or one of"),
        ({"autoreset_mode": "sometimes"}, "autoreset_mode must be one of"),
        ({"image_size": 65}, "image_size must be a multiple of 4"),
    ],
)
def test_wrong_arguments_are_named_with_what_is_allowed(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_vec(**arguments)


@pytest.mark.parametrize("make", [gym.make, gym.make_vec])
@pytest.mark.parametrize(
    ("env_id", "name", "message"),
    [
        (
            "DenoisingMDP-v0",
            "nmu_steps",
            r"unexpected keyword argument 'nmu_steps': allowed are .*. Did you mean 'num_steps'\?",
        ),
        (
            "TimePredictionMDP-v0",
            "num_steps",
            r"VectorEnv\(\) got an unexpected keyword argument 'num_steps': .* Did you mean 'max_steps'\?",
        ),
        ("TimePredictionMDP-v0", "promts", r"unexpected keyword argument 'promts'.* Did you mean 'prompts'\?"),
    ],
)
def test_unknown_arguments_are_named(make, env_id, name, message):
    with pytest.raises(TypeError, match=message):
        make(env_id, model="mixture", **{name: 3})


@pytest.mark.parametrize("env_id", ["DenoisingMDP-v0", "TimePredictionMDP-v0"])
@pytest.mark.parametrize("option", [{"autoreset_mode": "SAME_STEP"}, {"num_envs": 2}])
def test_arguments_of_vector_environments_are_not_for_single_ones(env_id, option):
    with pytest.raises(TypeError, match=f"{next(iter(option))} is an argument of gym.make_vec"):
        gym.make(env_id, model="mixture", **option)


def test_unknown_model_is_named():
    with pytest.raises(FileNotFoundError, match="unknown model 'stable': there is no folder"):
        make_vec(model="stable")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"promt": "a cat"}, ValueError, r"unknown reset option 'promt': .* Did you mean 'prompt'\?"),
        ({"prompt": ["a cat"]}, ValueError, r"one value, or one per lane \(2\)"),
        ({"prompt": 3}, ValueError, r"one value, or one per lane \(2\)"),
        ({"prompt": "a", "prompt_id": 1}, ValueError, "exclude each other"),
        ({"prompt_id": 45}, ValueError, "between 0 and 44, got 45"),
        ({"latents": torch.zeros(3, 16, 16)}, ValueError, r"latents must have shape \[4, 16, 16\] or \[2, 4, 16, 16\]"),
        ({"latents": torch.full(SHAPE, np.nan)}, ValueError, "'latents' must be finite, got NaN or infinity"),
        ({"latents": actions() / torch.zeros(2, 1, 1, 1)}, ValueError, "'latents' must be finite"),
        ({"reset_mask": [True, False]}, TypeError, "numpy array or a torch tensor"),
        ({"reset_mask": np.array([True])}, ValueError, r"bool of shape \(2,\)"),
        ({"reset_mask": np.array([False, False])}, ValueError, "at least one True"),
        ({"reset_mask": np.array([1, 0])}, ValueError, "must be bool"),
    ],
)
def test_wrong_reset_options_are_named(emoji, options, error, message):
    env = make_vec(model=emoji)
    env.reset()
    with pytest.raises(error, match=message):
        env.reset(options=options)


def test_first_reset_must_be_of_all_lanes(emoji):
    with pytest.raises(gym.error.ResetNeeded, match="first reset must be of all lanes"):
        make_vec(model=emoji).reset(options={"reset_mask": np.array([True, False])})


def test_seeds_must_be_one_per_lane(emoji):
    with pytest.raises(ValueError, match=r"one per lane \(2\), got 3"):
        make_vec(model=emoji).reset(seed=[1, 2, 3])


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.zeros((2, *SHAPE), np.float32), "must be a torch tensor .* got ndarray"),
        (torch.zeros(1, *SHAPE), r"shape \[2, 4, 16, 16\].* got shape \[1, 4, 16, 16\]"),
        (torch.zeros(2, *SHAPE, dtype=torch.float64), "torch.float32, on cpu; got .*torch.float64"),
        (torch.zeros(2, *SHAPE, device="meta"), "on cpu; got .* on meta"),
    ],
)
def test_wrong_actions_are_refused_at_once(emoji, action, message):
    env = make_vec(model=emoji)
    env.reset()
    with pytest.raises(gym.error.InvalidAction, match=message):
        env.step(action)


@pytest.mark.parametrize("action", [np.zeros((1, 4, 16, 16), np.float32), np.zeros(SHAPE, np.int64), "left"])
def test_wrong_actions_of_the_single_environment_are_refused(emoji, action):
    env = gym.make("DenoisingMDP-v0", model=emoji).unwrapped
    env.reset()
    with pytest.raises(gym.error.InvalidAction, match=r"float array of shape \[4, 16, 16\]"):
        env.step(action)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_actions_that_are_not_finite_are_refused_where_the_reward_is_read(emoji, value):
    env = make_vec(model=emoji)
    env.reset()
    action = actions()
    action[1, 0, 3, 3] = value
    env.step(action)
    with pytest.raises(gym.error.InvalidAction, match=r"actions of lanes \[1\] were NaN or infinite"):
        env.step(actions())


def test_a_reward_that_is_not_finite_or_of_the_wrong_shape_is_refused(emoji):
    def bad(images, prompts, metadata):
        return torch.full((len(images),), torch.nan)

    class Tensors(type(make_reward("brightness"))):
        def __call__(self, images, prompts, metadata=None):
            return images.mean((1, 2, 3))

    wrong = {"returned NaN": bad, "one value per image": lambda i, p, m: i.mean(), "return a RewardOutput": Tensors()}
    for message, reward in wrong.items():
        env = make_vec(model=emoji, reward=reward, num_steps=1)
        env.reset()
        with pytest.raises(ValueError, match=message):
            env.step(actions())


def test_single_environment_says_when_its_episode_is_over(emoji):
    env = gym.make("DenoisingMDP-v0", model=emoji, num_steps=1).unwrapped
    env.reset()
    env.step(env.action_space.sample())
    with pytest.raises(gym.error.ResetNeeded, match="ended"):
        env.step(env.action_space.sample())


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_an_error_at_the_end_of_an_episode_asks_for_a_reset(mode):
    broken = [True]

    def flaky(images, prompts, metadata):
        if broken.pop():
            raise ConnectionError("the reward is away")
        return images.mean((1, 2, 3))

    env = gym.make_vec("DenoisingMDP-v0", num_envs=2, model="mixture", reward=flaky, num_steps=1, autoreset_mode=mode)
    action = env.reset()[0]["latents"]
    with pytest.raises(ConnectionError):
        env.step(action)
    with pytest.raises(gym.error.ResetNeeded, match="the last step or reset ended in an error"):
        env.step(action)
    broken.append(False)
    env.reset()
    assert env.step(action)[4]["ended"].all()


def test_a_reward_with_gradients_is_detached(emoji):
    weight = torch.ones(1, requires_grad=True)
    env = make_vec(model=emoji, reward=lambda images, p, m: weight * images.mean((1, 2, 3)), num_steps=1)
    env.reset()
    assert not env.step(actions())[1].requires_grad


def test_prompts_outside_the_set_need_observed_embeddings(emoji):
    env = make_vec(model=emoji, observe_embeds=False)
    env.reset(options={"prompt": "a cat"})
    with pytest.raises(ValueError, match="observe_embeds=True"):
        env.reset(options={"prompt": "a red car"})


def test_rewards_as_objects(emoji):
    class Constant(type(make_reward("brightness"))):
        name = "constant"

        def __call__(self, images, prompts, metadata=None):
            return RewardOutput(torch.ones(len(images)), {"zero": torch.zeros(len(images))})

    env = make_vec(model=emoji, reward=Constant(), num_steps=1)
    env.reset()
    _, reward, _, _, info = env.step(actions())
    assert reward.tolist() == [1, 1]
    assert info["final_info"]["reward/zero"].tolist() == [0, 0]


def test_folder_of_another_model_works_in_the_environment(tmp_path):
    from tests.tiny import make_tiny_stable_diffusion

    folder = make_tiny_stable_diffusion(tmp_path / "tiny", timestep_spacing="trailing")
    env = make_vec(model=folder, num_steps=2)
    observation, _ = env.reset(seed=0)
    assert observation["timestep"].flatten().tolist() == [999, 999]
    env.step(torch.zeros(2, 4, 8, 8))
    *_, info = env.step(torch.zeros(2, 4, 8, 8))
    assert info["final_obs"]["timestep"].flatten().tolist() == [-1, -1]
    assert load_model(folder).schedule.ends_clean
