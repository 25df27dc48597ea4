"""Weights of the small networks by the names of the code that published the models: what single files hold."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_UNET = {
    r"^time_embedding\.linear_1": "time_embed.0",
    r"^time_embedding\.linear_2": "time_embed.2",
    r"^add_embedding\.linear_1": "label_emb.0.0",
    r"^add_embedding\.linear_2": "label_emb.0.2",
    r"^conv_in": "input_blocks.0.0",
    r"^conv_norm_out": "out.0",
    r"^conv_out": "out.2",
    r"^mid_block\.resnets\.0": "middle_block.0",
    r"^mid_block\.attentions\.0": "middle_block.1",
    r"^mid_block\.resnets\.1": "middle_block.2",
    # Two levels, of one layer each: a level has one entry more than layers, for what changes the size.
    r"^down_blocks\.0\.resnets\.0": "input_blocks.1.0",
    r"^down_blocks\.0\.downsamplers\.0\.conv": "input_blocks.2.0.op",
    r"^down_blocks\.1\.resnets\.0": "input_blocks.3.0",
    r"^down_blocks\.1\.attentions\.0": "input_blocks.3.1",
    r"^up_blocks\.0\.resnets\.([01])": r"output_blocks.\1.0",
    r"^up_blocks\.0\.attentions\.([01])": r"output_blocks.\1.1",
    r"^up_blocks\.0\.upsamplers\.0\.conv": "output_blocks.1.2.conv",
    r"^up_blocks\.1\.resnets\.0": "output_blocks.2.0",
    r"^up_blocks\.1\.resnets\.1": "output_blocks.3.0",
}
_VAE = {
    r"conv_norm_out": "norm_out",
    r"conv_shortcut": "nin_shortcut",
    r"mid_block\.resnets\.0": "mid.block_1",
    r"mid_block\.resnets\.1": "mid.block_2",
    r"mid_block\.attentions\.0\.group_norm": "mid.attn_1.norm",
    r"mid_block\.attentions\.0\.to_([qkv])": r"mid.attn_1.\1",
    r"mid_block\.attentions\.0\.to_out\.0": "mid.attn_1.proj_out",
    r"down_blocks\.(\d)\.resnets": r"down.\1.block",
    r"down_blocks\.(\d)\.downsamplers\.0": r"down.\1.downsample",
    r"up_blocks\.0\.resnets": "up.1.block",
    r"up_blocks\.1\.resnets": "up.0.block",
    r"up_blocks\.0\.upsamplers\.0": "up.1.upsample",
}
_MMDIT = {
    r"^pos_embed\.pos_embed": "pos_embed",
    r"^pos_embed\.proj": "x_embedder.proj",
    r"^time_text_embed\.timestep_embedder\.linear_1": "t_embedder.mlp.0",
    r"^time_text_embed\.timestep_embedder\.linear_2": "t_embedder.mlp.2",
    r"^time_text_embed\.text_embedder\.linear_1": "y_embedder.mlp.0",
    r"^time_text_embed\.text_embedder\.linear_2": "y_embedder.mlp.2",
    r"^proj_out": "final_layer.linear",
    r"^norm_out\.linear": "final_layer.adaLN_modulation.1",
    r"^transformer_blocks": "joint_blocks",
    r"attn\.to_add_out": "context_block.attn.proj",
    r"(attn2?)\.to_out\.0": r"x_block.\1.proj",
    r"(attn2?)\.norm_([qk])": r"x_block.\1.ln_\2",
    r"attn\.norm_added_([qk])": r"context_block.attn.ln_\1",
    r"norm1\.linear": "x_block.adaLN_modulation.1",
    r"norm1_context\.linear": "context_block.adaLN_modulation.1",
    r"ff_context\.net\.0\.proj": "context_block.mlp.fc1",
    r"ff_context\.net\.2": "context_block.mlp.fc2",
    r"ff\.net\.0\.proj": "x_block.mlp.fc1",
    r"ff\.net\.2": "x_block.mlp.fc2",
}


def _renamed(weights: Mapping[str, Tensor], names: Mapping[str, str], prefix: str) -> dict[str, Tensor]:
    renamed = {}
    for name, value in weights.items():
        for pattern, original in names.items():
            name = re.sub(pattern, original, name)
        renamed[prefix + name] = value.clone()
    return renamed


def of_unet(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a small UNet's weights by the names of Stable Diffusion 1, 2 and XL."""
    resnets = {
        name: ".".join(_RESNET.get(part, part) for part in name.split(".")) if ".resnets." in name else name
        for name in weights
    }
    return _renamed({resnets[name]: value for name, value in weights.items()}, _UNET, "model.diffusion_model.")


def of_vae(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a small autoencoder's weights by their original names: attention is a convolution of 1×1."""
    return {
        name: value[:, :, None, None] if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name) else value
        for name, value in _renamed(weights, _VAE, "first_stage_model.").items()
    }


def of_clip(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return a CLIP's weights, whose names have no "text_model.", as older transformers named them."""
    starts = {name: prefix if name.startswith("text_projection") else f"{prefix}text_model." for name in weights}
    return {f"{starts[name]}{name}": value for name, value in weights.items()}


def of_mmdit(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a Stable Diffusion 3 transformer's weights by their original names: queries, keys and values are one."""
    weights = dict(weights)
    last = max(int(name.split(".")[1]) for name in weights if name.startswith("transformer_blocks."))
    joined = {}
    for name in [name for name in weights if re.search(r"attn2?\.(to_q|add_q_proj)\.", name)]:
        parts = [weights.pop(re.sub(r"(to_|add_)q", rf"\g<1>{part}", name)) for part in "qkv"]
        block = "context_block" if "add_q" in name else "x_block"
        layer, attention, _, kind = re.match(r"(.*)\.(attn2?)\.(to_q|add_q_proj)\.(\w+)", name).groups()
        joined[f"{layer}.{block}.{attention}.qkv.{kind}"] = torch.cat(parts)
    for name in weights:  # the original has the shift before the scale
        if name.startswith(("norm_out.linear", f"transformer_blocks.{last}.norm1_context.linear")):
            weights[name] = torch.cat(weights[name].chunk(2)[::-1])
    return _renamed(weights | joined, _MMDIT, "model.diffusion_model.")
