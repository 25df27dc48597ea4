"""Train the autoencoder, 64×64 pixels to 16×16×4 latents, and whiten its latents.

    python -m tools.emoji.train_vae

takes an hour on one core and writes `build/emoji/vae/vae`. With `--init FOLDER --decoder-only` the decoder alone is
trained on: the latents stay what they were, so a UNet that was trained on them stays good.
"""

import copy
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from diffusers import AutoencoderKL
from torch import Tensor

from .dataset import Batch, IconData, NameSampler
from .samples import lay_out
from .sources import WORK
from .training import TrainingRun, autocast

logger = logging.getLogger(__name__)

STABLE_DIFFUSIONS_SCALE = 0.18215
KL_WEIGHT = 3e-4
GRADIENT_WEIGHT = 0.5


def new_autoencoder(channels: tuple[int, ...] = (32, 32, 64)) -> AutoencoderKL:
    """Return an autoencoder with random weights, 0.7 M parameters."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * len(channels),
        up_block_types=["UpDecoderBlock2D"] * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        scaling_factor=STABLE_DIFFUSIONS_SCALE,
    )


def reconstruction_loss(decoded: Tensor, target: Tensor) -> Tensor:
    """Return L1 + MSE + ½·L1 of the differences between neighbouring pixels, of images in [−1, 1]."""
    error = decoded - target
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.square().mean() + GRADIENT_WEIGHT * edges


@torch.no_grad()
def whiten(vae: AutoencoderKL, images: Tensor) -> AutoencoderKL:
    """Return the autoencoder with latents of mean 0 and standard deviation 1/scaling_factor in every channel.

    The affine map goes into the 1×1 convolutions around the latents, so images are encoded and decoded as before.

    Args:
        vae: The autoencoder.
        images: [B, 3, 64, 64] in [−1, 1] whose latents are measured.
    """
    modes = torch.cat([vae.encode(part).latent_dist.mode() for part in images.split(64)])
    mean, std = modes.mean((0, 2, 3)), modes.std((0, 2, 3))
    scale = 1 / (vae.config.scaling_factor * std)
    whitened = copy.deepcopy(vae)
    into, out_of = whitened.quant_conv, whitened.post_quant_conv
    channels = len(mean)
    into.bias[:channels].sub_(mean).mul_(scale)
    into.weight[:channels].mul_(scale[:, None, None, None])
    into.bias[channels:].add_(2 * scale.log())
    out_of.bias.add_(out_of.weight[:, :, 0, 0] @ mean)
    out_of.weight.div_(scale[None, :, None, None])
    return whitened


def psnr(decoded: Tensor, target: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB of images in [−1, 1]."""
    return 10 * math.log10(4 / (decoded.clamp(-1, 1) - target).square().mean().item())


@dataclass
class Args:
    """Train the autoencoder."""

    work: Path = WORK
    """Where everything is read and written."""
    init: Path | None = None
    """An autoencoder's folder to go on from; none: random weights."""
    decoder_only: bool = False
    """Train the decoder alone, on the latents as they are."""
    images: int = 120_000
    """How many images to train for."""
    batch_size: int = 32
    """Images of a step."""
    learning_rate: float = 2e-3
    """AdamW's, at its peak."""
    save_every: int = 20_000
    """Images between two checkpoints."""
    seed: int = 0
    """Of everything random."""


def main(args: Args) -> None:
    if args.decoder_only and args.init is None:
        raise ValueError("--decoder-only trains a decoder on given latents: give the autoencoder with --init")
    data = IconData(args.work / "icons")
    sampler = NameSampler(data)
    torch.manual_seed(args.seed)
    vae = AutoencoderKL.from_pretrained(args.init) if args.init else new_autoencoder()
    vae.train()
    if args.decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)

    def draw(count: int, generator: torch.Generator) -> Batch:
        return data.batch(sampler.draw(count, generator), generator)

    def loss(run: TrainingRun) -> tuple[Tensor, dict[str, Tensor]]:
        generator = run.generator(args.seed)
        target = draw(run.batch_size, generator).images * 2 - 1
        with autocast():
            posterior = vae.encode(target).latent_dist
            latents = posterior.mode() if args.decoder_only else posterior.sample(generator)
            decoded = vae.decode(latents).sample.float()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        reconstruction = reconstruction_loss(decoded, target)
        value = reconstruction if args.decoder_only else reconstruction + KL_WEIGHT * kl
        return value, {"loss": value, "mse": (decoded - target).square().mean(), "kl": kl}

    def save(run: TrainingRun) -> None:
        images = draw(512, torch.Generator().manual_seed(args.seed + 1)).images * 2 - 1
        finished = vae if args.decoder_only else whiten(vae, images)
        finished.save_pretrained(run.folder / "vae")
        with torch.no_grad():
            decoded = finished.decode(finished.encode(images[:64]).latent_dist.mode()).sample
        logger.info("%.2f dB after whitening", psnr(decoded, images[:64]))
        pairs = torch.stack([images[:64], decoded.clamp(-1, 1)], 1).flatten(0, 1) / 2 + 0.5
        lay_out(pairs, [""] * 64, per_label=2, columns=8).save(run.folder / f"pairs_{run.images_seen}.png")

    run = TrainingRun(
        vae,
        args.work / "vae",
        images=args.images,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        ema_decay=0.998,
    )
    run.fit(loss, save=save, save_every=args.save_every)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main(tyro.cli(Args, description=__doc__))
