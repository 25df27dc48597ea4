"""One reward server as its clients see it: an exchange with it gives a checked answer, or says what went wrong."""

import http.client
import json
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

import torch

from .base import RewardOutput
from .wire import PROTOCOL, Limits

_CONNECT_SECONDS = 10.0
_INFO_BYTES = 2**16
_FLOAT32_MAX = torch.finfo(torch.float32).max
_PORTS = {"remote": 8085, "http": 80, "https": 443}


class RemoteRewardError(RuntimeError):
    """A reward server that answers what is no answer, refuses a request, or has been away for too long."""


class Unavailable(Exception):  # noqa: N818
    """A server that may answer if it is asked again.

    Args:
        message: What happened.
        seconds: When it wants to be asked again.
    """

    def __init__(self, message: str, seconds: float = 0.0) -> None:
        super().__init__(message)
        self.seconds = seconds


@dataclass(frozen=True)
class ServedReward:
    """What a server says of its reward (`GET /info`)."""

    name: str
    unit: str
    range: tuple[float, float]
    limits: Limits


class Connection:
    """The way to a server.

    Args:
        url: "remote://host:port" or "http://host:port/path"; "https://…" for one behind a proxy.
        token: What the server asks for.
        timeout: The seconds that a whole exchange may take.

    Raises:
        ValueError: the address is not one.
    """

    def __init__(self, url: str, *, token: str | None, timeout: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in _PORTS or not parts.hostname or parts.username or parts.query or parts.fragment:
            raise ValueError(f"a reward server's address is like remote://host:port or https://host/path, got {url!r}")
        self.url = url
        self._connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._address = (parts.hostname, parts.port or _PORTS[parts.scheme])
        self._path = parts.path.rstrip("/")
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._timeout = timeout

    def info(self) -> ServedReward:
        """Return what the server says of its reward.

        Raises:
            Unavailable: it cannot be reached now.
            RemoteRewardError: it is no reward server, one of another protocol, or the token is wrong.
        """
        said = self._ask("GET", "/info", max_bytes=_INFO_BYTES)
        if said.get("protocol") != PROTOCOL:
            raise self._garbage(f"protocol {said.get('protocol')!r} instead of {PROTOCOL} (one of its version?)")
        try:
            low, high = (None if bound is None else float(bound) for bound in said["range"])  # type: ignore[attr-defined]
            limits = Limits(**{key: said[key] for key in ("max_batch", "max_pixels", "max_bytes")})  # type: ignore[arg-type]
            name, unit = said["name"], said["unit"]
        except (KeyError, TypeError, ValueError) as error:
            raise self._garbage(f"an /info with {type(error).__name__}: {error}") from error
        if not isinstance(name, str) or not isinstance(unit, str):
            raise self._garbage(f"an /info whose name and unit are {name!r} and {unit!r}")
        bounds = (-float("inf") if low is None else low, float("inf") if high is None else high)
        return ServedReward(name, unit, bounds, limits)

    def score(self, content_type: str, body: bytes, num_images: int, expected: ServedReward) -> RewardOutput:
        """Return the rewards [num_images] on the CPU that a request asks for.

        Raises:
            Unavailable: the server cannot be reached now, has no time, or failed.
            RemoteRewardError: it refuses the request, or answers something else than that many finite numbers.
        """
        said = self._ask("POST", "/score", max_bytes=expected.limits.max_answer_bytes, body=body, type_=content_type)
        if said.get("name") != expected.name:
            raise self._garbage(f"the reward {said.get('name')!r}, which was {expected.name!r} before")
        extras = said.get("extras")
        if not isinstance(extras, dict):
            raise self._garbage(f"extras {extras!r:.80}")
        values = self._numbers("values", said.get("values"), num_images)
        return RewardOutput(values, {name: self._numbers(name, given, num_images) for name, given in extras.items()})

    # ------------------------------------------------------------------ its parts
    def _numbers(self, name: str, values: object, num: int) -> torch.Tensor:
        if not isinstance(values, list) or len(values) != num:
            raise self._garbage(f"{name!r} that are not {num} numbers, one per image: {values!r:.80}")
        for value in values:
            if type(value) not in (int, float) or not abs(value) <= _FLOAT32_MAX:
                raise self._garbage(f"{name!r} with {value!r:.80}, which is not a finite float32")
        return torch.tensor(values, dtype=torch.float32)

    def _ask(
        self, method: str, path: str, *, max_bytes: int, body: bytes | None = None, type_: str | None = None
    ) -> Mapping[str, object]:
        """Return the JSON object that the server answers."""
        headers = self._headers | ({} if type_ is None else {"Content-Type": type_})
        began = time.monotonic()
        try:
            status, retry_after, answer = self._exchange(method, self._path + path, headers, body, max_bytes)
        except ssl.SSLCertVerificationError as error:
            raise RemoteRewardError(f"the reward server {self.url} is not who it says: {error}") from error
        except (OSError, http.client.HTTPException) as error:
            if time.monotonic() - began >= self._timeout:
                raise Unavailable(f"no whole answer within {self._timeout:g} s (timeout=… allows more)") from error
            if isinstance(error, OSError | http.client.IncompleteRead):
                raise Unavailable(f"{type(error).__name__}: {error}") from error
            raise self._garbage(f"{error!r}, which is not HTTP") from error
        if status == 200:
            return self._parsed(answer)
        message = _error_of(answer)
        if status >= 500 or status in (408, 429):
            seconds = float(retry_after) if retry_after and retry_after.isdecimal() else 0.0
            raise Unavailable(f"status {status}: {message}", seconds)
        raise RemoteRewardError(f"the reward server {self.url} refused the request with status {status}: {message}")

    def _exchange(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None, max_bytes: int
    ) -> tuple[int, str | None, bytes]:
        """Return the answer's status, its Retry-After and its body; within `timeout`, however slowly bytes drip."""
        connection = self._connect(*self._address, timeout=min(self._timeout, _CONNECT_SECONDS))
        try:
            connection.connect()
            connection.sock.settimeout(self._timeout)
            deadline = threading.Timer(self._timeout, _hang_up, [connection.sock])
            deadline.daemon = True
            deadline.start()
            try:
                # A server may refuse a body before it has read all of it: what it says comes all the same.
                with suppress(BrokenPipeError, ConnectionResetError):
                    connection.request(method, path, body=body, headers=dict(headers))
                response = connection.getresponse()
                answer = response.read(max_bytes + 1)
                has_no_end = response.length is None and not response.chunked  # its headers were cut off
                if len(answer) <= max_bytes and (response.length or has_no_end):
                    raise http.client.IncompleteRead(answer, response.length)
            finally:
                deadline.cancel()
        finally:
            connection.close()
        if len(answer) > max_bytes:
            raise self._garbage(f"more than {max_bytes} bytes: {answer[:80]!r}")
        return response.status, response.headers.get("Retry-After"), answer

    def _parsed(self, answer: bytes) -> Mapping[str, object]:
        try:
            parsed = json.loads(answer.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise self._garbage(f"{answer[:80]!r}, which is not JSON: {error}") from error
        if not isinstance(parsed, dict):
            raise self._garbage(f"{answer[:80]!r}, which is not a JSON object")
        return parsed

    def _garbage(self, what: str) -> RemoteRewardError:
        return RemoteRewardError(f"the reward server {self.url} answered {what}")


def _hang_up(opened: socket.socket) -> None:
    with suppress(OSError):
        opened.shutdown(socket.SHUT_RDWR)


def _error_of(answer: bytes) -> str:
    """Return what an answer that is none says of itself, as far as it does."""
    try:
        parsed = json.loads(answer)
        return str(parsed["error"])[:500]
    except (ValueError, RecursionError, KeyError, TypeError):
        return repr(answer[:80])
