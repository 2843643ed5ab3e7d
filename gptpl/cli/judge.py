"""`gptpl judge`: how good a model's answers are, by their references, a judge model, or another model's."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from tqdm import tqdm

from gptpl.cli.console import RunLog
from gptpl.cli.hydra_app import instantiate, run_under_hydra
from gptpl.cli.judge_figure import comparison_figure, png_of, scores_figure
from gptpl.cli.judge_results import Comparison, Scores
from gptpl.errors import InputError
from gptpl.files.whole import write_atomically
from gptpl.judging import (
    Entry,
    Judge,
    JudgeModel,
    NoJudge,
    Pair,
    Preference,
    ReferenceScores,
    Verdict,
    check_bootstrap,
    compared,
    judged,
    paired,
    read_responses,
    reference_scores,
)

log = logging.getLogger(__name__)

CACHE_FILE = "judgements.jsonl"


def run(arguments: list[str]) -> int:
    """Writes the result and its picture, prints a table to standard output; returns the exit status."""
    run_under_hydra("judge", arguments, _judge)
    return 0


@dataclass(frozen=True, kw_only=True)
class _Request:
    """What is asked for, checked; `judge` is None without a judge model."""

    cfg: DictConfig
    responses: Path
    compare: Path | None
    output: Path
    settings: JudgeModel | NoJudge
    judge: Judge | None

    @property
    def facts(self) -> dict[str, Any]:
        """Settings of the result."""
        names = ("both_orders", "seed", "bootstrap_samples")
        return {name: self.cfg[name] for name in names} | {"markers": list(self.cfg.markers)}


def _judge(cfg: DictConfig) -> None:
    with RunLog():
        if cfg.both_orders and cfg.compare is None:
            raise InputError(
                "both_orders=true has two answers to swap only with compare=: give it, or leave it out"
            )
        if not all(cfg.markers):
            raise InputError("markers holds an empty text, which is in every answer: leave it out")
        check_bootstrap(seed=cfg.seed, samples=cfg.bootstrap_samples)
        responses = Path(cfg.responses).expanduser()
        compare = None if cfg.compare is None else Path(cfg.compare).expanduser()
        output = _checked_output(cfg.output, responses, compare)
        entries = read_responses(responses)
        pairs = None if compare is None else paired(entries, read_responses(compare, key="compare"))
        settings = instantiate(cfg.judge)
        judge = settings.connected(output.parent / CACHE_FILE) if isinstance(settings, JudgeModel) else None
        request = _Request(
            cfg=cfg, responses=responses, compare=compare, output=output, settings=settings, judge=judge
        )
        if pairs is None:
            _score(request, entries)
        else:
            _compare(request, pairs)


def _score(request: _Request, entries: Sequence[Entry]) -> None:
    references = _reference_scores(request, entries)
    verdicts: dict[int, Verdict[float]] = {}
    scale = 0.0, 1.0
    if request.judge is not None:
        assert isinstance(request.settings, JudgeModel)
        scale = request.settings.min_score, request.settings.max_score
        with _kept(request, len(entries)) as bar:
            for place, verdict in judged(entries, request.judge, request.settings):
                verdicts[place] = verdict
                bar.update()
    in_order = [verdicts[place] for place in sorted(verdicts)]
    scores = Scores.of(entries, references, in_order, scale=scale, **_statistics(request))
    _write(request, scores, scores_figure(scores))


def _compare(request: _Request, pairs: Sequence[Pair]) -> None:
    first = _reference_scores(request, [pair.first for pair in pairs])
    second = _reference_scores(request, [pair.second for pair in pairs])
    preferences: dict[int, Preference] = {}
    if request.judge is not None:
        assert isinstance(request.settings, JudgeModel)
        seed, both_orders = request.cfg.seed, request.cfg.both_orders
        with _kept(request, len(pairs)) as bar:
            for place, preference in compared(
                pairs, request.judge, request.settings, seed=seed, both_orders=both_orders
            ):
                preferences[place] = preference
                bar.update()
    in_order = [preferences[place] for place in sorted(preferences)]
    comparison = Comparison.of(pairs, first, second, in_order, **_statistics(request))
    _write(request, comparison, comparison_figure(comparison))


def _statistics(request: _Request) -> dict[str, int]:
    return {"seed": request.cfg.seed, "samples": request.cfg.bootstrap_samples}


def _reference_scores(request: _Request, entries: Sequence[Entry]) -> list[ReferenceScores]:
    markers = list(request.cfg.markers)
    bar = tqdm(entries, unit="answer", desc="against the references", disable=None, leave=False)
    return [reference_scores(entry, markers=markers) for entry in bar]


@contextmanager
def _kept(request: _Request, total: int) -> Iterator[Any]:
    """A progress bar; if it ends early, says what is kept."""
    assert request.judge is not None
    cache = request.judge.cache
    if len(cache):
        log.info("%s: earlier replies (%d) are not asked for again", cache.path, len(cache))
    with tqdm(total=total, unit="answer", desc="judging", disable=None) as bar:
        try:
            yield bar
        except BaseException:
            if len(cache):
                replies = "1 reply is" if len(cache) == 1 else f"{len(cache)} replies are"
                log.info("%s: %s kept, the same command goes on from there", cache.path, replies)
            raise


def _write(request: _Request, result: Scores | Comparison, figure: Any) -> None:
    """Files first, then the table; a judge of whom nothing could be read is an error after both."""
    record = result.record(request.responses, request.compare, request.settings, request.judge, request.facts)
    picture = request.output.with_suffix(".png")
    write_atomically(request.output, record)
    write_atomically(picture, png_of(figure))
    files = [str(path) for path in (request.responses, request.compare) if path is not None]
    print(f"answers     {' against '.join(files)}, {result.count} entries")
    if request.judge is not None:
        client = request.judge.client
        print(f"judge       {client.model} at {client.address}")
    print("\n" + "\n".join(result.lines()) + "\n")
    print(f"result      {request.output}")
    print(f"picture     {picture}")
    if request.judge is not None and result.failures:
        first = result.first_failure()
        if len(result.failures) == result.count:
            raise InputError(
                f"no reply of the judge could be read, the first was {first}:"
                " give another judge.model, or ask for the form more plainly in judge.prompt"
            )
        log.warning(
            "%d of %d judgements could not be read and are in no mean, the first reply was %s",
            *(len(result.failures), result.count, first),
        )


def _checked_output(given: str | None, responses: Path, compare: Path | None) -> Path:
    """The JSON to write: a file in a folder that exists, and none of those that are read."""
    name = "scores.json" if compare is None else "comparison.json"
    output = responses.parent / name if given is None else Path(given).expanduser()
    if output.suffix != ".json" or output.is_dir() or not (output.parent.is_dir() or given is None):
        raise InputError(f"output={output} cannot be written: give a .json file in a folder that exists")
    if output.resolve() in {path.resolve() for path in (responses, compare) if path is not None}:
        raise InputError(f"output={output} is the file that is judged: give another one with output=")
    return output
