"""Which judge there is, and what it is asked: the objects of the config group `judge`."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptpl.errors import InputError
from gptpl.judging.cache import ReplyCache
from gptpl.judging.client import JudgeClient, api_key, checked_address
from gptpl.judging.judge import Judge
from gptpl.judging.prompts import COMPARISON_FIELDS, SCORE_FIELDS, Prompt
from gptpl.judging.protocols import PROTOCOLS, Options


@dataclass(frozen=True, kw_only=True)
class NoJudge:
    """The scores against the references alone."""


@dataclass(frozen=True, kw_only=True)
class JudgeModel:
    """A model behind an HTTP server, and its prompts; checked when it is made.

    Attributes:
        protocol: ollama or openai.
        address: http(s) address of the server, without the protocol's path.
        model: name of the model there.
        api_key_env: environment variable that holds the key; None: the server wants none.
        temperature, seed, num_ctx, max_tokens: see `protocols.Options`.
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

    protocol: str
    address: str
    model: str
    api_key_env: str | None
    temperature: float | None
    seed: int | None
    num_ctx: int | None
    max_tokens: int | None
    options: dict[str, Any]
    system: str
    rubric: str
    prompt: str
    reminder: str
    comparison_prompt: str
    comparison_reminder: str
    min_score: float
    max_score: float
    asks: int
    timeout_seconds: float
    retries: int
    backoff_seconds: float
    max_wait_seconds: float
    max_concurrent: int

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

    def connected(self, cache: Path) -> Judge:
        """The judge, not asked yet. Raises InputError for a wrong address or a missing key."""
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
