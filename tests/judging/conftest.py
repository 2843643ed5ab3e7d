"""Judges of the tests' own server, which wait for nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptpl.judging.client import PROTOCOLS, JudgeClient, Options
from gptpl.judging.judge import Judge, ReplyCache
from gptpl.judging.responses import Entry

OPTIONS = Options(temperature=0.0, seed=123, num_ctx=None, max_tokens=None, extra={})


@pytest.fixture
def waits() -> list[float]:
    """Seconds that the client would have waited."""
    return []


@pytest.fixture
def client(judge_server: Any, waits: list[float]) -> Callable[..., JudgeClient]:
    """A client of the server, impatient: `client(protocol="openai", retries=0)`."""

    def make(protocol: str = "ollama", **changes: Any) -> JudgeClient:
        settings: dict[str, Any] = {
            "address": judge_server.address,
            "model": "llama3",
            "timeout_seconds": 10,
            "retries": 3,
            "backoff_seconds": 1,
            "max_wait_seconds": 120,
            "sleep": waits.append,
        }
        return JudgeClient(protocol=PROTOCOLS[protocol], **(settings | changes))

    return make


@pytest.fixture
def judge(client: Callable[..., JudgeClient], tmp_path: Path) -> Callable[..., Judge]:
    """A judge with its cache in the test's folder: `judge(asks=2)`."""

    def make(*, asks: int = 3, options: Options = OPTIONS, **changes: Any) -> Judge:
        cache = ReplyCache(tmp_path / "judgements.jsonl")
        return Judge(client=client(**changes), options=options, cache=cache, asks=asks)

    return make


@pytest.fixture
def entry() -> Callable[..., Entry]:
    """`entry(3, "an answer")`."""

    def make(index: int, answer: str, **changes: Any) -> Entry:
        fields = {"instruction": f"Task {index}.", "input": "", "output": "yes"} | changes
        return Entry(index=index, model_response=answer, fields={}, **fields)

    return make
