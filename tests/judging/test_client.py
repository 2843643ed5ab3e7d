"""Questions to a server that misbehaves in every way a real one does."""

import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from gptpl.errors import InputError
from gptpl.judging.client import UnreadableReplyError, api_key, checked_address

BODY = {"messages": [{"role": "user", "content": "Score this."}]}


def status(code, text="", **headers):
    return lambda handler: handler.send(code, text, **headers)


def silent(handler):
    handler.fall_silent()


def cut(handler):
    handler.cut()


def cut_midway(handler):
    handler.cut_midway()


def refusal(client):
    with pytest.raises(InputError) as raised:
        client.reply(BODY)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("protocol", ["ollama", "openai"])
def test_a_reply_is_the_models_text(protocol, client, judge_server):
    assert client(protocol).reply(BODY) == "Score: 85"
    assert judge_server.bodies == [BODY]


# --- tried again ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failure", [status(500), status(503, "<html>"), status(429), status(408), cut, cut_midway]
)
def test_what_may_pass_is_tried_again_after_ever_longer_waits(failure, client, judge_server, waits):
    judge_server.script = [failure, failure]
    asking = client()
    assert asking.reply(BODY) == "Score: 85"
    assert (waits, asking.retried, len(judge_server.bodies)) == ([1, 2], 2, 3)


def test_a_server_that_is_too_slow_is_asked_again(client, judge_server, waits):
    judge_server.script = [silent]
    assert client(timeout_seconds=0.2).reply(BODY) == "Score: 85"
    assert waits == [1]


def test_a_server_that_stays_silent_is_named_with_the_time(client, judge_server, waits):
    judge_server.script = [silent] * 2
    message = refusal(client(timeout_seconds=0.1, retries=1))
    assert f"the judge at {judge_server.address} failed 2 times (no answer for 0.1 s)" in message
    assert (waits, len(judge_server.bodies)) == ([1], 2)


def test_a_server_that_stays_broken_is_quoted(client, judge_server, waits):
    judge_server.script = [status(500, '{"error": "out of memory"}')] * 9
    message = refusal(client())
    assert "failed 4 times (HTTP 500 Internal Server Error: out of memory)" in message
    assert "run the same command again to continue" in message
    assert waits == [1, 2, 4]


def test_the_server_says_how_long_to_wait(client, judge_server, waits):
    then = datetime.now(UTC) + timedelta(seconds=60)
    dates = [format_datetime(then, usegmt=True), format_datetime(then.replace(tzinfo=None))]
    for value in ("7", *dates, "soon"):
        judge_server.script.append(status(429, Retry_After=value))
    assert client(retries=4).reply(BODY) == "Score: 85"
    assert (waits[0], waits[3]) == (7, 8)  # the last is a back-off of the client's own
    assert waits[1:3] == pytest.approx([60, 60], abs=5)


def test_a_date_that_is_past_means_at_once(client, judge_server, waits):
    judge_server.script = [status(503, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT")]
    client().reply(BODY)
    assert waits == [0]


def test_a_wait_that_is_too_long_ends_the_judging(client, judge_server, waits):
    judge_server.script = [status(429, '{"error": {"message": "quota used up"}}', Retry_After="3600")]
    message = refusal(client())
    assert "asks to wait 3,600 s (HTTP 429 Too Many Requests: quota used up)" in message
    assert (waits, len(judge_server.bodies)) == ([], 1)


# --- final ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("protocol", "failure", "words"),
    [
        (
            "ollama",
            status(404, '{"error": "model \'llama3\' not found"}'),
            "get it with `ollama pull llama3`",
        ),
        ("openai", status(404, '{"error": {"message": "The model `x` does not exist"}}'), "judge.model="),
        ("ollama", status(404, "404 page not found"), "(HTTP 404 Not Found: 404 page not found)"),
        ("ollama", status(400, '{"error": "invalid options"}'), "HTTP 400 Bad Request: invalid options"),
        ("ollama", status(400, '{"error": "exceeds the available context size"}'), "raise judge.num_ctx"),
        ("openai", status(401, '{"error": {"message": "wrong key"}}'), "wrong key): name the variable"),
        ("openai", status(403), "(HTTP 403 Forbidden): name the variable"),
        ("openai", status(301, Location="http://elsewhere/"), "HTTP 301 Moved Permanently"),
        ("openai", status(422, "x" * 5000), f"Unprocessable Entity: {'x' * 300}):"),
    ],
)
def test_what_the_server_refuses_is_not_tried_again(protocol, failure, words, client, judge_server, waits):
    judge_server.script = [failure]
    assert words in refusal(client(protocol))
    assert (waits, len(judge_server.bodies)) == ([], 1)


@pytest.mark.parametrize(
    "text", ["<html>", "", "[]", "{}", '{"message": {}}', '{"message": {"content": null}}']
)
@pytest.mark.parametrize("protocol", ["ollama", "openai"])
def test_a_reply_that_is_none_is_told_apart(protocol, text, client, judge_server):
    judge_server.script = [status(200, text)]
    with pytest.raises(UnreadableReplyError):
        client(protocol).reply(BODY)


@pytest.mark.parametrize("text", ['{"choices": []}', '{"choices": [3]}', '{"choices": {"a": 1}}'])
def test_openai_without_a_choice(text, client, judge_server):
    judge_server.script = [status(200, text)]
    with pytest.raises(UnreadableReplyError, match="JSON without a text"):
        client("openai").reply(BODY)


# --- no server ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("protocol", "words"),
    [
        ("ollama", "start it with `ollama serve`, and get the model with `ollama pull llama3`"),
        ("openai", "start the server"),
    ],
)
@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "http://nowhere.invalid:1"])
def test_a_judge_that_does_not_run_is_named_at_once(protocol, words, address, client, waits, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    message = refusal(client(protocol, address=address))
    assert f"no judge answers at {address}: " in message
    assert words in message
    assert waits == []


def test_a_judge_that_goes_away_is_waited_for(client, judge_server, waits):
    asking = client()
    asking.reply(BODY)
    asking.address = "http://127.0.0.1:9"
    assert "failed 4 times (the connection was lost)" in refusal(asking)
    assert waits == [1, 2, 4]


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("localhost:11434", "such as http://localhost:11434, got 'localhost:11434'"),
        ("", "got ''"),
        ("ftp://host", "got 'ftp://host'"),
        ("http://", "got 'http://'"),
        ("http://me:secret@host", "contains a user or password"),
    ],
)
def test_an_address_that_is_none_is_refused(address, words):
    with pytest.raises(InputError, match=words) as raised:
        checked_address(address, "ollama")
    assert "secret" not in str(raised.value)


def test_the_protocols_path_may_be_given_with_the_address():
    assert checked_address("http://host:8000/v1/", "openai") == "http://host:8000"
    assert checked_address("http://host/v1", "ollama") == "http://host/v1"


# --- keys -----------------------------------------------------------------------------------------------


def test_the_key_is_sent_and_nothing_of_the_machines_own(client, judge_server, tmp_path, monkeypatch):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("SOME_KEY", "sk-1")
    with_key = client("openai", api_key_env="SOME_KEY")
    with_key.reply(BODY)
    client("openai").reply(BODY)
    assert [headers.get("Authorization") for headers in judge_server.headers] == ["Bearer sk-1", None]
    assert "sk-1" not in repr(with_key)


def test_the_key_comes_from_the_variable_that_is_named(monkeypatch):
    monkeypatch.setenv("SOME_KEY", " sk-1\n")
    assert (api_key("SOME_KEY"), api_key(None)) == ("sk-1", None)
    monkeypatch.delenv("SOME_KEY")
    with pytest.raises(InputError, match=r"SOME_KEY of judge.api_key_env is not set: .*api_key_env=null"):
        api_key("SOME_KEY")
    monkeypatch.setenv("SOME_KEY", "sé cret")
    with pytest.raises(InputError, match=r"SOME_KEY of judge\.api_key_env is not a key") as raised:
        api_key("SOME_KEY")
    assert "cret" not in str(raised.value)


# --- what is sent ---------------------------------------------------------------------------------------


def test_the_bodies_are_those_of_the_published_protocols(client):
    messages = [{"role": "user", "content": "Hello"}]
    given = {"seed": 1, "max_tokens": 9}
    assert client("ollama", **given, num_ctx=4096, options={"top_k": 5}).body(messages) == {
        "model": "llama3",
        "messages": messages,
        "stream": False,
        "truncate": False,
        "options": {"temperature": 0.0, "seed": 1, "num_ctx": 4096, "num_predict": 9, "top_k": 5},
    }
    assert client("openai", **given, temperature=None, options={"top_p": 0.5}).body(messages) == {
        "model": "llama3",
        "messages": messages,
        "stream": False,
        "seed": 1,
        "max_tokens": 9,
        "top_p": 0.5,
    }


def test_a_client_that_gives_up_does_so_in_time(client, judge_server):
    judge_server.script = [silent] * 3
    began = time.monotonic()
    refusal(client(timeout_seconds=0.1, retries=2))
    assert time.monotonic() - began < 30
