"""A reward server takes what is right, says what is wrong, and does nothing else, whoever asks."""

import asyncio
import base64
import contextlib
import io
import json
import socket
import threading
import time
import zlib
from http.client import HTTPException

import pytest
import torch
from PIL import Image, PngImagePlugin

from diffusion_gym.rewards import Normalised, make_reward
from diffusion_gym.rewards.server import RewardServer, is_loopback, main, serve
from diffusion_gym.rewards.wire import SAFETENSORS_TYPE, Limits
from tests.serving import (
    IMAGES,
    JSON_HEADERS,
    Probe,
    ask,
    changed_request,
    score_request,
    serving,
    tensor_request,
    wait_until,
)
from tests.tiny import make_tiny_clip


def as_file(image, image_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **options)
    return base64.b64encode(buffer.getvalue()).decode()


def png_of_size(width, height):
    """Return a PNG file whose header says this size, and which holds hardly anything."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(1000))), chunk(b"IEND", b"")
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).decode()


def png_with_long_text():
    """Return a PNG file with 10 MB of text, packed."""
    texts = PngImagePlugin.PngInfo()
    texts.add_text("comment", "a" * 10_000_000, zip=True)
    return as_file(Image.new("RGB", (8, 8)), "PNG", pnginfo=texts)


def test_health_and_info():
    with serving(make_reward("incompressibility"), limits=Limits(max_batch=3)) as port:
        assert ask(port, "GET", "/health")[2] == {"status": "ok", "requests": 0}
        status, _, info = ask(port, "GET", "/info")
    assert status == 200
    assert (info["name"], info["unit"], info["range"]) == ("incompressibility", "kB", [0.0, None])
    assert (info["version"], info["protocol"], info["max_batch"]) == ("0.1.0", 1, 3)


def test_the_token_is_asked_for_before_anything_is_read():
    with serving(Probe(), token="secret") as port:
        for headers in (
            {},
            {"Authorization": "secret"},
            {"Authorization": "Bearer secre"},
            {"Authorization": "Bearer \xff"},
        ):
            assert ask(port, "GET", "/info", headers=headers)[0] == 401
            status, _, answer = ask(port, "POST", "/score", b"nothing", headers)
            assert status == 401
            assert "the token is missing or wrong" in answer["error"]
        right = {"Authorization": "Bearer secret", **JSON_HEADERS}
        assert ask(port, "GET", "/info", headers=right)[0] == 200
        assert ask(port, "POST", "/score", score_request()[1], right)[0] == 200
        assert ask(port, "GET", "/health")[0] == 200


def test_others_cannot_reach_a_server_without_a_token(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("DIFFUSION_GYM_REWARD_TOKEN", raising=False)
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost")] == [True] * 3
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org")] == [False] * 4
    with pytest.raises(ValueError, match=r"on 0\.0\.0\.0 others can reach the server: write a token"):
        serve(RewardServer(Probe()), host="0.0.0.0")
    for arguments, message in (
        (["--reward", "brightness", "--host", "0.0.0.0"], "others can reach the server"),
        (["--reward", "brigthness"], "Did you mean 'brightness'"),
        (["--reward", "emoji_alignment", "--options", '{"amongst": 1}'], "unexpected keyword argument 'amongst'"),
        (["--reward", "brightness", "--options", "[1]"], 'JSON object like {"clip": "/models/clip"}, got [1]'),
        (["--reward", "brightness", "--options", "{"], "argument --options: invalid"),
        (["--reward", "clip_score", "--options", '{"dtype": "float16"}'], "but as --device and --dtype"),
        (["--reward", "brightness", "--dtype", "float16"], "unexpected keyword argument 'dtype'"),
        (["--reward", "clip_score", "--dtype", "half"], "argument --dtype: invalid choice"),
        (["--reward", "brightness", "--max-batch", "0"], "max_batch must be an integer of at least 1"),
        (["--reward", "brightness", "--token-file", str(tmp_path / "missing")], "No such file"),
        (["--reward", "brightness", "--read-seconds", "nan"], "read_seconds must be a finite number"),
        (["--reward", "no_such_module:redness"], "the module 'no_such_module', which Python does not find"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err


def test_the_command_line_serves_a_python_function(monkeypatch, tmp_path):
    made = {}
    monkeypatch.setattr("diffusion_gym.rewards.server.serve", lambda server, **where: made.update(server=server))
    (tmp_path / "served_rewards.py").write_text(
        "def redness(images, prompts, metadata):\n    return images[:, 0].mean((1, 2))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    main(["--reward", "served_rewards:redness"])
    assert made["server"].reward.name == "redness"


def test_the_command_line_makes_the_server(monkeypatch, capsys, tmp_path):
    made = {}
    monkeypatch.setattr("diffusion_gym.rewards.server.serve", lambda server, **where: made.update(where, server=server))
    (tmp_path / "token").write_text("secret\n")
    options = ["--options", '{"among": ["a fox", "a bear"]}', "--max-batch", "7", "--max-queue", "2", "--port", "1"]
    options += ["--read-seconds", "3"]
    main(["--reward", "emoji_alignment", "--token-file", str(tmp_path / "token"), *options])
    server = made["server"]
    assert (server.reward.name, server.reward.among) == ("emoji_alignment", ("a fox", "a bear"))
    assert (server.limits, server.max_queue, server.has_token) == (Limits(max_batch=7), 2, True)
    assert (made["host"], made["port"], server.read_seconds) == ("127.0.0.1", 1, 3)
    clip = make_tiny_clip(tmp_path / "clip")
    main(["--reward", "clip_score", "--options", json.dumps({"clip": str(clip)}), "--dtype", "bfloat16"])
    assert made["server"].reward.dtype == torch.bfloat16
    assert {"network", "_tokenizer", "_prepare"} <= vars(made["server"].reward).keys()
    (clip / "preprocessor_config.json").unlink()
    with pytest.raises(SystemExit):
        main(["--reward", "clip_score", "--options", json.dumps({"clip": str(clip)})])
    assert "CLIP's preprocessor_config.json could not be loaded" in capsys.readouterr().err


def test_a_reward_that_remembers_is_not_served():
    with pytest.raises(ValueError, match="normalised_brightness remembers what it saw"):
        RewardServer(Normalised("brightness"))
    assert RewardServer(Normalised("brightness", mean=0.5, std=0.1)).reward.name == "normalised_brightness"


GREY = as_file(Image.new("L", (8, 8)), "PNG")
SMALL = as_file(Image.new("RGB", (4, 4)), "PNG")
CUT = base64.b64encode(base64.b64decode(as_file(Image.effect_noise((8, 8), 50).convert("RGB"), "PNG"))[:80]).decode()
FIRST = json.loads(score_request()[1])["images"][0]
WRONG = {
    "no JSON": (b"hello", 400, "the body is not JSON"),
    "no UTF-8": (b"\xff\xfe", 400, "the body is not JSON"),
    "deep": (b"[" * 30_000, 400, "the body is not JSON: maximum recursion"),
    "many values": (
        changed_request(metadata=[{"a": [{}] * 40_000}, {}]),
        413,
        "may have 32768 commas and opening brackets",
    ),
    "a list": (b"[]", 422, "must be a JSON object with"),
    "unknown key": (changed_request(picture=1), 422, "unknown key 'picture'"),
    "no images": (b'{"prompts": ["a"]}', 422, "'images' must be a list of strings"),
    "no prompts": (changed_request(prompts=None), 422, "'prompts' must be a list of strings"),
    "prompts of numbers": (changed_request(prompts=[1, 2]), 422, "'prompts' must be a list of strings"),
    "none": (changed_request(prompts=[], images=[]), 422, "1 to 8 prompts, got 0"),
    "too many": (changed_request(prompts=["a"] * 9, images=[FIRST] * 9), 422, "1 to 8 prompts, got 9"),
    "half a letter": (changed_request(prompts=["a", "\ud800"]), 422, "prompt 1 is not Unicode text"),
    "fewer images": (changed_request(images=[FIRST]), 422, "as many images as prompts, got 1 and 2"),
    "metadata of numbers": (changed_request(metadata=[1, 2]), 422, "'metadata' must be a list of objects"),
    "fewer metadata": (changed_request(metadata=[{}]), 422, "one object per prompt, 2, got 1"),
    "no base64": (changed_request(images=[FIRST, "!"]), 422, "image 1 is not base64"),
    "letters that are not ASCII": (changed_request(images=[FIRST, "é"]), 422, "image 1 is not"),
    "no picture": (changed_request(images=[FIRST, "aGVsbG8="]), 422, "image 1 is not a PNG or JPEG file"),
    "a GIF": (
        changed_request(images=[FIRST, as_file(Image.new("RGB", (8, 8)), "GIF")]),
        422,
        "image 1 is not a PNG or JPEG",
    ),
    "PostScript": (
        changed_request(images=[FIRST, as_file(Image.new("RGB", (8, 8)), "EPS")]),
        422,
        "image 1 is not a PNG or JPEG",
    ),
    "a TIFF": (
        changed_request(images=[FIRST, as_file(Image.new("RGB", (8, 8)), "TIFF")]),
        422,
        "image 1 is not a PNG or JPEG",
    ),
    "grey": (changed_request(images=[FIRST, GREY]), 422, "image 1 is L, 8×8"),
    "another size": (changed_request(images=[FIRST, SMALL]), 422, "image 1 is RGB, 4×4, and image 0 8×8"),
    "cut off": (changed_request(images=[FIRST, CUT]), 422, "image 1 cannot be unpacked"),
    "many pixels": (
        changed_request(images=[FIRST, png_of_size(3000, 1000)]),
        413,
        "10000 pixels together, got 3000064",
    ),
    "a bomb": (changed_request(images=[FIRST, png_of_size(50_000, 50_000)]), 422, "decompression bomb"),
    "a bomb of text": (changed_request(images=[FIRST, png_with_long_text()]), 422, "image 1 is not a PNG or JPEG file"),
}


WRONG_TENSORS = {
    "no file": (b"hello", 400, "not a safetensors file"),
    "a header beyond the end": ((2**40).to_bytes(8, "little") + b"{}", 400, "not a safetensors file"),
    "another tensor": (tensor_request(more=IMAGES.clone()), 422, "must hold 'images' and 'texts'"),
    "half precision": (tensor_request(images=IMAGES.half()), 422, r"must be float32 [2, 3, H, W] for the prompts"),
    "more images": (tensor_request(images=IMAGES[[0, 1, 1]]), 422, "float32 [2, 3, H, W] for the prompts"),
    "one image": (tensor_request(images=IMAGES[0]), 422, "got torch.float32 [3, 8, 8]"),
    "no pixels": (tensor_request(images=IMAGES[..., :0]), 422, "got torch.float32 [2, 3, 8, 0]"),
    "many pixels": (tensor_request(images=torch.zeros(2, 3, 80, 80)), 413, "10000 pixels together, got 12800"),
    "beyond 1": (tensor_request(images=IMAGES + 1), 422, "must lie in [0, 1]"),
    "NaN": (tensor_request(images=IMAGES * float("nan")), 422, "must lie in [0, 1]"),
    "many values": (
        tensor_request(texts=torch.full((40_000,), ord("["), dtype=torch.uint8)),
        413,
        "may have 32768 commas and opening brackets",
    ),
    "texts as numbers": (tensor_request(texts=IMAGES.clone()), 422, "'texts' must be the UTF-8 bytes of JSON"),
    "texts that are not JSON": (tensor_request(texts=torch.zeros(3, dtype=torch.uint8)), 400, "not JSON"),
}


AS_JSON = b"Content-Type: application/json\r\n"


@pytest.fixture(scope="module")
def small_server():
    with serving(Probe(), limits=Limits(max_batch=8, max_pixels=10_000, max_bytes=200_000)) as port:
        yield port


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_json_is_said_to_be(kind, small_server):
    body, status, message = WRONG[kind]
    given, _, answer = ask(small_server, "POST", "/score", body, JSON_HEADERS)
    assert message in answer["error"]
    assert given == status


@pytest.mark.parametrize("kind", WRONG_TENSORS)
def test_wrong_tensors_are_said_to_be(kind, small_server):
    body, status, message = WRONG_TENSORS[kind]
    given, _, answer = ask(small_server, "POST", "/score", body, {"Content-Type": SAFETENSORS_TYPE})
    assert message in answer["error"]
    assert given == status


def test_other_types_and_paths_are_refused(small_server):
    assert ask(small_server, "POST", "/score", score_request()[1], {"Content-Type": "application/pickle"})[0] == 415
    assert ask(small_server, "POST", "/score", score_request()[1])[0] == 415
    assert ask(small_server, "GET", "/score")[0] == 405
    assert ask(small_server, "GET", "/docs")[0] == 404
    assert (
        ask(small_server, "POST", "/score", score_request()[1], {"Content-Type": "Application/JSON; charset=utf-8"})[0]
        == 200
    )


def test_a_large_body_is_refused_when_its_length_says_so_and_while_it_is_read(small_server):
    status, _, answer = ask(small_server, "POST", "/score", bytes(200_001), JSON_HEADERS)
    assert (status, answer["error"]) == (413, "a request may have 200000 bytes")
    chunks = (b" " * 1000 for _ in range(300))
    assert ask(small_server, "POST", "/score", chunks, JSON_HEADERS)[0] == 413


def test_an_endless_body_is_read_only_as_far_as_the_limit():
    """The server's own part of it, without uvicorn: it asks for no chunk after the one that is too many."""
    server = RewardServer(Probe(), limits=Limits(max_bytes=10_000))
    chunks, sent = [0], []

    async def receive():
        chunks[0] += 1
        return {"type": "http.request", "body": bytes(1000), "more_body": True}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/score",
        "headers": [(b"content-type", b"application/json")],
        "query_string": b"",
        "http_version": "1.1",
    }
    asyncio.run(server.app(scope, receive, send))
    assert sent[0]["status"] == 413
    assert chunks[0] == 11


def test_a_body_that_drips_is_given_up():
    with (
        serving(Probe(), read_seconds=0.2) as port,
        socket.create_connection(("127.0.0.1", port), timeout=10) as opened,
    ):
        opened.sendall(b"POST /score HTTP/1.1\r\nHost: localhost\r\n" + AS_JSON + b"Content-Length: 100\r\n\r\n{")
        assert opened.recv(1000).startswith(b"HTTP/1.1 408")
        wait_until(lambda: ask(port, "GET", "/health")[2]["requests"] == 0)


def test_connections_that_ask_for_nothing_are_closed_and_hinder_nobody(monkeypatch):
    monkeypatch.setattr("diffusion_gym.rewards.server._IDLE_SECONDS", 0.3)
    probe = Probe()
    refused = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n"
    right = {"Authorization": "Bearer secret", **JSON_HEADERS}
    with serving(probe, token="secret") as port, contextlib.ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20)) for _ in range(100)]
        idle[0].sendall(b"POST /score HTTP/1.1\r\nHost:")
        idle[1].sendall(refused)
        assert ask(port, "GET", "/health")[0] == 200
        probe.may_answer.clear()
        threads, results = in_threads(lambda: ask(port, "POST", "/score", score_request()[1], right))
        assert idle[1].recv(4096).startswith(b"HTTP/1.1 401")
        with contextlib.suppress(ConnectionError):
            for _ in range(40):  # uvicorn's own patience begins anew with each byte
                idle[1].sendall(b"x")
                time.sleep(0.05)
            pytest.fail("the connection is open after 2 s")
        assert [opened.recv(1) for opened in idle[2:]] == [b""] * 98
        assert idle[0].recv(1) == b""
        probe.may_answer.set()
        threads[0].join(20)
        assert results[0][0] == 200


@pytest.mark.parametrize("reads", [0, 10])
def test_connections_that_do_not_take_their_answers_are_ended(monkeypatch, reads):
    """Requests are piled up and their answers are not read, or a few bytes at a time: that must not last for ever."""
    monkeypatch.setattr("diffusion_gym.rewards.server._IDLE_SECONDS", 0.2)
    pile = b"GET /info HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000
    with serving(Probe(), send_buffer=4096) as port, socket.socket() as opened:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        opened.settimeout(0.05)
        opened.connect(("127.0.0.1", port))
        wait_until(lambda: is_ended(opened, pile, reads))
        assert ask(port, "GET", "/health")[0] == 200


def is_ended(opened, pile, reads):
    """Send, and read so many bytes, as far as it goes; return whether the other side has ended the connection."""
    try:
        with contextlib.suppress(TimeoutError):
            opened.sendall(pile)
        with contextlib.suppress(TimeoutError):
            opened.recv(reads)
    except ConnectionError:
        return True
    return False


def test_there_are_only_so_many_connections(monkeypatch):
    monkeypatch.setattr("diffusion_gym.rewards.server._MAX_CONNECTIONS", 10)
    with serving(Probe()) as port, contextlib.ExitStack() as stack:
        opened = [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5)) for _ in range(30)]
        for one in opened[10:]:
            with contextlib.suppress(ConnectionResetError):
                assert one.recv(1) == b""
        opened[0].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert opened[0].recv(100).startswith(b"HTTP/1.1 503")
        for one in opened:
            one.close()
        wait_until(lambda: ask_if_it_is_there(port) == 200)


def ask_if_it_is_there(port):
    try:
        return ask(port, "GET", "/health")[0]
    except (OSError, HTTPException, ValueError):
        return None


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:8085"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": "[::1"},
        {"Host": ""},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
    ],
)
def test_a_server_without_a_token_answers_no_web_page(headers):
    probe = Probe()
    with serving(probe) as port:
        for method, path, body in (
            ("GET", "/health", None),
            ("GET", "/info", None),
            ("POST", "/score", score_request()[1]),
        ):
            status, _, answer = ask(port, method, path, body, {**JSON_HEADERS, **headers})
            assert (status, list(answer)) == (403, ["error"])
            assert "programs of this machine alone" in answer["error"]
        for host in ("localhost", "LOCALHOST:1", f"127.0.0.1:{port}", "[::1]:8085"):
            assert ask(port, "GET", "/info", None, {"Host": host})[0] == 200
    assert probe.sizes == []
    with serving(probe, token="secret") as port:
        assert ask(port, "GET", "/info", None, {"Authorization": "Bearer secret", **headers})[0] == 200


def test_the_content_type_is_looked_at_before_the_body():
    """What a web page may send without asking takes no place in the queue, however slowly it comes."""
    with serving(Probe(), max_queue=1) as port, contextlib.ExitStack() as stack:
        for kind in (b"text/plain", b"application/x-www-form-urlencoded", b"multipart/form-data; boundary=x"):
            opened = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            opened.sendall(b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: " + kind)
            opened.sendall(b"\r\nContent-Length: 100\r\n\r\n{")
            assert opened.recv(1000).startswith(b"HTTP/1.1 415")
            assert ask(port, "POST", "/score", score_request()[1], JSON_HEADERS)[0] == 200


def in_threads(*functions):
    results = [None] * len(functions)

    def run(index):
        results[index] = functions[index]()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(functions))]
    for thread in threads:
        thread.start()
    return threads, results


def test_requests_wait_in_a_short_queue_and_the_reward_is_called_once_at_a_time():
    probe = Probe()
    with serving(probe, max_queue=3) as port:

        def score():
            return ask(port, "POST", "/score", score_request()[1], JSON_HEADERS)

        probe.may_answer.clear()
        threads, results = in_threads(score, score, score)
        wait_until(lambda: ask(port, "GET", "/health")[2]["requests"] == 3)
        status, headers, answer = score()
        assert (status, headers["Retry-After"]) == (503, "1")
        assert "3 requests are waiting already" in answer["error"]
        probe.may_answer.set()
        for thread in threads:
            thread.join(20)
        assert [result[0] for result in results] == [200] * 3
        assert probe.most_at_once == 1
        assert score()[0] == 200


def test_what_nobody_waits_for_any_more_is_not_computed():
    probe = Probe()
    content_type, body = score_request()
    head = f"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: {content_type}\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with serving(probe) as port:
        probe.may_answer.clear()
        threads, results = in_threads(lambda: ask(port, "POST", "/score", body, JSON_HEADERS))
        wait_until(lambda: probe.sizes)
        with socket.create_connection(("127.0.0.1", port)) as opened:
            opened.sendall(head.encode() + body)
            wait_until(lambda: ask(port, "GET", "/health")[2]["requests"] == 2)
        time.sleep(0.1)
        probe.may_answer.set()
        threads[0].join(20)
        wait_until(lambda: ask(port, "GET", "/health")[2]["requests"] == 0)
        assert probe.sizes == [2]
        assert results[0][0] == 200
