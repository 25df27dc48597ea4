"""Grids of images for logs and pictures."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffusion_gym import transfer

_LEAST_SIDE, _MOST_SIDE = 128, 256
_FONT_SHARE = 9 / 64  # TensorBoard shows the grid at some 340 pixels until it is clicked: 10 pixels for a letter
_PROMPT_LINES = 3

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def captioned_grid(images: Tensor, captions: Sequence[tuple[str, str]], *, columns: int = 4) -> np.ndarray:
    """Return one image, [height, width, 3] uint8, of all images in reading order on white, with two captions each.

    Images less than 128 pixels wide are enlarged by a whole factor, those of more than 256 are reduced by one; letters
    grow with the images.

    Args:
        images: [B, 3, H, W], RGB in [0, 1].
        captions: For each a text in black, on up to three lines (the prompt), and one in grey (the reward).
        columns: Images per row.

    Raises:
        ValueError: there is no image, or not one pair of captions for each.
    """
    if not len(images) or len(images) != len(captions):
        raise ValueError(
            f"an image grid needs at least one image, and captions for each: got {len(images)} images and "
            f"{len(captions)} pairs of captions"
        )
    images = F.avg_pool2d(images.float(), -(-images.shape[3] // _MOST_SIDE))
    pixels = transfer.to_host((images * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1))
    enlarged = -(-_LEAST_SIDE // pixels.shape[2])
    pixels = pixels.repeat(enlarged, axis=1).repeat(enlarged, axis=2)
    _, height, width, _ = pixels.shape
    font_size = round(_FONT_SHARE * width)
    font = ImageFont.load_default(font_size)
    texts = [(_wrapped(prompt, font, width), _shortened(reward, font, width)) for prompt, reward in captions]
    line, gap = font_size * 5 // 4, font_size
    caption_height = line * (max(len(prompt) for prompt, _ in texts) + 1) + line // 4
    rows = -(-len(pixels) // columns)
    columns = min(columns, len(pixels))
    size = (columns * (width + gap) + gap, rows * (height + caption_height + gap) + gap)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for index, (prompt, reward) in enumerate(texts):
        row, column = divmod(index, columns)
        left, top = gap + column * (width + gap), gap + row * (height + caption_height + gap)
        canvas.paste(Image.fromarray(pixels[index]), (left, top))
        for number, text in enumerate([*prompt, reward]):
            colour = "black" if number < len(prompt) else "dimgray"
            draw.text((left, top + height + line // 4 + number * line), text, colour, font=font)
    return np.asarray(canvas)


def _wrapped(text: str, font: Font, width: int) -> list[str]:
    """Return a text as lines that fit the width; the last one is cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or len(lines) == _PROMPT_LINES or font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return [_shortened(line, font, width) for line in lines]


def _shortened(text: str, font: Font, width: int) -> str:
    """Return a text, cut to the width if it does not fit."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"
