"""Judges on the tests' own server."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptpl.judging.client import JudgeClient
from gptpl.judging.judge import Judge
from gptpl.judging.responses import Answer
from gptpl.judging.settings import JudgeModel


@pytest.fixture
def waits() -> list[float]:
    """Seconds that the client would have waited."""
    return []


@pytest.fixture
def settings(judge_server: Any) -> Callable[..., JudgeModel]:
    """An impatient judge model on the test's server: `settings(protocol="openai", retries=0)`."""

    def make(**changes: Any) -> JudgeModel:
        given = {"address": judge_server.address, "model": "llama3", "timeout_seconds": 10, "retries": 3}
        return JudgeModel(**(given | changes))

    return make


@pytest.fixture
def client(settings: Callable[..., JudgeModel], waits: list[float]) -> Callable[..., JudgeClient]:
    """A client of the server that does not wait: `client("openai", retries=0)`."""

    def make(protocol: str = "ollama", **changes: Any) -> JudgeClient:
        return JudgeClient(settings(protocol=protocol, **changes), sleep=waits.append)

    return make


@pytest.fixture
def judge(settings: Callable[..., JudgeModel], tmp_path: Path) -> Callable[..., Judge]:
    """A judge with its cache in the test's folder: `judge(asks=2)`."""
    return lambda **changes: Judge(settings(**changes), tmp_path / "judgements.jsonl")


@pytest.fixture
def answer() -> Callable[..., Answer]:
    """`answer(3, "a text")`."""

    def make(index: int, text: str, **changes: Any) -> Answer:
        fields = {"instruction": f"Task {index}.", "input": "", "output": "yes"} | changes
        return Answer(index=index, model_response=text, fields={}, **fields)

    return make
