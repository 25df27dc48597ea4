"""Reward servers that tests talk to: real ones in a thread, and ones that answer what a test says."""

import contextlib
import json
import socket
import threading
import time
from http.client import HTTPConnection

import safetensors.torch
import torch
import uvicorn

from diffusion_gym.rewards import Reward, RewardOutput
from diffusion_gym.rewards.server import RewardServer, configure
from diffusion_gym.rewards.wire import JSON_TYPE, encode_request

INFO = {
    "name": "brightness",
    "unit": "1",
    "range": [0.0, 1.0],
    "version": "0",
    "protocol": 1,
    "max_batch": 64,
    "max_pixels": 2**20,
    "max_bytes": 2**20,
}

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a fox", "a bear"]
JSON_HEADERS = {"Content-Type": JSON_TYPE}


def score_request(image_format="png", images=IMAGES, prompts=PROMPTS, metadata=None):
    return encode_request(images, prompts, metadata, image_format=image_format)


def changed_request(**changes):
    """Return a right JSON request with some of its values changed."""
    return json.dumps({**json.loads(score_request()[1]), **changes}).encode()


def tensor_request(**changes):
    texts = torch.frombuffer(bytearray(b'{"prompts": ["a", "b"]}'), dtype=torch.uint8)
    return safetensors.torch.save({"images": IMAGES, "texts": texts, **changes})


class Probe(Reward):
    """The brightness; counts how it is called, waits and fails as a test wants it."""

    name, range = "brightness", (0.0, 1.0)

    def __init__(self):
        self.sizes, self.prompts, self.failures = [], [], []
        self.at_once = self.most_at_once = 0
        self.may_answer = threading.Event()
        self.may_answer.set()

    def __call__(self, images, prompts, metadata=None):
        self.sizes.append(len(images))
        self.prompts += prompts
        self.at_once += 1
        self.most_at_once = max(self.at_once, self.most_at_once)
        assert self.may_answer.wait(20)
        self.at_once -= 1
        if self.failures and (failure := self.failures.pop(0)) is not None:
            raise failure
        return RewardOutput(images.mean((1, 2, 3)), {"red": images[:, 0].mean((1, 2))})


def free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def is_there(port):
    """Return whether something listens there."""
    with socket.socket() as opened:
        return opened.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def serving(reward, *, port=0, send_buffer=None, **options):
    """Serve a reward from a thread; yield the port. The system keeps about `send_buffer` bytes that nobody reads."""
    server = uvicorn.Server(configure(RewardServer(reward, **options), "127.0.0.1", port))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        listener = server.servers[0].sockets[0]
        if send_buffer is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def ask(port, method, path, body=None, headers=None):
    """Return the status, the headers and the JSON of an answer."""
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, body=body, headers=headers or {})
        response = connection.getresponse()
        return response.status, response.headers, json.loads(response.read())
    finally:
        connection.close()


def response(body, status="200 OK", length=None):
    """Return an HTTP answer's bytes, perhaps with a wrong length."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    length = len(body) if length is None else length
    return f"HTTP/1.1 {status}\r\nContent-Length: {length}\r\n\r\n".encode() + body


@contextlib.contextmanager
def scripted(*answers, info=INFO, pause=0.0):
    """Answer /info rightly, then each further request with the next of these bytes, the last one again and again.

    With `pause`, answers drip byte by byte, with these seconds between them. Yield the port.
    """
    left = list(answers)
    listener = socket.create_server(("127.0.0.1", 0))

    def run():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                request = b""
                while b"\r\n\r\n" not in request:
                    request += connection.recv(65536)
                head, _, body = request.partition(b"\r\n\r\n")
                lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
                length = int(lengths[0].split(b":")[1]) if lengths else 0
                while len(body) < length:
                    body += connection.recv(65536)
                if head.startswith(b"GET"):
                    connection.sendall(response(info))
                    continue
                answer = left.pop(0) if len(left) > 1 else left[0]
                for byte in answer if pause else []:
                    connection.sendall(bytes([byte]))
                    time.sleep(pause)
                connection.sendall(b"" if pause else answer)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(20)
        assert not thread.is_alive()
