"""Helpers for loading networks: no progress bar for small ones, and a test whether the Hub can be reached."""

import contextlib
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from huggingface_hub import constants
from transformers.utils import logging

_HUB_SECONDS = 5.0


def hub_answers() -> bool:
    """Return whether the Hugging Face Hub takes connections, in 5 s: its own library tries for most of a minute.

    Behind a proxy the answer is True without a try, for only the proxy knows.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    hub = urlsplit(constants.ENDPOINT)
    host, port = hub.hostname or "", hub.port or (80 if hub.scheme == "http" else 443)
    if hub.scheme in getproxies() and not proxy_bypass(host):
        return True
    try:
        socket.create_connection((host, port), timeout=_HUB_SECONDS).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def no_progress_bar() -> Iterator[None]:
    """Load a small network without transformers' progress bar."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
