"""Train the text encoder and the UNet, on latents of augmented icons.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m tools.emoji.train_unet --init diffusion_gym/models/emoji

on two cores; `python -m tools.emoji.train_unet` on one, at 35 to 50 images/s. Every `save_every` images it writes a
checkpoint to go on from, the pipeline with the averaged weights (`build/emoji/unet/pipeline`, a folder for `--init` or
for `tools.emoji.export`) and a sample grid. Killed and started again with the same command it goes on; without its
checkpoint it goes on from the pipeline's weights with `--init`.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusion_gym.models import load_model

from .dataset import IconData, NameSampler, draw_captions
from .samples import draw_grid
from .sources import WORK
from .tokenizer import CONTEXT
from .training import TrainingRun, autocast, join_processes, process_rank

logger = logging.getLogger(__name__)

SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    # Stable Diffusion's .012 would leave the background's mean visible at the last step, on latents this small.
    "beta_end": 0.02,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
}
# The noise levels that are trained on, log SNR ~ N(mean, deviation²): those at which shapes are decided, not the near
# pure noise that is 40 % of all timesteps on latents this small.
LOG_SNR = (0.0, 2.0)
MAX_WEIGHT = 20.0


class TextToLatents(nn.Module):
    """The text encoder and the UNet, trained together."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet

    def forward(self, latents: Tensor, t: Tensor, token_ids: Tensor) -> Tensor:
        """Return the UNet's output [B, C, h, w] for noised latents at times t, with the captions' tokens [B, 16]."""
        embeds = self.text_encoder(token_ids)[0]
        return self.unet(latents, t, encoder_hidden_states=embeds, return_dict=False)[0]


def new_network(tokenizer: CLIPTokenizer, channels: tuple[int, ...] = (64, 128, 192)) -> TextToLatents:
    """Return a network with random weights."""
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        projection_dim=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    return TextToLatents(CLIPTextModel(text), unet)


def load_network(folder: Path) -> TextToLatents:
    """Return the network of a pipeline folder, in float32."""
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    return TextToLatents(text_encoder, UNet2DConditionModel.from_pretrained(folder, subfolder="unet"))


@dataclass(frozen=True)
class LatentPool:
    """Augmented icons as latents [N, 4, 16, 16] (float16, scaled as the UNet sees them), with what they show."""

    latents: Tensor
    names: Sequence[str]
    colours: Sequence[str]


@torch.no_grad()
def encode_pool(vae: AutoencoderKL, data: IconData, size: int, *, seed: int) -> LatentPool:
    """Return latents of `size` random pictures, drawn as the UNet is to see them."""
    sampler, generator = NameSampler(data), torch.Generator().manual_seed(seed)
    latents, names, colours = [], [], []
    for start in range(0, size, 128):
        batch = data.batch(sampler.draw(min(128, size - start), generator), generator)
        with autocast():
            mode = vae.encode(batch.images * 2 - 1).latent_dist.mode()
        latents.append((mode.float() * vae.config.scaling_factor).half())
        names.extend(batch.names)
        colours.extend(batch.colours)
    return LatentPool(torch.cat(latents), names, colours)


def draw_pairs(
    pool: LatentPool, tokenizer: CLIPTokenizer, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return random latents [B, 4, 16, 16] of the pool and the tokens [B, 16] of random captions of theirs."""
    rows = torch.randint(0, len(pool.latents), (count,), generator=generator)
    names, colours = [pool.names[row] for row in rows], [pool.colours[row] for row in rows]
    tokens = tokenizer(
        draw_captions(names, colours, generator),
        padding="max_length",
        max_length=CONTEXT,
        truncation=True,
        return_tensors="pt",
    )
    return pool.latents[rows].float(), tokens.input_ids


def draw_timesteps(count: int, alphas_cumprod: Tensor, generator: torch.Generator) -> Tensor:
    """Return the timesteps [count] whose log SNR is next to draws of N(mean, deviation²) (see `LOG_SNR`)."""
    mean, deviation = LOG_SNR
    wanted = mean + deviation * torch.randn(count, generator=generator)
    descending = torch.logit(alphas_cumprod)
    return torch.searchsorted(-descending, -wanted).clamp(max=len(alphas_cumprod) - 1)


def epsilon_loss(
    network: Callable[[Tensor, Tensor], Tensor], x0: Tensor, alphas_cumprod: Tensor, generator: torch.Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of epsilon prediction, weighted as v-prediction's; another objective takes this function's place.

    L = E_{t, ε} min(1/ᾱ_t, 20)·‖ε − ε_θ(√ᾱ_t·x_0 + √(1 − ᾱ_t)·ε, t)‖² / dim,  log SNR_t ~ N(0, 2²)

    An unweighted ε loss says little about x_0 where the noise is strong: shapes stayed blobs, however long it trained.

    Source: Salimans & Ho, 2022, §4 (the weight SNR + 1 on x_0), https://arxiv.org/abs/2202.00512; Karras et al., 2022,
    table 1 (log-normal noise levels), https://arxiv.org/abs/2206.00364.
    """
    t = draw_timesteps(len(x0), alphas_cumprod, generator)
    epsilon = torch.randn(x0.shape, generator=generator)
    alpha_bar = alphas_cumprod[t][:, None, None, None]
    output = network(alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * epsilon, t).float()
    squared = (output - epsilon).square().mean(dim=(1, 2, 3))
    loss = ((1 / alphas_cumprod[t]).clamp(max=MAX_WEIGHT) * squared).mean()
    return loss, {"loss": loss, "epsilon_mse": squared.mean()}


def as_pipeline(network: TextToLatents, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """Return the parts as a diffusers pipeline."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=network.text_encoder,
        tokenizer=tokenizer,
        unet=network.unet,
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@dataclass
class Args:
    """Train the text encoder and the UNet."""

    work: Path = WORK
    """Where everything is read and written."""
    init: Path | None = None
    """A pipeline folder to go on from; none: random weights."""
    vae: Path | None = None
    """The autoencoder's folder; none: that of `init`, or `build/emoji/vae/vae`."""
    images: int = 600_000
    """How many images to train for."""
    pool: int = 131_072
    """How many augmented pictures each process encodes, once, before training."""
    batch_size: int = 48
    """Images of a step, of all processes together."""
    learning_rate: float = 4e-4
    """AdamW's, at its peak."""
    save_every: int = 50_000
    """Images between two checkpoints."""
    per_prompt: int = 4
    """Samples of each animal in the grid."""
    seed: int = 0
    """Of pictures, captions, times and noises."""


def main(args: Args) -> None:
    join_processes()
    data = IconData(args.work / "icons")
    tokenizer_folder = args.init / "tokenizer" if args.init else args.work / "tokenizer"
    vae_folder = args.vae or (args.init / "vae" if args.init else args.work / "vae" / "vae")
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    vae = AutoencoderKL.from_pretrained(vae_folder).eval().requires_grad_(False)
    torch.manual_seed(args.seed)
    network = (load_network(args.init) if args.init else new_network(tokenizer)).train()
    # In bfloat16 on a CPU the plain processor's training step takes 20 % less than the fused attention's.
    network.unet.set_attn_processor(AttnProcessor())
    # Not compiled: on a CPU torch.compile (2.13) gave this network's inner layers a gradient of exactly 0.
    logger.info("%.2f M parameters", sum(parameter.numel() for parameter in network.parameters()) / 1e6)
    pool = encode_pool(vae, data, args.pool, seed=args.seed * 1000 + process_rank())
    logger.info("%d latents, standard deviation %.3f", len(pool.latents), pool.latents.float().std())
    alphas_cumprod = DDIMScheduler(**SCHEDULER).alphas_cumprod

    def loss(run: TrainingRun) -> tuple[Tensor, dict[str, Tensor]]:
        generator = run.generator(args.seed)
        latents, token_ids = draw_pairs(pool, tokenizer, run.share, generator)
        with autocast():
            return epsilon_loss(partial(network, token_ids=token_ids), latents, alphas_cumprod, generator)

    def save(run: TrainingRun) -> None:
        pipeline = as_pipeline(network, vae, tokenizer)
        pipeline.save_pretrained(run.folder / "pipeline")
        grid = draw_grid(load_model(run.folder / "pipeline"), per_prompt=args.per_prompt)
        grid.save(run.folder / f"grid_{run.images_seen}.png")

    run = TrainingRun(
        network,
        args.work / "unet",
        images=args.images,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
    )
    run.fit(loss, save=save, save_every=args.save_every)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main(tyro.cli(Args, description=__doc__))
