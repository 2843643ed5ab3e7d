"""The settings of a judge model and its prompts."""

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

from gptpl.errors import InputError
from gptpl.files.template import SafeTemplate
from gptpl.judging.prompts import (
    COMPARISON_FIELDS,
    COMPARISON_PROMPT,
    COMPARISON_REMINDER,
    PROMPT,
    REMINDER,
    RUBRIC,
    SCORE_FIELDS,
)


@dataclass(frozen=True, kw_only=True)
class NoJudge:
    """Scores against the references only."""


@dataclass(frozen=True, kw_only=True)
class JudgeModel:
    """A model behind an HTTP server, and its prompts.

    Attributes:
        model: its name on the server.
        protocol: API of the server.
        address: http(s) address of the server, without the protocol's path.
        api_key_env: environment variable that holds the key; None if the server needs none.
        temperature, seed, max_tokens: of the replies; None leaves one to the server.
        num_ctx: context in tokens, for Ollama only.
        options: more of the server's own options.
        system: the system message; "" sends none.
        rubric: what a good answer is, a field of the templates.
        prompt: Jinja template of the question for a score, with `prompts.SCORE_FIELDS`.
        reminder: Jinja template of the message after a reply that could not be read, with the same fields.
        comparison_prompt: Jinja template with `prompts.COMPARISON_FIELDS`.
        comparison_reminder: the reminder of a comparison.
        min_score, max_score: the scale.
        asks: how often a question is asked until its reply can be read.
        timeout_seconds: longest silence of the server.
        retries: attempts after the first one, per request.
        backoff_seconds: wait after the first failed attempt, doubled after each further one.
        max_wait_seconds: longest wait that a server may ask for.
        max_concurrent: questions sent at the same time.
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
        if self.protocol not in ("ollama", "openai"):
            raise InputError(f"judge.protocol must be ollama or openai, got {self.protocol}")
        if not self.model.strip():
            raise InputError("judge.model is empty: name a model that the server has")
        if self.protocol == "openai" and self.num_ctx is not None:
            raise InputError(
                "judge.num_ctx is for Ollama only: leave it out, and set the context at the server"
            )
        if not -math.inf < self.min_score < self.max_score < math.inf:
            raise InputError(
                f"judge.min_score={self.min_score:g} must be below judge.max_score={self.max_score:g}"
            )
        lowest = {"asks": 1, "max_concurrent": 1, "retries": 0, "backoff_seconds": 0, "max_wait_seconds": 0}
        for name, least in lowest.items():
            if not least <= getattr(self, name) < math.inf:
                raise InputError(f"judge.{name} must be {least} or more, got {getattr(self, name):g}")
        if not 0 < self.timeout_seconds < math.inf:
            raise InputError(f"judge.timeout_seconds must be positive, got {self.timeout_seconds:g}")
        self.score_prompts()
        self.comparison_prompts()

    def score_prompts(self) -> tuple[SafeTemplate, SafeTemplate]:
        """The question for a score, and its reminder."""
        needed = ("model_response",)
        return self._template("prompt", SCORE_FIELDS, needed), self._template("reminder", SCORE_FIELDS)

    def comparison_prompts(self) -> tuple[SafeTemplate, SafeTemplate]:
        """The question which answer is better, and its reminder."""
        question = self._template("comparison_prompt", COMPARISON_FIELDS, ("answer_a", "answer_b"))
        return question, self._template("comparison_reminder", COMPARISON_FIELDS)

    def _template(self, key: str, fields: Collection[str], needed: Collection[str] = ()) -> SafeTemplate:
        source = getattr(self, key)
        return SafeTemplate(source, name=f"judge.{key}", fields=fields, needed=needed, trim_blocks=True)
