"""Small models of real classes with random weights, in diffusers' folder layout."""

import json
import shutil
import string
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from tokenizers import Tokenizer, models, processors
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

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


def make_tiny_consistency_model(folder: Path, *, num_classes: int | None = None, **scheduler_config) -> Path:
    """Write a ConsistencyModelPipeline folder: 8×8 pixels, a UNet of 0.1 M parameters, with classes or without."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=["DownBlock2D", "AttnDownBlock2D"],
            up_block_types=["AttnUpBlock2D", "UpBlock2D"],
            norm_num_groups=8,
            num_class_embeds=num_classes,
        )
    scheduler = CMStochasticIterativeScheduler(**scheduler_config)
    ConsistencyModelPipeline(unet, scheduler).save_pretrained(folder)
    return folder


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


def make_tiny_stable_diffusion_3(folder: Path, *, with_t5: bool = True, **scheduler_config) -> Path:
    """Write a StableDiffusion3Pipeline folder: 8×8 latents in patches of 2×2, the emoji tokenizer, T5 or none.

    With T5 it is as 3.5: normalised queries and a second attention; without, the package's key says 0 tokens of it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    index = {"_class_name": "StableDiffusion3Pipeline", "text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    for number, name in enumerate(("text_encoder", "text_encoder_2")):
        index |= _write_clip_text(folder, name, CLIPTextModelWithProjection, seed=number, projection_dim=24)
    if with_t5:
        index |= _write_t5(folder, "text_encoder_3", width=80)
    else:
        index["_max_sequence_length"] = 0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        SD3Transformer2DModel(
            sample_size=8,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=80,
            caption_projection_dim=32,
            pooled_projection_dim=48,
            pos_embed_max_size=8,
            dual_attention_layers=(0,) if with_t5 else (),
            qk_norm="rms_norm" if with_t5 else None,
        ).save_pretrained(folder / "transformer")
    index |= {"transformer": ["diffusers", "SD3Transformer2DModel"]}
    return _write_flow(folder, index, {"shift": 3.0, **scheduler_config})


def make_tiny_flux(folder: Path, *, is_schnell: bool = False) -> Path:
    """Write a FluxPipeline folder as of [dev] or [schnell]: one block of each kind, 16 channels packed to 64."""
    folder.mkdir(parents=True, exist_ok=True)
    index = {"_class_name": "FluxPipeline", **_write_clip_text(folder, "text_encoder", CLIPTextModel, seed=0)}
    index |= _write_t5(folder, "text_encoder_2", width=48)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        FluxTransformer2DModel(
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=48,
            pooled_projection_dim=32,
            guidance_embeds=not is_schnell,
            axes_dims_rope=(4, 6, 6),
        ).save_pretrained(folder / "transformer")
    index |= {"transformer": ["diffusers", "FluxTransformer2DModel"]}
    return _write_flow(folder, index, {"shift": 1.0} if is_schnell else {"shift": 3.0, "use_dynamic_shifting": True})


def _write_flow(folder: Path, index: dict, scheduler: dict) -> Path:
    """Write what the flows have in common: an autoencoder of 16 channels, the scheduler, and the index."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            norm_num_groups=4,
            sample_size=16,
            latent_channels=16,
            scaling_factor=1.5,
            shift_factor=0.06,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ).save_pretrained(folder / "vae")
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", **scheduler}
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    index |= {"scheduler": ["diffusers", config["_class_name"]], "vae": ["diffusers", "AutoencoderKL"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _write_clip_text(folder: Path, name: str, network: type, *, seed: int, **config) -> dict:
    """Write a CLIP text encoder with the emoji tokenizer, and return their lines of the index."""
    tokenizer = name.replace("text_encoder", "tokenizer")
    shutil.copytree(EMOJI / "tokenizer", folder / tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text = CLIPTextConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=3037,
            bos_token_id=3035,
            eos_token_id=3036,
            pad_token_id=3036,
            max_position_embeddings=16,
            initializer_factor=10.0,
            **config,
        )
        network(text).save_pretrained(folder / name)
    return {name: ["transformers", network.__name__], tokenizer: ["transformers", "CLIPTokenizer"]}


def _write_t5(folder: Path, name: str, *, width: int) -> dict:
    """Write a T5 encoder with a tokenizer that knows single letters, and return their lines of the index."""
    tokenizer = name.replace("text_encoder", "tokenizer")
    marks = ["<pad>", "</s>", "<unk>"]
    letters = "▁" + string.ascii_letters + string.digits + string.punctuation
    vocabulary = Tokenizer(models.Unigram([*((mark, 0.0) for mark in marks), *((c, -3.0) for c in letters)], unk_id=2))
    vocabulary.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    vocabulary.add_special_tokens(marks)
    (folder / tokenizer).mkdir()
    vocabulary.save(str(folder / tokenizer / "tokenizer.json"))
    config = {
        "tokenizer_class": "T5Tokenizer",
        "model_max_length": 512,
        "extra_ids": 0,
        "additional_special_tokens": [],
        **dict(zip(("pad_token", "eos_token", "unk_token"), marks, strict=True)),
    }
    (folder / tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    with torch.random.fork_rng():
        torch.manual_seed(2)
        t5 = T5Config(
            vocab_size=100,
            d_model=width,
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
            tie_word_embeddings=False,
        )
        T5EncoderModel(t5).save_pretrained(folder / name)
    return {name: ["transformers", "T5EncoderModel"], tokenizer: ["transformers", "T5TokenizerFast"]}
