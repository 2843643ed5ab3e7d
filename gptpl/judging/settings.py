"""The settings of a judge model, its prompts as Jinja templates, and how its replies are read.

A reply that is ambiguous is read as None.
"""

import json
import math
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

from gptpl.errors import InputError
from gptpl.files.template import SafeTemplate

SCORE_FIELDS = ("instruction", "input", "output", "model_response", "rubric", "min_score", "max_score")
COMPARISON_FIELDS = ("instruction", "input", "output", "answer_a", "answer_b", "rubric")

RUBRIC = """\
The best score is for an answer that is right, does all that is asked, and nothing else; half of it for one
that is partly right; the lowest for one that is wrong, empty, off the subject or unreadable. An answer may be
worded otherwise than the reference. Length is no merit."""

_TASK = """\
Instruction:
{{ instruction }}

{% if input %}
Input:
{{ input }}

{% endif %}
Correct answer:
{{ output }}
"""

REMINDER = """\
Reply with one line and nothing else; N is a whole number from {{ min_score }} to {{ max_score }}:
Score: N"""

PROMPT = f"""\
Score how well a model's answer follows an instruction.

{_TASK}
Model's answer:
{{{{ model_response }}}}

{{{{ rubric }}}}

{REMINDER}"""

COMPARISON_REMINDER = """\
Reply with one of these lines and nothing else:
Winner: A
Winner: B
Winner: tie"""

COMPARISON_PROMPT = f"""\
Which of two answers follows an instruction better? Their order has no meaning.

{_TASK}
Answer A:
{{{{ answer_a }}}}

Answer B:
{{{{ answer_b }}}}

{{{{ rubric }}}}

{COMPARISON_REMINDER}"""

# --- replies --------------------------------------------------------------------------------------------

FIRST, SECOND, TIE = "A", "B", "tie"

_THOUGHTS = re.compile(r"<(think|thinking|reasoning)>.*?</\1>", re.DOTALL | re.IGNORECASE)
_MARKUP = re.compile(r"[*`\"'#]|(?<!\w)_+|_+(?!\w)")
_DASH = r"[-\u2010-\u2015]"
# A number, and what comes after it if that makes another amount of it: 8/10, 80-90, 85 %, 1,000.
_AMOUNT = (
    r"\[?(?<![\w.,/-])(-?\d+(?:\.\d+)?)(?!\w|\.\d)"
    rf"(\s*(?:(?:/|out of|of|to|{_DASH})\s*\d[\d.,]*|%)|,\d+)?\]?(?:\s*points?)?"
)
_LABEL = r"(?:score|rating|grade)"
_END = r"\s*[.!]?"
_CHOICE = (
    r"\[*(?:(?:answer|response|assistant|model)\s+)?(A|B|C|tie|draw|equal|neither|both)\b\]*"  # [[C]]: tie
)
_BETTER = (
    r"\b(?:answer|response)\s+([AB])\s+(?:is (?:clearly |slightly )?better|wins)\b"
    r"|\bbetter (?:answer|response) is (?:answer |response )?([AB])\b"
)


def parse_score(reply: str, *, low: float, high: float) -> float | None:
    """The score of a reply on the scale from `low` to `high`, or None.

    Lines `Score: N` decide. Without one, these are read: JSON with the key "score", a first or last line that
    is only a number, a number after "score", "rating" or "grade", and one with the scale ("85/100", "85 out
    of 100"). None if they contradict each other, and for a number that is outside the scale, on another one
    ("8/10"), a range ("80-90"), or has a comma. The scale itself ("from 0 to 100") is not a score.
    """
    text = _without_scale(_plain(reply), low, high)
    found = _lines(text, rf"(?:final |overall )?{_LABEL}\s*[:=]\s*{_AMOUNT}{_END}")
    if not found:
        found = [
            *((str(value), "") for value in _json_values(reply, "score")),
            *_lines(_first_and_last(text), _AMOUNT + _END),
            *re.findall(rf"\b{_LABEL}\s*(?:(?::|=|is|of|as|would be)\s*)*{_AMOUNT}", text, re.IGNORECASE),
            *(each for each in re.findall(_AMOUNT, text) if _is_top(each[1], high)),
        ]
    values = {_value(number, tail, low, high) for number, tail in found}
    return values.pop() if len(values) == 1 else None


def parse_winner(reply: str) -> str | None:
    """The answer that a reply prefers, FIRST, SECOND or TIE, or None.

    Lines `Winner: A`, `Winner: B` or `Winner: tie` decide. Without one, these are read: JSON with the key
    "winner", a first or last line that is only such a word ("A", "[[B]]", "Answer A", "Tie."), and "Answer A
    is better". None if they contradict each other.
    """
    text = _plain(reply)
    found = _lines(text, rf"(?:final |overall )?(?:winner|verdict)\s*[:=]\s*{_CHOICE}{_END}")
    if not found:
        found = [
            *(word for value in _json_values(reply, "winner") for word in _lines(str(value), _CHOICE)),
            *_lines(_first_and_last(text), f"{_CHOICE}{_END}"),
            *re.findall(_BETTER, text, re.IGNORECASE),
        ]
    words = {next(filter(None, groups)).upper() for groups in found}
    winners = {word if word in (FIRST, SECOND) else TIE for word in words}
    return winners.pop() if len(winners) == 1 else None


def _value(number: str, tail: str, low: float, high: float) -> float | None:
    """The number, unless it is off the scale or `tail`, the text after it, makes it another amount."""
    percentage = tail.strip() == "%" and (low, high) == (0, 100)
    if tail and not percentage and not _is_top(tail, high):
        return None
    try:
        value = float(number)
    except ValueError:
        return None
    return value if low <= value <= high else None


def _is_top(tail: str, high: float) -> bool:
    """Whether the text after a number is the right scale: `/100`, `out of 100`."""
    match = re.fullmatch(r"\s*(?:/|out of|of)\s*(\d+(?:\.\d+)?)[.,]?", tail, re.IGNORECASE)
    return match is not None and float(match[1]) == high


def _without_scale(text: str, low: float, high: float) -> str:
    """The text without the places that only name the scale."""
    bottom, top = re.escape(f"{low:g}"), re.escape(f"{high:g}")
    text = re.sub(
        rf"\(?(?<![\d.])(?:from |between )?{bottom}\s*(?:{_DASH}|to|and)\s*{top}(?!\.?\d)\)?", " ", text
    )
    text = re.sub(rf"\(\s*(?:out of|of|/)\s*{top}\s*\)", " ", text)
    return re.sub(rf"({_LABEL})\s+out of\s+{top}(?!\.?\d)", r"\1", text, flags=re.IGNORECASE)


def _plain(reply: str) -> str:
    """The reply without a reasoning model's thoughts and without Markdown."""
    return _MARKUP.sub("", _THOUGHTS.sub("", reply)).strip()


def _lines(text: str, pattern: str) -> list[tuple[str, ...]]:
    """The groups of the pattern in each line that is nothing else."""
    lines = (re.fullmatch(pattern, line.strip(), re.IGNORECASE) for line in text.splitlines())
    return [match.groups("") for match in lines if match]


def _first_and_last(text: str) -> str:
    """The first and the last line that are not blank."""
    lines = [line for line in text.splitlines() if line.strip()]
    return "\n".join([*lines[:1], *lines[-1:]])


def _json_values(reply: str, key: str) -> list[Any]:
    """The value of a key if the reply, or the fenced block in it, is a JSON object."""
    text = _THOUGHTS.sub("", reply).strip()
    fenced = re.search(r"```(?:json)?\s*(\{.*?\})\s*```", text, re.DOTALL)
    try:
        data = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return []
    return [value for name, value in data.items() if name.lower() == key] if isinstance(data, dict) else []


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
        prompt: Jinja template of the question for a score, with SCORE_FIELDS.
        reminder: Jinja template of the message after a reply that could not be read, with the same fields.
        comparison_prompt: Jinja template with COMPARISON_FIELDS.
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
