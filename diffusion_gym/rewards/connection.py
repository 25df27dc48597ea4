"""A client's connection to one reward server: each exchange gives a checked answer or a clear error."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .base import RewardOutput
from .exchange import Endpoint, Garbage, Refused
from .wire import PROTOCOL, Limits, answer_bytes

_INFO_BYTES = 2**16
_FLOAT32_MAX = torch.finfo(torch.float32).max


class RemoteRewardError(RuntimeError):
    """A reward server gave an answer that makes no sense, refused a request, or was away for too long."""


@dataclass(frozen=True)
class ServedReward:
    """A server's description of its reward (`GET /info`)."""

    name: str
    unit: str
    range: tuple[float, float]
    limits: Limits


class Connection:
    """The connection to a server.

    Args:
        url: "remote://host:port" or "http://host:port/path"; "https://…" for one behind a proxy.
        token: The token that the server asks for.
        timeout: The seconds that a whole exchange may take.

    Raises:
        ValueError: the address is not one.
    """

    def __init__(self, url: str, *, token: str | None, timeout: float) -> None:
        self.url = url
        self._endpoint = Endpoint(url, timeout=timeout, has_token=token is not None)
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}

    def info(self) -> ServedReward:
        """Return the server's description of its reward.

        Raises:
            Unavailable: it cannot be reached now (`Unreachable`), or has no time.
            RemoteRewardError: it is no reward server, one of another protocol, or the token is wrong.
        """
        description = self._ask("GET", "/info", max_bytes=_INFO_BYTES)
        if description.get("protocol") != PROTOCOL:
            raise self._garbage(f"protocol {description.get('protocol')!r} instead of {PROTOCOL} (one of its version?)")
        try:
            low, high = (None if bound is None else float(bound) for bound in description["range"])  # type: ignore[attr-defined]
            limits = Limits(**{key: description[key] for key in ("max_batch", "max_pixels", "max_bytes")})  # type: ignore[arg-type]
            name, unit = description["name"], description["unit"]
        except (KeyError, TypeError, ValueError) as error:
            raise self._garbage(f"an /info with {type(error).__name__}: {error}") from error
        if not isinstance(name, str) or not isinstance(unit, str) or not name or not unit:
            raise self._garbage(f"an /info whose name and unit are {name!r} and {unit!r}")
        bounds = (-float("inf") if low is None else low, float("inf") if high is None else high)
        if not bounds[0] <= bounds[1]:
            raise self._garbage(f"an /info whose range is {description['range']}")
        return ServedReward(name, unit, bounds, limits)

    def score(self, content_type: str, body: bytes, num_images: int, expected: ServedReward) -> RewardOutput:
        """Return the rewards that a request asks for, [num_images] on the CPU.

        Raises:
            Unavailable: the server cannot be reached now, has no time, or failed.
            RemoteRewardError: it refuses the request, or answers something else than that many finite numbers.
        """
        answer = self._ask("POST", "/score", max_bytes=answer_bytes(num_images), body=body, type_=content_type)
        if answer.get("name") != expected.name:
            raise self._garbage(f"the reward {answer.get('name')!r}, which was {expected.name!r} before")
        extras = answer.get("extras")
        if not isinstance(extras, dict):
            raise self._garbage(f"extras {extras!r:.80}")
        values = self._numbers("values", answer.get("values"), num_images)
        return RewardOutput(
            values, {name: self._numbers(name, numbers, num_images) for name, numbers in extras.items()}
        )

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
        try:
            answer = self._endpoint.ask(method, path, headers=headers, body=body, max_bytes=max_bytes)
        except Refused as error:
            raise RemoteRewardError(f"the reward server {self.url} {error}") from error
        except Garbage as error:
            raise self._garbage(str(error)) from error
        try:
            parsed = json.loads(answer.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise self._garbage(f"{answer[:80]!r}, which is not JSON: {error}") from error
        if not isinstance(parsed, dict):
            raise self._garbage(f"{answer[:80]!r}, which is not a JSON object")
        return parsed

    def _garbage(self, what: str) -> RemoteRewardError:
        return RemoteRewardError(f"the reward server {self.url} answered {what}")
