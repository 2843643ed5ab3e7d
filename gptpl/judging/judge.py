"""A judge model: what it is asked and how often, on which server, and what it has answered already."""

import hashlib
import json
import logging
import math
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from gptpl.errors import InputError
from gptpl.judging.client import (
    PROTOCOLS,
    JudgeClient,
    Message,
    Options,
    UnreadableReplyError,
    api_key,
    checked_address,
)
from gptpl.judging.prompts import (
    COMPARISON_FIELDS,
    COMPARISON_PROMPT,
    COMPARISON_REMINDER,
    PROMPT,
    REMINDER,
    RUBRIC,
    SCORE_FIELDS,
    Prompt,
    asked_again,
)

log = logging.getLogger(__name__)

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class NoJudge:
    """The scores against the references alone."""


@dataclass(frozen=True, kw_only=True)
class JudgeModel:
    """A model behind an HTTP server, and its prompts; checked when it is made.

    Attributes:
        model: its name on the server.
        protocol: what the server speaks.
        address: http(s) address of the server, without the protocol's path.
        api_key_env: environment variable that holds the key; None: the server wants none.
        temperature, seed, num_ctx, max_tokens: see `client.Options`.
        options: more of the server's own options.
        system: the system message; "" is none.
        rubric: what is good, a field of the templates.
        prompt: Jinja template with `prompts.SCORE_FIELDS`.
        reminder: Jinja template of what is said after a reply that could not be read, the same fields.
        comparison_prompt: Jinja template with `prompts.COMPARISON_FIELDS`.
        comparison_reminder: the reminder of a comparison.
        min_score, max_score: the scale.
        asks: see `Judge`.
        timeout_seconds, retries, backoff_seconds, max_wait_seconds: see `JudgeClient`.
        max_concurrent: questions under way at a time.
    """

    model: str
    protocol: Literal["ollama", "openai"] = "ollama"
    address: str = "http://localhost:11434"
    api_key_env: str | None = None
    temperature: float | None = 0.0
    seed: int | None = 123
    num_ctx: int | None = None
    max_tokens: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    system: str = ""
    rubric: str = RUBRIC
    prompt: str = PROMPT
    reminder: str = REMINDER
    comparison_prompt: str = COMPARISON_PROMPT
    comparison_reminder: str = COMPARISON_REMINDER
    min_score: float = 0
    max_score: float = 100
    asks: int = 3
    timeout_seconds: float = 120
    retries: int = 4
    backoff_seconds: float = 1
    max_wait_seconds: float = 120
    max_concurrent: int = 1

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise InputError(
                f"judge.protocol={self.protocol} is unknown: choose one of {', '.join(PROTOCOLS)}"
            )
        if not self.model.strip():
            raise InputError("judge.model is empty: name a model that the server has")
        if not -math.inf < self.min_score < self.max_score < math.inf:
            raise InputError(
                f"judge.min_score={self.min_score:g} is not below judge.max_score={self.max_score:g}:"
                " give a scale such as 0 to 100"
            )
        for name, lowest in (("asks", 1), ("max_concurrent", 1), ("retries", 0)):
            if getattr(self, name) < lowest:
                raise InputError(f"judge.{name}={getattr(self, name)} is too few: give {lowest} or more")
        if not 0 < self.timeout_seconds < math.inf:
            raise InputError(f"judge.timeout_seconds={self.timeout_seconds:g} is no time: give more than 0")
        for name in ("backoff_seconds", "max_wait_seconds"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"judge.{name}={getattr(self, name):g} is no time: give 0 or more")
        self.score_prompts()
        self.comparison_prompts()
        PROTOCOLS[self.protocol].body(self.model, [], self._options())

    def score_prompts(self) -> tuple[Prompt, Prompt]:
        """The question for a score, and the reminder. Raises InputError for a template that is wrong."""
        return (
            Prompt(self.prompt, key="judge.prompt", fields=SCORE_FIELDS, needed=("model_response",)),
            Prompt(self.reminder, key="judge.reminder", fields=SCORE_FIELDS),
        )

    def comparison_prompts(self) -> tuple[Prompt, Prompt]:
        """The question which answer is better, and the reminder."""
        key, both = "judge.comparison_prompt", ("answer_a", "answer_b")
        return (
            Prompt(self.comparison_prompt, key=key, fields=COMPARISON_FIELDS, needed=both),
            Prompt(self.comparison_reminder, key="judge.comparison_reminder", fields=COMPARISON_FIELDS),
        )

    def connected(self, cache: Path | None = None) -> "Judge":
        """The judge, not asked yet; `cache` is the file of its replies, see `ReplyCache`.

        Raises InputError for a wrong address or a missing key.
        """
        protocol = PROTOCOLS[self.protocol]
        client = JudgeClient(
            address=checked_address(self.address, protocol),
            protocol=protocol,
            model=self.model,
            api_key=api_key(self.api_key_env),
            timeout_seconds=self.timeout_seconds,
            retries=self.retries,
            backoff_seconds=self.backoff_seconds,
            max_wait_seconds=self.max_wait_seconds,
        )
        return Judge(client=client, options=self._options(), cache=ReplyCache(cache), asks=self.asks)

    def _options(self) -> Options:
        return Options(
            temperature=self.temperature,
            seed=self.seed,
            num_ctx=self.num_ctx,
            max_tokens=self.max_tokens,
            extra=self.options,
        )


@dataclass(frozen=True)
class Verdict(Generic[Value]):
    """What the judge said of one thing.

    Attributes:
        value: what was read from its last reply; None: no reply could be read.
        replies: all of them, as they came; those that were no reply at all with the reason in brackets.
    """

    value: Value | None
    replies: tuple[str, ...]


@dataclass(kw_only=True)
class Judge:
    """Asks one model, and keeps what it says.

    Attributes:
        client: the server.
        options: how the model answers.
        cache: replies of earlier questions, which are not put again.
        asks: times a question is put, with a reminder of the form from the second time on, until its reply
            can be read.
        asked: questions put to the server so far.
        remembered: questions that the cache answered so far.
    """

    client: JudgeClient
    options: Options
    cache: "ReplyCache"
    asks: int
    asked: int = 0
    remembered: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def verdict(
        self, messages: list[Message], parse: Callable[[str], Value | None], *, reminder: str
    ) -> Verdict[Value]:
        """What `parse` reads from the reply, for any number of threads.

        A reply that is none (no JSON, no text in it) is not kept: the same question is put again.

        Raises InputError as `JudgeClient.reply` does.
        """
        replies: list[str] = []
        for _ in range(self.asks):
            try:
                reply = self._reply(messages)
            except UnreadableReplyError as error:
                replies.append(f"({error})")
                continue
            replies.append(reply)
            value = parse(reply)
            if value is not None:
                return Verdict(value, tuple(replies))
            messages = asked_again(messages, reply, reminder)
        return Verdict(None, tuple(replies))

    def _reply(self, messages: list[Message]) -> str:
        protocol = self.client.protocol
        body = protocol.body(self.client.model, messages, self.options)
        key = question_key(protocol.name, body)
        known = self.cache.get(key)
        with self._lock:
            if known is None:
                self.asked += 1
            else:
                self.remembered += 1
        if known is not None:
            return known
        reply = self.client.reply(body)
        self.cache.add(key, reply)
        return reply


def question_key(protocol: str, body: Mapping[str, Any]) -> str:
    """SHA-256 of all that a reply depends on: protocol, model, options and the full prompt."""
    text = json.dumps([protocol, body], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


class ReplyCache:
    """Replies by the keys of their questions: a line of JSON each, on disk before `add` returns.

    Lines that cannot be read, such as the last one of a process that was killed, are dropped with a warning;
    the questions are then put again. Threads may share an object.

    Args:
        path: the file, made by the first reply; None: replies are kept in memory only.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._replies: dict[str, str] = {}
        if path is not None and path.exists():
            self._read(path)

    def __len__(self) -> int:
        return len(self._replies)

    def get(self, key: str) -> str | None:
        """The reply; None where the question was never answered."""
        return self._replies.get(key)

    def add(self, key: str, reply: str) -> None:
        """Records a reply; another thread's earlier one to the same question stays."""
        line = json.dumps({"key": key, "reply": reply}) + "\n"
        with self._lock:
            if key in self._replies:
                return
            if self.path is not None:
                # Appending, so that two processes do not overwrite each other.
                with self.path.open("ab") as file:
                    file.write(line.encode("ascii"))
                    file.flush()
                    os.fsync(file.fileno())
            self._replies[key] = reply

    def _read(self, path: Path) -> None:
        data = path.read_bytes()
        whole, _, rest = data.rpartition(b"\n")
        damaged = 0
        for line in whole.split(b"\n") if whole else []:
            key, reply = _parsed(line)
            if key is None:
                damaged += 1
            else:
                self._replies.setdefault(key, reply)
        if rest:
            os.truncate(path, len(data) - len(rest))  # the next line must not be glued to it
        if damaged := damaged + bool(rest):
            lines = "1 damaged line is" if damaged == 1 else f"{damaged} damaged lines are"
            log.warning("%s: %s dropped, and asked for again", path, lines)


def _parsed(line: bytes) -> tuple[str | None, str]:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        return None, ""
    if isinstance(data, dict) and isinstance(data.get("key"), str) and isinstance(data.get("reply"), str):
        return data["key"], data["reply"]
    return None, ""
