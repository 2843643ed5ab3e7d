"""Metrics, the series of the monitor's page, and the alarm for outputs that have changed."""

import json
import random

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gptpl.errors import InputError
from gptpl.filters import PersonalData
from gptpl.serving import Drift
from tests.serving.conftest import PROMPT, slow_down, until


def metrics(client):
    """Every sample of /metrics by its name and labels."""
    status, text = client.get("/metrics")
    assert status == 200
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_requests_tokens_and_findings_are_counted(start, base):
    server, client = start(base, filter=PersonalData())
    done = client.complete("Write to jo@example.org", max_tokens=9, n=2)
    client.refused("/v1/completions", {"prompt": PROMPT, "max_tokens": -1})
    client.refused("/v1/nothing", {})
    found, model = metrics(client), ("model", "tale")

    def count(name, *labels):
        return found[f"gptpl_{name}", *sorted(labels)]

    path = ("endpoint", "/v1/completions")
    assert count("requests_total", model, path, ("status", "200")) == 1
    assert count("requests_total", ("model", ""), path, ("status", "400")) == 1
    assert count("requests_total", ("model", ""), ("endpoint", "other"), ("status", "404")) == 1
    assert count("generated_tokens_total", model) == done["usage"]["completion_tokens"]
    assert count("prompt_tokens_total", model) == done["usage"]["prompt_tokens"]
    assert count("filter_findings_total", model, ("where", "prompt"), ("rule", "e-mail address")) == 1
    assert count("time_to_first_token_seconds_count", model) == 2
    assert count("queued_requests", model) == count("running_rows", model) == 0
    assert count("drift_alarm", model) == 0
    assert 0 < count("request_seconds_sum", model) < 30
    server.monitor.tick()
    _, data = client.get("/monitor/data")
    [point] = data["points"]
    assert (point["requests"], point["filtered"], point["errors"]) == (3, 1, 0)
    assert point["tokens"] == done["usage"]["completion_tokens"]
    assert point["first_token_ms"][0] <= point["first_token_ms"][1]
    assert data["totals"]["requests"] == 3
    assert data["drift"]["state"] == "learning"
    server.monitor.tick()
    quiet = client.get("/monitor/data")[1]["points"][1]
    assert (quiet["requests"], quiet["first_token_ms"], quiet["log_probability"]) == (0, None, None)


def test_streams_that_fail_and_clients_that_leave_are_counted(start, base, monkeypatch):
    server, client = start(base, timeout_s=1.0)
    slow_down(monkeypatch, 0.02)
    body = {"prompt": "x", "max_tokens": 150, "stream": True, "logit_bias": {"256": -100}}
    client.stream("/v1/completions", body)
    with client.begun("/v1/completions", json.dumps(body).encode()) as connection:
        connection.recv(100)
    labels = [("endpoint", "/v1/completions"), ("model", "tale")]
    until(lambda: metrics(client).get(("gptpl_requests_total", *labels, ("status", "499"))) == 1)
    assert metrics(client)["gptpl_requests_total", *labels, ("status", "504")] == 1
    assert server.monitor.data()["totals"]["errors"] == 1


def test_what_is_refused_is_counted_by_its_status(start, base):
    _, client = start(base, api_key="a long secret")
    client.refused("/v1/completions", {"prompt": PROMPT})
    client.refused("/v1/completions", {"prompt": PROMPT})
    headers = {"Authorization": "Bearer a long secret"}
    assert b'gptpl_rejected_requests_total{reason="401"} 2.0' in client.get("/metrics", **headers)[1]


def test_the_mean_log_probability_of_outputs_is_the_model_s(start, base):
    server, client = start(base)
    end = base.tokenizer.eot_id
    [expected] = base.complete(
        [PROMPT], max_new_tokens=20, temperature=0, alternatives=0, banned_tokens=[end]
    )
    client.complete(max_tokens=20, logit_bias={str(end): -100})
    server.monitor.tick()
    [point] = client.get("/monitor/data")[1]["points"]
    mean = sum(each.log_probability for each in expected.details) / len(expected.details)
    assert point["log_probability"] == pytest.approx(mean, abs=1e-4)


def outputs(drift, number, *, mean=-2.0, repetition=0.1, seed=0):
    numbers = random.Random(seed)
    for _ in range(number):
        drift.add(log_probability=numbers.gauss(mean, 0.3), repetition=numbers.gauss(repetition, 0.05))


def test_outputs_that_stay_as_they_were_raise_no_alarm():
    for seed in range(50):
        drift = Drift(reference=100, window=40)
        outputs(drift, 139, seed=seed)
        assert (drift.state, drift.measured) == ("learning", {})
        outputs(drift, 60, seed=1000 + seed)
        assert drift.state == "steady"


@pytest.mark.parametrize(
    "change", [{"mean": -2.4}, {"mean": -1.6}, {"repetition": 0.2}, {"repetition": 0.03}]
)
def test_outputs_that_change_raise_it_until_they_are_as_before(change):
    drift = Drift(reference=100, window=40)
    states: list[str] = []
    for seed, changed in ((0, {}), (1, change), (2, {})):
        outputs(drift, 200 if seed == 0 else 40, seed=seed, **changed)
        states.append(drift.state)
        if seed == 1:
            measured = drift.measured
    assert states == ["steady", "alarm", "steady"]
    [name] = change
    measure = "log_probability" if name == "mean" else name
    found = measured[measure]
    assert abs(found.deviation) > found.threshold
    assert (found.recent > found.reference) == (change[name] > {"mean": -2.0, "repetition": 0.1}[name])


def test_deviations_are_counted_in_standard_errors():
    drift = Drift(reference=4, window=2, threshold=1.0)
    for value in (-1.0, -3.0, -1.0, -3.0, -4.0, -4.0):  # standard deviation 1.1547
        drift.add(log_probability=value, repetition=0.5)
    found = drift.measured
    assert found["log_probability"].deviation == pytest.approx(-2 / (4 / 3 / 4) ** 0.5)
    assert found["repetition"].deviation == 0
    assert drift.state == "alarm"
    for _ in range(2):
        drift.add(log_probability=-2.0, repetition=0.6)  # all were equal before
    assert drift.record()["measures"]["repetition"]["deviation"] is None


def test_one_output_that_repeats_itself_is_no_alarm_where_none_did():
    drift = Drift(reference=100, window=40)
    for number in range(180):
        drift.add(log_probability=-2.0 + number % 7 / 10, repetition=0.3 if number == 150 else 0.0)
        assert drift.state != "alarm"


def test_a_server_that_is_started_again_compares_with_the_first_outputs(start, base, tmp_path):
    file = tmp_path / "first.json"
    settings = {"drift_reference": 5, "drift_window": 3, "drift_file": file}
    server, _ = start(base, **settings)
    for number in range(5):
        assert not file.exists()
        server.monitor.output("tale", [1, 2, 3] * 4, [-1.0 - number / 10] * 12)
    again, _ = start(base, **settings)
    for number in range(3):
        again.monitor.output("tale", [1, 2, 3] * 4, [-3.0 - number / 10] * 12)
    drift = again.monitor.drift["tale"]
    assert (drift.state, drift.measured["log_probability"].reference) == ("alarm", pytest.approx(-1.2))
    for content in ("[]", "{", '{"tale": {"repetition": [1]}}', '{"tale": {"log_probability": ["x"]}}'):
        file.write_text(content)
        with pytest.raises(InputError, match=r"drift_file=.*(first outputs|does not fit tale)"):
            start(base, **settings)


def test_an_alarm_is_logged_once(start, base, caplog):
    server, _ = start(base, drift_reference=5, drift_window=2)
    for number in range(8):
        server.monitor.output("tale", [1, 2, 3] * 4, [-1.0 - number % 2 / 10] * 12)
    for _ in range(4):
        server.monitor.output("tale", [1, 2, 3] * 4, [-9.0] * 12)
    assert caplog.text.count("the outputs of tale have changed") == 1


@pytest.mark.parametrize(
    "settings", [{"reference": 1}, {"window": 0}, {"threshold": -1.0}, {"threshold": float("nan")}]
)
def test_settings_of_drift_are_checked(settings):
    [name] = settings
    with pytest.raises(InputError, match=f"{name} must be"):
        Drift(**settings)
