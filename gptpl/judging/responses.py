"""A model's answers to instructions: read from JSON and checked, and scored against their references."""

import json
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptpl.errors import InputError
from gptpl.files.plain import parse_json
from gptpl.text import shortened

log = logging.getLogger(__name__)

Responses = Path | str | Sequence[Mapping[str, Any]]
"""A file that `gptpl respond` wrote, or such a list: `instruction`, `input`, `output`, `model_response`."""
_REMEDY = "give a file that gptpl respond wrote"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A model's answer to one instruction; `output` is the reference.

    `index` is its place in the file, from 0, `fields` the whole JSON object, other keys included.
    """

    index: int
    instruction: str
    input: str
    output: str
    model_response: str
    fields: dict[str, Any]

    @property
    def task(self) -> tuple[str, str]:
        """Instruction and input, by which the answers of two models are matched."""
        return self.instruction, self.input

    @property
    def name(self) -> str:
        """Its number in the file, from 1, and the beginning of its instruction, for messages."""
        return f"entry {self.index + 1} ({shortened(self.instruction, 60)!r})"


def read_responses(given: Responses, *, key: str = "responses") -> list[Answer]:
    """Read the answers; `key` is the setting that names them in messages.

    `input` may be missing or null, which means empty. Empty answers and repeated tasks are kept, with a
    warning. Raises InputError for a file that cannot be read or is not JSON, for anything but a list, and for
    an entry without one of the texts.
    """
    name = key
    if isinstance(given, Path | str):
        name = f"{key}={given}"
        try:
            text = Path(given).expanduser().read_text(encoding="utf-8-sig")
        except OSError as error:
            raise InputError(f"{name} cannot be read ({error.strerror}): {_REMEDY}") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{name} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    else:
        text = json.dumps(list(given))
    entries = parse_json(text, name)
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{name} must be a list with at least one entry: {_REMEDY}")
    answers = [_answer(index, fields, name) for index, fields in enumerate(entries)]
    if empty := [answer for answer in answers if not answer.model_response.strip()]:
        log.warning(
            "%s: %d of %d answers are empty and are judged as they are, the first is %s",
            *(name, len(empty), len(answers), empty[0].name),
        )
    counts = Counter(answer.task for answer in answers)
    if repeated := [answer for answer in answers if counts[answer.task] > 1]:
        log.warning(
            "%s: %d entries repeat an instruction and input, each counts; the first is %s",
            *(name, len(repeated), repeated[0].name),
        )
    return answers


def _answer(index: int, fields: Any, name: str) -> Answer:
    where = f"{name}, entry {index + 1}"
    if not isinstance(fields, dict):
        raise InputError(f"{where} must be an object, got {shortened(json.dumps(fields), 40)}: {_REMEDY}")
    texts: dict[str, Any] = {
        key: fields.get(key) for key in ("instruction", "input", "output", "model_response")
    }
    texts["input"] = "" if texts["input"] is None else texts["input"]
    for key, value in texts.items():
        if not isinstance(value, str):
            raise InputError(
                f"{where}: {key} must be text, got {shortened(json.dumps(value), 40)}: {_REMEDY}"
            )
    return Answer(index=index, fields=fields, **texts)


def paired(first: Sequence[Answer], second: Sequence[Answer]) -> list[tuple[Answer, Answer]]:
    """Match two models' answers by their tasks, in the order of the first; equal tasks in their own order.

    Raises InputError for a task that only one model answers, or answers more often, and for references that
    differ.
    """
    remedy = "give answers of two models to the same test set"
    unmatched: dict[tuple[str, str], list[Answer]] = {}
    for answer in second:
        unmatched.setdefault(answer.task, []).append(answer)
    pairs = []
    for answer in first:
        if not unmatched.get(answer.task):
            raise InputError(f"{answer.name} of responses= is missing in compare=: {remedy}")
        pairs.append((answer, unmatched[answer.task].pop(0)))
    if left := [answer for others in unmatched.values() for answer in others]:
        missing = min(left, key=lambda answer: answer.index)
        raise InputError(f"{missing.name} of compare= is missing in responses=: {remedy}")
    for answer, other in pairs:
        if answer.output != other.output:
            raise InputError(f"{answer.name} of responses= has another reference in compare=: {remedy}")
    return pairs


# --- scores ---------------------------------------------------------------------------------------------

TITLES = {
    "exact_match": "exact match",
    "token_f1": "token F1",
    "rouge_l": "ROUGE-L",
    "well_formed": "well-formed",
    "judge": "judge's score",
    "win_rate": "win rate",
}
"""Names of the scores in tables and pictures."""


def reference_scores(answer: Answer, *, markers: Sequence[str]) -> dict[str, float]:
    """Scores of one answer against its reference, each from 0 to 1.

    `exact_match`: 1 if it equals the reference up to case, punctuation, articles and white space (SQuAD;
    Rajpurkar et al. 2016). `token_f1`: harmonic mean of precision and recall of the words, order ignored
    (SQuAD). `rouge_l`: F-measure of the longest common subsequence of words (Lin 2004); ROUGE sees the
    letters a to z and digits only, so it says nothing about texts in other scripts. `well_formed`: 1 if the
    answer is not blank, contains none of the `markers` (texts of the prompt's template), and its entry does
    not have `"well_formed": false`, which marks an answer that the model did not end.
    """
    from torchmetrics.functional.text import rouge_score, squad  # here because the import takes seconds

    text = answer.model_response
    target = {"answers": {"text": [answer.output], "answer_start": [0]}, "id": "0"}
    words = squad({"prediction_text": text, "id": "0"}, target)  # type: ignore[arg-type]
    rouge = rouge_score(text, answer.output, rouge_keys="rougeL")
    ended = answer.fields.get("well_formed") is not False
    return {
        "exact_match": float(words["exact_match"]) / 100,
        "token_f1": float(words["f1"]) / 100,
        "rouge_l": float(rouge["rougeL_fmeasure"]),
        "well_formed": float(ended and bool(text.strip()) and not any(mark in text for mark in markers)),
    }


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over `count` values, None over none, with its 95 % interval, None for fewer than two."""

    value: float | None
    low: float | None
    high: float | None
    count: int


def bootstrap_mean(values: Sequence[float], *, seed: int, samples: int) -> Mean:
    """The mean with its 95 % interval by the percentile bootstrap of so many resampled sets.

    For two models give the differences of each entry: that is the paired bootstrap. Source: Efron and
    Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13.
    """
    numbers = np.asarray(values, dtype=np.float64)
    n = len(numbers)
    if n < 2:
        return Mean(value=float(numbers[0]) if n else None, low=None, high=None, count=n)
    generator = np.random.default_rng(seed)
    means = [numbers[generator.integers(n, size=n)].mean() for _ in range(samples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Mean(value=float(numbers.mean()), low=float(low), high=float(high), count=n)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p-value of so uneven a split if both outcomes were equally likely."""
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**n)
