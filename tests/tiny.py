"""Small models of real classes with random weights, in diffusers' folder layout."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModelWithProjection

EMOJI = Path(__file__).parents[1] / "diffusion_gym" / "models" / "emoji"

_SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_SMALL_TEXT = {**_SMALL, "vocab_size": 3037, "bos_token_id": 3035, "eos_token_id": 3036, "pad_token_id": 3036}


def make_tiny_stable_diffusion(folder: Path, **scheduler_config) -> Path:
    """Write a StableDiffusionPipeline folder: 8×8 latents, a UNet of 0.2 M parameters, the emoji text encoder."""
    return _write_unet_pipeline(folder, "StableDiffusionPipeline", unet={}, scheduler=scheduler_config)


def make_tiny_stable_diffusion_xl(folder: Path, **scheduler_config) -> Path:
    """Write a StableDiffusionXLPipeline folder: as the tiny Stable Diffusion's, with a second, random text encoder."""
    unet = {
        "cross_attention_dim": 128 + 32,
        "attention_head_dim": [2, 4],
        "transformer_layers_per_block": [1, 2],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 24,
    }
    scheduler = {
        "_class_name": "EulerDiscreteScheduler",
        "interpolation_type": "linear",
        "timestep_spacing": "leading",
        "steps_offset": 1,
        **scheduler_config,
    }
    _write_unet_pipeline(folder, "StableDiffusionXLPipeline", unet=unet, scheduler=scheduler)
    shutil.copytree(folder / "tokenizer", folder / "tokenizer_2")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        text = CLIPTextConfig(**_SMALL_TEXT, hidden_act="gelu", max_position_embeddings=16, projection_dim=24)
        CLIPTextModelWithProjection(text).save_pretrained(folder / "text_encoder_2")
    index = json.loads((folder / "model_index.json").read_text())
    for unused in ("requires_safety_checker", "safety_checker"):
        del index[unused]
    index["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
    index["tokenizer_2"] = index["tokenizer"]
    index["force_zeros_for_empty_prompt"] = True
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def make_tiny_latent_consistency(folder: Path, **scheduler_config) -> Path:
    """Write a LatentConsistencyModelPipeline folder: as the tiny Stable Diffusion's, with a guidance embedding."""
    scheduler = {"_class_name": "LCMScheduler", "original_inference_steps": 50, **scheduler_config}
    unet = {"time_cond_proj_dim": 16}
    return _write_unet_pipeline(folder, "LatentConsistencyModelPipeline", unet=unet, scheduler=scheduler)


def _write_unet_pipeline(folder: Path, pipeline: str, *, unet: dict, scheduler: dict) -> Path:
    for part in ("model_index.json", "text_encoder", "tokenizer"):
        source = EMOJI / part
        if source.is_dir():
            shutil.copytree(source, folder / part)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, folder / part)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "cross_attention_dim": 128,
            "attention_head_dim": 4,
            "norm_num_groups": 8,
        }
        UNet2DConditionModel(**{**sizes, **unet}).save_pretrained(folder / "unet")
        AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            norm_num_groups=4,
            sample_size=16,
        ).save_pretrained(folder / "vae")
    (folder / "scheduler").mkdir()
    config = {
        "_class_name": "DDIMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        **scheduler,
    }
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = pipeline
    index["scheduler"] = ["diffusers", config["_class_name"]]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def make_tiny_clip(folder: Path, *, image_size: int = 32) -> Path:
    """Write a folder of the layout of openai/clip-vit-large-patch14: CLIP with 2 + 2 layers, the emoji tokenizer."""
    text = {**_SMALL_TEXT, "max_position_embeddings": 16, "hidden_act": "gelu"}
    vision = {**_SMALL, "hidden_size": 48, "image_size": image_size, "patch_size": 8, "hidden_act": "gelu"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
        for name, parameter in clip.named_parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
            elif name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
        clip.save_pretrained(folder)
    shutil.copytree(EMOJI / "tokenizer", folder, dirs_exist_ok=True)
    config = {
        "size": {"shortest_edge": image_size},
        "crop_size": {"height": image_size, "width": image_size},
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return folder
