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

PERCENT = (
    *("acc", "acc_norm", "acc_per_token", "centred", "extracted"),
    *(
        "preference",
        "whole",
        "ss",
        "lms",
        "icat",
        "gap",
        "right_pro",
        "right_anti",
        "unknown",
        "acc_gap",
        "women_share",
    ),
)
"""Metrics that are fractions, of questions or of probability, or differences of fractions."""
SIGNED = ("gap", "acc_gap", "bias", "correlation")
"""Metrics from -1 to 1."""
CUT = (
    "beginning cut: questions longer than the model's context, which lose their beginning; not asked: those"
    " with an answer longer than the context"
)


def shown(name: str, value: float) -> str:
    """A metric's value, as a percentage where it is a fraction of questions."""
    if math.isnan(value):
        return "-"
    if name in PERCENT:
        return f"{100 * value:.1f} %"
    return f"{value:.3f}" if name in SIGNED else f"{value:.4g}"


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
            own = [interval(task.grouped, result.tasks[name].groups[group][1]) for result in results]
            metric = task.grouped if task.grouped != task.primary else ""
            rows.append([f"  {group}", metric, *own, "", "", f"{count:,}", "", ""])
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
    lines += [f"note: {name}: {text}" for name, text in notes(first).items()]
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


def notes(result: SuiteResult) -> dict[str, str]:
    """What is known to be wrong with the tasks, by their names."""
    limits = {name: " ".join(task.about.limits.split()) for name, task in result.tasks.items()}
    return {name: text for name, text in limits.items() if text}


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
            del fields["values"], fields["clusters"]  # in the scores of the questions
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
    """A value's bar and interval, in percent of the axis."""

    colour: str
    label: str
    text: str
    start: float
    end: float
    low: float
    high: float

    @classmethod
    def of(cls, name: str, metric: Metric, **shown: str) -> "_Bar":
        """From 0, or, where chance is best, from there."""
        start = metric.chance if metric.better == "chance" and metric.chance is not None else 0.0
        low, high = (metric.value if math.isnan(each) else each for each in (metric.low, metric.high))
        start, end = sorted(_place(name, each) for each in (start, metric.value))
        return cls(start=start, end=end, low=_place(name, low), high=_place(name, high), **shown)


def _place(name: str, value: float) -> float:
    """Where a metric's value is on its axis, in percent."""
    return 50 * (1 + value) if name in SIGNED else 100 * value


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
    limits = notes(first)
    charts: dict[str, list[dict[str, Any]]] = {"high": [], "low": [], "chance": []}
    for name, task in first.tasks.items():
        if task.primary not in (*PERCENT, *SIGNED):
            continue
        primary = _primary(task)
        bars = [
            _Bar.of(
                task.primary,
                _primary(result.tasks[name]),
                colour=COLOURS[place % len(COLOURS)],
                label=result.model.name,
                text=interval(task.primary, _primary(result.tasks[name])),
            )
            for place, result in enumerate(results)
        ]
        for model, figures in (task.about.published or {}).items():
            if task.primary in figures:
                published = Metric(value=figures[task.primary], low=math.nan, high=math.nan)
                text = f"{shown(task.primary, published.value)}, published"
                bars.append(_Bar.of(task.primary, published, colour=GREY, label=model, text=text))
        chance = None
        if primary.chance is not None:
            chance = _place(task.primary, primary.chance), shown(task.primary, primary.chance)
        chart = {
            "name": name,
            "metric": f"{task.primary}, -1 to 1" if task.primary in SIGNED else task.primary,
            "chance": chance,
            "bars": bars,
            "note": limits.pop(name, ""),
        }
        charts[primary.better].append(chart)
    tables = []
    for name, task in first.tasks.items():
        columns = [*(each.model.name for each in results), "chance"]
        rows = [
            [
                metric,
                *(interval(metric, each.tasks[name].metrics[metric]) for each in results),
                "" if own.chance is None else shown(metric, own.chance),
            ]
            for metric, own in task.metrics.items()
        ]
        label = "" if task.grouped == task.primary else f"{task.grouped}: "
        rows += [
            [
                f"{label}{group} ({count:,})",
                *(interval(task.grouped, each.tasks[name].groups[group][1]) for each in results),
                "" if own.chance is None else shown(task.grouped, own.chance),
            ]
            for group, (count, own) in task.groups.items()
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
        notes=limits,
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
