"""A reward server outlives a thousand random requests, and does nothing that they say."""

import base64
import io
import json
import os
import pickle
import random
import socket
import sys

import numpy as np
import pytest
import torch

from diffusion_gym.rewards import make_reward
from diffusion_gym.rewards.wire import JSON_TYPE, SAFETENSORS_TYPE, Limits
from tests.serving import JSON_HEADERS, ask, changed_request, score_request, serving, tensor_request


class _Marker:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


_forbidden = []
_watching = []
_EXECUTION = {
    "pickle.find_class",
    "os.system",
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "exec",
    "compile",
    "import",
}


def _audit(event, arguments):
    if _watching and event in _EXECUTION:
        _forbidden.append((event, str(arguments)[:200]))


def odd_values(rng):
    return rng.choice(
        [None, True, -1, 0, 1e308, 10**400, "", "a" * 5000, "\x00", "\ud800", [], {}, [[]] * 50, {"a": {"b": [None]}}]
    )


def mutated_json(rng, parsed):
    """Replace, repeat or remove something somewhere."""
    keys = list(parsed)
    key = rng.choice(keys)
    value = parsed[key]
    if isinstance(value, list) and value and rng.random() < 0.6:
        index = rng.randrange(len(value))
        kind = rng.randrange(3)
        if kind == 0:
            value[index] = odd_values(rng)
        elif kind == 1:
            value.insert(index, value[index])
        elif isinstance(value[index], str) and value[index]:
            at = rng.randrange(len(value[index]))
            value[index] = value[index][:at] + rng.choice(["A", "=", "é", "\n", ""]) + value[index][at + 1 :]
    elif rng.random() < 0.7:
        parsed[key] = odd_values(rng)
    else:
        del parsed[key]
    return json.dumps(parsed).encode()


def mutated_bytes(rng, body):
    body = bytearray(body)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(body) or 1)
        kind = rng.randrange(4)
        if kind == 0 and body:
            body[at] = rng.randrange(256)
        elif kind == 1:
            del body[at : at + rng.randrange(1, 50)]
        elif kind == 2:
            body[at:at] = rng.randbytes(rng.randrange(1, 50))
        else:
            body = body[:at] if rng.random() < 0.3 else body + body[: rng.randrange(100)]
    return bytes(body)


def mutated_picture(rng, parsed):
    index = rng.randrange(len(parsed["images"]))
    picture = mutated_bytes(rng, base64.b64decode(parsed["images"][index]))
    parsed["images"][index] = base64.b64encode(picture).decode()
    return json.dumps(parsed).encode()


def harmful_bodies(marker):
    """Return pickles that do something, wherever a request may hold one."""
    payload = pickle.dumps(_Marker(marker), protocol=0)
    text = base64.b64encode(payload).decode()
    npy, archive = io.BytesIO(), io.BytesIO()
    np.save(npy, np.array([_Marker(marker)], dtype=object), allow_pickle=True)
    torch.save(_Marker(marker), archive)
    return [
        payload,
        pickle.dumps(_Marker(marker)),
        npy.getvalue(),
        archive.getvalue(),
        changed_request(images=[text, text]),
        changed_request(prompts=[text, f"__import__('os').mkdir({str(marker)!r})"]),
        changed_request(metadata=[{"__reduce__": ["os.mkdir", [str(marker)]]}, {"py/object": "os.mkdir"}]),
        tensor_request(texts=torch.frombuffer(bytearray(payload), dtype=torch.uint8)),
    ]


def random_request(rng, harmful):
    """Return method, path, headers and body."""
    image_format = rng.choice(["png", "jpeg", "safetensors"])
    content_type, body = score_request(image_format, metadata=[{"n": 1}, {"n": [2.5, "x"]}])
    kind = rng.randrange(5)
    if kind == 0:
        body = mutated_bytes(rng, body)
    elif kind == 1 and content_type == JSON_TYPE:
        body = mutated_json(rng, json.loads(body))
    elif kind == 2 and content_type == JSON_TYPE:
        body = mutated_picture(rng, json.loads(body))
    elif kind == 3:
        body = rng.choice(harmful)
    headers = {"Content-Type": content_type}
    if rng.random() < 0.15:
        types = ["application/octet-stream", "application/x-pickle", SAFETENSORS_TYPE, JSON_TYPE, "", "\xff/\xff"]
        headers["Content-Type"] = rng.choice(types)
    if rng.random() < 0.95:
        headers["Authorization"] = rng.choice(["Bearer secret"] * 20 + ["Bearer", "Basic c2VjcmV0", "Bearer secret2"])
    if rng.random() < 0.05:
        headers["Content-Encoding"] = "gzip"
    method, path = rng.choice(
        [("POST", "/score")] * 20 + [("PUT", "/score"), ("POST", "/info"), ("GET", "/../etc"), ("POST", "//")]
    )
    return method, path, headers, body


def raw_exchange(port, data):
    """Send bytes and the end of them; return what comes until the server closes."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as opened:
        try:
            opened.sendall(data)
            opened.shutdown(socket.SHUT_WR)
            while chunk := opened.recv(65536):
                answer += chunk
        except ConnectionError:
            pass
    return answer


def test_a_thousand_random_requests_do_no_harm(tmp_path, caplog):
    rng = random.Random(0)
    marker = tmp_path / "executed"
    with pytest.raises(FileExistsError):  # the markers work: where they are unpickled, they are seen
        pickle.loads(pickle.dumps(_Marker(tmp_path)))
    right = {"Authorization": "Bearer secret", **JSON_HEADERS}
    statuses, harmful = {}, harmful_bodies(marker)
    sys.addaudithook(_audit)
    with serving(make_reward("brightness"), token="secret", limits=Limits(max_batch=8, max_pixels=10_000)) as port:
        expected = ask(port, "POST", "/score", score_request()[1], right)[2]
        requests = [random_request(rng, harmful) for _ in range(900)]
        head = b"POST /score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\nContent-Length: 5\r\n\r\nhello"
        raws = [mutated_bytes(rng, head) for _ in range(100)]
        assert (
            ask(port, "POST", "/score", score_request("safetensors")[1], {**right, "Content-Type": SAFETENSORS_TYPE})[0]
            == 200
        )
        _watching.append(True)
        for method, path, headers, body in requests:
            status, _, answer = ask(port, method, path, body, headers)
            statuses[status] = statuses.get(status, 0) + 1
            assert status == 200 or "error" in answer or "detail" in answer
            assert status != 200 or np.isfinite(answer["values"]).all()
        raw_answers = [raw_exchange(port, data) for data in raws]
        _watching.clear()
        assert ask(port, "POST", "/score", score_request()[1], right)[2] == expected
        assert ask(port, "GET", "/health")[2] == {"status": "ok", "requests": 0}
    assert set(statuses) == {200, 400, 401, 404, 405, 413, 415, 422} - ({413} - set(statuses))
    assert statuses[200] >= 100
    assert sum(statuses[status] for status in (400, 415, 422)) >= 300
    assert {answer[:12] for answer in raw_answers} <= {
        b"",
        *(f"HTTP/1.1 {status}".encode() for status in (400, 401, 404, 405, 415, 422)),
    }
    assert not marker.exists()
    assert _forbidden == []
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
