"""A server that gives a reward to trainings in other processes, or on other machines.

    python -m diffusion_gym.rewards.server --reward aesthetic --device cuda:1

and there `gym.make_vec(…, reward="remote://127.0.0.1:8085")`. `diffusion_gym.rewards.wire` describes their messages.
A server listens on this machine alone unless it has a token, which clients have to show. Messages are not encrypted:
where the network is not to be trusted, reach the server through ssh (`ssh -L 8085:127.0.0.1:8085 host`) or a proxy that
speaks https. Without a token it answers no web page of this machine's browsers: requests have to name this machine as
their host, and no origin.
"""

import argparse
import asyncio
import hmac
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import Tensor

try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.concurrency import run_in_threadpool
    from fastapi.responses import JSONResponse
    from starlette.requests import ClientDisconnect
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as missing:
    raise ImportError('the reward server needs FastAPI: pip install "diffusion-gym[server]"') from missing

from .. import __version__, transfer
from ..checks import checked_integer, checked_number
from .base import Reward, RewardOutput, check_reward, checked_output
from .connection import RemoteRewardError
from .exchange import is_loopback
from .model_based import ModelReward, checked_device
from .names import make_reward, named_class
from .wire import PROTOCOL, TOKEN_VARIABLE, BadRequest, Limits, check_content_type, checked_token, decode_request

logger = logging.getLogger(__name__)

_IDLE_SECONDS = 10.0
_UNREAD_LOOKS = 3
_MAX_CONNECTIONS = 256
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class RewardServer:
    """One reward, asked by one request at a time; `app` is its ASGI application.

    Args:
        reward: The reward to serve. One that remembers (`state_dict`) is refused: its memory would be lost with the
            server.
        device: The device of the images that the reward sees; None: the CPU.
        token: The token that clients have to show; None: none.
        limits: The largest request.
        max_queue: The most requests that are read, wait or are worked on at once; one more is answered 503.
        read_seconds: The longest that reading a request may take.

    Raises:
        ValueError: the reward remembers, the token is empty or not ASCII, there is no such device, or a number is not
            positive.
    """

    def __init__(
        self,
        reward: Reward,
        *,
        device: torch.device | str | None = None,
        token: str | None = None,
        limits: Limits | None = None,
        max_queue: int = 8,
        read_seconds: float = 60.0,
    ) -> None:
        if reward.state_dict():
            raise ValueError(f"{reward.name} remembers what it saw, and would lose it: apply it where the training is")
        check_reward(reward)
        self.reward = reward
        self.device = checked_device(device or "cpu")
        self.limits = limits or Limits()
        self.max_queue = checked_integer("max_queue", max_queue, at_least=1)
        self.read_seconds = checked_number("read_seconds", read_seconds, "(0, inf)")
        self._authorization = None if checked_token(token) is None else f"Bearer {token}".encode()
        self._turn = asyncio.Lock()
        self._num_requests = 0
        self.app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
        self.app.add_api_route("/health", self._health, methods=["GET"], response_model=None)
        self.app.add_api_route("/info", self._info, methods=["GET"], response_model=None)
        self.app.add_api_route("/score", self._score, methods=["POST"], response_model=None)

    @property
    def has_token(self) -> bool:
        """Whether clients have to show a token."""
        return self._authorization is not None

    async def _health(self, request: Request) -> JSONResponse:
        return self._refused(request) or JSONResponse({"status": "ok", "requests": self._num_requests})

    async def _info(self, request: Request) -> JSONResponse:
        if refusal := self._refused(request) or self._unauthorized(request):
            return refusal
        return JSONResponse(
            {
                "name": self.reward.name,
                "unit": self.reward.unit,
                "range": [bound if math.isfinite(bound) else None for bound in self.reward.range],
                "version": __version__,
                "protocol": PROTOCOL,
                **vars(self.limits),
            }
        )

    async def _score(self, request: Request) -> JSONResponse:
        if refusal := self._refused(request) or self._unauthorized(request):
            return refusal
        if self._num_requests >= self.max_queue:
            return _failure(503, f"{self.max_queue} requests are waiting already", {"Retry-After": "1"})
        self._num_requests += 1
        try:
            content_type = check_content_type(request.headers.get("content-type", ""))
            body = await asyncio.wait_for(self._read(request), self.read_seconds)
            async with self._turn:
                if await request.is_disconnected():
                    return _failure(400, "the client has gone")
                return await run_in_threadpool(self._answer, content_type, body)
        except BadRequest as error:
            return _failure(error.status, str(error))
        except asyncio.TimeoutError:
            return _failure(408, f"the request did not come within {self.read_seconds:g} s")
        except ClientDisconnect:
            return _failure(400, "the client has gone")
        finally:
            self._num_requests -= 1

    def _refused(self, request: Request) -> JSONResponse | None:
        """Return the refusal of a web page's request, if the server has no token; None for other requests."""
        host, origin = request.headers.get("host"), request.headers.get("origin")
        if self.has_token or (origin is None and (host is None or is_loopback(_name_of(host)))):
            return None
        return _failure(
            403,
            "without a token the server answers programs of this machine alone: requests to 127.0.0.1 or localhost "
            f"that no web page makes. This one is to the host {host!r}, from the origin {origin!r}",
        )

    def _unauthorized(self, request: Request) -> JSONResponse | None:
        credentials = request.headers.get("authorization", "").encode("latin-1")
        if self._authorization is None or hmac.compare_digest(credentials, self._authorization):
            return None
        message = f"the token is missing or wrong: give the server's as token=…, or in the variable {TOKEN_VARIABLE}"
        return _failure(401, message, {"WWW-Authenticate": "Bearer"})

    async def _read(self, request: Request) -> bytes:
        """Return the body; one that is larger than the limit is never held in memory."""
        too_large = BadRequest(f"a request may have {self.limits.max_bytes} bytes", 413)
        if int(request.headers.get("content-length", 0)) > self.limits.max_bytes:
            raise too_large
        body = bytearray()
        async for chunk in request.stream():
            if len(body) + len(chunk) > self.limits.max_bytes:
                raise too_large
            body += chunk
        return bytes(body)

    def _answer(self, content_type: str, body: bytes) -> JSONResponse:
        """Return the answer to a request that has been read; called in a thread of its own."""
        images, prompts, metadata = decode_request(content_type, body, self.limits)
        try:
            with torch.no_grad():
                output = checked_output(self.reward, images.to(self.device), prompts, metadata)
            return JSONResponse(self._described(output))
        except ValueError as error:  # the same request would fail again
            logger.warning("the reward %s refused a request: %s", self.reward.name, error)
            raise BadRequest(f"the reward {self.reward.name!r} refused it: {error}") from error
        except Exception as error:  # the server outlives it: memory may have run out, and be free the next time
            logger.exception("the reward %s failed", self.reward.name)
            return _failure(500, f"the reward {self.reward.name!r} failed: {type(error).__name__}: {error}")

    def _described(self, output: RewardOutput) -> dict[str, object]:
        for name, values in {self.reward.name: output.values, **output.extras}.items():
            numbers = transfer.to_host(values)
            if not np.isfinite(numbers).all():
                raise ValueError(f"{name!r} should be finite numbers, and is {numbers.tolist()}")
        extras = {name: _numbers(values) for name, values in output.extras.items()}
        return {"name": self.reward.name, "values": _numbers(output.values), "extras": extras}


def _numbers(values: Tensor) -> list[float]:
    return transfer.to_host(values.float()).tolist()


def _failure(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": message}, status_code=status, headers=headers)


def _name_of(host: str) -> str:
    """Return the name in a Host header, without the port; empty where the header makes no sense."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


class _Protocol(H11Protocol):
    """uvicorn's protocol, with an end to connections that send no whole request or do not take the answer.

    Without it anybody could open ever more of them.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._unread_looks = 0
        self._next_look = self.loop.call_later(_IDLE_SECONDS, self._look, None)
        if len(self.connections) > _MAX_CONNECTIONS:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._next_look.cancel()
        super().connection_lost(exc)

    def _look(self, last_request: object) -> None:
        """End the connection if no request has begun since the last look and none is open, or no answer is taken."""
        self._unread_looks = self._unread_looks + 1 if self.transport.get_write_buffer_size() else 0
        if self._unread_looks >= _UNREAD_LOOKS:
            self.transport.abort()
            return
        if self.cycle is last_request and (self.cycle is None or self.cycle.response_complete):
            self.transport.close()
        self._next_look = self.loop.call_later(_IDLE_SECONDS, self._look, self.cycle)


def configure(server: RewardServer, host: str, port: int) -> uvicorn.Config:
    """Return uvicorn's configuration for a reward server."""
    return uvicorn.Config(
        server.app,
        host=host,
        port=port,
        http=_Protocol,
        ws="none",
        lifespan="off",
        access_log=False,
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_graceful_shutdown=10,
    )


def serve(server: RewardServer, *, host: str = "127.0.0.1", port: int = 8085) -> None:
    """Serve until the process is told to stop.

    Raises:
        ValueError: other machines could reach it, and it has no token.
    """
    if not is_loopback(host) and not server.has_token:
        raise ValueError(
            f"on {host} others can reach the server: write a token into a file and give --token-file, or set "
            f"{TOKEN_VARIABLE}; or listen on 127.0.0.1"
        )
    uvicorn.Server(configure(server, host, port)).run()


def _json_object(text: str) -> dict[str, object]:
    parsed = json.loads(text)
    if not isinstance(parsed, dict):
        raise argparse.ArgumentTypeError(f'must be a JSON object like {{"clip": "/models/clip"}}, got {text}')
    return parsed


def _parser() -> argparse.ArgumentParser:
    defaults = Limits()
    parser = argparse.ArgumentParser(prog="python -m diffusion_gym.rewards.server", description="Serve a reward.")
    parser.add_argument("--reward", required=True, help="its name, as in make_reward, or one's own: module:function")
    parser.add_argument("--options", type=_json_object, default={}, help='its keywords: {"clip": "/models/clip"}')
    parser.add_argument("--device", default="cpu", help="where it computes: cuda:1")
    parser.add_argument("--dtype", choices=_DTYPES, help="the type that its network computes in")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on")
    parser.add_argument("--port", type=int, default=8085)
    parser.add_argument("--token-file", type=Path, help=f"a file with the token; or set {TOKEN_VARIABLE}")
    parser.add_argument("--max-batch", type=int, default=defaults.max_batch, help="images of a request")
    parser.add_argument("--max-pixels", type=int, default=defaults.max_pixels, help="pixels of its images together")
    parser.add_argument("--max-bytes", type=int, default=defaults.max_bytes, help="bytes of its body")
    parser.add_argument("--max-queue", type=int, default=8, help="requests at once, the waiting ones included")
    parser.add_argument("--read-seconds", type=float, default=60.0, help="the longest that reading a request may take")
    return parser


def _load_reward(name: str, options: Mapping[str, object], *, device: str, dtype: str | None) -> Reward:
    """Return the reward; a network's is loaded whole before the first request comes."""
    if options.keys() & {"device", "dtype"}:
        raise ValueError("device and dtype are not given among the options, but as --device and --dtype")
    kind = named_class(name)
    keywords = {**options, **({"device": device} if kind is not None and issubclass(kind, ModelReward) else {})}
    if dtype is not None:
        keywords["dtype"] = _DTYPES[dtype]
    reward = make_reward(name, options=keywords)
    if isinstance(reward, ModelReward):
        reward.load_all()
    return reward


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve the reward that the command line names."""
    parser = _parser()
    settings = parser.parse_args(arguments)
    try:
        token = settings.token_file.read_text().strip() if settings.token_file else os.environ.get(TOKEN_VARIABLE)
        reward = _load_reward(settings.reward, settings.options, device=settings.device, dtype=settings.dtype)
        limits = Limits(max_batch=settings.max_batch, max_pixels=settings.max_pixels, max_bytes=settings.max_bytes)
        served = {"max_queue": settings.max_queue, "read_seconds": settings.read_seconds}
        server = RewardServer(reward, device=settings.device, token=token, limits=limits, **served)
        serve(server, host=settings.host, port=settings.port)
    except (TypeError, ValueError, OSError, RemoteRewardError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
