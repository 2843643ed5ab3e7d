"""`gptpl serve` as a process, and its settings."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from gptpl.config.groups import config_folder
from gptpl.filters import PersonalData
from gptpl.serving import ServerSettings


def started(*arguments: str, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "gptpl", "serve", *arguments],
        cwd=cwd,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_run_is_served_until_a_signal(quick, tmp_path):
    process = started(
        f"checkpoint={quick.run.path}", "port=0", "names=[mine]", cwd=tmp_path, GPTPL_API_KEY="a long secret"
    )
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", url)
    body = json.dumps({"prompt": "x", "max_tokens": 3}).encode()
    headers = {"Content-Type": "application/json", "Authorization": "Bearer a long secret"}
    request = urllib.request.Request(f"{url}/v1/completions", body, headers)
    with urllib.request.urlopen(request, timeout=30) as response:
        assert json.loads(response.read())["model"] == "mine"
    with urllib.request.urlopen(url, timeout=30) as response:
        assert b"<!doctype html>" in response.read().lower()
    process.send_signal(signal.SIGTERM)
    out, log = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "")
    assert "models: mine" in log
    assert "stopping: requests that have begun are finished first" in log
    assert "Traceback" not in log
    assert "a long secret" not in log


def test_settings_that_are_not_safe_are_refused_before_anything_is_loaded(refused, tmp_path):
    message = refused("serve", "checkpoint=nowhere", "host=0.0.0.0", "api_key=null")
    assert "host=0.0.0.0 lets other machines in: give an api_key (or set GPTPL_API_KEY)" in message


def test_a_missing_checkpoint_is_named(refused):
    assert "checkpoint is not set" in refused("serve")


def test_the_defaults_are_those_of_the_class():
    config = yaml.safe_load((config_folder() / "serve.yaml").read_text(encoding="utf-8"))
    own = {field.name: field.default for field in fields(ServerSettings) if field.name != "filter"}
    assert {name: config[name] for name in own} == {
        name: list(value) if isinstance(value, tuple) else value for name, value in own.items()
    }


@pytest.mark.parametrize("override", ["port=web", "max_rows=many", "cors=5", "feedback=[a]"])
def test_a_setting_of_another_type_is_refused(refused, override):
    assert override.partition("=")[0] in refused("serve", "checkpoint=x", override)


def test_several_models_and_a_filter_are_served(gptpl, quick, monkeypatch):
    given: dict[str, Any] = {}

    class Served:
        names, url = ["a", "b"], "http://nowhere"

        def __init__(self, models, settings, *, names):
            given.update(models=models, settings=settings, names=names)

        def start(self):
            pass

        def wait(self, seconds=None):
            return True

    monkeypatch.setattr("gptpl.serving.server.Server", Served)
    run = quick.run.path
    outcome = gptpl("serve", f"checkpoint={run}", f"also=[{run}]", "names=[a,b]", "filter=personal_data")
    assert (outcome.status, outcome.out) == (0, "http://nowhere\n"), outcome.err
    assert len(given["models"]) == 2
    assert given["names"] == ["a", "b"]
    assert isinstance(given["settings"].filter, PersonalData)
