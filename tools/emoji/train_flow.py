"""Train `emoji_flow`: Stable Diffusion 3's transformer, by flow matching, on `emoji`'s autoencoder and captions.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m tools.emoji.train_flow

on two cores; `python -m tools.emoji.train_flow` on one. Every `save_every` images it writes a checkpoint to go on from,
the pipeline with the averaged weights (`build/emoji/flow/pipeline`, a folder for `--init` or for `tools.emoji.export`)
and a sample grid. Killed and started again with the same command it goes on; without its checkpoint it goes on from the
pipeline's weights with `--init`.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention_processor import Attention
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffusion_gym.prompts import make_prompts

from .dataset import IconData
from .export import PACKAGE
from .samples import CHUNK, GUIDANCE_SCALE, lay_out
from .sources import WORK
from .tokenizer import CONTEXT
from .train_unet import draw_pairs, encode_pool
from .training import TrainingRun, autocast, join_processes, process_rank

logger = logging.getLogger(__name__)

# No shift: Stable Diffusion 3's 3.0 is for 128×128 latents, which it takes more noise to spoil than these 16×16.
SCHEDULER = {"num_train_timesteps": 1000, "shift": 1.0}
# The pipeline appends rows of zeros for the T5 that is not there, `max_sequence_length` of them: 256 unless told
# otherwise. All counts that it allows are trained on, small ones as often as large ones, for they draw faster.
MOST_ZEROS = 512


class JointAttention:
    """Stable Diffusion 3's attention over picture and text, in which a token can stand for several equal ones.

    `attention_mask`, [B, 1, 1, L], is added to the scores: the logarithm of how many tokens a token stands for.
    In bfloat16 on a CPU the plain product trains faster than the fused attention.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return what the picture's tokens and the text's attend to, as `JointAttnProcessor2_0` does."""

        def by_head(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        query = by_head(attn.to_q(hidden_states)), by_head(attn.add_q_proj(encoder_hidden_states))
        key = by_head(attn.to_k(hidden_states)), by_head(attn.add_k_proj(encoder_hidden_states))
        value = by_head(attn.to_v(hidden_states)), by_head(attn.add_v_proj(encoder_hidden_states))
        query = torch.cat([attn.norm_q(query[0]), attn.norm_added_q(query[1])], dim=2)
        key = torch.cat([attn.norm_k(key[0]), attn.norm_added_k(key[1])], dim=2)
        scores = (query * attn.scale) @ key.transpose(-1, -2)
        if attention_mask is not None:
            scores = scores + attention_mask.to(scores.dtype)
        attended = (scores.softmax(-1).to(query.dtype) @ torch.cat(value, dim=2)).transpose(1, 2).flatten(2)
        picture, text = attended.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        if not attn.context_pre_only:
            text = attn.to_add_out(text)
        return attn.to_out[0](picture), text


class TextToVelocity(nn.Module):
    """The two text encoders and the transformer, trained together."""

    def __init__(
        self,
        text_encoder: CLIPTextModelWithProjection,
        text_encoder_2: CLIPTextModelWithProjection,
        transformer: SD3Transformer2DModel,
    ) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2
        self.transformer = transformer

    def encode(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the captions' embeddings [B, L, D] and pooled embeddings [B, P], as the pipeline makes them."""
        encoded = [
            encoder(token_ids, output_hidden_states=True) for encoder in (self.text_encoder, self.text_encoder_2)
        ]
        embeds = torch.cat([output.hidden_states[-2] for output in encoded], dim=-1)
        return embeds, torch.cat([output.text_embeds for output in encoded], dim=-1)

    def forward(self, latents: Tensor, t: Tensor, *, token_ids: Tensor, zeros: Tensor) -> Tensor:
        """Return the velocity [B, C, h, w].

        Args:
            latents: x_t, [B, C, h, w].
            t: [B] in [0, 1]: 0 is data, 1 is noise.
            token_ids: The captions' tokens, [B, 16].
            zeros: How many rows of zeros follow the captions' embeddings, [B]. They are equal, have no position and so
                stay equal: one of them is computed, and counts `zeros` times in the attention.
        """
        embeds, pooled = self.encode(token_ids)
        embeds = F.pad(embeds, (0, 0, 0, 1))
        picture = (latents.shape[-1] // self.transformer.config.patch_size) ** 2
        counts = F.pad(zeros.float().log()[:, None, None, None], (picture + embeds.shape[1] - 1, 0))
        return self.transformer(
            latents,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            timestep=t * SCHEDULER["num_train_timesteps"],
            joint_attention_kwargs={"attention_mask": counts},
            return_dict=False,
        )[0]


def text_config(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextConfig:
    """Return the configuration of a text encoder whose last layer but one is what the transformer sees."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=CONTEXT,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def new_network(
    tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, *, heads: int = 3, layers: int = 8
) -> TextToVelocity:
    """Return a network with random weights but for the first text encoder's, which has `emoji`'s and one layer more.

    The modulations and the output start at 0: every block starts as the identity, the velocity as 0.

    Source: Peebles & Xie, 2023, §3.2 (adaLN-Zero), https://arxiv.org/abs/2212.09748.
    """
    width, depth = text_encoder.config.hidden_size, text_encoder.config.num_hidden_layers
    first = CLIPTextModelWithProjection(text_config(tokenizer, width, depth + 1))
    weights = {name.removeprefix("text_model."): weight for name, weight in text_encoder.state_dict().items()}
    first.text_model.load_state_dict(weights, strict=False)
    second = CLIPTextModelWithProjection(text_config(tokenizer, width // 2, depth))
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=64,
        num_attention_heads=heads,
        joint_attention_dim=width + width // 2,
        pooled_projection_dim=width + width // 2,
        caption_projection_dim=64 * heads,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    for name, parameter in transformer.named_parameters():
        if any(part in name for part in ("norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out.")):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 2:
            nn.init.xavier_uniform_(parameter)
    return TextToVelocity(first, second, transformer)


def load_network(folder: Path) -> TextToVelocity:
    """Return the network of a pipeline folder, in float32."""
    first, second = (
        CLIPTextModelWithProjection.from_pretrained(folder / part, dtype=torch.float32)
        for part in ("text_encoder", "text_encoder_2")
    )
    return TextToVelocity(first, second, SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer"))


def flow_loss(
    network: Callable[[Tensor, Tensor], Tensor], x0: Tensor, generator: torch.Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of flow matching along straight lines.

    x_t = (1 − t)·x_0 + t·ε
    L = E_{t, ε} ‖(ε − x_0) − v_θ(x_t, t)‖² / dim,  logit(t) ~ N(0, 1)

    Source: Esser et al., 2024, eqs. 13 and 19, https://arxiv.org/abs/2403.03206.
    """
    t = torch.randn(len(x0), generator=generator).sigmoid()
    epsilon = torch.randn(x0.shape, generator=generator)
    at = t[:, None, None, None]
    velocity = network((1 - at) * x0 + at * epsilon, t).float()
    loss = (velocity - (epsilon - x0)).square().mean()
    return loss, {"loss": loss}


def draw_zeros(count: int, generator: torch.Generator) -> Tensor:
    """Return how many rows of zeros follow each caption, [count] in [0, 512]: of 1 + zeros the logarithm is uniform."""
    return (torch.rand(count, generator=generator) * math.log(1 + MOST_ZEROS)).exp().sub(1).round()


def as_pipeline(network: TextToVelocity, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusion3Pipeline:
    """Return the parts as a diffusers pipeline."""
    return StableDiffusion3Pipeline(
        vae=vae,
        text_encoder=network.text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=network.text_encoder_2,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
        transformer=network.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
    )


def draw_flow_grid(pipeline: StableDiffusion3Pipeline, *, per_prompt: int, num_steps: int = 20) -> Image.Image:
    """Return a labelled grid of samples of the 45 animals, seeds 0, 1, … on and on."""
    prompts = list(make_prompts("simple_animals"))
    repeated = [prompt for prompt in prompts for _ in range(per_prompt)]
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, len(repeated), CHUNK):
        part = repeated[start : start + CHUNK]
        with autocast():
            drawn = pipeline(
                part,
                height=64,
                width=64,
                num_inference_steps=num_steps,
                guidance_scale=GUIDANCE_SCALE,
                generator=[torch.Generator().manual_seed(start + k) for k in range(len(part))],
                max_sequence_length=CONTEXT,
                output_type="pt",
            )
        images.append(drawn.images.float())
    return lay_out(torch.cat(images), prompts, per_label=per_prompt)


@dataclass
class Args:
    """Train the text encoders and the transformer."""

    work: Path = WORK
    """Where everything is read and written."""
    init: Path | None = None
    """A pipeline folder to go on from; none: a new transformer, and the text encoder of `emoji`."""
    emoji: Path = PACKAGE / "models" / "emoji"
    """The pipeline folder whose autoencoder, tokenizer and text encoder a new one takes."""
    images: int = 600_000
    """How many images to train for."""
    pool: int = 65_536
    """How many augmented pictures each process encodes, once, before training."""
    batch_size: int = 64
    """Images of a step, of all processes together."""
    learning_rate: float = 1e-3
    """AdamW's, at its peak."""
    heads: int = 3
    """Of 64 channels each, of a new transformer."""
    layers: int = 8
    """Of a new transformer."""
    save_every: int = 25_000
    """Images between two checkpoints."""
    per_prompt: int = 2
    """Samples of each animal in the grid."""
    seed: int = 0
    """Of pictures, captions, times and noises."""


def main(args: Args) -> None:
    join_processes()
    data = IconData(args.work / "icons")
    start = args.init or args.emoji
    tokenizer = CLIPTokenizer.from_pretrained(start / "tokenizer")
    vae = AutoencoderKL.from_pretrained(start / "vae").eval().requires_grad_(False)
    vae.register_to_config(shift_factor=0.0)
    torch.manual_seed(args.seed)
    if args.init:
        network = load_network(args.init).train()
    else:
        text_encoder = CLIPTextModel.from_pretrained(args.emoji / "text_encoder", dtype=torch.float32)
        network = new_network(tokenizer, text_encoder, heads=args.heads, layers=args.layers).train()
    network.transformer.set_attn_processor(JointAttention())
    logger.info("%.2f M parameters", sum(parameter.numel() for parameter in network.parameters()) / 1e6)
    pool = encode_pool(vae, data, args.pool, seed=args.seed * 1000 + process_rank())
    logger.info("%d latents, standard deviation %.3f", len(pool.latents), pool.latents.float().std())

    def loss(run: TrainingRun) -> tuple[Tensor, dict[str, Tensor]]:
        generator = run.generator(args.seed)
        latents, token_ids = draw_pairs(pool, tokenizer, run.share, generator)
        zeros = draw_zeros(run.share, generator)
        with autocast():
            return flow_loss(partial(network, token_ids=token_ids, zeros=zeros), latents, generator)

    def save(run: TrainingRun) -> None:
        pipeline = as_pipeline(network, vae, tokenizer)
        pipeline.save_pretrained(run.folder / "pipeline")
        grid = draw_flow_grid(pipeline, per_prompt=args.per_prompt)
        grid.save(run.folder / f"grid_{run.images_seen}.png")

    run = TrainingRun(
        network,
        args.work / "flow",
        images=args.images,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
    )
    run.fit(loss, save=save, save_every=args.save_every)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main(tyro.cli(Args, description=__doc__))
