"""What answers are worth: `score` one model's, `compare` two models', as a table, a picture and a file."""

import json
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gptpl import __version__
from gptpl.errors import InputError
from gptpl.files.durable import sha256_of, write_atomically
from gptpl.files.figures import COLOURS, GREY, figure_png, new_figure
from gptpl.judging.judge import (
    DRAW,
    LOSS,
    WIN,
    Judge,
    JudgeModel,
    NoJudge,
    Preference,
    Verdict,
    compared,
    judged,
)
from gptpl.judging.measures import (
    TITLES,
    Mean,
    ReferenceScores,
    bootstrap_mean,
    by_name,
    check_bootstrap,
    reference_scores,
    sign_test,
)
from gptpl.judging.responses import Entry, Pair, paired, read_responses
from gptpl.text import shortened, table

if TYPE_CHECKING:  # matplotlib takes long to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

Responses = Path | str | Sequence[Mapping[str, Any]]
"""A file that `gptpl respond` wrote, or such a list: `instruction`, `input`, `output`, `model_response`."""
Progress = Callable[..., Iterable[Any]]
"""Shows how far a loop is, as tqdm does: `progress(iterable, total=..., desc=...)`."""
Result = TypeVar("Result")

MARKERS = ("### Instruction", "### Input", "### Response", "<|")
"""What only the prompt's template holds: an answer with one of them is not well-formed."""
CACHE_FILE = "judgements.jsonl"


def score(
    responses: Responses,
    *,
    judge: JudgeModel | NoJudge | None = None,
    output: Path | str | None = None,
    seed: int = 123,
    bootstrap_samples: int = 10_000,
    markers: Sequence[str] = MARKERS,
    progress: Progress | None = None,
) -> "Scores":
    """Scores of a model's answers, by their references and by the judge.

    Args:
        responses: the answers.
        judge: a judge model; None: the references alone, which needs no server.
        output: a .json file for the result, with a picture (.png) beside it; the judge's replies are kept in
            its folder, so that the same call after an interruption asks only for what is missing. None:
            nothing is written.
        seed: of the intervals.
        bootstrap_samples: resampled test sets for the 95 % intervals.
        markers: see MARKERS.
        progress: shows the progress, for example `tqdm.tqdm`.

    Raises InputError for answers that cannot be read (see `read_responses`), an output that cannot be
    written, and a judge that cannot be asked.
    """
    entries = read_responses(responses)
    job = _Job(judge, output, {}, seed, bootstrap_samples, markers, progress, {"responses": responses})
    references = job.references(entries)
    values, verdicts = by_name(references), []
    if job.judge is not None:
        assert isinstance(judge, JudgeModel)
        verdicts = job.in_order(judged(entries, job.judge, judge), total=len(entries))
        values["judge"] = [each.value for each in verdicts if each.value is not None]
    scores = Scores(
        entries=entries,
        references=references,
        verdicts=verdicts,
        scale=(judge.min_score, judge.max_score) if isinstance(judge, JudgeModel) else (0.0, 1.0),
        means=job.means(values),
        judge=job.judge,
        files=job.files,
        settings=job.settings,
    )
    if job.output is not None:
        scores.write(job.output)
    return scores


def compare(
    responses: Responses,
    other: Responses,
    *,
    judge: JudgeModel | NoJudge | None = None,
    both_orders: bool = False,
    output: Path | str | None = None,
    seed: int = 123,
    bootstrap_samples: int = 10_000,
    markers: Sequence[str] = MARKERS,
    progress: Progress | None = None,
) -> "Comparison":
    """Which of two models answers the same tasks better.

    Takes the arguments of `score`, with the second model's answers as `other`. Which answer of a pair the
    judge reads first is drawn from `seed`; with `both_orders` it is asked twice, the answers swapped, and a
    win is what wins both times.

    Raises InputError as `score`, and for answers to different test sets (see `paired`).
    """
    pairs = paired(read_responses(responses), read_responses(other, key="compare"))
    files = {"responses": responses, "compare": other}
    own = {"both_orders": both_orders}
    job = _Job(judge, output, own, seed, bootstrap_samples, markers, progress, files)
    first = job.references([pair.first for pair in pairs])
    second = job.references([pair.second for pair in pairs])
    ours, theirs = by_name(first), by_name(second)
    values = {name: [a - b for a, b in zip(each, theirs[name], strict=True)] for name, each in ours.items()}
    preferences = []
    if job.judge is not None:
        assert isinstance(judge, JudgeModel)
        found = compared(pairs, job.judge, judge, seed=seed, both_orders=both_orders)
        preferences = job.in_order(found, total=len(pairs))
        values["win_rate"] = [each.points for each in preferences if each.points is not None]
    comparison = Comparison(
        pairs=pairs,
        first=first,
        second=second,
        preferences=preferences,
        means=job.means(values),
        judge=job.judge,
        files=job.files,
        settings=job.settings,
    )
    if job.output is not None:
        comparison.write(job.output)
    return comparison


class _Job:
    """What `score` and `compare` have in common: their arguments, checked, and the work with them."""

    def __init__(
        self,
        judge: JudgeModel | NoJudge | None,
        output: Path | str | None,
        own: dict[str, Any],
        seed: int,
        bootstrap_samples: int,
        markers: Sequence[str],
        progress: Progress | None,
        read: Mapping[str, Responses],
    ) -> None:
        check_bootstrap(seed=seed, samples=bootstrap_samples)
        if not all(markers):
            raise InputError("markers holds an empty text, which is in every answer: leave it out")
        self.seed, self.samples, self.markers, self.progress = seed, bootstrap_samples, markers, progress
        paths = {
            name: Path(given).expanduser() if isinstance(given, str | Path) else None
            for name, given in read.items()
        }
        self.files = {
            name: None if path is None else {"path": str(path.absolute()), "sha256": sha256_of(path)}
            for name, path in paths.items()
        }
        self.output = None if output is None else Path(output).expanduser()
        if self.output is not None:
            if self.output.suffix != ".json" or self.output.is_dir() or not self.output.parent.is_dir():
                raise InputError(
                    f"output={self.output} cannot be written: give a .json file in a folder that exists"
                )
            if self.output.resolve() in {path.resolve() for path in paths.values() if path is not None}:
                raise InputError(
                    f"output={self.output} is the file that is judged: give another one with output="
                )
        self.settings = {
            **own,
            "seed": seed,
            "bootstrap_samples": bootstrap_samples,
            "markers": list(markers),
        }
        self.settings["judge"], self.judge = None, None
        if isinstance(judge, JudgeModel):
            self.settings["judge"] = asdict(judge)
            self.judge = judge.connected(None if self.output is None else self.output.parent / CACHE_FILE)

    def references(self, entries: Sequence[Entry]) -> list[ReferenceScores]:
        shown = self.progress(entries, desc="against the references") if self.progress else entries
        return [reference_scores(entry, markers=self.markers) for entry in shown]

    def in_order(self, found: Iterator[tuple[int, Result]], *, total: int) -> list[Result]:
        """What the judge says, in the order of the entries; after an interruption, logs what is kept."""
        assert self.judge is not None
        cache = self.judge.cache
        if len(cache):
            log.info("%s: earlier replies (%d) are not asked for again", cache.path, len(cache))
        try:
            by_place = dict(self.progress(found, total=total, desc="judging") if self.progress else found)
        except BaseException:
            if cache.path is not None and len(cache):
                replies = "1 reply is" if len(cache) == 1 else f"{len(cache)} replies are"
                log.info("%s: %s kept, the same command goes on from there", cache.path, replies)
            raise
        return [by_place[place] for place in range(total)]

    def means(self, values: Mapping[str, Sequence[float]]) -> dict[str, Mean]:
        return {
            name: bootstrap_mean(each, seed=self.seed, samples=self.samples) for name, each in values.items()
        }


# ------------------------------------------------------------------------------------------------- results


@dataclass(frozen=True, kw_only=True)
class _Judged(ABC):
    """What `Scores` and `Comparison` share.

    Attributes:
        means: of each kind of score, by its name in TITLES, with their 95 % intervals.
        judge: the model that was asked; None without one.
        files: path and SHA-256 of what was read.
        settings: what the result depends on besides.
    """

    means: dict[str, Mean]
    judge: Judge | None
    files: Mapping[str, Any]
    settings: Mapping[str, Any]

    @property
    @abstractmethod
    def count(self) -> int:
        """Entries, or pairs of them."""

    @property
    @abstractmethod
    def failures(self) -> dict[int, str]:
        """The last reply of the judge where none could be read, by the place of the entry."""

    @abstractmethod
    def lines(self) -> list[str]:
        """The result as a table for the terminal."""

    @abstractmethod
    def figure(self) -> "Figure":
        """The result as a picture."""

    @abstractmethod
    def _summary(self) -> dict[str, Any]: ...

    @abstractmethod
    def _rows(self) -> Iterator[dict[str, Any]]: ...

    def write(self, output: Path | str) -> None:
        """Writes all that is known to a .json file, and the picture beside it."""
        output = Path(output).expanduser()
        summary = {"entries": self.count, **self._summary()}
        if self.judge is not None:
            summary |= {"parse_failures": len(self.failures), "questions_asked": self.judge.asked}
            summary |= {"questions_from_cache": self.judge.remembered}
            summary |= {"tries_repeated": self.judge.client.retried}
        record = {"gptpl": __version__, **self.files, "summary": summary, "settings": self.settings}
        record["entries"] = list(self._rows())
        content = json.dumps(record, ensure_ascii=False, indent=2, allow_nan=False) + "\n"
        write_atomically(output, content)
        write_atomically(output.with_suffix(".png"), figure_png(self.figure()))

    def check_readable(self) -> None:
        """Logs a warning for replies of the judge that could not be read; InputError where none could."""
        if not self.failures:
            return
        first = repr(shortened(next(iter(self.failures.values())), 100))
        if len(self.failures) == self.count:
            raise InputError(
                f"no reply of the judge could be read, the first was {first}:"
                " give another judge.model, or ask for the form more plainly in judge.prompt"
            )
        log.warning(
            "%d of %d judgements could not be read and are in no mean, the first reply was %s",
            *(len(self.failures), self.count, first),
        )


@dataclass(frozen=True, kw_only=True)
class Scores(_Judged):
    """One model's answers.

    Attributes:
        entries, references, verdicts: in the order of the file; no verdicts without a judge model.
        scale: lowest and highest score of the judge.
    """

    entries: Sequence[Entry]
    references: Sequence[ReferenceScores]
    verdicts: Sequence[Verdict[float]]
    scale: tuple[float, float]

    @property
    def count(self) -> int:  # noqa: D102
        return len(self.entries)

    @property
    def failures(self) -> dict[int, str]:  # noqa: D102
        return {place: each.replies[-1] for place, each in enumerate(self.verdicts) if each.value is None}

    def lines(self) -> list[str]:  # noqa: D102
        return _mean_lines(self.means)

    def figure(self) -> "Figure":  # noqa: D102
        from matplotlib.ticker import MaxNLocator

        names = ("token_f1", "rouge_l")
        panels = {name: [getattr(each, name) for each in self.references] for name in names}
        scored = [each.value for each in self.verdicts if each.value is not None]
        if scored:
            panels = {"judge": scored, **panels}
        figure, row = _panels(len(panels))
        for axes, (name, values) in zip(row, panels.items(), strict=True):
            scale = self.scale if name == "judge" else (0.0, 1.0)
            axes.hist(values, bins=20, range=scale, color=COLOURS[0])
            axes.set_ylabel("Entries")
            axes.grid(visible=True, axis="y", alpha=0.3)
            axes.set_axisbelow(True)
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
            mean = self.means[name]
            axes.axvline(mean.value or 0.0, color=COLOURS[3])
            if mean.low is not None and mean.high is not None:
                axes.axvspan(mean.low, mean.high, color=COLOURS[3], alpha=0.25, linewidth=0)
            axes.set_xlabel(TITLES[name][0].upper() + TITLES[name][1:])
        title = f"Scores of {self.count} answers, with their mean and its 95 % interval"
        figure.suptitle(title, fontweight="bold")
        return figure

    def _summary(self) -> dict[str, Any]:
        return {name: asdict(mean) for name, mean in self.means.items()}

    def _rows(self) -> Iterator[dict[str, Any]]:
        for place, (entry, reference) in enumerate(zip(self.entries, self.references, strict=True)):
            row: dict[str, Any] = {**entry.fields, "scores": asdict(reference)}
            if self.verdicts:
                row["scores"]["judge"] = self.verdicts[place].value
                row["judge_replies"] = list(self.verdicts[place].replies)
            yield row


@dataclass(frozen=True, kw_only=True)
class Comparison(_Judged):
    """Two models' answers to the same tasks.

    `means` are of the differences, first minus second, and the win rate of the first, a tie counting half.

    Attributes:
        pairs, first, second, preferences: in the order of the first file; no preferences without a judge.
    """

    pairs: Sequence[Pair]
    first: Sequence[ReferenceScores]
    second: Sequence[ReferenceScores]
    preferences: Sequence[Preference]

    @property
    def count(self) -> int:  # noqa: D102
        return len(self.pairs)

    @property
    def failures(self) -> dict[int, str]:  # noqa: D102
        return {
            place: next(verdict.replies[-1] for verdict in each.verdicts if verdict.value is None)
            for place, each in enumerate(self.preferences)
            if each.result is None
        }

    @property
    def results(self) -> Counter[str]:
        """How often the first model won, lost and drew."""
        return Counter(each.result for each in self.preferences if each.result is not None)

    @property
    def contradictory(self) -> int:
        """Pairs whose winner depended on the order of the answers, which counts as a tie."""
        return sum(each.contradictory for each in self.preferences)

    def p_value(self) -> float:
        """Of the sign test: how likely so uneven a result were between equal models."""
        return sign_test(self.results[WIN], self.results[LOSS])

    @property
    def differences(self) -> dict[str, Mean]:
        """`means` without the win rate."""
        return {name: mean for name, mean in self.means.items() if name != "win_rate"}

    def lines(self) -> list[str]:  # noqa: D102
        lines = ["the first minus the second:", *_mean_lines(self.differences, signed=True)]
        if self.preferences:
            wins, draws, losses = (self.results[each] for each in (WIN, DRAW, LOSS))
            lines += ["", f"the judge: {wins} wins, {draws} ties, {losses} losses of the first"]
            if any(len(each.swapped) > 1 for each in self.preferences):
                lines.append(f"{self.contradictory} of the ties were decided by the order of the answers")
            lines += _mean_lines({"win_rate": self.means["win_rate"]})
            lines.append(f"sign test: p = {self.p_value():.3g}")
        return lines

    def figure(self) -> "Figure":  # noqa: D102
        figure, panels = _panels(2 if self.preferences else 1)
        names = list(reversed(self.differences))
        for row, name in enumerate(names):
            mean = self.means[name]
            assert mean.value is not None
            if mean.low is not None and mean.high is not None:
                panels[0].plot([mean.low, mean.high], [row, row], color=COLOURS[0], linewidth=2)
            panels[0].plot([mean.value], [row], color=COLOURS[0], marker="o")
        panels[0].axvline(0, color=GREY, linewidth=1)
        panels[0].set_yticks(range(len(names)), [TITLES[name] for name in names])
        panels[0].set_xlabel("First minus second")
        if self.preferences:
            counts = [self.results[each] for each in (WIN, DRAW, LOSS)]
            labels, colours = ("first better", "tie", "second better"), (COLOURS[0], GREY, COLOURS[1])
            panels[1].bar_label(panels[1].bar(labels, counts, color=colours))
            panels[1].set_ylabel("Entries")
        figure.suptitle(f"Two models' answers to {self.count} instructions", fontweight="bold")
        return figure

    def _summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = {
            "differences": {name: asdict(each) for name, each in self.differences.items()}
        }
        if self.preferences:
            wins, ties, losses = (self.results[each] for each in (WIN, DRAW, LOSS))
            summary |= {"wins": wins, "ties": ties, "losses": losses, "contradictory": self.contradictory}
            summary |= {"win_rate": asdict(self.means["win_rate"]), "sign_test_p": self.p_value()}
        return summary

    def _rows(self) -> Iterator[dict[str, Any]]:
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
            yield row


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


def _panels(count: int) -> tuple["Figure", list["Axes"]]:
    figure = new_figure()
    return figure, list(figure.subplots(1, count, squeeze=False)[0])
