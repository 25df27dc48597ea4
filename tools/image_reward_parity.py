"""Score images with the package image-reward itself, on a small network with weights that anyone can make again.

Its numbers are the fixture of `tests/diffusion_gym/test_image_reward.py`. The package needs libraries of 2023, so run
it in an environment of its own, on Python 3.11 or older:

    python -m venv old && old/bin/pip install torch pillow numpy transformers==4.30.2
    old/bin/pip install --no-deps image-reward==1.5
    old/bin/python tools/image_reward_parity.py tests/diffusion_gym/image_reward_parity.json

timm, fairscale and torchvision are stood in for; the stand-in for torchvision resizes with Pillow, as torchvision does
with Pillow's images. The network has the published one's classes and is smaller.
"""

import importlib
import json
import sys
import tempfile
import types
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import nn

SIZES = {"image": 32, "patch": 8, "vision": 192, "layers": 2, "text": 128, "positions": 40}
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "fox",
    "cat",
    "red",
    "wash",
    "##ing",
    "dishes",
    "the",
    "##s",
    ",",
]
PROMPTS = ["a red fox", "The cat, washing the dishes", "a zebra", "cats, " * 30]
IMAGES = [(32, 32), (64, 64), (48, 40), (20, 28)]


def uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return numbers in [0, 1) that depend on the name and the place only: MurmurHash3's finaliser of both."""
    x = np.arange(int(np.prod(shape)), dtype=np.uint64) + (np.uint64(zlib.crc32(name.encode())) << np.uint64(32))
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        x ^= x >> np.uint64(33)
        x *= np.uint64(factor)
    x ^= x >> np.uint64(33)
    return ((x >> np.uint64(11)) / 2**53).reshape(shape)


def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a parameter: around 1 for the scale of a normalisation, around 0 otherwise."""
    values = 0.4 * uniform(name, shape) - 0.2
    return torch.from_numpy(values + ("norm" in name.lower() and name.endswith("weight"))).float()


def picture(index: int) -> np.ndarray:
    """Return bytes [H, W, 3]: noise, the hardest to resize."""
    return (uniform(f"image {index}", (*IMAGES[index], 3)) * 256).astype(np.uint8)


class PatchEmbed(nn.Module):
    """timm's, of 2022."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the patches, [B, L, E]."""
        return self.proj(images).flatten(2).transpose(1, 2)


def resize(side: int, interpolation: object = None):
    def apply(image: Image.Image) -> Image.Image:
        width, height = image.size
        short = min(width, height)
        return image.resize((int(side * width / short), int(side * height / short)), Image.Resampling.BICUBIC)

    return apply


def centre_crop(side: int):
    def apply(image: Image.Image) -> Image.Image:
        left, top = round((image.width - side) / 2), round((image.height - side) / 2)
        return image.crop((left, top, left + side, top + side))

    return apply


def compose(steps):
    def apply(value):
        for step in steps:
            value = step(value)
        return value

    return apply


def normalize(mean, std):
    return lambda images: (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def to_tensor():
    return lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255)


def stand_ins() -> dict[str, types.ModuleType]:
    """Return modules for what the package imports: what scoring needs is written above, the rest is never called."""
    needed = {
        "torchvision.transforms": {
            "Resize": resize,
            "CenterCrop": centre_crop,
            "Compose": compose,
            "Normalize": normalize,
            "ToTensor": to_tensor,
            "InterpolationMode": mock.Mock(),
        },
        "timm.models.vision_transformer": {"_cfg": None, "PatchEmbed": PatchEmbed},
        "timm.models.registry": {"register_model": None},
        "timm.models.layers": {"trunc_normal_": nn.init.trunc_normal_, "DropPath": lambda rate: nn.Identity()},
        "timm.models.helpers": {"named_apply": None, "adapt_input_conv": None},
        "timm.models.hub": {"download_cached_file": None},
        "fairscale.nn.checkpoint.checkpoint_activations": {"checkpoint_wrapper": None},
    }
    modules = {}
    for name, contents in needed.items():
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            modules.setdefault(".".join(parts[:depth]), types.ModuleType(".".join(parts[:depth])))
        vars(modules[name]).update(contents)
    return modules


def package_modules() -> tuple[types.ModuleType, types.ModuleType, types.ModuleType]:
    """Return the package's `ImageReward`, `blip_pretrain` and `vit`, without its `__init__`, which imports more."""
    root = next(
        Path(folder) / "ImageReward" for folder in sys.path if (Path(folder) / "ImageReward" / "ReFL.py").is_file()
    )
    for name, folder in {"ImageReward": root, "ImageReward.models": root / "models"}.items():
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(folder)]
    names = ("ImageReward.ImageReward", "ImageReward.models.BLIP.blip_pretrain", "ImageReward.models.BLIP.vit")
    return tuple(importlib.import_module(name) for name in names)


def make_reward(folder: Path) -> nn.Module:
    """Return the package's own `ImageReward`, small, with the weights of `weight`."""
    from transformers import BertTokenizer

    scoring, blip, vit = package_modules()
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    config = {
        "add_cross_attention": True,
        "attention_probs_dropout_prob": 0.1,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": SIZES["text"],
        "intermediate_size": 2 * SIZES["text"],
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": SIZES["positions"],
        "num_attention_heads": SIZES["text"] // 64,
        "num_hidden_layers": SIZES["layers"],
        "pad_token_id": 0,
        "vocab_size": len(WORDS),
    }
    (folder / "med_config.json").write_text(json.dumps(config))
    encoder = vit.VisionTransformer(
        img_size=SIZES["image"],
        patch_size=SIZES["patch"],
        embed_dim=SIZES["vision"],
        depth=SIZES["layers"],
        num_heads=SIZES["vision"] // 64,
        drop_path_rate=0.1,
    )
    with (
        mock.patch.object(blip, "create_vit", return_value=(encoder, SIZES["vision"])),
        mock.patch.object(blip, "init_tokenizer", return_value=BertTokenizer(str(folder / "vocab.txt"))),
        mock.patch.object(scoring, "MLP", return_value=scoring.MLP(SIZES["text"])),
    ):
        reward = scoring.ImageReward(med_config=str(folder / "med_config.json"))
    reward.preprocess = scoring._transform(SIZES["image"])
    parameters = {name: weight(name, tuple(tensor.shape)) for name, tensor in reward.named_parameters()}
    reward.load_state_dict(parameters, strict=False)
    return reward.eval()


def main() -> None:
    import transformers

    with mock.patch.dict(sys.modules, stand_ins()), tempfile.TemporaryDirectory() as folder, torch.no_grad():
        reward = make_reward(Path(folder))
        scores = [reward.score(prompt, Image.fromarray(picture(i))) for i, prompt in enumerate(PROMPTS)]
    fixture = {
        "made with": {"image-reward": "1.5", "transformers": transformers.__version__, "torch": torch.__version__},
        "shapes": {name: list(tensor.shape) for name, tensor in reward.state_dict().items()},
        "scores": scores,
    }
    Path(sys.argv[1]).write_text(json.dumps(fixture, indent=1) + "\n")
    print(scores)


if __name__ == "__main__":
    main()
