"""What came of judging: the JSON that is written, and the table that is printed."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gptpl import __version__
from gptpl.cli.text_table import table
from gptpl.files.hashes import sha256_of
from gptpl.judging import (
    Entry,
    Judge,
    JudgeModel,
    Mean,
    NoJudge,
    Pair,
    Preference,
    ReferenceScores,
    Verdict,
    bootstrap_mean,
    sign_test,
)
from gptpl.judging.comparison import DRAW, LOSS, WIN
from gptpl.judging.reference_scores import by_name

TITLES = {
    "exact_match": "exact match",
    "token_f1": "token F1",
    "rouge_l": "ROUGE-L",
    "well_formed": "well-formed",
    "judge": "judge's score",
    "win_rate": "win rate",
}
_SHOWN_CHARACTERS = 100


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One model's answers.

    Attributes:
        entries, references, verdicts: in the order of the file; no verdicts without a judge model.
        means: of each kind of score, by its name in TITLES.
        scale: lowest and highest score of the judge.
    """

    entries: Sequence[Entry]
    references: Sequence[ReferenceScores]
    verdicts: Sequence[Verdict[float]]
    means: dict[str, Mean]
    scale: tuple[float, float]

    @classmethod
    def of(
        cls,
        entries: Sequence[Entry],
        references: Sequence[ReferenceScores],
        verdicts: Sequence[Verdict[float]],
        *,
        scale: tuple[float, float],
        seed: int,
        samples: int,
    ) -> "Scores":
        """With the means and their intervals."""
        values = by_name(references)
        if verdicts:
            values["judge"] = [each.value for each in verdicts if each.value is not None]
        means = {name: bootstrap_mean(each, seed=seed, samples=samples) for name, each in values.items()}
        return cls(entries=entries, references=references, verdicts=verdicts, means=means, scale=scale)

    @property
    def count(self) -> int:
        """Entries."""
        return len(self.entries)

    @property
    def failures(self) -> list[int]:
        """Places whose judgement could not be read."""
        return [place for place, verdict in enumerate(self.verdicts) if verdict.value is None]

    def first_failure(self) -> str:
        """The reply that could not be read, for a message."""
        return _shown(self.verdicts[self.failures[0]].replies[-1])

    def lines(self) -> list[str]:
        """The table."""
        return _mean_lines(self.means)

    def record(
        self,
        responses: Path,
        _compare: Path | None,
        settings: JudgeModel | NoJudge,
        judge: Judge | None,
        facts: Mapping[str, Any],
    ) -> str:
        """The file's content."""
        rows = []
        for place, (entry, reference) in enumerate(zip(self.entries, self.references, strict=True)):
            row: dict[str, Any] = {**entry.fields, "scores": asdict(reference)}
            if self.verdicts:
                row["scores"]["judge"] = self.verdicts[place].value
                row["judge_replies"] = list(self.verdicts[place].replies)
            rows.append(row)
        summary = {
            "entries": self.count,
            **{name: asdict(mean) for name, mean in self.means.items()},
            **_judge_counts(judge, self.failures),
        }
        files = {"responses": _file(responses)}
        return _json(files, summary, settings, facts, rows)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two models' answers to the same tasks.

    Attributes:
        pairs, first, second, preferences: in the order of the first file; no preferences without a judge.
        means: of the differences, first minus second, of each kind of score, and the win rate of the first,
            a tie counting half.
    """

    pairs: Sequence[Pair]
    first: Sequence[ReferenceScores]
    second: Sequence[ReferenceScores]
    preferences: Sequence[Preference]
    means: dict[str, Mean]

    @classmethod
    def of(
        cls,
        pairs: Sequence[Pair],
        first: Sequence[ReferenceScores],
        second: Sequence[ReferenceScores],
        preferences: Sequence[Preference],
        *,
        seed: int,
        samples: int,
    ) -> "Comparison":
        """With the mean differences and their intervals."""
        ours, theirs = by_name(first), by_name(second)
        values = {
            name: [a - b for a, b in zip(each, theirs[name], strict=True)] for name, each in ours.items()
        }
        if preferences:
            values["win_rate"] = [each.points for each in preferences if each.points is not None]
        means = {name: bootstrap_mean(each, seed=seed, samples=samples) for name, each in values.items()}
        return cls(pairs=pairs, first=first, second=second, preferences=preferences, means=means)

    @property
    def count(self) -> int:
        """Pairs."""
        return len(self.pairs)

    @property
    def failures(self) -> list[int]:
        """Places whose judgement could not be read."""
        return [place for place, each in enumerate(self.preferences) if each.result is None]

    def first_failure(self) -> str:
        """The reply that could not be read, for a message."""
        verdicts = self.preferences[self.failures[0]].verdicts
        return _shown(next(each.replies[-1] for each in verdicts if each.value is None))

    @property
    def results(self) -> Counter[str]:
        """How often the first model won, lost and drew."""
        return Counter(each.result for each in self.preferences if each.result is not None)

    def p_value(self) -> float:
        """Of the sign test: how likely so uneven a result were between equal models."""
        return sign_test(self.results[WIN], self.results[LOSS])

    def lines(self) -> list[str]:
        """The table, of differences first minus second, and how the judge decided."""
        differences = {name: mean for name, mean in self.means.items() if name != "win_rate"}
        lines = ["the first minus the second:", *_mean_lines(differences, signed=True)]
        if self.preferences:
            wins, draws, losses = (self.results[each] for each in (WIN, DRAW, LOSS))
            lines += ["", f"the judge: {wins} wins, {draws} ties, {losses} losses of the first"]
            contradictory = sum(each.contradictory for each in self.preferences)
            if any(len(each.swapped) > 1 for each in self.preferences):
                lines.append(f"{contradictory} of the ties were decided by the order of the answers")
            lines += _mean_lines({"win_rate": self.means["win_rate"]})
            lines.append(f"sign test: p = {self.p_value():.3g}")
        return lines

    def record(
        self,
        responses: Path,
        compare: Path | None,
        settings: JudgeModel | NoJudge,
        judge: Judge | None,
        facts: Mapping[str, Any],
    ) -> str:
        """The file's content."""
        assert compare is not None
        rows = []
        for place, (pair, first, second) in enumerate(zip(self.pairs, self.first, self.second, strict=True)):
            row: dict[str, Any] = {
                **{name: getattr(pair.first, name) for name in ("instruction", "input", "output")},
                "first": {"model_response": pair.first.model_response, "scores": asdict(first)},
                "second": {"model_response": pair.second.model_response, "scores": asdict(second)},
            }
            if self.preferences:
                each = self.preferences[place]
                replies = [list(verdict.replies) for verdict in each.verdicts]
                row |= {"result": each.result, "contradictory": each.contradictory}
                row |= {"second_shown_first": list(each.swapped), "judge_replies": replies}
            rows.append(row)
        win_rate = self.means.get("win_rate")
        summary: dict[str, Any] = {
            "entries": self.count,
            "differences": {name: asdict(each) for name, each in self.means.items() if name != "win_rate"},
        }
        if win_rate is not None:
            summary |= {name: self.results[key] for name, key in _RESULTS.items()}
            summary |= {"contradictory": sum(each.contradictory for each in self.preferences)}
            summary |= {"win_rate": asdict(win_rate), "sign_test_p": self.p_value()}
        summary |= _judge_counts(judge, self.failures)
        files = {"responses": _file(responses), "compare": _file(compare)}
        return _json(files, summary, settings, facts, rows)


_RESULTS = {"wins": WIN, "ties": DRAW, "losses": LOSS}


def _mean_lines(means: Mapping[str, Mean], *, signed: bool = False) -> list[str]:
    rows = [("", "mean", "95 % interval", "entries")]
    for name, mean in means.items():
        form = f"{'+' if signed else ''}.{1 if name == 'judge' else 3}f"
        value, low, high = (
            "-" if each is None else format(each, form) for each in (mean.value, mean.low, mean.high)
        )
        interval = "-" if mean.low is None else f"{low} to {high}"
        rows.append((TITLES[name], value, interval, str(mean.count)))
    return table(rows, right=(1, 2, 3))


def _judge_counts(judge: Judge | None, failures: Sequence[int]) -> dict[str, Any]:
    if judge is None:
        return {}
    return {
        "parse_failures": len(failures),
        "questions_asked": judge.asked,
        "questions_from_cache": judge.remembered,
        "tries_repeated": judge.client.retried,
    }


def _file(path: Path) -> dict[str, str]:
    return {"path": str(path.absolute()), "sha256": sha256_of(path)}


def _json(
    files: Mapping[str, Any],
    summary: Mapping[str, Any],
    settings: JudgeModel | NoJudge,
    facts: Mapping[str, Any],
    rows: Sequence[Any],
) -> str:
    judge = asdict(settings) if isinstance(settings, JudgeModel) else None
    record = {
        "gptpl": __version__,
        **files,
        "summary": summary,
        "settings": {**facts, "judge": judge},
        "entries": rows,
    }
    return json.dumps(record, ensure_ascii=False, indent=2, allow_nan=False) + "\n"


def _shown(reply: str) -> str:
    line = " ".join(reply.split())
    return repr(line if len(line) <= _SHOWN_CHARACTERS else f"{line[: _SHOWN_CHARACTERS - 3]}...")
