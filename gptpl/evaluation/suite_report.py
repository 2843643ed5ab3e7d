"""Results of suites as lines of a terminal, as a JSON file, and as a web page that needs nothing else."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from gptpl import __version__
from gptpl.evaluation.benchmarks import Metric, ModelFacts, SuiteResult, TaskResult, difference
from gptpl.files.figures import COLOURS, GREY
from gptpl.text import duration_text, table

PERCENT = ("acc", "acc_norm", "acc_per_token", "centred", "extracted")
"""Metrics that are fractions of questions."""
CUT = (
    "beginning cut: questions longer than the model's context, which lose their beginning; not asked: those"
    " with an answer longer than the context"
)


def shown(name: str, value: float) -> str:
    """A metric's value, as a percentage where it is a fraction of questions."""
    if math.isnan(value):
        return "-"
    return f"{100 * value:.1f} %" if name in PERCENT else f"{value:.4g}"


def interval(name: str, metric: Metric) -> str:
    """A metric with its 95 % interval, such as "31.1 % (28.4 to 33.9)"."""
    if math.isnan(metric.low):
        return shown(name, metric.value)
    low, high = (shown(name, each).removesuffix(" %") for each in (metric.low, metric.high))
    return f"{shown(name, metric.value)} ({low} to {high})"


def result_lines(results: Sequence[SuiteResult]) -> list[str]:
    """A table with a row for each task and a column for each model, then what has to be said of them."""
    first = results[0]
    names = [result.model.name for result in results]
    head = ["task", "metric", *(names if len(names) > 1 else ["value, 95 % interval"]), "chance"]
    rows = [[*head, "published", "questions", "beginning cut", "not asked"]]
    for name, task in first.tasks.items():
        primary = task.metrics[task.primary]
        chance = "-" if primary.chance is None else shown(task.primary, primary.chance)
        values = [interval(task.primary, _primary(result.tasks[name])) for result in results]
        published = [
            f"{model} {shown(task.primary, figures[task.primary])}"
            for model, figures in (task.about.published or {}).items()
            if task.primary in figures
        ]
        counts = [f"{count:,}" for count in (task.questions, task.shortened, task.left_out)]
        rows.append([name, task.primary, *values, chance, ", ".join(published), *counts])
        for group, (count, _) in task.groups.items():
            own = [interval(task.primary, result.tasks[name].groups[group][1]) for result in results]
            rows.append([f"  {group}", "", *own, "", "", f"{count:,}", "", ""])
    if first.centred is not None:
        centred = ["-" if each.centred is None else shown("centred", each.centred) for each in results]
        rows.append(["mean above chance", "centred", *centred, "0.0 %", "", "", "", ""])
    empty = ("", "0")
    kept = [
        place
        for place, cells in enumerate(zip(*rows[1:], strict=True))
        if place < len(head) or not all(cell in empty for cell in cells)
    ]
    numbers = [n for n, place in enumerate(kept) if place > len(head)]
    lines = table([[row[place] for place in kept] for row in rows], right=numbers)
    for result in results[1:]:
        lines += ["", *table(_difference_rows(result, first))]
    if any(task.shortened or task.left_out for task in first.tasks.values()):
        lines += ["", CUT]
    lines += [f"note: {note}" for note in notes(first)]
    seconds = sum(task.seconds for result in results for task in result.tasks.values())
    answers = sum(task.answers for result in results for task in result.tasks.values())
    return [*lines, "", f"{answers:,} answers in {duration_text(seconds)}"]


def _primary(task: TaskResult) -> Metric:
    return task.metrics[task.primary]


def _difference_rows(result: SuiteResult, base: SuiteResult) -> list[list[str]]:
    rows = [[f"{result.model.name} less {base.model.name}", "difference, 95 % interval", "p (sign test)"]]
    for name, task in result.tasks.items():
        if not task.values:
            continue
        found = difference(task, base.tasks[name])
        as_metric = Metric(value=found.value, low=found.low, high=found.high)
        rows.append([name, interval(task.primary, as_metric), f"{found.p:.2g}"])
    return rows


def notes(result: SuiteResult) -> list[str]:
    """What is known to be wrong with the tasks."""
    limits = {name: " ".join(task.about.limits.split()) for name, task in result.tasks.items()}
    return [f"{name}: {text}" for name, text in limits.items() if text]


def record(results: Sequence[SuiteResult]) -> dict[str, Any]:
    """Plain data for a JSON file; nan and infinite values are null."""
    made: dict[str, Any] = {"gptpl": __version__, "results": []}
    for result in results:
        tasks = {}
        for name, task in result.tasks.items():
            fields = dataclasses.asdict(task)
            fields["groups"] = {
                group: {"questions": count, **dataclasses.asdict(metric)}
                for group, (count, metric) in task.groups.items()
            }
            del fields["values"]  # in the scores of the questions
            tasks[name] = fields
        made["results"].append(
            {
                "suite": result.suite,
                "model": dataclasses.asdict(result.model),
                "centred": result.centred,
                "tasks": tasks,
            }
        )
    plain: dict[str, Any] = _finite(made)
    return plain


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- as a web page --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Bar:
    """A value between 0 and 1, in percent of a bar's width."""

    colour: str
    label: str
    text: str
    value: float
    low: float
    high: float


def page(results: Sequence[SuiteResult], *, facts: Mapping[str, str] | None = None) -> str:
    """One HTML document: bars beside chance and published figures, then every metric in a table."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gptpl.evaluation", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    first = results[0]
    charts = []
    for name, task in first.tasks.items():
        if task.primary not in PERCENT:
            continue
        primary = _primary(task)
        bars = [_bar(each, name, place) for place, each in enumerate(results)]
        for model, figures in (task.about.published or {}).items():
            if task.primary in figures:
                value = 100 * figures[task.primary]
                text = f"{value:.1f} %, published"
                bars.append(_Bar(colour=GREY, label=model, text=text, value=value, low=value, high=value))
        chance = None if primary.chance is None else 100 * primary.chance
        charts.append({"name": name, "metric": task.primary, "chance": chance, "bars": bars})
    tables = []
    for name, task in first.tasks.items():
        columns = [each.model.name for each in results]
        rows = [
            [metric, *(interval(metric, each.tasks[name].metrics[metric]) for each in results)]
            for metric in task.metrics
        ]
        rows += [
            [
                f"{group} ({count:,})",
                *(interval(task.primary, each.tasks[name].groups[group][1]) for each in results),
            ]
            for group, (count, _) in task.groups.items()
        ]
        tables.append({"name": name, "task": task, "columns": columns, "rows": rows})
    differences = []
    for result in results[1:]:
        head, *rows = _difference_rows(result, first)
        differences.append({"head": head, "rows": rows})
    return environment.get_template("suite_page.html").render(
        title=f"{first.suite}: {', '.join(each.model.name for each in results)}",
        facts={**_facts(results), **(facts or {})},
        charts=charts,
        tables=tables,
        differences=differences,
        notes=notes(first),
    )


def _bar(result: SuiteResult, name: str, place: int) -> _Bar:
    task = result.tasks[name]
    metric = _primary(task)
    low, high = (metric.value if math.isnan(each) else each for each in (metric.low, metric.high))
    return _Bar(
        colour=COLOURS[place % len(COLOURS)],
        label=result.model.name,
        text=interval(task.primary, metric),
        value=100 * metric.value,
        low=100 * low,
        high=100 * high,
    )


def _facts(results: Sequence[SuiteResult]) -> dict[str, str]:
    tasks = [task for result in results for task in result.tasks.values()]
    found = {"answers": f"{sum(each.answers for each in tasks):,}"}
    found["time"] = duration_text(sum(each.seconds for each in tasks))
    for result in results:
        found[result.model.name] = _model_text(result.model)
        if result.centred is not None:
            found[f"{result.model.name}, mean above chance"] = shown("centred", result.centred)
    return found


def _model_text(model: ModelFacts) -> str:
    step = f", step {model.step:,}" if model.step else ""
    return f"{model.parameters:,} parameters{step}, {model.sha256[:12]}"
