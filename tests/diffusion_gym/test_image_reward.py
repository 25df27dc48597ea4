"""ImageReward against the package image-reward: see tools/image_reward_parity.py."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffusion_gym.rewards.image_reward import ImageReward, from_published, text_config, vision_config
from tools.image_reward_parity import IMAGES, PROMPTS, WORDS, picture, weight

FIXTURE = json.loads((Path(__file__).parent / "image_reward_parity.json").read_text())


def published_weights():
    """Return the tensors of the package's network, with its names."""
    shapes = {name: tuple(shape) for name, shape in FIXTURE["shapes"].items()}
    return {
        name: torch.arange(shape[1])[None] if name.endswith("position_ids") else weight(name, shape)
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image_reward")
    torch.save(published_weights(), folder / "ImageReward.pt")
    (folder / "bert").mkdir()
    (folder / "bert" / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


@pytest.fixture(scope="module")
def reward(folder):
    reward = ImageReward(weights=folder / "ImageReward.pt", tokenizer=folder / "bert", device="cpu")
    reward.load_all()
    assert {"network", "_tokenizer"} <= vars(reward).keys()
    return reward


def image(index):
    return torch.from_numpy(picture(index)).permute(2, 0, 1)[None] / 255


def test_images_and_prompts_get_the_scores_of_the_package(reward):
    values = [reward(image(i), [PROMPTS[i]]).values.item() for i in range(len(IMAGES))]
    assert values == pytest.approx(FIXTURE["scores"], abs=1e-5)


def test_the_published_sizes_are_read_from_the_tensors():
    shapes = {
        "visual_encoder.pos_embed": (1, 197, 1024),
        "visual_encoder.patch_embed.proj.weight": (1024, 3, 16, 16),
        **{f"visual_encoder.blocks.{i}.mlp.fc1.weight": (4096, 1024) for i in range(24)},
        "text_encoder.embeddings.word_embeddings.weight": (30524, 768),
        "text_encoder.embeddings.position_embeddings.weight": (512, 768),
        **{f"text_encoder.encoder.layer.{i}.crossattention.self.key.weight": (768, 1024) for i in range(12)},
        "text_encoder.encoder.layer.0.intermediate.dense.weight": (3072, 768),
    }
    weights = from_published({f"blip.{name}": torch.empty(shape, device="meta") for name, shape in shapes.items()})
    vision, text = vision_config(weights), text_config(weights)
    assert (vision.image_size, vision.patch_size, vision.hidden_size, vision.intermediate_size) == (224, 16, 1024, 4096)
    assert (vision.num_hidden_layers, vision.num_attention_heads) == (24, 16)
    assert (text.vocab_size, text.hidden_size, text.encoder_hidden_size, text.intermediate_size) == (
        30524,
        768,
        1024,
        3072,
    )
    assert (text.num_hidden_layers, text.num_attention_heads, text.max_position_embeddings) == (12, 12, 512)


def test_prompts_of_a_batch_do_not_mix(reward):
    images = image(0).expand(4, -1, -1, -1)
    together = reward(images, PROMPTS).values
    alone = torch.cat([reward(images[:1], [prompt]).values for prompt in PROMPTS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert together.std() > 0.1


def test_words_after_the_35th_token_are_not_read(reward):
    long = "a " * 33
    a, b, c = reward(image(0).expand(3, -1, -1, -1), [long + "fox", long + "cat", "fox " + long]).values
    assert a == b
    assert a != c


def test_safetensors_give_the_same(folder, reward, tmp_path):
    save_file(published_weights(), tmp_path / "weights.safetensors")
    other = ImageReward(weights=tmp_path / "weights.safetensors", tokenizer=folder / "bert")
    assert torch.equal(other(image(0), ["a fox"]).values, reward(image(0), ["a fox"]).values)


def test_half_precision_comes_near(folder, reward):
    half = ImageReward(weights=folder / "ImageReward.pt", tokenizer=folder / "bert", dtype=torch.bfloat16)
    values = half(image(0), ["a fox"]).values
    assert values.dtype == torch.float32
    assert half.network.mlp.layers[0].weight.dtype == torch.float32
    assert values.item() == pytest.approx(reward(image(0), ["a fox"]).values.item(), abs=0.2)


def test_a_checkpoint_of_something_else_is_named(folder, tmp_path):
    weights = published_weights()
    del weights["blip.text_encoder.encoder.layer.1.output.dense.weight"]
    torch.save(weights, tmp_path / "part.pt")
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(
        ValueError, match=r"part\.pt is not a checkpoint .* 1 of the .* 'text\.encoder\.layer\.1\.output"
    ):
        ImageReward(weights=tmp_path / "part.pt", tokenizer=folder / "bert")(image(0), ["a fox"])
    with pytest.raises(ValueError, match=r"other\.pt is not a checkpoint of ImageReward"):
        ImageReward(weights=tmp_path / "other.pt", tokenizer=folder / "bert")(image(0), ["a fox"])
