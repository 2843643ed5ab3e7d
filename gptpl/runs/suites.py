"""Suites of benchmarks on loaded models; their scores, figures and a page in a folder."""

import json
import logging
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptpl.config.compose import composed
from gptpl.config.groups import Folder
from gptpl.config.instantiate import instantiate
from gptpl.config.overrides import quoted
from gptpl.errors import InputError
from gptpl.evaluation.benchmarks import ModelFacts, Progress, Suite, SuiteResult
from gptpl.evaluation.suite_report import page, record
from gptpl.files.durable import write_atomically

if TYPE_CHECKING:
    from gptpl.runs.models import LanguageModel

log = logging.getLogger(__name__)

FOLDER = "evaluations"
RESULTS, PAGE, SCORES = "results.json", "report.html", "scores"


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
    for model in models:
        known = ModelFacts.of(_name(model, results), model.net, model.tokenizer, model.step)
        scores = None if folder is None else folder / SCORES / known.sha256[:16]
        settings: dict[str, Any] = {"model": known, "name": name, "folder": scores, "progress": progress}
        results.append(suite.of_model(model).run(model.net, model.tokenizer, **settings))
    if folder is not None:
        facts = {"date": datetime.now(UTC).date().isoformat()} | ({"command": command} if command else {})
        text = json.dumps(facts | record(results), ensure_ascii=False, indent=2)
        write_atomically(folder / RESULTS, text + "\n")
        write_atomically(folder / PAGE, page(results, facts=facts))
    return results


def recorded(run_dir: Path, model: ModelFacts) -> list[dict[str, Any]]:
    """What the suites of a run's folder say of these weights, as in `results.json`, newest last.

    Each has `suite`, `tasks`, `date` and `command`, which may be None. Unreadable files are left out.
    """
    found = []
    for path in sorted((run_dir / FOLDER).glob(f"*/{RESULTS}"), key=lambda path: path.stat().st_mtime):
        try:
            content = json.loads(path.read_text("utf-8"))
            own = [each for each in content["results"] if each["model"]["sha256"] == model.sha256]
            found += [{**each, "date": content["date"], "command": content.get("command")} for each in own]
        except (OSError, ValueError, LookupError, TypeError) as error:
            log.warning("%s cannot be read (%s): it is left out", path, error)
    return found


def _name(model: "LanguageModel", others: Iterable[SuiteResult]) -> str:
    """A model's name in tables: that of its run and step, or of its file, once only."""
    run = model.run_dir
    name = model.path.stem if run is None else f"{run.parent.name}/{run.name}, step {model.step:,}"
    taken = [result.model.name for result in others]
    return name if name not in taken else f"{name} ({len(taken) + 1})"
