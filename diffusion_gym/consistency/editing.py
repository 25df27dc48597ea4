"""Zero-shot editing: what is known of an image is put into every prediction of x_0, and the model draws the rest.

Each step predicts x_0, decodes it, replaces the known part by its true values and encodes the result again, before
noise is drawn for the next time. A linear operator must act on pixels, for an autoencoder is not linear; a mask may act
on latents too, which is cheaper and less exact. Since only predictions go through the autoencoder, and no noise, what
it loses costs little, and at the end the known part is put back into the pixels themselves.

Source: Song et al., 2023, "Consistency Models", algorithm 4, https://arxiv.org/abs/2303.01469; Meng et al., 2021,
"SDEdit", https://arxiv.org/abs/2108.01073.
"""

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..checks import checked_integer
from ..grids import chosen_grid
from ..models.base import Conditioning, DiffusionModel
from ..predictions import broadcast_to
from ..samplers import Sampler
from ..sampling import sample_latents
from ..transitions import draw_noise
from .operators import Operator

Space = Literal["pixels", "latents"]

_DEFAULT_STEPS = 8


@torch.no_grad()
def edit(
    model: DiffusionModel,
    images: Tensor,
    prompts: str | Sequence[str],
    operator: Operator | None = None,
    *,
    num_steps: int | None = None,
    times: Sequence[float] | None = None,
    space: Space = "pixels",
    sampler: Sampler | None = None,
    guidance_scale: float | None = None,
    denoiser: nn.Module | None = None,
    seed: int = 0,
) -> Tensor:
    """Return images [B, 3, H, W] in [0, 1] that have what an operator knows of these, and show the prompts.

        x_T = α_T·y + σ_T·z;   each step:  x_0 ← A⁻¹[(A·y)(1 − Ω) + (A·x̂_0)Ω],  x_s from it by the sampler

    What the operator says is known is that of `images` to the last bits of float32; what is free of them has no effect.
    Without an operator all is free, and the images are where it begins: at a time in the middle of the process, such as
    `times=(599, 399, 199)` of a thousand, their layout and colours remain, and strokes become a picture (SDEdit).

    Args:
        model: The diffusion model; a consistency model needs the fewest steps.
        images: [B, 3, H, W] in [0, 1], of the model's size.
        prompts: What they are to show: a text for all, or one for each.
        operator: What is known of them; None: nothing.
        num_steps: The number of steps, on the model's own grid; None: 8.
        times: The times of the steps in the place of that grid.
        space: Where the known part is put back in each step: in the "pixels", or (`Inpainting` alone) in the "latents",
            where a step costs no passes through the autoencoder and a seam is easier to see.
        sampler: How steps are drawn; None: the model's default.
        guidance_scale: Guidance; None: the model's default.
        denoiser: The network to ask, such as a trained policy's; None: the model's own.
        seed: Image i is edited with the noise of seed + i, whatever stands beside it.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, or does not fit the model or the images.
    """
    images = _checked_images(model, images)
    if space not in get_args(Space):
        raise ValueError(f"space must be one of {get_args(Space)}, got {space!r}")
    grid = chosen_grid(model.schedule, num_steps=num_steps, times=times, default_steps=_DEFAULT_STEPS)
    generators = [torch.Generator().manual_seed(seed + index) for index in range(len(images))]
    start = model.encode(images if operator is None else operator.start(images))
    t = grid[:1].float().to(model.device).expand(len(images))
    alpha, sigma = (broadcast_to(level(t), start) for level in (model.schedule.alpha, model.schedule.sigma))
    latents = sample_latents(
        model,
        (alpha * start + sigma * draw_noise(start, generators)).to(model.dtype),
        _conditioning(model, prompts, len(images)),
        grid,
        sampler=model.default_sampler if sampler is None else sampler,
        generators=generators,
        correct=None if operator is None else _correction(model, images, start, operator, space),
        guidance_scale=guidance_scale,
        denoiser=denoiser,
    )
    edited = model.decode(latents)
    return edited if operator is None else operator.restore(edited, images)


def _correction(
    model: DiffusionModel, images: Tensor, start: Tensor, operator: Operator, space: Space
) -> Callable[[Tensor], Tensor]:
    """Return the function that puts the known part into predicted latents."""
    if space == "latents":
        on_latents = operator.on_latents(model.latent_shape)
        return lambda pred_x0: on_latents.project(pred_x0, start)
    return lambda pred_x0: model.encode(operator.restore(model.decode(pred_x0), images))


@torch.no_grad()
def denoise(
    model: DiffusionModel,
    latents: Tensor,
    prompts: str | Sequence[str],
    *,
    times: Sequence[float],
    sampler: Sampler | None = None,
    guidance_scale: float | None = None,
    denoiser: nn.Module | None = None,
    seed: int = 0,
) -> Tensor:
    """Return the images [B, 3, H, W] in [0, 1] behind noisy latents.

    In one step it is the consistency function itself: one of the images that the noisy one may have been, where the
    x̂_0 of a diffusion model is their mean.

    Note:
        Noise in pixels is no white noise in the latents of an autoencoder, which takes most of it away by itself:
        a model of latents is no denoiser of pixels.

    Args:
        model: The diffusion model.
        latents: [B, C, h, w] x_t = α_t·x_0 + σ_t·ε at the first of the times.
        prompts: What the images show: a text for all, or one for each.
        times: The times of the steps, one or more.
        sampler: How steps are drawn; None: the model's default.
        guidance_scale: Guidance; None: the model's default.
        denoiser: The network to ask; None: the model's own.
        seed: Image i has the noise of seed + i, where there is more than one step.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, or does not fit the model.
    """
    if latents.shape[1:] != model.latent_shape:
        raise ValueError(f"latents must be of shape [B, {model.latent_shape}], got {list(latents.shape)}")
    x_0 = sample_latents(
        model,
        latents,
        _conditioning(model, prompts, len(latents)),
        chosen_grid(model.schedule, num_steps=None, times=times, default_steps=1),
        sampler=model.default_sampler if sampler is None else sampler,
        generators=[torch.Generator().manual_seed(seed + index) for index in range(len(latents))],
        guidance_scale=guidance_scale,
        denoiser=denoiser,
    )
    return model.decode(x_0)


def slerp(first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
    """Return points [N, ...] on the arc between two noises [...], at these weights [N] of the second.

        sin((1 − w)θ)/sin θ·first + sin(wθ)/sin θ·second,   θ the angle between them

    A mixture w·first + (1 − w)·second would be shorter than noise is.
    """
    weights = broadcast_to(weights, first[None])
    cosine = (first * second).sum() / (first.norm() * second.norm())
    angle = torch.arccos(cosine.clamp(-1, 1))
    if angle.sin() < 1e-6:
        return torch.lerp(first, second, weights)
    return (((1 - weights) * angle).sin() * first + (weights * angle).sin() * second) / angle.sin()


@torch.no_grad()
def interpolate(
    model: DiffusionModel,
    prompts: str | tuple[str, str],
    num_images: int = 8,
    *,
    seeds: tuple[int, int] = (0, 1),
    num_steps: int | None = None,
    times: Sequence[float] | None = None,
    sampler: Sampler | None = None,
    guidance_scale: float | None = None,
    denoiser: nn.Module | None = None,
) -> Tensor:
    """Return images [num_images, 3, H, W] in [0, 1] on the way from one noise, and prompt, to another.

    The noises are mixed on their arc (`slerp`), the prompts' embeddings linearly; the noise of later steps is the same
    for all images, so that nothing else differs between them.

    Args:
        model: The diffusion model.
        prompts: The text of all images, or those of the first and the last.
        num_images: The number of images, at least 2.
        seeds: Those of the first noise and of the last; equal: only the prompt changes.
        num_steps: The number of steps, on the model's own grid; None: 8.
        times: The times of the steps in the place of that grid.
        sampler: How steps are drawn; None: the model's default.
        guidance_scale: Guidance; None: the model's default.
        denoiser: The network to ask; None: the model's own.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, or does not fit the model.
    """
    weights = torch.linspace(0, 1, checked_integer("num_images", num_images, at_least=2), device=model.device)
    texts = (prompts, prompts) if isinstance(prompts, str) else tuple(prompts)
    if len(texts) != 2:
        raise ValueError(f"prompts must be a text, or those of the first and the last image; got {prompts!r}")
    ends = model.encode_prompts(texts)
    conditioning = {
        key: torch.lerp(value[:1], value[1:], broadcast_to(weights, value[:1])) for key, value in ends.items()
    }
    generators = [torch.Generator().manual_seed(seeds[0]) for _ in weights]
    empty = torch.empty(len(weights), *model.latent_shape, device=model.device)
    first = draw_noise(empty, generators)[0]
    second = draw_noise(empty[:1], [torch.Generator().manual_seed(seeds[1])])[0]
    latents = sample_latents(
        model,
        (model.schedule.initial_std * slerp(first, second, weights)).to(model.dtype),
        conditioning,
        chosen_grid(model.schedule, num_steps=num_steps, times=times, default_steps=_DEFAULT_STEPS),
        sampler=model.default_sampler if sampler is None else sampler,
        generators=generators,
        guidance_scale=guidance_scale,
        denoiser=denoiser,
    )
    return model.decode(latents)


def _checked_images(model: DiffusionModel, images: Tensor) -> Tensor:
    """Return images on the model's device in float32; raise TypeError or ValueError where they are none of it."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        raise TypeError(f"images must be a float tensor [B, 3, H, W] in [0, 1], got {type(images).__name__}")
    if images.ndim != 4 or images.shape[1:] != model.image_shape:
        raise ValueError(f"images must be of shape [B, {model.image_shape}], the model's; got {list(images.shape)}")
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise ValueError(f"images must be in [0, 1], got values in [{float(images.min()):g}, {float(images.max()):g}]")
    return images.to(model.device, torch.float32)


def _conditioning(model: DiffusionModel, prompts: str | Sequence[str], number: int) -> Conditioning:
    """Return the conditioning of a text for all images, or of one for each."""
    texts = [prompts] * number if isinstance(prompts, str) else list(prompts)
    if len(texts) != number:
        raise ValueError(f"prompts must be a text, or one for each of the {number} images; got {len(texts)}")
    return model.encode_prompts(texts)
