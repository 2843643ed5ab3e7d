"""Details of texts, filters, limits and metrics, each of which a small defect would change unseen."""

import http.client
import json
import threading
from contextlib import closing
from typing import Any

import pytest

from gptpl.filters import PersonalData
from gptpl.generation import TokenDetails
from gptpl.serving import ServerSettings
from gptpl.serving.engine import _TokenTexts
from gptpl.serving.server import Server
from tests.serving.conftest import PROMPT, hold_steps, repeating, slow_down, until
from tests.serving.test_monitoring import metrics

KEY = "a long secret"
MAIL = "Write to jo@example.org"


@pytest.mark.parametrize("given", [KEY[:-1], KEY + "x", KEY.upper()])
def test_a_key_must_be_whole(start, base, given):
    _, client = start(base, api_key=KEY)
    assert client.get("/info", Authorization=f"Bearer {given}")[0] == 401


@pytest.mark.parametrize("rule", [{"min_p": 0.3}, {"typical_p": 0.2}, {"repetition_penalty": 3.0}])
def test_every_rule_reaches_the_model(client, base, rule):
    settings: dict[str, Any] = {"temperature": 1.5, "seed": 5} | rule
    [expected] = base.complete([PROMPT], max_new_tokens=30, top_k=None, **settings)
    plain = base.complete([PROMPT], max_new_tokens=30, top_k=None, temperature=1.5, seed=5)
    assert client.complete(max_tokens=30, **settings)["choices"][0]["text"] == expected.text
    assert expected.text != plain[0].text


def test_top_k_beyond_the_vocabulary_is_all_of_it(client):
    assert client.complete(top_k=10_000, max_tokens=2)


def test_every_sample_has_the_echo(client):
    choices = client.complete([PROMPT, "Ja"], n=2, echo=True, max_tokens=2, temperature=1.0, logprobs=0)[
        "choices"
    ]
    for choice, prompt in zip(choices, [PROMPT, PROMPT, "Ja", "Ja"], strict=True):
        assert choice["text"].startswith(prompt)
        assert "".join(choice["logprobs"]["tokens"]) == choice["text"]


def test_tokens_after_a_stop_string_are_left_out(start, base):
    _, client = start(repeating(base, b"abcdef"))
    [choice] = client.complete("a", max_tokens=12, stop="de", logprobs=0)["choices"]
    assert (choice["text"], choice["logprobs"]["tokens"]) == ("bc", ["b", "c"])


def test_a_stream_is_logged_where_texts_are(start, base, caplog):
    caplog.set_level("INFO")
    _, client = start(base, log_texts=True)
    client.stream("/v1/completions", {"prompt": "a secret thing", "max_tokens": 3})
    until(lambda: "a secret thing" in caplog.text)


@pytest.mark.parametrize(
    "settings, body, status",
    [
        ({"max_body_kb": 1}, {"prompt": "x" * 2000}, 413),
        ({"requests_per_minute": 1}, {"prompt": "x", "max_tokens": 1}, 429),
    ],
)
def test_every_refusal_is_counted(start, base, settings, body, status):
    _, client = start(base, **settings)
    client.post("/v1/completions", {"prompt": "x", "max_tokens": 1})
    client.refused("/v1/completions", body)
    assert metrics(client)["gptpl_rejected_requests_total", ("reason", str(status))] == 1


def test_scores_are_those_of_their_labels(client, spam):
    texts = ["Win a prize now", "See you at six"]
    _, answer = client.post("/classify", {"model": "spam", "texts": texts})
    for found, each in zip(answer["data"], spam.classify(texts), strict=True):
        assert found["scores"] == pytest.approx(
            dict(zip(each.labels, each.probabilities, strict=True)), abs=1e-6
        )
        assert max(found["scores"], key=found["scores"].get) == found["label"]


def test_a_classifier_has_a_bounded_queue(start, spam, monkeypatch):
    server, client = start(spam, max_queue=1)
    refused = threading.Event()

    def slow(self: object, texts: object) -> list[Any]:
        refused.wait(20)
        return []

    monkeypatch.setattr(type(spam), "classify", slow)
    body = json.dumps({"texts": ["x"]}).encode()
    with client.begun("/classify", body):
        until(lambda: server.monitor.loads()["spam"].running == 1)
        assert client.refused("/classify", {"texts": ["x"]})[0] == 429
        refused.set()


def test_a_filter_judges_every_message_of_a_chat(start, instruct):
    _, client = start(instruct, filter=PersonalData())
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": MAIL}]
    _, answer = client.post("/v1/chat/completions", {"messages": messages, "max_tokens": 6, "temperature": 0})
    marked = "Be brief.\n\n" + instruct.template.prompt("Write to [e-mail address]")
    assert answer["usage"]["prompt_tokens"] == len(marked)
    text = instruct.generate(marked, max_new_tokens=6, temperature=0)
    assert answer["choices"][0]["message"]["content"] == text.strip()
    [note] = answer["prompt_filter"]
    assert (note["index"], note["text"]) == (1, "Write to [e-mail address]")


def test_a_template_is_given_the_messages_in_their_order(start, base):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}<bot>"
    _, client = start(base, chat_template=template)
    messages = [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "3"},
    ]
    _, answer = client.post("/v1/chat/completions", {"messages": messages, "max_tokens": 9, "temperature": 0})
    prompt = "<user>1<|endoftext|><assistant>2<|endoftext|><user>3<|endoftext|><bot>"
    expected = base.generate(prompt, max_new_tokens=9, temperature=0).strip()
    assert answer["choices"][0]["message"]["content"] == expected


def test_an_answer_begins_without_a_space_also_in_a_stream(start, base):
    _, client = start(repeating(base, b"? q"), chat_template="{{ messages[-1].content }}")
    body = {"messages": [{"role": "user", "content": "?"}], "max_tokens": 4, "temperature": 0}
    events, _ = client.stream("/v1/chat/completions", body)
    contents = [event["choices"][0]["delta"].get("content", "") for event in events]
    assert "".join(contents) == "q? "


def test_the_end_of_a_text_is_shown_as_an_alternative(base):
    tokenizer = base.tokenizer
    texts = _TokenTexts(tokenizer, ())
    best = ((tokenizer.eot_id, -0.5), (66, -1.0))
    texts.push(65, TokenDetails(log_probability=-2.0, entropy=1.0, alternatives=best))
    [token] = texts.within(1, final=True)
    assert token.alternatives == (("<|endoftext|>", -0.5), ("B", -1.0))


def test_the_monitor_shows_the_median_the_shared_tokens_and_the_worst_drift(start, base):
    other = type(base)(**(vars(base) | {"path": base.path.with_name("other")}))
    server, client = start(base, other, drift_reference=5, drift_window=2, max_rows=2)
    assert metrics(client)["gptpl_cache_use_ratio", ("model", "tale")] == 0
    for _ in range(2):
        tokens = client.complete(max_tokens=9, logit_bias={"256": -100})["usage"]["completion_tokens"]
    found = metrics(client)
    assert found["gptpl_shared_prompt_tokens_total", ("model", "tale")] == len(PROMPT) - 1
    assert found["gptpl_time_to_first_token_seconds_count", ("model", "tale")] == 2
    assert 0 < found["gptpl_time_between_tokens_seconds_count", ("model", "tale")] <= 2 * (tokens - 1)
    for number in range(8):
        server.monitor.output("other", [1, 2, 3] * 4, [-1.0 - number % 2 / 10 - 8 * (number > 5)] * 12)
    assert server.monitor.data()["drift"]["state"] == "alarm"
    server.monitor.tick()
    server.monitor._values["first_token"] = [0.1, 0.2, 0.3]
    server.monitor.tick()
    assert server.monitor.data()["points"][-1]["first_token_ms"][0] == 200


def test_findings_in_texts_are_counted(start, base):
    _, client = start(repeating(base, b" a@b.org"), filter=PersonalData())
    client.complete("x ", max_tokens=20)
    found = metrics(client)
    key = ("gptpl_filter_findings_total", ("model", "tale"), ("rule", "e-mail address"), ("where", "text"))
    assert found[key] >= 1


def test_pages_may_not_be_framed(client):
    with client.sent("GET", "/") as response:
        policy = response.headers["Content-Security-Policy"]
        for each in ("base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'", "connect-src 'self'"):
            assert each in policy


def test_runs_are_named_by_their_last_two_folders(base, tmp_path):
    run = tmp_path / "tale" / "first"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("{}")
    model = type(base)(**(vars(base) | {"path": run / "checkpoints" / "last.ckpt"}))
    assert Server([model, base], ServerSettings()).names == ["tale/first", "tale"]
    assert Server([model], ServerSettings(host="::1")).url.startswith("http://[::1]:")


def test_limits_are_of_each_address(start, base):
    _, client = start(base, api_key=KEY, requests_per_minute=1)
    body = json.dumps({"prompt": "x", "max_tokens": 1})

    def ask(source: str, key: str) -> int:
        address = http.client.HTTPConnection("127.0.0.1", client.port, timeout=30, source_address=(source, 0))
        with closing(address) as connection:
            headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
            connection.request("POST", "/v1/completions", body, headers)
            return connection.getresponse().status

    assert [ask("127.0.0.1", "wrong") for _ in range(21)][-2:] == [401, 429]
    assert ask("127.0.0.2", "wrong") == 401
    assert [ask("127.0.0.2", KEY) for _ in range(2)] == [200, 429]
    assert ask("127.0.0.3", KEY) == 200


def test_a_minute_s_limit_says_when_it_ends(start, base):
    _, client = start(base, requests_per_minute=1)
    client.complete(max_tokens=1)
    data = json.dumps({"prompt": "x"}).encode()
    with client.sent("POST", "/v1/completions", data, Content_Type="application/json") as response:
        assert 55 <= int(response.headers["Retry-After"]) <= 60


def test_a_server_that_stops_says_when_to_retry(start, base, monkeypatch):
    server, client = start(base, grace_s=20.0)
    client.complete(max_tokens=1)
    released = hold_steps(monkeypatch)
    thread = threading.Thread(target=lambda: client.complete(max_tokens=40))
    thread.start()
    until(lambda: server.monitor.loads()["tale"].running == 1)
    server.request_stop()
    until(lambda: client.get("/ready")[0] == 503)
    with client.sent("POST", "/v1/completions", b"{}", Content_Type="application/json") as response:
        assert (response.status, response.headers["Retry-After"]) == (503, "10")
    released.set()
    thread.join()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place_long_before_its_text_would_end(
    start, base, monkeypatch, stream
):
    slow_down(monkeypatch, 0.1)  # 15 s for the whole text
    server, client = start(base, max_rows=1, kept_mb=0)
    body = {"prompt": "x", "max_tokens": 150, "stream": stream, "logit_bias": {"256": -100}}
    with client.begun("/v1/completions", json.dumps(body).encode()):
        until(lambda: server.monitor.loads()["tale"].running == 1)
    until(lambda: server.monitor.loads()["tale"].running == 0, seconds=12)
