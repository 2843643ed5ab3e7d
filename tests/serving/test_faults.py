"""What goes wrong for one client stays its own: others have their texts, and the server lives on."""

import json
import random
import socket
import threading
from contextlib import suppress
from typing import Any

import pytest
import torch

from gptpl.filters import Finding, Rule
from gptpl.generation.continuous import ContinuousBatch
from gptpl.model import CachedGPT, GPTModel
from gptpl.runs.models import LanguageModel
from gptpl.serving import serve
from gptpl.serving.engine import Engine
from tests.serving.conftest import PROMPT, hold_steps, slow_down, until

PATH = "/v1/completions"
LONG = json.dumps(
    {"prompt": "x", "max_tokens": 150, "temperature": 1, "stream": True, "logit_bias": {"256": -100}}
).encode()


@pytest.fixture
def served(start, base):
    """A server with two places, its client, and a check that it answers as it should."""
    server, client = start(base, max_rows=2, kept_mb=0)
    expected = base.generate(PROMPT, max_new_tokens=12, temperature=0)

    def well() -> None:
        assert client.complete(max_tokens=12)["choices"][0]["text"] == expected
        until(lambda: server.monitor.loads()["tale"].running == 0)
        assert client.get("/health")[0] == 200

    return server, client, well


def test_a_client_that_leaves_frees_its_place_at_once(served, monkeypatch):
    server, client, well = served
    with monkeypatch.context() as patch:
        slow_down(patch, 0.1)  # 15 s for the whole text
        for _ in range(3):
            with (
                client.begun("/v1/completions", LONG) as first,
                client.begun("/v1/completions", LONG) as second,
            ):
                assert first.recv(100).startswith(b"HTTP/1.1 200")
                assert second.recv(100).startswith(b"HTTP/1.1 200")
                until(lambda: server.monitor.loads()["tale"].running == 2)
            until(lambda: server.monitor.loads()["tale"].running == 0, seconds=10)
    well()


def test_a_client_that_leaves_while_it_waits_is_forgotten(served, monkeypatch):
    server, client, well = served
    with monkeypatch.context() as patch:
        slow_down(patch, 0.1)  # 15 s for the whole text
        with client.begun("/v1/completions", LONG), client.begun("/v1/completions", LONG):
            until(lambda: server.monitor.loads()["tale"].running == 2)
            with client.begun("/v1/completions", LONG.replace(b', "stream": true', b"")):
                until(lambda: server.monitor.loads()["tale"].queued == 1)
            until(lambda: server.monitor.loads()["tale"].queued == 0, seconds=10)
    well()


@pytest.mark.parametrize(
    "sent",
    [
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Le",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b'Content-Length: 400\r\n\r\n{"prompt": "half of',
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",  # TLS
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"GET " + b"/x" * 50_000 + b" HTTP/1.1\r\n\r\n",
        b"\0" * 1000,
    ],
    ids=["head", "body", "tls", "version", "length", "path", "zeros"],
)
def test_requests_that_are_half_sent_or_none_disturb_nobody(served, sent):
    _, client, well = served
    with socket.create_connection(("127.0.0.1", client.port), timeout=10) as connection:
        connection.sendall(sent)
        well()


def test_a_body_that_does_not_come_is_not_waited_for(served, monkeypatch):
    _, client, well = served
    monkeypatch.setattr("gptpl.serving.routes._BODY_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", client.port), timeout=10) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 400\r\n\r\n{"
        )
        assert b" 408 " in connection.recv(1000)
    well()


def test_a_client_that_does_not_read_is_dropped(start, base, monkeypatch):
    monkeypatch.setattr("gptpl.serving.routes._BODY_SECONDS", 0.3)
    slow_down(monkeypatch, 0.01)
    server, client = start(base, max_rows=2)
    body = json.loads(LONG) | {"logprobs": 20, "n": 2}
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.settimeout(10)
        connection.connect(("127.0.0.1", client.port))
        data = json.dumps(body).encode()
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            + f"Content-Length: {len(data)}\r\n\r\n".encode()
            + data
        )
        until(lambda: server.monitor.loads()["tale"].running == 2)
        until(lambda: server.monitor.loads()["tale"].running == 0)
    assert client.complete(max_tokens=3)


def test_a_large_wrong_body_gets_a_short_answer(served):
    _, client, well = served
    for body in (
        b'{"prompt": [' + b"{}," * 300_000 + b"{}]}",
        b'{"messages": [' + b"{}," * 300_000 + b"{}]}",
        b'{"prompt": [' + b"[{}]," * 150_000 + b"{}]}",
        b"{" + b",".join(b'"%d": 1' % number for number in range(80_000)) + b"}",
        b'{"prompt": "x", "stop": "' + b"-" * 1_000_000 + b'"}',
        b'{"prompt": "x", "stop": [' + b'"x",' * 200_000 + b'"x"]}',
    ):
        status, error = client.refused(PATH, body)
        assert status == 400
        assert len(error["message"]) < 500
    well()


@pytest.mark.parametrize("length", ["content-encoding: gzip", "host: [::1"])
def test_heads_that_are_wrong_get_an_error_body(client, length):
    name, _, value = length.partition(": ")
    status, error = client.refused(PATH, {"prompt": "x"}, **{name: value})
    assert status in (400, 403)
    assert error["message"]


def test_a_client_of_http_1_0_sees_the_end_of_a_stream(client):
    body = json.dumps({"prompt": "x", "max_tokens": 3, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", client.port), timeout=10) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.0\r\nHost: localhost\r\nConnection: keep-alive\r\n"
            b"Content-Type: application/json\r\n" + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
        )
        received = b""
        while data := connection.recv(4096):
            received += data
    assert received.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"null", b"[]", b'"x"', b"1", b"{'prompt': 'x'}", b'{"prompt": "x"} {}', b"\xff\xfe{}",
        b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}', b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "temperature": 1e999}', b'{"prompt": "x", "max_tokens": 1e999}',
        b'{"prompt": "x", "max_tokens": 99999999999999999999999999}', b"[" * 100_000, b'{"a":' * 100_000,
        b'{"prompt": ' + b"[" * 50 + b"]" * 50 + b"}", b'{"prompt": {"$ref": "/etc/passwd"}}',
        b'{"prompt": "x", "__class__": "x"}',
    ],
)  # fmt: skip
def test_what_is_no_request_gets_an_error_body(client, body):
    for path in ("/v1/completions", "/v1/chat/completions", "/classify", "/feedback"):
        status, error = client.refused(path, body)
        assert status in (400, 404), (path, error)
        assert error["message"]


def test_ten_megabytes_are_refused(served):
    _, client, well = served
    body = json.dumps({"prompt": "x" * 10_000_000}).encode()
    with suppress(BrokenPipeError, ConnectionResetError):  # it was hung up on while it was sending
        assert client.refused("/v1/completions", body)[0] == 413
    well()


def random_value(numbers: random.Random, depth: int = 0) -> Any:
    kinds = ["none", "bool", "int", "float", "text", "list", "dict"][: 5 if depth > 2 else 7]
    kind = numbers.choice(kinds)
    if kind == "list":
        return [random_value(numbers, depth + 1) for _ in range(numbers.randrange(4))]
    if kind == "dict":
        return {
            str(random_value(numbers, 9)): random_value(numbers, depth + 1)
            for _ in range(numbers.randrange(4))
        }
    return {
        "none": None,
        "bool": numbers.random() < 0.5,
        "int": numbers.choice([0, 1, -1, 2, 7, 40, 2**31, -(2**63), 10**30]),
        "float": numbers.choice([0.0, 0.5, 1.5, -2.0, 1e-320, 1e308]),
        "text": numbers.choice(
            ["", "x", "é\u0000\u2028", "<|endoftext|>", "a" * 300, "tale", "user", "../../x"]
        ),
    }[kind]


FIELDS = (
    *(
        "prompt",
        "messages",
        "model",
        "max_tokens",
        "n",
        "seed",
        "stop",
        "stream",
        "temperature",
        "top_p",
        "top_k",
    ),
    *(
        "min_p",
        "frequency_penalty",
        "presence_penalty",
        "repetition_penalty",
        "logit_bias",
        "logprobs",
        "echo",
    ),
    *("suffix", "best_of", "user", "texts", "typical_p", "stream_options", "response_format", "top_logprobs"),
)


def test_a_thousand_random_bodies_kill_nothing(served):
    _, client, well = served
    numbers = random.Random(5)
    statuses = set()
    for number in range(1000):
        body: Any = {name: random_value(numbers) for name in numbers.sample(FIELDS, numbers.randrange(1, 6))}
        if numbers.random() < 0.5:
            body = {"prompt": "x", "max_tokens": 2} | body
        path = "/v1/chat/completions" if number % 3 == 0 else "/v1/completions"
        status, answer = client.post(path, body)
        statuses.add(status)
        assert status in (200, 400, 404), (body, answer)
        if status != 200:
            assert answer["error"]["message"]
    assert statuses >= {200, 400}
    well()


# --- the model ------------------------------------------------------------------------------------------


def test_a_model_whose_logits_are_not_finite_says_so_and_others_are_served(start, base):
    net = GPTModel(base.net.config)
    net.load_state_dict(base.net.state_dict())
    with torch.no_grad():
        net.pos_emb.weight[20] = torch.nan  # texts of more than 20 tokens
    model = LanguageModel(**(vars(base) | {"net": net.eval()}))
    _, client = start(model)
    expected = base.generate("Ja", max_new_tokens=9, temperature=0)
    for stream in (False, True):
        body = {"prompt": "x" * 19, "max_tokens": 60, "temperature": 0, "logit_bias": {"256": -100}}
        if stream:
            events, ended = client.stream("/v1/completions", body)
            assert not ended
            error = events[-1]["error"]
        else:
            status, error = client.refused("/v1/completions", body)
            assert status == 500
        assert "not finite" in error["message"]
        assert error["type"] == "server_error"
        assert client.complete("Ja", max_tokens=9)["choices"][0]["text"] == expected


def test_a_step_that_fails_ends_its_requests_and_no_others(served, monkeypatch):
    _, client, well = served
    original = ContinuousBatch.step
    failing = threading.Event()

    def step(self: ContinuousBatch) -> None:
        if failing.is_set():
            failing.clear()
            raise RuntimeError("no memory for it")
        original(self)

    monkeypatch.setattr(ContinuousBatch, "step", step)
    failing.set()
    status, error = client.refused("/v1/completions", {"prompt": PROMPT})
    assert (status, error["message"]) == (500, "the model failed: no memory for it")
    well()


@pytest.mark.parametrize("where", ["new_cache", "read", "step"])
def test_what_fails_within_a_step_leaves_nobody_waiting(served, monkeypatch, where):
    _, client, well = served
    original = getattr(CachedGPT, where)
    failing = [True]

    def once(self: CachedGPT, *given: Any, **settings: Any) -> Any:
        if failing:
            failing.clear()
            raise KeyError("a defect")
        return original(self, *given, **settings)

    monkeypatch.setattr(CachedGPT, where, once)
    status, error = client.refused("/v1/completions", {"prompt": PROMPT, "max_tokens": 5})
    assert (status, error["message"]) == (500, "the model failed: 'a defect'")
    well()


def test_an_engine_that_says_nothing_is_given_up(start, base, monkeypatch):
    monkeypatch.setattr("gptpl.serving.texts._LATE", 0.2)
    monkeypatch.setattr(Engine, "submit", lambda self, generation: None)
    _, client = start(base, timeout_s=0.1)
    assert client.refused("/v1/completions", {"prompt": PROMPT})[0] == 504


def test_a_dead_engine_shows_in_the_health(start, base, monkeypatch):
    server, client = start(base)

    def step(self: ContinuousBatch) -> None:
        raise KeyError("a defect")

    monkeypatch.setattr(ContinuousBatch, "step", step)
    monkeypatch.setattr(ContinuousBatch, "clear", step)
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    assert client.refused("/v1/completions", {"prompt": PROMPT})[0] == 500
    until(lambda: client.get("/health") == (503, {"status": "failed"}))
    assert client.get("/ready")[0] == 503
    assert client.refused("/v1/completions", {"prompt": PROMPT})[0] == 503
    assert client.get("/v1/models")[0] == 200
    assert server.url


def test_a_filter_that_fails_ends_its_request_only(start, base):
    class Broken(Rule):
        def find(self, part: str) -> list[Finding]:
            raise KeyError("the list of words has gone")

    _, client = start(base, filter=Broken(), filter_prompts=False)
    for _ in range(2):
        status, error = client.refused(PATH, {"prompt": PROMPT, "max_tokens": 3, "logit_bias": {"256": -100}})
        assert (status, error["message"]) == (
            500, "the text could not be judged: 'the list of words has gone'"
        )  # fmt: skip
        assert client.get("/health")[0] == 200
    _, client = start(base, filter=Broken())
    status, error = client.refused("/v1/completions", {"prompt": PROMPT})
    assert (status, error["message"]) == (500, "the server failed: its log says why")


def test_a_text_that_takes_too_long_is_ended(start, base, monkeypatch):
    slow_down(monkeypatch, 0.05)
    server, client = start(base, timeout_s=0.3)
    body = {"prompt": "x", "max_tokens": 100, "logit_bias": {"256": -100}}
    status, error = client.refused("/v1/completions", body)
    assert (status, error["type"]) == (504, "timeout")
    assert "not finished within 0.3 seconds" in error["message"]
    events, ended = client.stream("/v1/completions", body)
    assert events[-1]["error"]["code"] == "timeout"
    assert not ended
    until(lambda: server.monitor.loads()["tale"].running == 0)


# --- the end --------------------------------------------------------------------------------------------


def test_what_has_begun_is_finished_when_the_server_stops(start, base, monkeypatch):
    server, client = start(base, grace_s=20.0)
    client.complete(max_tokens=1)
    released = hold_steps(monkeypatch)
    expected = base.generate(PROMPT, max_new_tokens=40, temperature=0)
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(client.complete(max_tokens=40)))
    thread.start()
    until(lambda: server.monitor.loads()["tale"].running == 1)
    server.request_stop()
    until(lambda: client.get("/ready")[0] == 503)
    status, error = client.refused("/v1/completions", {"prompt": "x"})
    assert (status, error["message"]) == (503, "the server is stopping")
    released.set()
    thread.join()
    assert answers[0]["choices"][0]["text"] == expected
    assert server.wait(10)


def test_what_does_not_end_in_time_is_told(start, base, monkeypatch):
    slow_down(monkeypatch, 0.05)
    server, client = start(base, grace_s=0.2)
    found: list[Any] = []
    body = {"prompt": "x", "max_tokens": 150, "logit_bias": {"256": -100}}
    thread = threading.Thread(target=lambda: found.append(client.refused("/v1/completions", body)))
    thread.start()
    until(lambda: server.monitor.loads()["tale"].running == 1)
    server.stop()
    thread.join()
    assert found[0][0] == 503


def test_a_server_stops_twice_and_in_a_with(base):
    with serve(base, port=0) as server:
        assert server.url.startswith("http://127.0.0.1:")
        server.stop()
    assert server.wait(0)
