"""Who may use a server, and what requests can reach: nothing but the models."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from gptpl.errors import InputError
from gptpl.filters import PersonalData, WordList
from gptpl.serving import ServerSettings, serve
from gptpl.serving.server import Server
from tests.serving.conftest import PROMPT, hold_steps, until

KEY = "a long secret"
BODY = {"prompt": PROMPT, "max_tokens": 2}


# --- settings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org"])
def test_other_machines_need_a_key_or_a_decision(host):
    with pytest.raises(InputError, match=r"lets other machines in: give an api_key.* or say insecure=true"):
        ServerSettings(host=host)
    assert not ServerSettings(host=host, api_key=KEY).is_local
    ServerSettings(host=host, insecure=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_this_machine_needs_none(host):
    assert ServerSettings(host=host).is_local


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"port": 65536}, "port must be from 0"),
        ({"port": -1}, "port must be from 0"),
        ({"api_key": "short"}, "8 characters or more"),
        ({"cors": ["example.org"]}, "cors=example.org is no origin"),
        ({"cors": ["https://example.org/path"]}, "is no origin"),
        ({"cors": ["*"]}, "is no origin"),
        ({"max_rows": 0}, "max_rows must be at least 1, got 0"),
        ({"kept_mb": -1}, "kept_mb must be at least 0"),
        ({"requests_per_minute": 0}, "requests_per_minute must be at least 1"),
        ({"timeout_s": 0}, "timeout_s must be a positive number"),
        ({"drift_window": 1}, "window must be at least 2"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        ServerSettings(**settings)


def test_models_and_their_names_are_checked(base):
    with pytest.raises(InputError, match="no model to serve"):
        serve()
    with pytest.raises(InputError, match="names must be 2 different texts"):
        serve(base, base, names=["a", "a"])
    assert Server([base, base], ServerSettings()).names == ["tale", "tale-2"]
    with pytest.raises(InputError, match=r"chat_template is not a Jinja template"):
        serve(base, chat_template="{% for %}")
    with pytest.raises(InputError, match="neither a Jinja text nor a file"):
        serve(base, chat_template="nowhere.jinja")


def test_a_port_in_use_is_named(start, base):
    server, _ = start(base)
    with pytest.raises(InputError, match=rf"port={server.port} cannot be used .*give another port"):
        serve(base, port=server.port)
    with pytest.raises(InputError, match="cannot be used"):
        serve(base, host="x" * 70, port=0, insecure=True)


# --- keys and origins -----------------------------------------------------------------------------------


def test_without_the_key_only_pages_and_health_are_open(start, base):
    _, client = start(base, api_key=KEY)
    for path in ("/", "/monitor", "/health", "/ready"):
        assert client.get(path)[0] == 200, path
    for path in ("/v1/models", "/info", "/metrics", "/monitor/data", "/card/0", "/nothing"):
        assert client.get(path)[0] == 401, path
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": KEY[:-1]},
        {"Authorization": "Bearer "},
    ):
        status, error = client.refused("/v1/completions", BODY, **headers)
        assert (status, error["type"], error["code"]) == (401, "authentication_error", "invalid_api_key")
        assert KEY not in error["message"]
    assert client.post("/v1/completions", BODY, Authorization=f"Bearer {KEY}")[0] == 200
    assert client.get("/info", Authorization=f"Bearer {KEY}")[0] == 200


def test_a_key_cannot_be_guessed_at_any_rate(start, base):
    _, client = start(base, api_key=KEY)
    found = [client.refused("/v1/completions", BODY, Authorization=f"Bearer {i}")[0] for i in range(25)]
    assert found == [401] * 20 + [429] * 5
    assert client.refused("/v1/completions", BODY, Authorization=f"Bearer {KEY}")[0] == 429
    _, client = start(base, api_key=KEY)
    assert client.post("/v1/completions", BODY, Authorization=f"bearer  {KEY}")[0] == 200


def test_usage_does_not_tell_what_others_wrote(client):
    client.complete("The password of the safe is tulip 42", max_tokens=1)
    usage = client.complete("The password of the safe is tulip 4", max_tokens=1)["usage"]
    assert set(usage) == {"prompt_tokens", "completion_tokens", "total_tokens"}


def test_a_name_made_to_mean_this_machine_is_refused(client):
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", ""):
        assert client.get("/v1/models", Host=host)[0] in (400, 403), host
    for host in ("localhost", f"localhost:{client.port}", "127.0.0.1:1", "[::1]:5"):
        assert client.get("/v1/models", Host=host)[0] == 200, host


def test_pages_of_other_sites_may_not_use_it(client):
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1", "file://", "http://[::1"):
        assert client.refused("/v1/completions", BODY, Origin=origin)[0] == 403, origin
        assert client.get("/v1/models", Origin=origin)[0] == 403
        assert client.ask("OPTIONS", "/v1/completions", Origin=origin)[0] == 403
    assert client.post("/v1/completions", BODY, Origin=f"http://127.0.0.1:{client.port}")[0] == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_what_a_form_can_send_is_refused(client, kind):
    assert client.refused("/v1/completions", BODY, Content_Type=kind)[0] == 415


def test_a_proxy_may_speak_tls_for_it(client):
    own = f"https://127.0.0.1:{client.port}"
    assert client.post("/v1/completions", BODY, Origin=own)[0] == 200


def test_a_named_origin_may_use_it(start, base):
    _, client = start(base, cors=["https://lab.example"])
    given = {"Origin": "https://lab.example"}
    with client.sent("OPTIONS", "/v1/completions", **given) as response:
        assert response.status == 204
        assert response.headers["Access-Control-Allow-Origin"] == "https://lab.example"
        assert "Authorization" in response.headers["Access-Control-Allow-Headers"]
    asked = {"Access_Control_Request_Headers": "authorization, x-stainless-os"}
    with client.sent("OPTIONS", "/v1/completions", **given, **asked) as response:
        assert response.headers["Access-Control-Allow-Headers"] == "authorization, x-stainless-os"
    data = json.dumps(BODY | {"stream": True}).encode()
    with client.sent("POST", "/v1/completions", data, Content_Type="application/json", **given) as response:
        assert response.headers["Access-Control-Allow-Origin"] == "https://lab.example"
        assert b"[DONE]" in response.read()
    with client.sent("GET", "/v1/models") as response:
        assert response.headers["Access-Control-Allow-Origin"] is None
    assert client.get("/v1/models", Origin="https://other.example")[0] == 403


def test_pages_load_nothing_from_elsewhere(client):
    seen = set()
    for path in ("/", "/monitor"):
        with client.sent("GET", path) as response:
            policy, text = response.headers["Content-Security-Policy"], response.read().decode()
            assert response.headers["X-Content-Type-Options"] == "nosniff"
        nonce = policy.partition("script-src 'nonce-")[2].partition("'")[0]
        assert policy.startswith("default-src 'none'; ")
        assert f'nonce="{nonce}"' in text
        assert "unsafe" not in policy
        seen.add(nonce)
    assert len(seen) == 2  # another one each time


@pytest.mark.parametrize(
    "path",
    [
        "/card/0",
        "/card/9",
        "/card/..%2f..%2fetc%2fpasswd",
        "/card/-1",
        "/..%2f..%2fetc/passwd",
        "/card/%D9%A1",
    ],
)
def test_no_path_reaches_files(client, path):
    status, answer = client.get(path)
    assert status in (400, 404)
    assert "root:" not in str(answer)


def test_a_card_beside_the_run_is_shown_as_plain_text(start, base, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text("{}")
    (tmp_path / "model_card.md").write_text("# <b>Card</b>", encoding="utf-8")
    model = type(base)(**(vars(base) | {"path": tmp_path / "checkpoints" / "last.ckpt"}))
    _, client = start(model)
    [info] = client.get("/info")[1]["models"]
    with client.sent("GET", info["card"]) as response:
        assert response.headers.get_content_type() == "text/plain"
        assert response.read() == b"# <b>Card</b>"


# --- limits ---------------------------------------------------------------------------------------------


def test_a_body_that_is_too_large_is_refused(start, base):
    _, client = start(base, max_body_kb=4)
    status, error = client.refused("/v1/completions", {"prompt": "x" * 5000})
    assert status == 413
    assert "POST /v1/completions" in error["message"]
    assert client.complete(max_tokens=1)


def test_more_requests_than_may_wait_are_refused_with_the_time_to_retry(start, base, monkeypatch):
    server, client = start(base, max_rows=1, max_queue=2)
    client.complete(max_tokens=1)
    released = hold_steps(monkeypatch)
    body = json.dumps({"prompt": "x", "max_tokens": 9, "stream": True, "temperature": 0})
    with ExitStack() as open_requests:
        open_requests.enter_context(client.begun("/v1/completions", body.encode()))
        until(lambda: server.monitor.loads()["tale"].running == 1)
        for _ in range(2):
            open_requests.enter_context(client.begun("/v1/completions", body.encode()))
        until(lambda: server.monitor.loads()["tale"].queued == 2)
        with client.sent(
            "POST", "/v1/completions", json.dumps(BODY).encode(), Content_Type="application/json"
        ) as r:
            assert (r.status, r.headers["Retry-After"]) == (429, "5")
            assert json.loads(r.read())["error"]["type"] == "rate_limit_error"
        released.set()
    until(lambda: server.monitor.loads()["tale"].queued == 0)
    assert client.complete(max_tokens=2)


def test_requests_sent_together_have_no_more_places(start, base):
    server, client = start(base, max_rows=1, max_queue=4)
    body = {"prompt": ["x"] * 4, "max_tokens": 100, "logit_bias": {"256": -100}}
    most = [0]

    def ask(_: int) -> int:
        status, _ = client.post("/v1/completions", body)
        most[0] = max(most[0], server.monitor.loads()["tale"].queued)
        return status

    with ThreadPoolExecutor(20) as pool:
        assert set(pool.map(ask, range(20))) == {200, 429}
    assert most[0] <= 4


def test_a_classifier_is_called_once_at_a_time(start, base, spam, monkeypatch):
    server, client = start(spam, base)
    running, most, released = [0], [0], threading.Event()
    original = type(spam).classify

    def classify(self, texts):
        running[0] += 1
        most[0] = max(most[0], running[0])
        released.wait(20)
        found = original(self, texts)
        running[0] -= 1
        return found

    monkeypatch.setattr(type(spam), "classify", classify)
    body = json.dumps({"model": "spam", "texts": ["x"]}).encode()
    with ExitStack() as open_requests:
        for _ in range(12):
            open_requests.enter_context(client.begun("/classify", body))
        until(lambda: server.monitor.loads()["spam"].queued == 11)
        assert client.complete(model="tale", max_tokens=2)  # the other model has its own thread
        released.set()
    until(lambda: server.monitor.loads()["spam"].running == 0)
    assert most[0] == 1


def test_an_address_may_have_so_many_requests_at_a_time(start, base, monkeypatch):
    server, client = start(base, max_per_client=1)
    client.complete(max_tokens=1)
    released = hold_steps(monkeypatch)
    body = json.dumps({"prompt": "x", "max_tokens": 9, "stream": True, "temperature": 0}).encode()
    with client.begun("/v1/completions", body):
        until(lambda: server.monitor.loads()["tale"].running == 1)
        assert client.post("/v1/completions", BODY)[0] == 429
        released.set()


def test_requests_in_a_minute_are_limited(start, base):
    _, client = start(base, requests_per_minute=3)
    for _ in range(3):
        client.complete(max_tokens=1)
    with client.sent(
        "POST", "/v1/completions", json.dumps(BODY).encode(), Content_Type="application/json"
    ) as response:
        assert response.status == 429
        assert 1 <= int(response.headers["Retry-After"]) <= 60
        assert json.loads(response.read())["error"]["type"] == "rate_limit_error"
    assert client.get("/v1/models")[0] == 200


# --- filters and feedback -------------------------------------------------------------------------------


def test_a_filter_marks_the_prompt_before_the_model_reads_it_and_says_so(start, base):
    _, client = start(base, filter=PersonalData())
    prompt = "Write to jo@example.org now"
    answer = client.complete(prompt, max_tokens=6)
    [note] = answer["prompt_filter"]
    assert note == {
        "index": 0,
        "action": "mark",
        "counts": {"e-mail address": 1},
        "text": "Write to [e-mail address] now",
    }
    marked = base.generate("Write to [e-mail address] now", max_new_tokens=6, temperature=0)
    assert answer["choices"][0]["text"] == marked
    events, _ = client.stream("/v1/completions", {"prompt": prompt, "max_tokens": 6, "temperature": 0})
    assert events[0]["prompt_filter"] == answer["prompt_filter"]
    assert all("prompt_filter" not in event for event in events[1:])
    unfiltered = base.generate(prompt, max_new_tokens=6, temperature=0)
    _, other = start(base, filter=PersonalData(), filter_prompts=False)
    assert other.complete(prompt, max_tokens=6)["choices"][0]["text"] == unfiltered


def test_a_filter_judges_texts_and_counts_what_it_did(start, base):
    text = base.generate(PROMPT, max_new_tokens=40, temperature=0)
    word = max(text.split(), key=len)
    letters = "".join(c for c in word if c.isalnum()) or "a"
    filter = WordList(words=[letters])
    expected = filter.verdict(text)
    _, client = start(base, filter=filter)
    answer = client.complete(max_tokens=40)
    [choice] = answer["choices"]
    assert choice["text"] == expected.text
    if expected.findings:
        assert choice["filter"] == {"action": "mark", "counts": expected.counts}
    events, _ = client.stream("/v1/completions", {"prompt": PROMPT, "max_tokens": 40, "temperature": 0})
    assert "".join(each["choices"][0]["text"] for each in events) == expected.text


def test_a_filter_that_withholds_refuses_prompts_and_hides_texts(start, base):
    _, client = start(base, filter=WordList(words=["every", "zzz"], action="withhold"))
    status, error = client.refused("/v1/completions", {"prompt": PROMPT})
    assert (status, error["code"]) == (400, "content_filter")
    assert "word" in error["message"]
    [choice] = client.complete("q", max_tokens=6, logit_bias={str(ord("z")): 100}, stop=None)["choices"]
    assert "z" in choice["text"]  # zzzzzz is another word
    [choice] = client.complete("q", max_tokens=3, logit_bias={str(ord("z")): 100})["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("[withheld: word]", "content_filter")
    assert choice["filter"] == {"action": "withhold", "counts": {"word": 1}}


def test_probabilities_do_not_tell_what_a_filter_hides(start, base):
    _, client = start(base, filter=PersonalData())
    status, error = client.refused("/v1/completions", {"prompt": PROMPT, "logprobs": 1})
    assert (status, error["param"]) == (400, "logprobs")
    _, reporting = start(base, filter=PersonalData(action="report"))
    assert reporting.complete(logprobs=1, max_tokens=2)["choices"][0]["logprobs"]


def test_feedback_is_kept_only_where_it_was_asked_for(start, base, tmp_path):
    report = {"rating": "report", "prompt": "p", "text": "t\nü", "comment": "no"}
    _, client = start(base)
    assert client.refused("/feedback", report)[0] == 404
    file = tmp_path / "reports.jsonl"
    _, client = start(base, feedback=file)
    assert client.get("/info")[1]["feedback"] is True
    assert client.post("/feedback", report)[0] == 204
    assert client.post("/feedback", {"rating": "up"})[0] == 204
    first, second = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    assert {**report, "model": "tale"} == {name: first[name] for name in (*report, "model")}
    assert second["rating"] == "up"
    for body in (
        {"rating": "so so"},
        {},
        {"rating": "up", "comment": "x" * 5001},
        {"rating": "up", "path": "/tmp"},
    ):
        assert client.refused("/feedback", body)[0] == 400
    _, client = start(base, feedback=tmp_path / "no folder" / "f.jsonl")
    assert client.refused("/feedback", report)[0] == 500


def test_nothing_of_a_conversation_is_logged_unless_asked_for(start, base, caplog):
    caplog.set_level("DEBUG")
    _, client = start(base)
    client.complete("a secret thing", max_tokens=3)
    assert "secret" not in caplog.text
    assert '"status": 200' in caplog.text
    _, client = start(base, log_texts=True)
    client.complete("a secret thing", max_tokens=3)
    assert "a secret thing" in caplog.text
