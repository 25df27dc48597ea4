"""A vision-language model behind an OpenAI-compatible endpoint grades each image."""

import base64
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from ..checks import checked_integer, checked_number
from .base import Metadata, Reward, RewardOutput, check_prompts, to_uint8
from .exchange import Endpoint, Garbage, Refused, Unavailable, Unreachable, in_parallel
from .jpeg import as_files
from .wire import checked_token

T = TypeVar("T")
logger = logging.getLogger(__name__)

TEMPLATE = (
    'This image was drawn for the prompt "{prompt}". How well does it show what the prompt says, and how well is it '
    "drawn? Reply with one number from {low:g} (not at all) to {high:g} (perfectly), and nothing else."
)
_THOUGHTS_END = re.compile(r"</(?:think|thinking|thought|reasoning)>")
_AROUND = r"[\s*_`\"'$]*"
_NUMBER = r"([+-]?\d+(?:\.\d+)?)"
_REPLY = re.compile(rf"{_AROUND}{_NUMBER}{_AROUND}(?:(?:/|out of){_AROUND}{_NUMBER}{_AROUND})?\.?{_AROUND}")
_REPLY_LETTERS = 100
_REPLY_BYTES = 2**22


def read_number(reply: str, greatest: float) -> float | None:
    """Return a reply's number; None where the reply, after its reasoning, holds anything but one number.

    "7", "7.", "**7**", "8/10" where 10 is the greatest number that was asked for, "<think>…</think>7".
    """
    answer = _THOUGHTS_END.split(reply)[-1].strip()
    match = _REPLY.fullmatch(answer) if len(answer) <= _REPLY_LETTERS else None
    if match is None or match.group(2) not in (None, *_written(greatest)):
        return None
    return float(match.group(1))


class VLMJudge(Reward):
    """The number that a vision-language model gives an image, asked over HTTP.

    Any server with OpenAI's POST /chat/completions will do (vLLM, SGLang, llama.cpp, a provider's). Each image goes as
    a PNG in a request of its own. When the reply is anything but a number of the range (`read_number`), or the server
    does not answer, is busy (429) or fails (5xx), it is asked again, after 1, 2, 4 … seconds or what its Retry-After
    says. After the last try, or at once at any other status, there is an error: never a made-up score.

    Args:
        base_url: The endpoint's address without "/chat/completions"; https goes through the proxy that the
            environment names (https_proxy), if it does.
        model: The model's name there; None: the only one that the server lists.
        token_variable: The environment variable that holds the token; None: the server wants none. A warning says where
            the token would go over the network unencrypted.
        template: The question. "{prompt}" stands for the prompt, "{low:g}" and "{high:g}" for the range.
        score_range: The least and the greatest number to ask for and to accept.
        options: Further fields of the request: temperature, max_tokens (reasoning models need more), seed …
        parse: A function that returns the score in a reply's text, and None or a ValueError where there is none. None:
            `read_number`.
        timeout: The seconds that a whole reply may take.
        max_tries: The most requests for one score.
        backoff: The wait before the second try in seconds; it doubles up to a minute.
        max_concurrency: The most requests at once.

    Raises:
        ValueError: a keyword is out of its range, the address is none, the template has no "{prompt}" or unknown
            fields, or, when called, the environment has no token or the server lists several models.
        RuntimeError: when called: the server refused, or gave no score in `max_tries` tries.
    """

    name = "vlm_judge"

    def __init__(
        self,
        *,
        base_url: str = "http://127.0.0.1:8000/v1",
        model: str | None = None,
        token_variable: str | None = None,
        template: str = TEMPLATE,
        score_range: tuple[float, float] = (0.0, 10.0),
        options: Mapping[str, object] | None = None,
        parse: Callable[[str], float | None] | None = None,
        timeout: float = 120.0,
        max_tries: int = 6,
        backoff: float = 1.0,
        max_concurrency: int = 8,
    ) -> None:
        low, high = (checked_number("score_range", bound) for bound in score_range)
        if not low < high:
            raise ValueError(f"score_range must be (least, greatest), got {score_range}")
        self.base_url = base_url.rstrip("/")
        self._endpoint = Endpoint(base_url, timeout=timeout, has_token=token_variable is not None)
        self.token_variable = token_variable
        self.template = template
        self.range = (low, high)
        self.options = {"temperature": 0, "max_tokens": 16} if options is None else dict(options)
        self.parse = parse
        self.max_tries = checked_integer("max_tries", max_tries, at_least=1)
        self.backoff = checked_number("backoff", backoff, "[0, inf)")
        self.max_concurrency = checked_integer("max_concurrency", max_concurrency, at_least=1)
        if model is not None:
            self.model = model
        try:
            question = self.question("\0")
        except (KeyError, IndexError) as error:
            raise ValueError(f"template may only contain {{prompt}}, {{low}} and {{high}}, got {template!r}") from error
        if "\0" not in question:
            raise ValueError(f'template must contain "{{prompt}}", got {template!r}')

    def question(self, prompt: str) -> str:
        """Return the question to the model about an image of this prompt."""
        return self.template.format(prompt=prompt, low=self.range[0], high=self.range[1])

    @cached_property
    def model(self) -> str:
        """The model's name."""
        names = self._ask("GET", "/models", None, read=_model_names, over=threading.Event())
        if len(names) != 1:
            raise ValueError(f"{self.base_url} serves {names}: say which one is to judge, model=...")
        return names[0]

    def make_ready(self) -> None:
        """Find the server, the token and the model.

        Raises:
            ValueError: the environment has no token, or the server lists several models.
            RuntimeError: there is no connection to the server, or it refused.
        """
        self._authorization()
        try:
            self._endpoint.check()
        except (Unreachable, Refused) as error:
            raise RuntimeError(
                f"there is no connection to the judge at {self.base_url}: {error}. It has to be there first; its "
                'address is base_url="…" of VLMJudge'
            ) from error
        self.model  # noqa: B018

    @override
    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None
    ) -> RewardOutput:
        check_prompts(images, prompts)
        self.model  # noqa: B018  (asked for once, before the threads)
        pictures = zip(to_uint8(images).numpy(), prompts, strict=True)
        values = in_parallel(
            lambda picture, over: self.judge(*picture, over), pictures, num_threads=self.max_concurrency
        )
        return RewardOutput(torch.tensor(values, dtype=torch.float32, device=images.device))

    def judge(self, pixels: np.ndarray, prompt: str, over: threading.Event) -> float:
        """Return the model's number for an image [H, W, 3] uint8; gives up between two tries once `over` is set."""
        (file,) = as_files(pixels[None], "png", {})
        picture = f"data:image/png;base64,{base64.b64encode(file).decode()}"
        content = [
            {"type": "text", "text": self.question(prompt)},
            {"type": "image_url", "image_url": {"url": picture}},
        ]
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], **self.options}
        return self._ask("POST", "/chat/completions", json.dumps(body).encode(), read=self._number, over=over)

    def _ask(
        self, method: str, path: str, body: bytes | None, *, read: Callable[[object], T], over: threading.Event
    ) -> T:
        """Return the reply, parsed by `read`, after at most `max_tries` tries."""
        reason, after = "", 0.0
        for tries in range(self.max_tries):
            if tries and over.wait(max(after, min(self.backoff * 2 ** (tries - 1), 60.0))):
                break
            try:
                return read(self._send(method, path, body))
            except Unavailable as error:
                reason, after = str(error), min(error.seconds, 60.0)
                logger.warning("%s, try %d of %d: %s", self.base_url, tries + 1, self.max_tries, reason)
        raise RuntimeError(f"{self.base_url} gave no usable reply in {self.max_tries} tries; the last: {reason}")

    def _send(self, method: str, path: str, body: bytes | None) -> object:
        """Return the JSON that the server replies."""
        headers = {"Content-Type": "application/json", **self._authorization()}
        try:
            answer = self._endpoint.ask(method, path, headers=headers, body=body, max_bytes=_REPLY_BYTES)
        except Refused as error:
            raise RuntimeError(f"{self.base_url}{path} {error}") from error
        except Garbage as error:
            raise Unavailable(f"expected JSON, got {error}") from error
        try:
            return json.loads(answer)
        except (ValueError, RecursionError) as error:
            raise Unavailable(f"expected JSON, got {answer[:200]!r}") from error

    def _authorization(self) -> dict[str, str]:
        if self.token_variable is None:
            return {}
        token = os.environ.get(self.token_variable)
        if not token:
            raise ValueError(f"the environment variable {self.token_variable} must hold the token, but it is not set")
        return {"Authorization": f"Bearer {checked_token(token)}"}

    def _number(self, reply: object) -> float:
        """Return the number of a reply."""
        try:
            choice = reply["choices"][0]  # type: ignore[index]
            text, is_cut = _text_of(choice["message"]["content"]), choice.get("finish_reason") == "length"
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise Unavailable(f"expected a chat completion, got {str(reply)[:200]}") from error
        low, high = self.range
        try:
            number = self.parse(text) if self.parse is not None else read_number(text, high)
        except ValueError:
            number = None
        if number is None or not low <= number <= high:
            shown = text if len(text) <= 200 else f"{text[:100]} … {text[-100:]}"
            cut = " (it was cut off: allow more, options={'max_tokens': …})" if is_cut else ""
            raise Unavailable(
                f"expected a number from {low:g} to {high:g}, got {shown!r}{cut}; parse=… reads other replies"
            )
        return float(number)


def _written(number: float) -> tuple[str, ...]:
    """Return the ways in which a model writes a number."""
    return (f"{number:g}", f"{number:.1f}", f"{number:.2f}")


def _text_of(content: object) -> str:
    """Return a message's text, from a text, a number of JSON, or a list of parts of which some are texts.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part.get("type") == "text")
    if isinstance(content, str):
        return content
    if isinstance(content, int | float) and not isinstance(content, bool):
        return str(content)
    raise TypeError(content)


def _model_names(reply: object) -> list[str]:
    try:
        return [str(model["id"]) for model in reply["data"]]  # type: ignore[index]
    except (KeyError, TypeError) as error:
        raise Unavailable(f"expected a list of models, got {str(reply)[:200]}") from error
