"""HPSv2 against a network with OpenCLIP's layout and names, written here."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import AutoTokenizer

from diffusion_gym.rewards.hps_v2 import HPSv2
from diffusion_gym.rewards.image_preparation import CLIP_MEAN, CLIP_STD
from tests.tiny import make_tiny_clip

PROMPTS = ["a fox", "a cat and a dog", "x"]


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        layers = [("c_fc", nn.Linear(width, 64)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(64, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x, mask):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.resblocks = nn.ModuleList([Block(width) for _ in range(2)])

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 48, 8, 8, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(48))
        self.positional_embedding = nn.Parameter(torch.randn(17, 48))
        self.ln_pre = nn.LayerNorm(48)
        self.transformer = Transformer(48)
        self.ln_post = nn.LayerNorm(48)
        self.proj = nn.Parameter(torch.randn(48, 24))

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual = Visual()
        self.transformer = Transformer(32)
        self.token_embedding = nn.Embedding(3037, 32)
        self.positional_embedding = nn.Parameter(torch.randn(16, 32))
        self.ln_final = nn.LayerNorm(32)
        self.text_projection = nn.Parameter(torch.randn(32, 24))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))

    def score(self, images, ids):
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        causal = torch.full((ids.shape[1],) * 2, -float("inf")).triu(1)
        x = self.ln_final(self.transformer(x, causal))[torch.arange(len(ids)), ids.argmax(-1)] @ self.text_projection
        return (F.normalize(self.visual(images), dim=-1) * F.normalize(x, dim=-1)).sum(-1)


@pytest.fixture(scope="module")
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = OpenClip().eval().requires_grad_(False)
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return network


@pytest.fixture(scope="module")
def folder(tmp_path_factory, network):
    folder = make_tiny_clip(tmp_path_factory.mktemp("hps"))
    (folder / "model.safetensors").unlink()
    torch.save({"state_dict": network.state_dict()}, folder / "HPS.pt")
    return folder


def pictures(height, width):
    return torch.randint(0, 256, (3, 3, height, width), generator=torch.Generator().manual_seed(0)) / 255


def normalised(images):
    return (images - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


def test_the_score_is_that_of_the_checkpoint_in_open_clips_layout(network, folder):
    ids = AutoTokenizer.from_pretrained(folder)(PROMPTS, padding=True, return_tensors="pt").input_ids
    images = pictures(32, 32)
    reward = HPSv2(weights=folder / "HPS.pt", clip=folder)
    values = reward(images, PROMPTS).values
    torch.testing.assert_close(values, network.score(normalised(images), ids), atol=1e-5, rtol=0)
    assert values.std() > 0.01
    assert (reward.name, reward.unit, reward.range) == ("hps_v2", "1", (-1.0, 1.0))


@pytest.mark.parametrize(("height", "width", "inside"), [(64, 40, (32, 20)), (20, 40, (16, 32)), (45, 32, (32, 23))])
def test_the_whole_image_is_seen_on_a_black_square(folder, height, width, inside):
    images = pictures(height, width)
    prepared = HPSv2(weights="not needed", clip=folder).prepare(images)
    expected = torch.zeros(3, 3, 32, 32)
    top, left = (32 - inside[0]) // 2, (32 - inside[1]) // 2
    for image, place in zip(images.flatten(0, 1), expected.flatten(0, 1), strict=True):
        small = Image.fromarray(image.numpy()).resize(inside[::-1], Image.Resampling.BICUBIC)
        place[top : top + inside[0], left : left + inside[1]] = torch.from_numpy(np.array(small))
    torch.testing.assert_close(prepared, normalised(expected), atol=1e-5, rtol=0)


def test_a_checkpoint_that_lacks_a_tensor_is_named(network, folder, tmp_path):
    weights = dict(network.state_dict())
    del weights["visual.transformer.resblocks.1.attn.in_proj_bias"]
    torch.save({"state_dict": weights}, tmp_path / "part.pt")
    with pytest.raises(
        ValueError, match=r"part\.pt is not a checkpoint .* 3 of the .*layers\.1\.self_attn\.[qkv]_proj\.bias"
    ):
        HPSv2(weights=tmp_path / "part.pt", clip=folder).load()
