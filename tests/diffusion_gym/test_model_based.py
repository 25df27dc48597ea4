"""What rewards by networks share: loading late, chunks, devices and honest errors."""

import json
import pickle
import shutil
import socket
import time

import gymnasium as gym
import pytest
import torch
import transformers
from huggingface_hub import constants
from torch import nn

from diffusion_gym.loading import hub_answers
from diffusion_gym.rewards import RewardOutput, make_reward
from diffusion_gym.rewards.aesthetic import Aesthetic
from diffusion_gym.rewards.affine_head import AffineHead
from diffusion_gym.rewards.clip import ClipScore, embed_texts
from diffusion_gym.rewards.model_based import ModelReward, fill, pretrained, read_weights
from diffusion_gym.rewards.names import reward_class
from tests.tiny import make_tiny_clip


class Recorder(ModelReward):
    """Scores an image by its first pixel times a weight, and notes how it was called."""

    name = "recorder"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.loads = 0
        self.calls = []

    def load(self):
        self.loads += 1
        return nn.Linear(1, 1, bias=False)

    def score(self, images, prompts, metadata):
        self.calls.append((len(images), tuple(prompts), metadata))
        values = images[:, 0, 0, 0] * self.network.weight[0, 0].abs()
        return RewardOutput(values, {"length": torch.tensor([float(len(prompt)) for prompt in prompts])})


def test_the_network_is_loaded_once_and_when_it_is_first_asked():
    reward = Recorder()
    assert reward.loads == 0
    for _ in range(2):
        reward(torch.rand(2, 3, 4, 4), ["a", "b"])
    assert reward.loads == 1
    assert not any(parameter.requires_grad for parameter in reward.network.parameters())
    assert not reward.network.training


def test_chunks_keep_images_prompts_and_metadata_together():
    images = torch.arange(5.0)[:, None, None, None].expand(5, 3, 2, 2) / 5
    prompts, metadata = ["a", "bb", "ccc", "dddd", "eeeee"], [{"i": i} for i in range(5)]
    whole, chunks = Recorder(), Recorder(batch_size=2)
    chunks.network.load_state_dict(whole.network.state_dict())
    torch.testing.assert_close(chunks(images, prompts, metadata).values, whole(images, prompts, metadata).values)
    assert chunks.calls == [
        (2, ("a", "bb"), [{"i": 0}, {"i": 1}]),
        (2, ("ccc", "dddd"), [{"i": 2}, {"i": 3}]),
        (1, ("eeeee",), [{"i": 4}]),
    ]
    assert chunks(images, prompts).extras["length"].tolist() == [1, 2, 3, 4, 5]


def test_rewards_are_float32_on_the_images_device_without_gradients():
    reward = Recorder(dtype=torch.bfloat16, device="cpu")
    values = reward(torch.rand(2, 3, 4, 4, requires_grad=True), ["a", "b"]).values
    assert reward.network.weight.dtype == torch.bfloat16
    assert values.dtype == torch.float32
    assert not values.requires_grad


def test_a_device_that_is_not_there_is_named():
    for make in (lambda: Recorder(device="cuda:99"), lambda: make_reward("clip_score", options={"device": "cuda:99"})):
        with pytest.raises(ValueError, match=r"there is no device 'cuda:99': \d+ CUDA devices are here"):
            make()


def test_an_empty_chunk_is_an_error():
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got 0"):
        Recorder(batch_size=0)


def test_weights_of_every_format_are_read(tmp_path):
    weights = {"weight": torch.ones(2), "bias": torch.zeros(1)}
    torch.save(weights, tmp_path / "plain.pt")
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "nested.pth")
    for name in ("plain.pt", "nested.pth"):
        read = read_weights(tmp_path / name, what="it", keyword="weights")
        assert {key: tensor.tolist() for key, tensor in read.items()} == {"weight": [1, 1], "bias": [0]}


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def test_a_checkpoint_with_code_is_refused(tmp_path):
    torch.save({"weight": torch.ones(1), "code": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        read_weights(tmp_path / "evil.pt", what="it", keyword="weights")


@pytest.mark.parametrize("source", ["nowhere/at/all.pt", "nowhere.pt", "/nowhere/at/all.pt"])
def test_a_file_that_cannot_be_had_says_how_to_name_a_local_one(source):
    with pytest.raises(ValueError, match=f"the head could not be loaded from '{source}'.* local copy: head=") as caught:
        read_weights(source, what="the head", keyword="head")
    if source == "nowhere/at/all.pt":
        assert "`hf download nowhere/at all.pt`" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "what", "keyword"),
    [
        ("aesthetic", "the head of LAION's aesthetic predictor", "head"),
        ("clip_score", "the CLIP of clip_score", "clip"),
        ("pick_score", "the CLIP of pick_score", "clip"),
        ("hps_v2", "the checkpoint of HPSv2", "weights"),
        ("image_reward", "ImageReward's checkpoint", "weights"),
    ],
)
def test_every_pretrained_reward_says_what_it_needs_when_it_is_made(name, what, keyword):
    reward = reward_class(name)()
    assert reward.name == name
    assert len(reward.range) == 2
    message = f"{what} could not be loaded from .*HF_HUB_OFFLINE.*`hf download .*`.* {keyword}=\\.\\.\\."
    with pytest.raises(ValueError, match=message):
        reward(torch.rand(1, 3, 64, 64), ["a fox"])
    for make in (make_reward, lambda name: gym.make_vec("DenoisingMDP-v0", num_envs=1, model="mixture", reward=name)):
        with pytest.raises(ValueError, match=message):
            make(name)


def test_all_is_loaded_before_the_first_image_when_it_is_asked_for(tmp_path):
    clip = make_tiny_clip(tmp_path / "clip")
    reward = ClipScore(clip=clip, device="cpu")
    reward.load_all()
    shutil.rmtree(clip)
    assert reward(torch.rand(1, 3, 32, 32), ["a fox"]).values.shape == (1,)
    with pytest.raises(ValueError, match=r"to load clip_score before it sees an image, say .*: device=\.\.\."):
        ClipScore(clip=clip).load_all()


def test_a_reward_is_made_ready_without_reading_its_weights(tmp_path):
    clip = make_tiny_clip(tmp_path / "clip")
    reward = make_reward("clip_score", options={"clip": clip})
    assert "network" not in vars(reward)
    assert {"_tokenizer", "_prepare"} <= vars(reward).keys()
    (clip / "model.safetensors").rename(clip / "pytorch_model.bin")
    make_reward("clip_score", options={"clip": clip})
    (clip / "pytorch_model.bin").rename(clip / "part-1")
    with pytest.raises(
        ValueError, match=r"the CLIP of clip_score could not be loaded from .* has none of model.safetensors"
    ):
        make_reward("clip_score", options={"clip": clip})
    index = clip / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "part-1", "b": "part-2"}}))
    with pytest.raises(ValueError, match=r"has no part-2, which its model\.safetensors\.index\.json names"):
        make_reward("clip_score", options={"clip": clip})
    (clip / "part-2").touch()
    make_reward("clip_score", options={"clip": clip})


def in_the_hubs_cache(folder, cache, repo):
    """Put a folder into a cache as the Hub's library does."""
    snapshot = cache / f"models--{repo.replace('/', '--')}" / "snapshots" / "abc"
    shutil.copytree(folder, snapshot)
    (refs := snapshot.parents[1] / "refs").mkdir()
    (refs / "main").write_text("abc")


@pytest.fixture
def without_network(monkeypatch):
    """The Hub is to be asked, and there is no such host."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://no-such-host.invalid")
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_without_a_network_the_hub_is_not_tried_again_and_again(without_network):
    began = time.monotonic()
    with pytest.raises(
        ValueError, match=r"the CLIP of clip_score could not be loaded from 'owner/clip'.*does not answer"
    ):
        make_reward("clip_score", options={"clip": "owner/clip"})
    assert time.monotonic() - began < 10


def test_without_a_network_the_cache_is_enough(without_network, tmp_path, monkeypatch):
    clip, cache = make_tiny_clip(tmp_path / "clip"), tmp_path / "cache"
    in_the_hubs_cache(clip, cache, "owner/clip")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(transformers.utils.hub, "TRANSFORMERS_CACHE", str(cache), raising=False)  # before version 5
    began = time.monotonic()
    reward = make_reward("clip_score", options={"clip": "owner/clip"})
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(reward(images, ["a", "b"]).values, ClipScore(clip=clip)(images, ["a", "b"]).values)
    assert time.monotonic() - began < 20


def test_behind_a_proxy_the_hub_is_asked(without_network, monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert not hub_answers()
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    assert hub_answers()
    with socket.create_server(("127.0.0.1", 0)) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{hub.getsockname()[1]}")
        assert hub_answers()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert not hub_answers()


def test_a_prompt_is_read_once_and_the_batch_does_not_change_it(tmp_path, monkeypatch):
    clip = make_tiny_clip(tmp_path / "clip")
    read = []
    monkeypatch.setattr("diffusion_gym.rewards.clip._CACHED_PROMPTS", 3)
    embed = embed_texts
    monkeypatch.setattr("diffusion_gym.rewards.clip.embed_texts", lambda *given: read.extend(given[2]) or embed(*given))
    reward, images = ClipScore(clip=clip), torch.rand(4, 3, 32, 32)
    values = reward(images, ["a fox", "a long prompt of a bear", "a fox", "b"]).values
    assert torch.equal(reward(images[:1], ["a fox"]).values, ClipScore(clip=clip)(images[:1], ["a fox"]).values)
    assert torch.equal(reward(images, ["a fox", "a long prompt of a bear", "a fox", "b"]).values, values)
    assert sorted(read) == ["a fox", "a fox", "a long prompt of a bear", "b"]
    reward(images[:2], ["c", "a fox"])
    assert len(reward._embeddings) == 3


def test_weights_that_are_first_read_in_inference_mode_can_be_used_outside(tmp_path):
    reward = make_reward("emoji_alignment")
    images = torch.rand(1, 3, 64, 64)
    clip = ClipScore(clip=make_tiny_clip(tmp_path / "clip"))
    with torch.inference_mode():
        reward(images, ["a fox"])
        clip(images, ["a fox"])
    reward(images.requires_grad_(), ["a fox"]).values.sum().backward()
    assert images.grad.isfinite().all()
    assert not any(parameter.is_inference() for parameter in clip.network.parameters())


@pytest.mark.parametrize("name", ["clip", "head"])
def test_networks_are_float32_whatever_torchs_default_is(name, tmp_path):
    clip = make_tiny_clip(tmp_path / "clip")
    torch.save(AffineHead(24).state_dict(), tmp_path / "head.pth")

    def make():
        return Aesthetic(clip=clip, head=tmp_path / "head.pth") if name == "head" else ClipScore(clip=clip)

    images = torch.rand(2, 3, 32, 32)
    expected = make()(images, ["a", "b"]).values
    torch.set_default_dtype(torch.float64)
    try:
        values = make()(images, ["a", "b"]).values
    finally:
        torch.set_default_dtype(torch.float32)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, expected)


def test_there_must_be_a_prompt_per_image():
    with pytest.raises(ValueError, match="there must be a prompt per image, got 4 images and 1 prompts"):
        Recorder()(torch.rand(4, 3, 4, 4), ["a"])


def test_an_error_without_text_is_named():
    def away(source, **_):
        raise TimeoutError

    with pytest.raises(ValueError, match=r"the Hugging Face Hub did not give it \(TimeoutError; it does not answer"):
        pretrained(away, "owner/name", what="it", keyword="weights")


def test_other_errors_are_not_dressed_up():
    def broken(source, **_):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        pretrained(broken, "x", what="it", keyword="weights")


def test_a_tensor_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"file\.pt is not .* 'weight' has the shape \(2, 3\), expected \(1, 3\)"):
        fill(nn.Linear(3, 1, bias=False), {"weight": torch.zeros(2, 3)}, "file.pt")
