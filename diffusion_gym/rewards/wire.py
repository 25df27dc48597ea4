"""The messages between a remote reward and its server: JSON, PNG or JPEG, safetensors; never pickle.

A request to `POST /score` is either JSON, {"images": [base64 of a PNG or JPEG, …], "prompts": [text, …], "metadata":
[object, …] or null}, or a safetensors file with `images` (float32 [B, 3, H, W] in [0, 1]) and `texts` (uint8: the UTF-8
bytes of the same JSON without its images). In metadata NaN, Infinity and -Infinity are taken too, as Python writes
them. The answer is JSON: {"name": text, "values": [number, …], "extras": {name:
[number, …]}}, or {"error": text} with a status of 400 or more. `GET /info` tells name, unit, range and limits.
"""

import base64
import binascii
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from .. import transfer
from .base import Metadata, as_json, check_finite, to_uint8
from .jpeg import as_files

PROTOCOL = 1
JSON_TYPE, SAFETENSORS_TYPE = "application/json", "application/x-safetensors"
TOKEN_VARIABLE = "DIFFUSION_GYM_REWARD_TOKEN"

ImageFormat = Literal["png", "jpeg", "safetensors"]

_ANSWER_BYTES_PER_IMAGE = 4096
_VALUES_PER_IMAGE = 4096


@dataclass(frozen=True)
class Limits:
    """The largest request that a server takes.

    Args:
        max_batch: Images. Their prompts and metadata may have 4096 commas and opening brackets each, which bounds what
            JSON takes in memory.
        max_pixels: Pixels of all images together, as their headers say before anything is unpacked.
        max_bytes: Bytes of the body, counted as they come.

    Raises:
        ValueError: one of them is not positive.
    """

    max_batch: int = 64
    max_pixels: int = 2**26
    max_bytes: int = 2**28

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def answer_bytes(num_images: int) -> int:
    """Return the most bytes that the answer to a request of so many images may have."""
    return _ANSWER_BYTES_PER_IMAGE * (num_images + 1)


class BadRequest(ValueError):  # noqa: N818
    """A request that is refused, with the reason and HTTP's status for it."""

    def __init__(self, message: str, status: int = 422) -> None:
        super().__init__(message)
        self.status = status


def checked_token(token: str | None) -> str | None:
    """Return the token.

    Raises:
        ValueError: a header of HTTP cannot hold it.
    """
    if token is not None and not (token and token.isascii() and token.isprintable()):
        raise ValueError("the token must be printable ASCII, and not empty")
    return token


def encode_request(
    images: Tensor,
    prompts: Sequence[str],
    metadata: Sequence[Metadata] | None,
    *,
    image_format: ImageFormat,
    jpeg_quality: int = 95,
) -> tuple[str, bytes]:
    """Return a request's content type and body.

    Args:
        images: [B, 3, H, W], RGB in [0, 1].
        prompts: The B prompts.
        metadata: The prompts' metadata, which JSON has to hold.
        image_format: "png" (rounded to 8 bits), "jpeg" (with loss), "safetensors" (the float32 numbers themselves).
        jpeg_quality: libjpeg's, 1 to 95.

    Raises:
        TypeError: JSON cannot hold the metadata.
        ValueError: an image is NaN or infinite.
    """
    texts = {"prompts": list(prompts), "metadata": None if metadata is None else [dict(entry) for entry in metadata]}
    if image_format == "safetensors":
        check_finite(images)
        as_bytes = torch.frombuffer(bytearray(json.dumps(texts, default=as_json).encode()), dtype=torch.uint8)
        pixels = torch.from_numpy(transfer.to_host(images.float())).contiguous()
        return SAFETENSORS_TYPE, safetensors.torch.save({"images": pixels, "texts": as_bytes})
    options = {"compress_level": 1} if image_format == "png" else {"quality": jpeg_quality}
    files = as_files(to_uint8(images.detach()).numpy(), image_format, options)
    pictures = [base64.b64encode(file).decode() for file in files]
    return JSON_TYPE, json.dumps({"images": pictures, **texts}, default=as_json).encode()


def check_content_type(header: str) -> str:
    """Return the content type of a request's header, before any of the body is read.

    Raises:
        BadRequest: it is none that a request may have.
    """
    content_type = header.partition(";")[0].strip().lower()
    if content_type not in (JSON_TYPE, SAFETENSORS_TYPE):
        raise BadRequest(f"the content type must be {JSON_TYPE} or {SAFETENSORS_TYPE}, got {content_type!r}", 415)
    return content_type


def decode_request(
    content_type: str, body: bytes, limits: Limits
) -> tuple[Tensor, list[str], list[Mapping[str, object]] | None]:
    """Return the images [B, 3, H, W], the prompts and the metadata of a request; nothing in it is trusted.

    Args:
        content_type: As `check_content_type` returns it.
        body: The request's.
        limits: The server's.

    Raises:
        BadRequest: it is not one, or larger than the limits.
    """
    if content_type == JSON_TYPE:
        request = _parse_object(body, limits, allowed={"images", "prompts", "metadata"})
        prompts, metadata = _texts(request, limits)
        images = _decode_pictures(_strings(request, "images"), len(prompts), limits)
    else:
        tensors = _load_tensors(body)
        request = _parse_object(tensors["texts"].numpy().tobytes(), limits, allowed={"prompts", "metadata"})
        prompts, metadata = _texts(request, limits)
        images = _check_images(tensors["images"], len(prompts), limits)
    return images, prompts, metadata


def _parse_object(text: bytes, limits: Limits, *, allowed: set[str]) -> dict[str, object]:
    most, count = _VALUES_PER_IMAGE * limits.max_batch, sum(text.count(mark) for mark in b",[{")
    if count > most:  # about as many values, of which one of two letters takes up to 70 bytes of memory
        raise BadRequest(f"prompts and metadata may have {most} commas and opening brackets together, got {count}", 413)
    try:
        parsed = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}", 400) from error
    if not isinstance(parsed, dict):
        raise BadRequest(f"the body must be a JSON object with {sorted(allowed)}, got {type(parsed).__name__}")
    if parsed.keys() - allowed:
        raise BadRequest(f"unknown key {sorted(parsed.keys() - allowed)[0]!r}: allowed are {sorted(allowed)}")
    return parsed


def _strings(request: Mapping[str, object], key: str) -> list[str]:
    values = request.get(key)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise BadRequest(f"{key!r} must be a list of strings")
    return values


def _texts(request: Mapping[str, object], limits: Limits) -> tuple[list[str], list[Mapping[str, object]] | None]:
    prompts, metadata = _strings(request, "prompts"), request.get("metadata")
    if not 1 <= len(prompts) <= limits.max_batch:
        raise BadRequest(f"a request may have 1 to {limits.max_batch} prompts, got {len(prompts)}")
    for index, prompt in enumerate(prompts):
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise BadRequest(f"prompt {index} is not Unicode text: it has half of a surrogate pair")
    if metadata is None:
        return prompts, None
    if not isinstance(metadata, list) or not all(isinstance(entry, dict) for entry in metadata):
        raise BadRequest("'metadata' must be a list of objects, or null")
    if len(metadata) != len(prompts):
        raise BadRequest(f"'metadata' must have one object per prompt, {len(prompts)}, got {len(metadata)}")
    return prompts, metadata


def _decode_pictures(texts: Sequence[str], num_prompts: int, limits: Limits) -> Tensor:
    if len(texts) != num_prompts:
        raise BadRequest(f"a request must have as many images as prompts, got {len(texts)} and {num_prompts}")
    pictures = []
    for index, text in enumerate(texts):
        try:
            pictures.append(Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG", "JPEG"]))
        except binascii.Error as error:
            raise BadRequest(f"image {index} is not base64: {error}") from error
        except Exception as error:  # Pillow raises whatever a file's error leads to
            raise BadRequest(f"image {index} is not a PNG or JPEG file: {error}") from error
    _check_pixels(sum(picture.width * picture.height for picture in pictures), limits)
    arrays = []
    for index, picture in enumerate(pictures):
        if picture.mode != "RGB" or picture.size != pictures[0].size:
            raise BadRequest(
                f"all images must be RGB with 8 bits per channel and of one size, but image {index} is "
                f"{picture.mode}, {picture.width}×{picture.height}, and image 0 {'×'.join(map(str, pictures[0].size))}"
            )
        try:
            arrays.append(np.asarray(picture))
        except Exception as error:  # as above
            raise BadRequest(f"image {index} cannot be unpacked: {error}") from error
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous().float() / 255


def _load_tensors(body: bytes) -> dict[str, Tensor]:
    try:
        tensors = safetensors.torch.load(body)
    except Exception as error:  # its own errors, and torch's for types and shapes that torch does not have
        raise BadRequest(f"the body is not a safetensors file: {error}", 400) from error
    if tensors.keys() != {"images", "texts"}:
        raise BadRequest(f"the safetensors file must hold 'images' and 'texts', got {sorted(tensors)}")
    if tensors["texts"].dtype != torch.uint8 or tensors["texts"].ndim != 1:
        raise BadRequest("'texts' must be the UTF-8 bytes of JSON, as a vector of uint8")
    return tensors


def _check_images(images: Tensor, num_prompts: int, limits: Limits) -> Tensor:
    shape = list(images.shape)
    if images.dtype != torch.float32 or len(shape) != 4 or shape[:2] != [num_prompts, 3] or 0 in shape:
        raise BadRequest(
            f"'images' must be float32 [{num_prompts}, 3, H, W] for the prompts, got {images.dtype} {shape}"
        )
    _check_pixels(shape[0] * shape[2] * shape[3], limits)
    if not ((images >= 0) & (images <= 1)).all():
        raise BadRequest("'images' must lie in [0, 1]")
    return images


def _check_pixels(pixels: int, limits: Limits) -> None:
    if pixels > limits.max_pixels:
        raise BadRequest(f"a request's images may have {limits.max_pixels} pixels together, got {pixels}", 413)
