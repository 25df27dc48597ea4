"""What rewards by networks share: loading late, chunks, devices and honest errors."""

import pickle
import shutil

import pytest
import torch
from torch import nn

from diffusion_gym.rewards import RewardOutput, make_reward
from diffusion_gym.rewards.clip import ClipScore
from diffusion_gym.rewards.model_based import ModelReward, fill, pretrained, read_weights
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


def test_an_empty_chunk_is_an_error():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
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
def test_every_pretrained_reward_is_made_by_name_and_says_what_it_needs(name, what, keyword):
    reward = make_reward(name)
    assert reward.name == name
    assert len(reward.range) == 2
    with pytest.raises(ValueError, match=f"{what} could not be loaded from .*`hf download .*`.* {keyword}=\\.\\.\\."):
        reward(torch.rand(1, 3, 64, 64), ["a fox"])


def test_all_is_loaded_before_the_first_image_when_it_is_asked_for(tmp_path):
    clip = make_tiny_clip(tmp_path / "clip")
    reward = ClipScore(clip=clip, device="cpu")
    reward.load_all()
    shutil.rmtree(clip)
    assert reward(torch.rand(1, 3, 32, 32), ["a fox"]).values.shape == (1,)
    with pytest.raises(ValueError, match=r"to load clip_score before it sees an image, say .*: device=\.\.\."):
        ClipScore(clip=clip).load_all()


def test_there_must_be_a_prompt_per_image():
    with pytest.raises(ValueError, match="there must be a prompt per image, got 4 images and 1 prompts"):
        Recorder()(torch.rand(4, 3, 4, 4), ["a"])


def test_an_error_without_text_is_named():
    def away(source):
        raise TimeoutError

    with pytest.raises(ValueError, match=r"the Hugging Face Hub did not give it \(TimeoutError\)"):
        pretrained(away, "owner/name", what="it", keyword="weights")


def test_other_errors_are_not_dressed_up():
    def broken(source):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        pretrained(broken, "x", what="it", keyword="weights")


def test_a_tensor_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"file\.pt is not .* 'weight' has the shape \(2, 3\), expected \(1, 3\)"):
        fill(nn.Linear(3, 1, bias=False), {"weight": torch.zeros(2, 3)}, "file.pt")
