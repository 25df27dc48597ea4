"""Exchanges over HTTP with a limit on their time and size; and many of them at once."""

import base64
import http.client
import ipaddress
import json
import re
import socket
import ssl
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from ..checks import checked_number

S = TypeVar("S")
T = TypeVar("T")

_CONNECT_SECONDS = 10.0
_PORTS = {"remote": 8085, "http": 80, "https": 443}


class Unavailable(Exception):  # noqa: N818
    """A server that may answer if it is asked again.

    Args:
        message: The reason.
        seconds: The time after which it wants to be asked again.
    """

    def __init__(self, message: str, seconds: float = 0.0) -> None:
        super().__init__(message)
        self.seconds = seconds


class Unreachable(Unavailable):
    """A server to which there is no connection: no such name, nothing that listens there, no way to it."""


class Refused(Exception):  # noqa: N818
    """A server that would say the same if it were asked again."""


class Garbage(Exception):  # noqa: N818
    """An answer that makes no sense."""


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a server that listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Endpoint:
    """The address of requests: https goes through the proxy of the variable https_proxy, all else directly.

    Args:
        url: "http://host:port/path", "https://…", or a reward server's "remote://host:port".
        timeout: The seconds that a whole exchange may take.
        has_token: Whether requests carry a token: if others can read it on its way, a warning says so.

    Raises:
        ValueError: the address is not one, the proxy's is none, or `timeout` is not positive.
    """

    def __init__(self, url: str, *, timeout: float, has_token: bool = False) -> None:
        parts, port = urlsplit(url), None
        with suppress(ValueError):  # a port that is no number is refused below
            port = parts.port or _PORTS.get(parts.scheme)
        extra_parts = parts.username or parts.query or parts.fragment
        if parts.scheme not in _PORTS or not (parts.hostname and port) or extra_parts:
            raise ValueError(
                f"a server's address is like remote://host:port, http://host:port/path or https://host, got {url!r}"
            )
        self._is_https = parts.scheme == "https"
        self._host, self._port = parts.hostname, port
        self._path = parts.path.rstrip("/")
        self._timeout = checked_number("timeout", timeout, "(0, inf)")
        self._proxy = _proxy_for(parts.hostname) if self._is_https else None
        if has_token and not self._is_https and not is_loopback(parts.hostname):
            warnings.warn(
                f"the token goes to {url} unencrypted, and everybody on the way can read it: put the server behind a "
                "proxy that speaks https, or reach it through ssh (ssh -L) as 127.0.0.1",
                stacklevel=4,
            )

    def check(self) -> None:
        """Check that the server takes connections.

        Raises:
            Unreachable: it does not.
            Refused: it is not who it says.
        """
        connection = self._connection()
        try:
            _connect(connection)
        finally:
            connection.close()

    def ask(
        self, method: str, path: str, *, headers: Mapping[str, str], body: bytes | None = None, max_bytes: int
    ) -> bytes:
        """Return the body of the server's answer, of at most `max_bytes`.

        Raises:
            Unavailable: it cannot be reached now (`Unreachable`), has no time, or failed.
            Refused: it answers with a status that is not 200, and does not mean "later"; or is not who it says.
            Garbage: it does not speak HTTP, or answers more than `max_bytes`.
        """
        began = time.monotonic()
        try:
            status, after, answer = self._exchange(method, self._path + path, headers, body, max_bytes)
        except (OSError, http.client.HTTPException) as error:
            if time.monotonic() - began >= self._timeout:
                raise Unavailable(f"no whole answer within {self._timeout:g} s (timeout=… allows more)") from error
            if isinstance(error, OSError | http.client.IncompleteRead):
                raise Unavailable(f"{type(error).__name__}: {error}") from error
            raise Garbage(f"{error!r}, which is not HTTP") from error
        if status >= 500 or status in (408, 429):
            seconds = float(after) if after and re.fullmatch(r"\d+(\.\d+)?", after) else 0.0
            raise Unavailable(f"status {status}: {_error_of(answer)}", seconds)
        if status != 200:
            raise Refused(f"refused with status {status}: {_error_of(answer)}")
        if len(answer) > max_bytes:
            raise Garbage(f"more than {max_bytes} bytes: {answer[:80]!r}")
        return answer

    def _exchange(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None, max_bytes: int
    ) -> tuple[int, str | None, bytes]:
        """Return the answer's status, its Retry-After and its body, of which at most `max_bytes` + 1 are read.

        It ends within `timeout`, however slowly bytes drip.
        """
        connection = self._connection()
        try:
            _connect(connection)
            connection.sock.settimeout(self._timeout)
            deadline = threading.Timer(self._timeout, _hang_up, [connection.sock])
            deadline.daemon = True
            began = time.monotonic()
            deadline.start()
            try:
                # A server may refuse a body before it has read all of it: its answer comes all the same.
                with suppress(BrokenPipeError, ConnectionResetError):
                    connection.request(method, path, body=body, headers=dict(headers))
                response = connection.getresponse()
                answer = response.read(max_bytes + 1)
                headers_were_cut = response.length is None and not response.chunked and not answer
                if len(answer) <= max_bytes and (response.length or headers_were_cut):
                    raise http.client.IncompleteRead(answer, response.length)
                if time.monotonic() - began >= self._timeout:  # an answer without a length seems to end by hanging up
                    raise TimeoutError
            finally:
                deadline.cancel()
        finally:
            connection.close()
        return response.status, response.headers.get("Retry-After"), answer

    def _connection(self) -> http.client.HTTPConnection:
        seconds = min(self._timeout, _CONNECT_SECONDS)
        if not self._is_https:
            return http.client.HTTPConnection(self._host, self._port, timeout=seconds)
        if self._proxy is None:
            return http.client.HTTPSConnection(self._host, self._port, timeout=seconds)
        through = http.client.HTTPSConnection(self._proxy.host, self._proxy.port, timeout=seconds)
        through.set_tunnel(self._host, self._port, headers=self._proxy.headers)
        return through


@dataclass(frozen=True)
class _Proxy:
    """A proxy's address, and the headers that it asks for."""

    host: str
    port: int
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


def _proxy_for(host: str) -> _Proxy | None:
    """Return the proxy that the environment names for https, with or without "http://", a user and a password.

    Raises:
        ValueError: it is no address of an HTTP proxy.
    """
    address = getproxies().get("https", "")
    if not address or proxy_bypass(host):
        return None
    parts, port = urlsplit(address if "://" in address else f"http://{address}"), None
    with suppress(ValueError):  # a port that is no number is refused below
        port = parts.port or 80
    if parts.scheme not in ("http", "https") or not (parts.hostname and port):
        shown = address.rpartition("@")[2]
        raise ValueError(f"the variable https_proxy must be like http://host:port or host:port, got {shown!r}")
    if parts.username is None:
        return _Proxy(parts.hostname, port)
    credentials = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return _Proxy(
        parts.hostname, port, {"Proxy-Authorization": f"Basic {base64.b64encode(credentials.encode()).decode()}"}
    )


def _connect(connection: http.client.HTTPConnection) -> None:
    try:
        connection.connect()
    except ssl.SSLCertVerificationError as error:
        raise Refused(f"is not who it says: {error}") from error
    except OSError as error:
        raise Unreachable(f"{type(error).__name__}: {error}") from error


def _hang_up(opened: socket.socket) -> None:
    with suppress(OSError):
        opened.shutdown(socket.SHUT_RDWR)


def _error_of(answer: bytes) -> str:
    """Return the error message of a failed answer, or the beginning of the answer where it has none."""
    try:
        return str(json.loads(answer)["error"])[:500]
    except (ValueError, RecursionError, KeyError, TypeError):
        return repr(answer[:200].decode("utf-8", "replace"))


def in_parallel(function: Callable[[S, threading.Event], T], items: Iterable[S], *, num_threads: int) -> list[T]:
    """Return the function's result for each item; a free thread takes the next item, and an error ends them all.

    Args:
        function: Takes an item, and an event that is set when its result is no longer wanted: its waits end then.
        items: The items.
        num_threads: The most items at once; with 1 the calling thread does the work.
    """
    over, taking = threading.Event(), threading.Lock()
    remaining, results = enumerate(items), dict[int, T]()

    def work() -> None:
        while not over.is_set():
            with taking:
                taken = next(remaining, None)
            if taken is None:
                return
            index, item = taken
            results[index] = function(item, over)

    if num_threads == 1:
        work()
    else:
        pool = ThreadPoolExecutor(num_threads)
        try:
            workers = [pool.submit(work) for _ in range(num_threads)]
            for worker in wait(workers, return_when=FIRST_EXCEPTION).done:
                worker.result()
        finally:
            over.set()
            pool.shutdown()
    return [results[index] for index in range(len(results))]
