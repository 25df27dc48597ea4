"""A reward that is computed in another process or on another machine, by `python -m diffusion_gym.rewards.server`."""

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar, get_args

import torch
from torch import Tensor
from typing_extensions import override

from ..checks import checked_integer
from .base import Metadata, Reward, RewardOutput, check_prompts
from .connection import Connection, RemoteRewardError, ServedReward
from .exchange import Unavailable, Unreachable, in_parallel
from .wire import TOKEN_VARIABLE, ImageFormat, checked_token, encode_request

T = TypeVar("T")

logger = logging.getLogger(__name__)

_FIRST_WAIT, _LONGEST_WAIT = 0.1, 10.0


class RemoteReward(Reward):
    """The reward of a server; by name `make_reward("remote://host:port")`.

    Name, unit and range are the server's, which is asked for them at once: then it has to be there. Batches are split
    to what the server takes at a time, and each part is asked for until it is answered: a server that is away (refuses
    connections, hangs, dies in the middle, is busy, answers 5xx) is asked again after 0.1 s, 0.2 s, 0.4 s, … 10 s, with
    a warning in the log, so that an outage costs time and no sample. An answer that makes no sense raises an error
    that names the server.

    Rewards are those of the same reward in process: bit for bit with "safetensors" and, for a reward that looks at
    8-bit pixels, with "png" too; other rewards see what "png" rounds to 1/255.

    Args:
        url: The server's address, "remote://host:port" ("https://…" for one behind a proxy); or those of several that
            serve the same reward: they share the parts of a batch, and stand in for each other; one that fails is asked
            after the others for the rest of the batch.
        token: The token that the servers ask for; None: the environment variable DIFFUSION_GYM_REWARD_TOKEN, if it is
            set. It is not encrypted on its way to "remote://…": a warning says so where that is another machine.
        timeout: The seconds that the answer to a part may take in all.
        max_retry_seconds: The time after its first failure in which a part is asked for again; infinity: for ever.
        image_format: The format of images: "png" (lossless in 8 bits), "jpeg" (with loss), "safetensors" (float32).
        jpeg_quality: libjpeg's, 1 to 95.

    Attributes:
        num_retries: The rounds in which servers had to be asked again so far.

    Raises:
        ValueError: an argument is out of its range, or the servers' rewards differ.
        RemoteRewardError: there is no connection to a server, which is not waited for; or, then and when it is called:
            a server cannot be had for `max_retry_seconds`, or answers something else than a reward.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        token: str | None = None,
        timeout: float = 120.0,
        max_retry_seconds: float = 600.0,
        image_format: ImageFormat = "png",
        jpeg_quality: int = 95,
    ) -> None:
        urls = [url] if isinstance(url, str) else list(url)
        token = checked_token(os.environ.get(TOKEN_VARIABLE) if token is None else token)
        if not urls:
            raise ValueError("a remote reward needs the address of at least one server")
        if not max_retry_seconds >= 0:
            raise ValueError(f"max_retry_seconds must be at least 0, got {max_retry_seconds}")
        if image_format not in get_args(ImageFormat):
            raise ValueError(f"image_format must be one of {get_args(ImageFormat)}, got {image_format!r}")
        if not 1 <= checked_integer("jpeg_quality", jpeg_quality) <= 95:
            raise ValueError(f"jpeg_quality must be in 1 … 95, got {jpeg_quality}")
        self.max_retry_seconds = max_retry_seconds
        self.image_format: ImageFormat = image_format
        self.jpeg_quality = jpeg_quality
        self.num_retries = 0
        self._jitter = random.Random()
        self._connections = [Connection(address, token=token, timeout=timeout) for address in urls]
        self._served = [
            self._ask([connection], _first_info, set(), threading.Event()) for connection in self._connections
        ]
        first = self._served[0]
        self.name, self.unit, self.range = first.name, first.unit, first.range
        for address, served in zip(urls, self._served, strict=True):
            if (served.name, served.unit, served.range) != (self.name, self.unit, self.range):
                raise ValueError(f"the servers must serve one reward: {urls[0]} has {first}, {address} has {served}")

    @override
    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None
    ) -> RewardOutput:
        check_prompts(images, prompts)
        failed: set[Connection] = set()

        def score(numbered: tuple[int, tuple[str, bytes, int]], over: threading.Event) -> RewardOutput:
            """Return the rewards of one part, from the server whose turn it is or from another."""
            index, part = numbered
            turn = index % len(self._connections)
            order, expected = self._connections[turn:] + self._connections[:turn], self._served[turn]
            return self._ask(order, lambda connection: connection.score(*part, expected), failed, over)

        parts = enumerate(self._parts(images, prompts, metadata))
        outputs = in_parallel(score, parts, num_threads=len(self._connections))
        if any(output.extras.keys() != outputs[0].extras.keys() for output in outputs):
            raise RemoteRewardError(f"the servers {[one.url for one in self._connections]} answered different extras")
        values = torch.cat([output.values for output in outputs]).to(images.device)
        extras = {name: torch.cat([output.extras[name] for output in outputs]) for name in outputs[0].extras}
        return RewardOutput(values, {name: numbers.to(images.device) for name, numbers in extras.items()})

    def _parts(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] | None, largest: int | None = None
    ) -> Iterator[tuple[str, bytes, int]]:
        """Yield requests (content type, body, number of images) that keep to all servers' limits, in order."""
        limits = [served.limits for served in self._served]
        pixels = images.shape[-2] * images.shape[-1]
        size = largest or min(min(limit.max_batch, max(1, limit.max_pixels // pixels)) for limit in limits)
        for start in range(0, len(images), size):
            rows = slice(start, start + size)
            part = (images[rows], prompts[rows], None if metadata is None else metadata[rows])
            type_, body = encode_request(*part, image_format=self.image_format, jpeg_quality=self.jpeg_quality)
            num_images = len(part[0])
            if len(body) > min(limit.max_bytes for limit in limits) and num_images > 1:
                yield from self._parts(*part, largest=(num_images + 1) // 2)
            else:
                yield type_, body, num_images

    def _ask(
        self,
        connections: Sequence[Connection],
        ask: Callable[[Connection], T],
        failed: set[Connection],
        over: threading.Event,
    ) -> T:
        """Return the answer of the first of these servers that gives one; they are asked again until time is over.

        Servers in `failed`, which the parts of a batch share, failed the last time and are asked after the others.
        """
        began, rounds = None, 0
        while True:
            requested_wait, failures = 0.0, []
            for connection in sorted(connections, key=lambda server: server in failed):
                if over.is_set():
                    raise RemoteRewardError("the reward server is asked no more: another part of the batch has failed")
                try:
                    answer = ask(connection)
                    failed.discard(connection)
                    return answer
                except Unavailable as unavailable:
                    logger.warning("reward server %s: %s", connection.url, unavailable)
                    failed.add(connection)
                    failures.append(f"{connection.url}: {unavailable}")
                    requested_wait = max(requested_wait, unavailable.seconds)
            began = time.monotonic() if began is None else began
            wait = min(_FIRST_WAIT * 2 ** min(rounds, 16), _LONGEST_WAIT) * self._jitter.uniform(0.75, 1.0)
            wait = max(wait, min(requested_wait, _LONGEST_WAIT))
            rounds += 1
            left = self.max_retry_seconds - (time.monotonic() - began)
            if wait > left:
                raise RemoteRewardError(
                    f"no reward server answered in {rounds} rounds over {time.monotonic() - began:.0f} s "
                    f"(max_retry_seconds={self.max_retry_seconds:g}): {'; '.join(failures)}"
                )
            self.num_retries += 1
            logger.warning(
                "no reward server answered; asked again in %.1f s, and for %.0f s more (max_retry_seconds=%g)",
                *(wait, left, self.max_retry_seconds),
            )
            over.wait(wait)


def _first_info(connection: Connection) -> ServedReward:
    """Return a server's description of its reward, when it is asked for the first time.

    Raises:
        Unavailable, RemoteRewardError: as `Connection.info`; where there is no connection, the latter.
    """
    try:
        return connection.info()
    except Unreachable as error:
        raise RemoteRewardError(
            f"there is no connection to the reward server {connection.url}: {error}. It has to be there first, under "
            "this address (python -m diffusion_gym.rewards.server --reward ...); later outages are waited for"
        ) from error
