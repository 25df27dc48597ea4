"""The judge against a small server of this test's, which is slow, busy, broken or rude when told so."""

import base64
import contextlib
import io
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_gym.rewards import make_reward, to_uint8
from diffusion_gym.rewards.exchange import Endpoint, Unreachable
from diffusion_gym.rewards.vlm_judge import VLMJudge
from tests.serving import free_port, response, scripted


def completion(text):
    return 200, json.dumps({"choices": [{"message": {"content": text}}]})


class Judge(ThreadingHTTPServer):
    """Grades an image by its mean level, 0 to 10; what `script` holds for a prompt comes first, a reply a try."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.requests, self.lock = {}, [], threading.Lock()
        self.models, self.delay = ["tiny-vlm"], 0.0
        self.busy, self.most_busy = 0, 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        assert self.path == "/v1/models"
        self.reply(200, json.dumps({"data": [{"id": name} for name in self.server.models]}))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text, picture = body["messages"][0]["content"]
        prompt = text["text"].split('"')[1]
        with self.server.lock:
            self.server.requests.append((time.monotonic(), prompt, self.path, dict(self.headers), body))
            self.server.busy += 1
            self.server.most_busy = max(self.server.most_busy, self.server.busy)
            planned = self.server.script.get(prompt, [])
            step = planned.pop(0) if planned else "grade"
        time.sleep(self.server.delay)
        with self.server.lock:
            self.server.busy -= 1
        if step == "grade":
            data = base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/png;base64,"))
            self.reply(*completion(f" {np.asarray(Image.open(io.BytesIO(data))).mean() / 25.5:.3f}\n"))
        elif step == "hang up":
            self.connection.close()
        elif step == "half":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices"')
        elif step == "sleep":
            time.sleep(1.5)
        elif step in ("drip", "endless"):
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                for _ in range(40):
                    self.wfile.write(b" " if step == "drip" else bytes(2**18))
                    time.sleep(0.05 if step == "drip" else 0)
        else:
            status, text, *headers = step
            self.reply(status, text, **(headers[0] if headers else {}))

    def reply(self, status, text, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(text.encode()), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def server():
    with Judge() as judge:
        thread = threading.Thread(target=judge.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield judge
        judge.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def images():
    return (
        torch.rand(6, 3, 5, 7, generator=torch.Generator().manual_seed(0))
        * torch.linspace(0.1, 1, 6)[:, None, None, None]
    )


PROMPTS = ["a cat", "a dog", "a fox", "a bear", "an {ant}", "a bee"]


def grades(images):
    return to_uint8(images).double().mean((1, 2, 3)) / 25.5


def judge(server, **keywords):
    return VLMJudge(**{"base_url": server.url, "model": "tiny-vlm", "backoff": 0.01, "timeout": 5.0, **keywords})


def test_images_reach_the_server_whole_and_numbers_come_back_in_order(server, images):
    server.delay = 0.02
    output = judge(server)(images, PROMPTS)
    torch.testing.assert_close(output.values.double(), grades(images), atol=6e-4, rtol=0)
    assert output.values.dtype == torch.float32
    bodies = {prompt: (path, body) for _, prompt, path, _, body in server.requests}
    assert sorted(bodies) == sorted(PROMPTS)
    path, body = bodies["an {ant}"]
    assert path == "/v1/chat/completions"
    assert body["model"] == "tiny-vlm"
    assert (body["temperature"], body["max_tokens"]) == (0, 16)
    assert "one number from 0 (not at all) to 10 (perfectly)" in body["messages"][0]["content"][0]["text"]


def test_what_goes_wrong_is_tried_again_and_no_score_is_lost(server, images):
    server.script = {
        "a cat": ["hang up", "half", (500, "oops")],
        "a dog": [(429, "busy"), (503, "starting")],
        "a fox": [(200, "not JSON"), (200, "[]"), (200, '{"choices": []}'), completion(None)],
        "a bear": [
            completion("I would give it 7"),
            completion("11"),
            completion("7/9"),
            completion("nan"),
            completion(""),
        ],
        "a bee": ["sleep"],
    }
    output = judge(server, timeout=1.0)(images, PROMPTS)
    torch.testing.assert_close(output.values.double(), grades(images), atol=6e-4, rtol=0)
    asked = [prompt for _, prompt, *_ in server.requests]
    assert [asked.count(prompt) for prompt in PROMPTS] == [4, 3, 5, 6, 1, 2]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("7", 7.0),
        (" 7.\n", 7.0),
        ("**7**", 7.0),
        ("**7.5**.", 7.5),
        ("`7`", 7.0),
        ('"7"', 7.0),
        ("$7$", 7.0),
        ("8/10", 8.0),
        ("**8** / 10", 8.0),
        ("8.5 out of 10.", 8.5),
        ("8/10.0", 8.0),
        ("<think>Nice, 3 ears. 8/10?\n</think>\n\n7", 7.0),
        ("so it is nice.</think>7", 7.0),
        ("<thinking>9</thinking>**7**", 7.0),
        (7, 7.0),
        (7.5, 7.5),
        ([{"type": "text", "text": "7"}], 7.0),
        ([{"type": "reasoning", "text": "9"}, {"type": "text", "text": "**7**"}], 7.0),
    ],
)
def test_a_number_is_read_however_it_is_dressed(server, images, content, expected):
    server.script = {"a cat": [completion(content)]}
    assert judge(server, max_tries=1)(images[:1], ["a cat"]).values.tolist() == [expected]


@pytest.mark.parametrize(
    "content",
    ["8/5", "80/100", "7 8", "7, 8", "I give it 7", "seven", "-7", "11", "12/10", "<think>7", "7<think>", "1e1", ".",
     "", "7" + " " * 10**6 + "x", True, None, {"text": "7"}, ["7"], [{"type": "text"}], "nan", "<think>7</think>"],
    ids=lambda content: str(content)[:20],
)  # fmt: skip
def test_what_is_no_number_of_the_range_is_no_score(server, images, content):
    server.script = {"a cat": [completion(content)]}
    with pytest.raises(RuntimeError, match=r"gave no usable reply in 1 tries; the last: expected a (number|chat comp)"):
        judge(server, max_tries=1)(images[:1], ["a cat"])


def test_another_way_to_read_replies_is_the_users(server, images):
    def parse(text):
        return float(text.rpartition("Score: ")[2])

    server.script = {"a cat": [completion("no idea"), completion("Score: nan"), completion("Colours: 3. Score: 7")]}
    assert judge(server, parse=parse)(images[:1], ["a cat"]).values.tolist() == [7.0]
    assert len(server.requests) == 3


def test_a_reply_that_was_cut_off_is_said_to_be(server, images):
    cut = json.dumps({"choices": [{"message": {"content": "<think>So"}, "finish_reason": "length"}]})
    server.script = {"a cat": [(200, cut)]}
    with pytest.raises(
        RuntimeError, match=r"got '<think>So' \(it was cut off: allow more, options={'max_tokens': …}\); parse="
    ):
        judge(server, max_tries=1)(images[:1], ["a cat"])


def test_a_judge_that_cannot_be_asked_is_named_when_the_reward_is_made(server, monkeypatch):
    assert make_reward("vlm_judge", options={"base_url": server.url}).model == "tiny-vlm"
    for url, reason in ((f"http://127.0.0.1:{free_port()}/v1", "Conn"), ("http://no-such-host.invalid/v1", "gaierror")):
        with pytest.raises(RuntimeError, match=rf"no connection to the judge at {url}: {reason}.*base_url="):
            make_reward("vlm_judge", options={"base_url": url, "model": "m"})
    monkeypatch.delenv("SOME_TOKEN", raising=False)
    with pytest.raises(ValueError, match="SOME_TOKEN must hold the token"):
        make_reward("vlm_judge", options={"base_url": server.url, "token_variable": "SOME_TOKEN"})
    with pytest.warns(UserWarning, match=r"the token goes to http://192\.0\.2\.1/v1 unencrypted"):
        VLMJudge(base_url="http://192.0.2.1/v1", token_variable="SOME_TOKEN")


def test_waits_double(server, images):
    server.script = {"a cat": [(500, "")] * 3}
    judge(server, backoff=0.1)(images[:1], ["a cat"])
    times = np.array([at for at, *_ in server.requests])
    assert (np.diff(times) > [0.1, 0.2, 0.4]).all()


def test_the_server_says_when_to_come_again(server, images):
    server.script = {"a cat": [(429, "busy", {"Retry-After": "0.4"}), (503, "", {"Retry-After": "soon"})]}
    began = time.monotonic()
    judge(server)(images[:1], ["a cat"])
    waits = np.diff([at for at, *_ in server.requests])
    assert waits[0] > 0.4
    assert waits[1] < 0.4
    assert time.monotonic() - began < 5


def test_a_reply_may_not_take_for_ever_nor_all_memory(server, images, caplog):
    server.script = {"a cat": ["drip", "endless"]}
    torch.testing.assert_close(
        judge(server, timeout=0.5)(images[:1], ["a cat"]).values.double(), grades(images[:1]), atol=6e-4, rtol=0
    )
    waits = np.diff([at for at, *_ in server.requests])
    assert 0.5 < waits[0] < 1.5  # all of it would drip for 2 s
    assert "try 1 of 6: no whole answer within 0.5 s" in caplog.text
    assert "try 2 of 6: expected JSON, got more than 4194304 bytes" in caplog.text


def test_https_goes_through_the_proxy_of_the_environment(images, monkeypatch):
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with scripted(response(b"", status="403 Forbidden")) as port:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
        with pytest.raises(RuntimeError, match="Tunnel connection failed: 403"):
            VLMJudge(base_url="https://judge.invalid/v1", model="m", max_tries=1)(images[:1], ["a cat"])


def test_the_proxy_may_be_named_without_a_scheme_and_with_a_password(monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        port = proxy.getsockname()[1]
        for before in ("", "http://", "us%40r:p%3Aw@", "http://us%40r:p%3Aw@"):
            monkeypatch.setenv("https_proxy", f"{before}127.0.0.1:{port}")
            with ThreadPoolExecutor(1) as pool:
                asking = pool.submit(Endpoint("https://judge.invalid", timeout=5.0).check)
                connection, _ = proxy.accept()
                with connection:
                    head = connection.recv(4096).decode()
                    connection.sendall(b"HTTP/1.1 407 Who are you?\r\n\r\n")
                with pytest.raises(Unreachable, match="Tunnel connection failed: 407"):
                    asking.result()
            assert head.startswith("CONNECT judge.invalid:443 HTTP/1")
            who = base64.b64encode(b"us@r:p:w").decode()
            assert (f"Proxy-Authorization: Basic {who}" in head) == ("@" in before)


@pytest.mark.parametrize("proxy", ["socks5://user:secret@host:1080", "http://host:port", "http://"])
def test_a_proxy_that_is_none_is_named_without_its_password(monkeypatch, proxy):
    monkeypatch.setenv("https_proxy", proxy)
    with pytest.raises(ValueError, match="https_proxy must be like http://host:port or host:port, got") as caught:
        Endpoint("https://judge.invalid", timeout=5.0)
    assert "secret" not in str(caught.value)


def test_after_the_last_try_there_is_an_error_and_no_score(server, images):
    server.script = {"a dog": [completion("great!")] * 3}
    message = r"http://127\.0\.0\.1:\d+/v1 gave no usable reply in 3 tries; the last: .*from 0 to 10, got 'great!'"
    with pytest.raises(RuntimeError, match=message):
        judge(server, max_tries=3)(images, PROMPTS)
    server.shutdown()
    server.server_close()
    with pytest.raises(RuntimeError, match="gave no usable reply in 2 tries; the last: ConnectionRefusedError"):
        judge(server, max_tries=2)(images, PROMPTS)


@pytest.mark.parametrize("status", [301, 400, 401, 404])
def test_a_refusal_is_an_error_at_once_that_ends_the_others_tries(server, images, status):
    server.script = {"a dog": [(status, "no, thanks")], "a fox": [(500, "")] * 5}
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=rf"v1/chat/completions refused with status {status}: 'no, thanks'"):
        judge(server, backoff=10.0)(images, PROMPTS)
    assert time.monotonic() - started < 10
    assert [prompt for _, prompt, *_ in server.requests].count("a dog") == 1


def test_no_more_requests_at_once_than_allowed(server, images):
    server.delay = 0.05
    judge(server, max_concurrency=2)(images, PROMPTS)
    assert server.most_busy == 2


def test_the_token_comes_from_the_environment(server, images, monkeypatch):
    reward = judge(server, token_variable="SOME_TOKEN")
    monkeypatch.delenv("SOME_TOKEN", raising=False)
    with pytest.raises(ValueError, match="the environment variable SOME_TOKEN must hold the token, but it is not set"):
        reward(images[:1], ["a cat"])
    monkeypatch.setenv("SOME_TOKEN", "s3cret")
    reward(images[:1], ["a cat"])
    judge(server)(images[:1], ["a cat"])
    assert [headers.get("Authorization") for *_, headers, _ in server.requests] == ["Bearer s3cret", None]
    assert "s3cret" not in str(vars(reward))


def test_the_only_model_is_found_and_one_of_many_must_be_named(server, images):
    judge(server, model=None)(images[:1], ["a cat"])
    assert server.requests[0][4]["model"] == "tiny-vlm"
    server.models = ["one", "two"]
    with pytest.raises(ValueError, match=r"serves \['one', 'two'\]: say which one is to judge, model=\.\.\."):
        judge(server, model=None)(images[:1], ["a cat"])


def test_question_range_and_options_are_the_users(server, images):
    server.script = {"a cat": [completion("0.5"), completion("-1")]}
    reward = judge(
        server,
        template='Rate "{prompt}" from {low} to {high}',
        score_range=(-1, 1),
        options={"max_completion_tokens": 9},
    )
    assert [reward(images[:1], ["a cat"]).values.item() for _ in range(2)] == [0.5, -1.0]
    body = server.requests[0][4]
    assert body["messages"][0]["content"][0]["text"] == 'Rate "a cat" from -1.0 to 1.0'
    assert set(body) == {"model", "messages", "max_completion_tokens"}
    assert reward.range == (-1, 1)


def test_keywords_out_of_their_range_are_named():
    for keywords, message in [
        ({"score_range": (1, 1)}, r"score_range must be \(least, greatest\), got \(1, 1\)"),
        ({"base_url": "127.0.0.1:8000"}, "a server's address is like .*, got '127.0.0.1:8000'"),
        ({"score_range": (0, float("inf"))}, "score_range must be a finite number"),
        ({"score_range": (float("nan"), 1)}, "score_range must be a finite number"),
        ({"max_tries": 0}, "max_tries must be an integer of at least 1"),
        ({"max_concurrency": 2.5}, "max_concurrency must be an integer"),
        ({"timeout": float("nan")}, "timeout must be a finite number"),
        ({"backoff": float("inf")}, "backoff must be a finite number"),
        ({"template": "Rate it from 0 to 10"}, r'template must contain "\{prompt\}"'),
        ({"template": "{prompt} {subject}"}, r"template may only contain \{prompt\}, \{low\} and \{high\}"),
    ]:
        with pytest.raises(ValueError, match=message):
            VLMJudge(**keywords)
