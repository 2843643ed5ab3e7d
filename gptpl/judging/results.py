"""Scores of one model's answers and comparisons of two models', as a table, a picture and a JSON file."""

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
from gptpl.files.figures import COLOURS, GREY, figure_pixels, new_figure, write_png
from gptpl.judging.judge import DRAW, LOSS, POINTS, WIN, Judge, Preference, Verdict, compared, judged
from gptpl.judging.responses import (
    TITLES,
    Answer,
    Mean,
    Responses,
    bootstrap_mean,
    paired,
    read_responses,
    reference_scores,
    sign_test,
)
from gptpl.judging.settings import JudgeModel, NoJudge
from gptpl.text import NONE, shortened, table

if TYPE_CHECKING:  # matplotlib takes long to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

Progress = Callable[..., Iterable[Any]]
"""Shows the progress of a loop, called as tqdm is: `progress(iterable, total=..., desc=...)`."""
Entry = dict[str, Any]
"""What is known of one answer, or of a pair, as in the JSON file."""
Result = TypeVar("Result")

MARKERS = ("### Instruction", "### Input", "### Response", "<|")
"""Texts of the prompt's template: an answer that contains one is not well-formed."""
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
    """Score a model's answers against their references and by a judge model.

    Args:
        responses: the answers.
        judge: a judge model; None: only the references are used, which needs no server.
        output: a .json file for the result, with a picture (.png) of the same name. The judge's replies are
            kept in its folder, so that the same call after an interruption asks only what is missing. None
            writes nothing.
        seed: of the intervals.
        bootstrap_samples: resampled test sets for the 95 % intervals.
        markers: see MARKERS.
        progress: shows the progress, for example `tqdm.tqdm`.

    Raises InputError for answers that cannot be read, an output that cannot be written, and a judge that
    cannot be asked.
    """
    answers = read_responses(responses)
    work = _Work({"responses": responses}, judge, output, seed, bootstrap_samples, markers, progress)
    entries: list[Entry] = [
        {**answer.fields, "scores": dict(scores)}
        for answer, scores in zip(answers, work.reference_scores(answers), strict=True)
    ]
    verdicts: list[Verdict[float]] = []
    if work.judge is not None:
        verdicts = work.collected(judged(answers, work.judge), total=len(answers))
        for entry, verdict in zip(entries, verdicts, strict=True):
            entry["scores"]["judge"], entry["judge_replies"] = verdict.value, list(verdict.replies)
    values = {name: [entry["scores"][name] for entry in entries] for name in entries[0]["scores"]}
    result = Scores(entries=entries, failures=_failures(verdicts), **work.common(values))
    if work.output is not None:
        result.write(work.output)
    return result


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
    """Compare two models' answers to the same tasks.

    Takes the arguments of `score`, with the second model's answers as `other`. Which answer of a pair the
    judge reads first is drawn from `seed`; with `both_orders` it is asked twice, the answers swapped, and a
    win must be one both times.

    Raises InputError as `score`, and for answers to different test sets.
    """
    pairs = paired(read_responses(responses), read_responses(other, key="compare"))
    read = {"responses": responses, "compare": other}
    work = _Work(read, judge, output, seed, bootstrap_samples, markers, progress, both_orders=both_orders)
    first, second = (work.reference_scores(answers) for answers in zip(*pairs, strict=True))
    entries: list[Entry] = [
        {
            **{name: getattr(ours, name) for name in ("instruction", "input", "output")},
            "first": {"model_response": ours.model_response, "scores": our_scores},
            "second": {"model_response": theirs.model_response, "scores": their_scores},
        }
        for (ours, theirs), our_scores, their_scores in zip(pairs, first, second, strict=True)
    ]
    values: dict[str, list[float | None]] = {
        name: [ours[name] - theirs[name] for ours, theirs in zip(first, second, strict=True)]
        for name in first[0]
    }
    preferences: list[Preference] = []
    if work.judge is not None:
        found = compared(pairs, work.judge, seed=seed, both_orders=both_orders)
        preferences = work.collected(found, total=len(pairs))
        for entry, each in zip(entries, preferences, strict=True):
            entry |= {"result": each.result, "contradictory": each.contradictory}
            entry["second_shown_first"] = list(each.swapped)
            entry["judge_replies"] = [list(verdict.replies) for verdict in each.verdicts]
        values["win_rate"] = [POINTS[each.result] for each in preferences]
    result = Comparison(entries=entries, failures=_failures(preferences), **work.common(values))
    if work.output is not None:
        result.write(work.output)
    return result


class _Work:
    """The arguments of `score` and `compare`, checked, and the work that both do with them."""

    def __init__(
        self,
        read: Mapping[str, Responses],
        judge: JudgeModel | NoJudge | None,
        output: Path | str | None,
        seed: int,
        samples: int,
        markers: Sequence[str],
        progress: Progress | None,
        **own_settings: Any,
    ) -> None:
        if samples < 100:
            raise InputError(f"bootstrap_samples must be at least 100, got {samples}")
        if seed < 0:
            raise InputError(f"seed must be 0 or more, got {seed}")
        if not all(markers):
            raise InputError("markers contains an empty text, which is in every answer: leave it out")
        self._seed, self._samples, self._markers = seed, samples, markers
        self._progress: Progress = progress or (lambda things, **_: things)
        self.output = path = None if output is None else Path(output).expanduser()
        if path is not None and (path.suffix != ".json" or path.is_dir() or not path.parent.is_dir()):
            raise InputError(f"output must be a .json file in an existing folder, got {path}")
        self._files: dict[str, Any] = dict.fromkeys(read)
        for name, given in read.items():
            if isinstance(given, Path | str):
                file = Path(given).expanduser().absolute()
                self._files[name] = {"path": str(file), "sha256": sha256_of(file)}
                if path is not None and file.resolve() == path.resolve():
                    raise InputError(f"output={path} is the file that is judged: give another output=")
        model = judge if isinstance(judge, JudgeModel) else None
        cache = None if self.output is None else self.output.parent / CACHE_FILE
        self.judge = None if model is None else Judge(model, cache)
        self._settings = own_settings | {
            "seed": seed,
            "bootstrap_samples": samples,
            "markers": list(markers),
            "judge": None if model is None else asdict(model),
        }

    def reference_scores(self, answers: Sequence[Answer]) -> list[dict[str, float]]:
        shown = self._progress(answers, desc="against the references")
        return [reference_scores(answer, markers=self._markers) for answer in shown]

    def collected(self, found: Iterator[tuple[int, Result]], *, total: int) -> list[Result]:
        """The judge's results in the order of the answers; logs after an interruption how many are kept."""
        try:
            by_place = dict(self._progress(found, total=total, desc="judging"))
        except BaseException:
            cache = None if self.judge is None else self.judge.cache
            if cache is not None and cache.path is not None and len(cache):
                log.info(
                    "%s: replies kept: %d; run the same command again to continue", cache.path, len(cache)
                )
            raise
        return [by_place[place] for place in range(total)]

    def common(self, values: Mapping[str, Sequence[float | None]]) -> dict[str, Any]:
        """The fields of `_Judged` that do not depend on the kind of work; None is left out of the means."""
        means = {}
        for name, each in values.items():
            numbers = [value for value in each if value is not None]
            means[name] = bootstrap_mean(numbers, seed=self._seed, samples=self._samples)
        return {"means": means, "judge": self.judge, "files": self._files, "settings": self._settings}


def _failures(opinions: Sequence[Verdict[float] | Preference]) -> dict[int, str]:
    return {place: each.failure for place, each in enumerate(opinions) if each.failure is not None}


# --- results --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Judged(ABC):
    """The common part of `Scores` and `Comparison`.

    Attributes:
        entries: what is known of each answer, or of each pair, as in the JSON file.
        failures: the judge's last reply where none could be read, by the index of the entry.
        means: the mean of each kind of score, by its name in TITLES.
        judge: the model that was asked; None without one.
        files: path and SHA-256 of the files that were read.
        settings: the other settings that the result depends on.
    """

    entries: Sequence[Entry]
    failures: Mapping[int, str]
    means: Mapping[str, Mean]
    judge: Judge | None
    files: Mapping[str, Any]
    settings: Mapping[str, Any]

    @abstractmethod
    def lines(self) -> list[str]:
        """The result as a table for the terminal."""

    @abstractmethod
    def figure(self) -> "Figure":
        """The result as a picture."""

    @abstractmethod
    def _summary(self) -> dict[str, Any]: ...

    def write(self, output: Path | str) -> None:
        """Write everything to a .json file, and the picture next to it."""
        output = Path(output).expanduser()
        summary = {"entries": len(self.entries), **self._summary()}
        if self.judge is not None:
            summary |= {
                "parse_failures": len(self.failures),
                "questions_asked": self.judge.asked,
                "questions_from_cache": self.judge.remembered,
                "tries_repeated": self.judge.client.retried,
            }
        record = {"gptpl": __version__, **self.files, "summary": summary, "settings": self.settings}
        content = json.dumps(
            {**record, "entries": self.entries}, ensure_ascii=False, indent=2, allow_nan=False
        )
        write_atomically(output, content + "\n")
        write_png(figure_pixels(self.figure()), output.with_suffix(".png"))

    def check_readable(self) -> None:
        """Log a warning if some replies of the judge could not be read; raise InputError if none could."""
        if not self.failures:
            return
        first = repr(shortened(next(iter(self.failures.values())), 100))
        if len(self.failures) == len(self.entries):
            raise InputError(
                f"no reply of the judge could be read, the first was {first}:"
                " try another judge.model, or ask for the form more plainly in judge.prompt"
            )
        log.warning(
            "%d of %d judgements could not be read and are left out of the means, the first reply was %s",
            *(len(self.failures), len(self.entries), first),
        )


class Scores(_Judged):
    """Scores of one model's answers."""

    def lines(self) -> list[str]:  # noqa: D102
        return _mean_lines(self.means)

    def figure(self) -> "Figure":  # noqa: D102
        from matplotlib.ticker import MaxNLocator

        names = [name for name in ("judge", "token_f1", "rouge_l") if name in self.means]
        figure, panels = _panels(len(names))
        for axes, name in zip(panels, names, strict=True):
            mean, title = self.means[name], TITLES[name]
            values = [entry["scores"][name] for entry in self.entries]
            scale = (0.0, 1.0)
            if name == "judge":
                scale = self.settings["judge"]["min_score"], self.settings["judge"]["max_score"]
            axes.hist([each for each in values if each is not None], bins=20, range=scale, color=COLOURS[0])
            if mean.value is not None:
                axes.axvline(mean.value, color=COLOURS[3])
            if mean.low is not None and mean.high is not None:
                axes.axvspan(mean.low, mean.high, color=COLOURS[3], alpha=0.25, linewidth=0)
            axes.set(xlabel=title[0].upper() + title[1:], ylabel="Entries", axisbelow=True)
            axes.grid(visible=True, axis="y", alpha=0.3)
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        title = f"Scores of {len(self.entries)} answers, with their mean and its 95 % interval"
        figure.suptitle(title, fontweight="bold")
        return figure

    def _summary(self) -> dict[str, Any]:
        return {name: asdict(mean) for name, mean in self.means.items()}


class Comparison(_Judged):
    """Two models' answers to the same tasks.

    `means` are those of the differences, first minus second, and the win rate of the first, where a tie
    counts half.
    """

    @property
    def counts(self) -> dict[str, int]:
        """The wins, ties and losses of the first model."""
        found = Counter(entry.get("result") for entry in self.entries)
        return {"wins": found[WIN], "ties": found[DRAW], "losses": found[LOSS]}

    @property
    def contradictory(self) -> int:
        """Pairs whose winner depended on the order of the answers."""
        return sum(entry["contradictory"] for entry in self.entries)

    def p_value(self) -> float:
        """The probability of a result at least as uneven between equal models (sign test)."""
        return sign_test(self.counts["wins"], self.counts["losses"])

    @property
    def differences(self) -> dict[str, Mean]:
        """`means` without the win rate."""
        return {name: mean for name, mean in self.means.items() if name != "win_rate"}

    def lines(self) -> list[str]:  # noqa: D102
        lines = ["the first minus the second:", *_mean_lines(self.differences, signed=True)]
        if self.judge is not None:
            counts = ", ".join(f"{count} {name}" for name, count in self.counts.items())
            lines += ["", f"the judge: {counts} of the first"]
            if self.settings["both_orders"]:
                lines.append(f"{self.contradictory} of the ties were decided by the order of the answers")
            lines += _mean_lines({"win_rate": self.means["win_rate"]})
            lines.append(f"sign test: p = {self.p_value():.3g}")
        return lines

    def figure(self) -> "Figure":  # noqa: D102
        figure, panels = _panels(1 if self.judge is None else 2)
        names = list(reversed(self.differences))
        for row, name in enumerate(names):
            mean = self.means[name]
            if mean.low is not None and mean.high is not None:
                panels[0].plot([mean.low, mean.high], [row, row], color=COLOURS[0], linewidth=2)
            panels[0].plot([mean.value or 0.0], [row], color=COLOURS[0], marker="o")
        panels[0].axvline(0, color=GREY, linewidth=1)
        panels[0].set_yticks(range(len(names)), [TITLES[name] for name in names])
        panels[0].set_xlabel("First minus second")
        if self.judge is not None:
            labels, colours = ("first better", "tie", "second better"), (COLOURS[0], GREY, COLOURS[1])
            panels[1].bar_label(panels[1].bar(labels, list(self.counts.values()), color=colours))
            panels[1].set_ylabel("Entries")
        figure.suptitle(f"Two models' answers to {len(self.entries)} instructions", fontweight="bold")
        return figure

    def _summary(self) -> dict[str, Any]:
        differences = {name: asdict(each) for name, each in self.differences.items()}
        summary: dict[str, Any] = {"differences": differences}
        if self.judge is not None:
            summary |= {**self.counts, "contradictory": self.contradictory}
            summary |= {"win_rate": asdict(self.means["win_rate"]), "sign_test_p": self.p_value()}
        return summary


def _mean_lines(means: Mapping[str, Mean], *, signed: bool = False) -> list[str]:
    rows = [("", "mean", "95 % interval", "entries")]
    for name, mean in means.items():
        form = f"{'+' if signed else ''}.{1 if name == 'judge' else 3}f"
        value, low, high = (
            NONE if each is None else format(each, form) for each in (mean.value, mean.low, mean.high)
        )
        interval = NONE if mean.low is None else f"{low} to {high}"
        rows.append((TITLES[name], value, interval, str(mean.count)))
    return table(rows, right=(1, 2, 3))


def _panels(count: int) -> tuple["Figure", list["Axes"]]:
    figure = new_figure()
    return figure, list(figure.subplots(1, count, squeeze=False)[0])
