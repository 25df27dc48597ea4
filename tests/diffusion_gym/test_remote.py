"""A remote reward is the reward itself, whatever happens on the way; what is no reward is an error with an address."""

import contextlib
import datetime
import logging
import math
import re
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import gymnasium as gym
import numpy as np
import pytest
import torch

import diffusion_gym  # noqa: F401
from diffusion_gym.rewards import make_reward
from diffusion_gym.rewards.connection import Connection, RemoteRewardError
from diffusion_gym.rewards.remote import RemoteReward
from diffusion_gym.rewards.wire import TOKEN_VARIABLE, Limits, encode_request
from tests.serving import INFO, Probe, free_port, response, scripted, serving, wait_until

PROMPTS = ["a fox", "ein Bär 🐻", "", 'quotes " and \\ backslashes\n', "a", "b", "c", "d"]
RIGHT = response({"name": "brightness", "values": [0.5], "extras": {}})


def pictures(num=8, size=16):
    return torch.rand(num, 3, size, size, generator=torch.Generator().manual_seed(0))


def eight_bits(images):
    return (images * 255).round() / 255


@pytest.mark.parametrize(
    ("name", "image_format"),
    [("incompressibility", "png"), ("compressibility", "safetensors"), ("brightness", "safetensors")],
)
def test_remote_rewards_are_those_in_process_bit_for_bit(name, image_format):
    local = make_reward(name)
    with serving(make_reward(name)) as port:
        remote = RemoteReward(f"remote://127.0.0.1:{port}", image_format=image_format)
        assert torch.equal(remote(pictures(), PROMPTS).values, local(pictures(), PROMPTS).values)
        assert (remote.name, remote.unit, remote.range) == (local.name, local.unit, local.range)
        assert remote.num_retries == 0


def test_png_rounds_to_eight_bits_and_jpeg_to_a_little_less():
    probe = Probe()
    with serving(probe) as port:
        url = f"remote://127.0.0.1:{port}"
        output = RemoteReward(url)(pictures(), PROMPTS, [{"questions": ["how many?"]} for _ in PROMPTS])
        assert torch.equal(output.values, eight_bits(pictures()).mean((1, 2, 3)))
        assert torch.equal(output.extras["red"], eight_bits(pictures())[:, 0].mean((1, 2)))
        assert probe.prompts == PROMPTS
        smooth = torch.linspace(0, 1, 16).expand(8, 3, 16, 16)
        values = RemoteReward(url, image_format="jpeg")(smooth, PROMPTS).values
        torch.testing.assert_close(values, smooth.mean((1, 2, 3)), atol=5e-3, rtol=0)


def test_batches_are_split_to_what_the_server_takes():
    probe = Probe()
    expected = eight_bits(pictures()).mean((1, 2, 3))
    with serving(probe, limits=Limits(max_batch=3)) as port:
        assert torch.equal(RemoteReward(f"remote://127.0.0.1:{port}")(pictures(), PROMPTS).values, expected)
    with serving(probe, limits=Limits(max_pixels=2 * 16 * 16)) as port:
        assert torch.equal(RemoteReward(f"remote://127.0.0.1:{port}")(pictures(), PROMPTS).values, expected)
    with serving(probe, limits=Limits(max_bytes=5000)) as port:  # a picture takes 1.1 kB
        assert torch.equal(RemoteReward(f"remote://127.0.0.1:{port}")(pictures(), PROMPTS).values, expected)
    assert probe.sizes == [3, 3, 2, 2, 2, 2, 2, 4, 4]


def test_only_the_part_that_failed_is_asked_for_again(caplog):
    probe = Probe()
    probe.failures = [None, RuntimeError("out of memory"), None]
    with serving(probe, limits=Limits(max_batch=3)) as port, caplog.at_level(logging.WARNING):
        remote = RemoteReward(f"remote://127.0.0.1:{port}")
        values = remote(pictures(), PROMPTS).values
    assert torch.equal(values, eight_bits(pictures()).mean((1, 2, 3)))
    assert probe.sizes == [3, 3, 3, 2]
    assert remote.num_retries == 1
    assert "status 500: the reward 'brightness' failed: RuntimeError: out of memory" in caplog.text


def test_many_servers_share_a_batch_and_stand_in_for_each_other():
    probes = Probe(), Probe()
    limits = Limits(max_batch=2)
    with serving(probes[0], limits=limits) as port:
        with serving(probes[1], limits=limits) as other:
            remote = RemoteReward([f"remote://127.0.0.1:{port}", f"remote://127.0.0.1:{other}"])
            before = remote(pictures(), PROMPTS).values
            assert [probe.sizes for probe in probes] == [[2, 2], [2, 2]]
        assert torch.equal(remote(pictures(), PROMPTS).values, before)
        assert torch.equal(before, eight_bits(pictures()).mean((1, 2, 3)))
        assert sum(probes[0].sizes) == 12
        with scripted(RIGHT, info={**INFO, "name": "other"}) as third, pytest.raises(ValueError, match="one reward"):
            RemoteReward([f"remote://127.0.0.1:{port}", f"remote://127.0.0.1:{third}"])


def test_it_is_a_name_and_takes_part_in_sums():
    arguments = {"model": "mixture", "num_steps": 2, "prompts": ["north"]}
    with serving(make_reward("incompressibility")) as port:
        name = f"remote://127.0.0.1:{port}"
        finals = []
        for reward in (name, "incompressibility", {name: 2.0}, name.replace("remote://", "http://")):
            env = gym.make_vec("DenoisingMDP-v0", num_envs=2, reward=reward, **arguments)
            env.reset(seed=0)
            for _ in range(2):
                _, rewards, *_ = env.step(torch.full((2, *env.single_action_space.shape), 0.1))
            finals.append(rewards)
    assert torch.equal(finals[0], finals[1])
    assert torch.equal(finals[3], finals[1])
    assert torch.equal(finals[2], 2 * finals[1])


def test_a_server_that_fails_is_named_at_once_and_asked_last_for_the_rest_of_a_batch(caplog):
    probe, info = Probe(), {**INFO, "max_batch": 1}
    with serving(probe, limits=Limits(max_batch=1)) as port, scripted(b"", info=info) as dead:
        remote = RemoteReward([f"remote://127.0.0.1:{port}", f"remote://127.0.0.1:{dead}"])
        probe.may_answer.clear()
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(remote, pictures(), PROMPTS)
            try:
                wait_until(lambda: f"reward server remote://127.0.0.1:{dead}: RemoteDisconnected" in caplog.text)
            finally:
                probe.may_answer.set()
            assert torch.equal(future.result().values, eight_bits(pictures()).mean((1, 2, 3)))
    assert caplog.text.count("reward server remote://") == 1
    assert remote.num_retries == 0


def test_no_more_parts_are_encoded_than_there_are_servers(monkeypatch):
    encoded, probes = [], (Probe(), Probe())
    monkeypatch.setattr(
        "diffusion_gym.rewards.remote.encode_request",
        lambda *given, **options: encoded.append(1) or encode_request(*given, **options),
    )
    with contextlib.ExitStack() as stack:
        ports = [stack.enter_context(serving(probe, limits=Limits(max_batch=1))) for probe in probes]
        remote = RemoteReward([f"remote://127.0.0.1:{port}" for port in ports])
        pool = stack.enter_context(ThreadPoolExecutor(1))
        for probe in probes:
            probe.may_answer.clear()
        future = pool.submit(remote, pictures(), PROMPTS)
        try:
            wait_until(lambda: all(probe.sizes for probe in probes))
            assert len(encoded) == 2
        finally:
            for probe in probes:
                probe.may_answer.set()
        assert torch.equal(future.result().values, eight_bits(pictures()).mean((1, 2, 3)))


def test_an_answer_without_a_length_ends_with_its_connection():
    with scripted(b"HTTP/1.0 200 OK\r\n\r\n" + RIGHT.partition(b"\r\n\r\n")[2]) as port:
        assert RemoteReward(f"remote://127.0.0.1:{port}")(pictures(1), ["a fox"]).values.tolist() == [0.5]


class Seen(Probe):
    def __call__(self, images, prompts, metadata=None):
        self.metadata = metadata
        return super().__call__(images, prompts, metadata)


@pytest.mark.parametrize("image_format", ["png", "jpeg", "safetensors"])
def test_metadata_of_numpy_dates_and_nan_goes_over_the_wire(image_format):
    seen = Seen()
    given = {
        "n": np.int64(3),
        "x": np.float32(0.5),
        "row": np.arange(2),
        "day": datetime.date(2026, 1, 2),
        "no": np.nan,
    }
    with serving(seen) as port:
        RemoteReward(f"remote://127.0.0.1:{port}", image_format=image_format)(pictures(1), ["a fox"], [given])
    (said,) = seen.metadata
    assert math.isnan(said.pop("no"))
    assert said == {"n": 3, "x": 0.5, "row": [0, 1], "day": "2026-01-02"}


@pytest.mark.parametrize("image_format", ["png", "jpeg", "safetensors"])
def test_a_picture_that_is_none_is_not_sent(image_format):
    probe = Probe()
    images = pictures(2)
    images[1, 0, 0, 0] = float("nan")
    with serving(probe) as port:
        remote = RemoteReward(f"remote://127.0.0.1:{port}", image_format=image_format)
        with pytest.raises(ValueError, match=r"the images \[1\] of 2 are NaN or infinite"):
            remote(images, ["a", "b"])
    assert probe.sizes == []


@pytest.mark.parametrize(
    ("url", "is_said"), [("remote://192.0.2.1", True), ("http://rewards.invalid", True), ("https://192.0.2.1", False),
                         ("remote://127.0.0.1:8085", False), ("http://[::1]:8085", False)],
)  # fmt: skip
def test_a_token_that_others_can_read_on_its_way_is_said(url, is_said):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Connection(url, token="secret", timeout=1.0)
        Connection(url, token=None, timeout=1.0)
    assert [f"the token goes to {url} unencrypted" in str(one.message) for one in caught] == [True] * is_said


GARBAGE = {
    "no HTTP": b"hello\r\n\r\n",
    "no JSON": response(b"<html>"),
    "deep JSON": response(b"[" * 100_000),
    "a list": response([1.0]),
    "no name": response({"values": [0.5], "extras": {}}),
    "another reward": response({"name": "aesthetic", "values": [0.5], "extras": {}}),
    "too few values": response({"name": "brightness", "values": [], "extras": {}}),
    "too many values": response({"name": "brightness", "values": [0.5, 0.5], "extras": {}}),
    "a number": response({"name": "brightness", "values": 0.5, "extras": {}}),
    "a matrix": response({"name": "brightness", "values": [[0.5]], "extras": {}}),
    "NaN": response({"name": "brightness", "values": [float("nan")], "extras": {}}),
    "infinity": response(b'{"name": "brightness", "values": [1e999], "extras": {}}'),
    "beyond float32": response({"name": "brightness", "values": [1e39], "extras": {}}),
    "a long integer": response(b'{"name": "brightness", "values": [1' + b"0" * 4000 + b'], "extras": {}}'),
    "a truth value": response({"name": "brightness", "values": [True], "extras": {}}),
    "null": response({"name": "brightness", "values": [None], "extras": {}}),
    "no extras": response({"name": "brightness", "values": [0.5]}),
    "NaN in extras": response({"name": "brightness", "values": [0.5], "extras": {"red": [float("nan")]}}),
    "endless": response(b" " * 2**20),
    "elsewhere": response(b"", status="302 Found"),
    "not found": response(b"<html>", status="404 Not Found"),
}


def test_what_a_server_says_of_itself_does_not_bound_what_is_read():
    """A server that takes a thousand million images may answer one with no more than others may."""
    long = response({"name": "brightness", "values": [0.5], "extras": {}, "more": "x" * 100_000})
    with scripted(long, info={**INFO, "max_batch": 10**9}) as port:
        remote = RemoteReward(f"remote://127.0.0.1:{port}")
        with pytest.raises(RemoteRewardError, match=rf":{port} answered more than 8192 bytes"):
            remote(pictures(1), ["a fox"])


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_is_an_error_that_names_the_server(kind):
    with scripted(GARBAGE[kind]) as port:
        remote = RemoteReward(f"remote://127.0.0.1:{port}")
        with pytest.raises(RemoteRewardError, match=f"reward server remote://127.0.0.1:{port} (answered|refused)"):
            remote(pictures(1), ["a fox"])
        assert remote.num_retries == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"protocol": 2},
        {"range": [0]},
        {"range": 1},
        {"range": [2, 1]},
        {"name": 3},
        {"name": ""},
        {"max_batch": 0},
        {"max_bytes": "x"},
    ],
)
def test_a_server_of_another_kind_is_named(wrong):
    with scripted(RIGHT, info={**INFO, **wrong}) as port, pytest.raises(RemoteRewardError, match=f":{port} answered"):
        RemoteReward(f"remote://127.0.0.1:{port}")


def test_what_the_reward_refuses_is_not_asked_for_again():
    with serving(make_reward(lambda images, prompts, metadata: images.sum((1, 2, 3)) / 0)) as port:
        remote = RemoteReward(f"remote://127.0.0.1:{port}")
        with pytest.raises(RemoteRewardError, match=r"status 422: the reward '<lambda>' refused it: .*finite numbers"):
            remote(pictures(1), ["a fox"])
    with pytest.raises(TypeError, match=r"what JSON can hold, got Tensor, tensor\(\[0\.\]\): leave it out"):
        RemoteReward.__call__(remote, pictures(1), ["a fox"], [{"tensor": torch.zeros(1)}])


def test_the_token_comes_from_the_call_or_the_environment(monkeypatch):
    with serving(Probe(), token="secret") as port:
        url = f"remote://127.0.0.1:{port}"
        for token in (None, "wrong"):
            with pytest.raises(RemoteRewardError, match=f"{url} refused .* 401: the token is missing or wrong"):
                RemoteReward(url, token=token)
        assert RemoteReward(url, token="secret").name == "brightness"
        monkeypatch.setenv(TOKEN_VARIABLE, "secret")
        assert make_reward(url)(pictures(1), ["a fox"]).values.shape == (1,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"url": "ftp://host:1"}, "address is like remote://host:port"),
        ({"url": "remote://"}, "address is like"),
        ({"url": "remote://127.0.0.1:abc"}, "address is like .*got 'remote://127.0.0.1:abc'"),
        ({"url": "http://127.0.0.1:99999"}, "address is like"),
        ({"url": "http://user:word@host"}, "address is like"),
        ({"url": []}, "at least one server"),
        ({"timeout": 0}, "timeout must be a finite number in"),
        ({"timeout": float("nan")}, "timeout must be a finite number in"),
        ({"timeout": float("inf")}, "timeout must be a finite number in"),
        ({"max_retry_seconds": -1}, "max_retry_seconds must be at least 0"),
        ({"max_retry_seconds": float("nan")}, "max_retry_seconds must be at least 0"),
        ({"image_format": "gif"}, "image_format must be one of"),
        ({"jpeg_quality": 100}, "jpeg_quality must be in 1 … 95"),
        ({"jpeg_quality": 1.5}, "jpeg_quality must be an integer"),
        ({"token": "a\nb"}, "printable ASCII"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        RemoteReward(**{"url": "remote://127.0.0.1:1", **arguments})


@pytest.mark.parametrize("name", ["127.0.0.1", "no-such-host.invalid"])
def test_a_server_that_was_never_there_is_named_at_once(name):
    url = f"remote://{name}:{free_port()}"
    began = time.monotonic()
    with pytest.raises(
        RemoteRewardError, match=rf"no connection to the reward server {url}: (Conn|gai).*has to be there"
    ):
        gym.make_vec("DenoisingMDP-v0", num_envs=1, model="mixture", reward=url)
    assert time.monotonic() - began < 15


def test_a_server_that_goes_away_is_waited_for_and_then_named(caplog):
    with serving(Probe()) as port:
        remote = RemoteReward(f"remote://127.0.0.1:{port}", max_retry_seconds=0.5)
    began = time.monotonic()
    url = f"remote://127.0.0.1:{port}"
    with pytest.raises(RemoteRewardError, match=rf"max_retry_seconds=0.5.*{url}: ConnectionRefusedError"):
        remote(pictures(1), ["a fox"])
    assert 0.1 < time.monotonic() - began < 5
    assert f"reward server {url}: ConnectionRefusedError" in caplog.text
    assert re.search(r"asked again in 0\.1 s, and for [01] s more \(max_retry_seconds=0\.5\)", caplog.text)


def test_when_all_servers_are_away_the_other_parts_are_not_waited_for():
    limits = Limits(max_batch=1)
    with serving(Probe(), limits=limits) as port, serving(Probe(), limits=limits) as other:
        remote = RemoteReward([f"remote://127.0.0.1:{port}", f"remote://127.0.0.1:{other}"], max_retry_seconds=0.6)
    began = time.monotonic()
    with pytest.raises(RemoteRewardError, match=r"max_retry_seconds=0.6\): .*Refused.*; .*Refused"):
        remote(pictures(), PROMPTS)
    assert time.monotonic() - began < 1.2  # 8 parts, two at a time, would take four times as long


INTERRUPTED = {
    "closed": b"",
    "cut off": response(b'{"name": "brigh', length=60),
    "cut off before its length": b"HTTP/1.1 200 OK\r\nServer: uvi",
    "busy": response({"error": "busy"}, status="503 Service Unavailable"),
    "failed": response({"error": "no memory"}, status="500 Internal Server Error"),
    "behind a proxy": response(b"<html>", status="502 Bad Gateway"),
    "a long page": response(b" " * 2**20, status="502 Bad Gateway"),
}


@pytest.mark.parametrize("kind", INTERRUPTED)
def test_an_interrupted_exchange_is_repeated(kind):
    with scripted(INTERRUPTED[kind], INTERRUPTED[kind], RIGHT) as port:
        remote = RemoteReward(f"remote://127.0.0.1:{port}")
        assert remote(pictures(1), ["a fox"]).values.tolist() == [0.5]
        assert remote.num_retries == 2


def test_the_server_says_when_to_come_again():
    busy = b"HTTP/1.1 503 Busy\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n"
    with scripted(busy, RIGHT) as port:
        remote = RemoteReward(f"remote://127.0.0.1:{port}")
        began = time.monotonic()
        remote(pictures(1), ["a fox"])
        assert 1 <= time.monotonic() - began < 8


def test_an_answer_that_drips_takes_no_longer_than_the_timeout():
    with scripted(RIGHT, pause=0.05) as port:  # 120 bytes: 6 s
        remote = RemoteReward(f"remote://127.0.0.1:{port}", timeout=1.0, max_retry_seconds=0.0)
        began = time.monotonic()
        with pytest.raises(RemoteRewardError, match=rf":{port}: no whole answer within 1 s"):
            remote(pictures(1), ["a fox"])
        assert 1 <= time.monotonic() - began < 4


def test_a_slow_answer_is_asked_for_again():
    probe = Probe()
    with serving(probe) as port:
        remote = RemoteReward(f"remote://127.0.0.1:{port}", timeout=0.3)
        probe.may_answer.clear()
        remote._jitter = _Releasing(probe)
        values = remote(pictures(1), ["a fox"]).values
    assert torch.equal(values, eight_bits(pictures(1)).mean((1, 2, 3)))
    assert remote.num_retries >= 1


class _Releasing:
    """Lets the server answer once the client has begun to wait."""

    def __init__(self, probe):
        self.probe = probe

    def uniform(self, low, high):
        self.probe.may_answer.set()
        return high
