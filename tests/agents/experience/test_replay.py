"""Finished images with their rewards."""

import json
import re

import gymnasium as gym
import pytest
import torch
from PIL import Image

import diffusion_gym  # noqa: F401
from agents import RWR, DenoisingPolicy, Replay, collect
from diffusion_gym.models import load_model
from diffusion_gym.models.mixture import write_mixture
from diffusion_gym.rewards import to_uint8
from tests.tiny import make_tiny_stable_diffusion


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return load_model(make_tiny_stable_diffusion(tmp_path_factory.mktemp("tiny") / "model"))


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    folder = tmp_path_factory.mktemp("line")
    return load_model(write_mixture(folder, [[-1.0], [1.0]], stds=[0.3, 0.3], names=["left", "right"]))


def test_a_folder_of_images_is_the_rollout_that_they_were_drawn_in(tiny, tmp_path):
    """And an algorithm can learn from it."""
    env = gym.make_vec("DenoisingMDP-v0", num_envs=4, num_steps=3, model=tiny, reward="brightness")
    policy = DenoisingPolicy(tiny, seed=0)
    rollout = collect(env, policy, seeds=[0], max_images=4)
    texts = [env.unwrapped.prompts[index] for index in rollout.prompt_id]
    lines = []
    for k, pixels in enumerate(to_uint8(rollout.images).numpy()):
        Image.fromarray(pixels).save(tmp_path / f"{k}.png")
        lines.append({"file_name": f"{k}.png", "prompt": texts[k], "reward": float(rollout.returns[k])})
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    replay = Replay.from_folder(tmp_path, tiny)
    torch.testing.assert_close(replay.latents, tiny.encode(rollout.images), rtol=0.05, atol=0.05)
    torch.testing.assert_close(replay.rewards, rollout.returns)
    for key, value in replay.constants.items():
        torch.testing.assert_close(value[:], rollout.constants[key][:])
    assert len(replay) == 4
    before = [parameter.clone() for parameter in policy.parameters()]
    assert float(RWR(policy, env, n_epochs=1, learning_rate=1e-3, seed=0).fit(replay)["loss"]) > 0
    assert any(not torch.equal(*pair) for pair in zip(before, policy.parameters(), strict=True))
    with pytest.raises(FileNotFoundError, match=r"has no metadata\.jsonl"):
        Replay.from_folder(tmp_path / "elsewhere", tiny)
    with pytest.raises(TypeError, match=r"model must be a DiffusionModel, .* got 'emoji'"):
        Replay.from_folder(tmp_path, "emoji")


@pytest.mark.parametrize(
    "wrong",
    [
        '{"file_name": "0.png", "prompt": "a cat"}',
        '{"file_name": "0.png", "prompt": "a cat", "reward": "x"}',
        '{"file_name": "0.png", "prompt": "a cat", "reward": null}',
        '{"file_name": "0.png", "prompt": "a cat", "reward": NaN}',
        '{"file_name": "0.png", "prompt": "a cat", "reward": -Infinity}',
        '{"file_name": "0.png", "prompt": 3, "reward": 1.0}',
        '{"file_name": "0.png"',
        '["0.png", "a cat", 1.0]',
    ],
)
def test_a_wrong_line_of_a_folder_is_named(line, tmp_path, wrong):
    right = '{"file_name": "0.png", "prompt": "a cat", "reward": 1}'
    (tmp_path / "metadata.jsonl").write_text(f"{right}\n\n{wrong}\n")
    with pytest.raises(ValueError, match=rf"metadata\.jsonl, line 3: expected .*, got {re.escape(wrong)}"):
        Replay.from_folder(tmp_path, line)
    (tmp_path / "metadata.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"metadata\.jsonl is empty"):
        Replay.from_folder(tmp_path, line)
