"""Suites of benchmarks on loaded models; their scores, figures and a page in a folder."""

import json
import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptpl.config.compose import composed
from gptpl.config.groups import Folder
from gptpl.config.instantiate import instantiate
from gptpl.config.overrides import quoted
from gptpl.errors import InputError
from gptpl.evaluation.benchmarks import Metric
from gptpl.evaluation.suite import ModelFacts, Progress, Suite, SuiteResult, safe_name
from gptpl.evaluation.suite_report import metric_of, page, record, task_record
from gptpl.files.durable import write_atomically

if TYPE_CHECKING:
    from gptpl.runs.models import LanguageModel

log = logging.getLogger(__name__)

FOLDER = "evaluations"
RESULTS, PAGE, SCORES = "results.json", "report.html", "scores"
_DIGITS = 16  # of the hash of weights, in the name of their folder


def suite_of(choice: str, *, config_dir: Folder | None = None, **settings: Any) -> Suite:
    """A choice of the config group `suite`: `suite_of("core", limit=200)`; settings as in its YAML."""
    given = [f"suite.{name}={_text(value)}" for name, value in settings.items()]
    suite: Suite = instantiate(
        composed([f"suite={choice}", *given], "evaluate", config_dir=config_dir).cfg.suite
    )
    return suite


def _text(value: Any) -> str:
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_text, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def run_suite(
    models: "Iterable[LanguageModel]",
    suite: Suite,
    *,
    name: str = "suite",
    output: str | Path | None = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> list[SuiteResult]:
    """Measure each model by the suite; the questions are the same for all.

    In the folder `output` are `results.json`, `report.html`, and the scores of every question, by which the
    same call continues after an interruption. None writes nothing. `command` is what a reader may type to get
    the same. Raises InputError as `Suite.run`.
    """
    folder = None if output is None else Path(output).expanduser()
    if folder is not None and folder.exists() and not folder.is_dir():
        raise InputError(f"output={folder} is a file: give a folder")
    results: list[SuiteResult] = []
    facts = {"date": datetime.now(UTC).date().isoformat()} | ({"command": command} if command else {})
    for model in models:
        known = ModelFacts.of(_name(model, results), model.net, model.tokenizer, model.step)
        scores = None if folder is None else folder / SCORES / known.sha256[:_DIGITS]
        settings: dict[str, Any] = {"model": known, "name": name, "folder": scores, "progress": progress}
        results.append(suite.of_model(model).run(model.net, model.tokenizer, **settings))
        if scores is not None:
            for task, found in results[-1].tasks.items():
                figures = {"suite": name, "task": task, **facts, **task_record(found)}
                path = scores / f"{safe_name(task)}-{found.sha256[:8]}.figures.json"
                write_atomically(path, json.dumps(figures, ensure_ascii=False, indent=2) + "\n")
    if folder is not None:
        text = json.dumps(facts | record(results), ensure_ascii=False, indent=2)
        write_atomically(folder / RESULTS, text + "\n")
        write_atomically(folder / PAGE, page(results, facts=facts))
    return results


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a task said of some weights, as a run's folder has it."""

    suite: str
    task: str
    date: str
    command: str
    primary: str
    metric: Metric
    groups: Mapping[str, tuple[int, Metric]]
    questions: int
    licence: str
    limits: str


def recorded(run_dir: Path, weights: Collection[str]) -> list[Figures]:
    """What the suites of a run's folder say of weights with these hashes, by `weights_sha256`.

    Of a task that was asked with several limits, the one with most questions. Files that are damaged are left
    out, with a warning.
    """
    found: dict[tuple[str, str, str], Figures] = {}
    for sha256 in weights:
        for path in sorted((run_dir / FOLDER).glob(f"*/{SCORES}/{sha256[:_DIGITS]}/*.figures.json")):
            try:
                figures = _figures(json.loads(path.read_text("utf-8")))
            except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
                log.warning("%s is damaged, and left out: %s", path, error)
                continue
            key = (sha256, figures.suite, figures.task)
            if key not in found or found[key].questions < figures.questions:
                found[key] = figures
    return list(found.values())


def _figures(content: Mapping[str, Any]) -> Figures:
    primary, about = str(content["primary"]), content["about"]
    return Figures(
        suite=str(content["suite"]),
        task=str(content["task"]),
        date=str(content["date"]),
        command=str(content.get("command") or "gptpl in Python"),
        primary=primary,
        metric=metric_of(content["metrics"][primary]),
        groups={
            str(group): (int(own["questions"]), metric_of(own)) for group, own in content["groups"].items()
        },
        questions=int(content["questions"]),
        licence=str(about["licence"]),
        limits=str(about["limits"]),
    )


def _name(model: "LanguageModel", others: Iterable[SuiteResult]) -> str:
    """A model's name in tables: that of its run and step, or of its file, once only."""
    run = model.run_dir
    name = model.path.stem if run is None else f"{run.parent.name}/{run.name}, step {model.step:,}"
    taken = [result.model.name for result in others]
    return name if name not in taken else f"{name} ({len(taken) + 1})"
