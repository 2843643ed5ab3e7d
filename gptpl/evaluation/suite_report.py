"""Results of suites as lines of a terminal, as a JSON file, and as a web page that needs nothing else."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

from gptpl import __version__
from gptpl.evaluation.benchmarks import Form, Metric, TaskResult
from gptpl.evaluation.suite import SuiteResult, difference
from gptpl.files.figures import COLOURS, GREY
from gptpl.files.template import package_templates
from gptpl.text import count_text, duration_text, table

CUT = (
    "beginning cut: questions longer than the model's context, which lose their beginning; not asked: those"
    " with an answer longer than the context"
)


def shown(value: float, form: Form = "number") -> str:
    """A metric's value, such as "31.1 %"; "-" for nan."""
    if math.isnan(value):
        return "-"
    if form == "percent":
        return f"{100 * value:.1f} %"
    return f"{value:.3f}" if form == "signed" else f"{value:.4g}"


def interval(metric: Metric) -> str:
    """A metric with its 95 % interval, such as "31.1 % (28.4 to 33.9)"."""
    if math.isnan(metric.low):
        return shown(metric.value, metric.form)
    low, high = (shown(each, metric.form).removesuffix(" %") for each in (metric.low, metric.high))
    return f"{shown(metric.value, metric.form)} ({low} to {high})"


def chance_text(metric: Metric) -> str:
    """What chance gives; "-" where that is not known."""
    return "-" if metric.chance is None else shown(metric.chance, metric.form)


def result_lines(results: Sequence[SuiteResult]) -> list[str]:
    """A table with a row for each task and a column for each model, then differences and notes."""
    first = results[0]
    names = [result.model.name for result in results]
    head = ["task", "metric", *(names if len(names) > 1 else ["value, 95 % interval"]), "chance"]
    rows = [[*head, "published", "questions", "beginning cut", "not asked"]]
    for name, task in first.tasks.items():
        each = [result.tasks[name] for result in results]
        primary = task.metrics[task.primary]
        published = [
            f"{model} {shown(figures[task.primary], primary.form)}"
            for model, figures in (task.about.published or {}).items()
            if task.primary in figures
        ]
        counts = [_counts(each, kind) for kind in ("questions", "shortened", "left_out")]
        values = [interval(own.metrics[task.primary]) for own in each]
        label = _label(task.primary, primary)
        rows.append([name, label, *values, chance_text(primary), ", ".join(published), *counts])
        for group, (count, metric) in task.groups.items():
            values = [interval(own.groups[group][1]) if group in own.groups else "-" for own in each]
            label = _label(task.grouped, metric) if task.grouped != task.primary else ""
            rows.append([f"  {group}", label, *values, "", "", f"{count:,}", "", ""])
    if first.centred is not None:
        centred = ["-" if each.centred is None else shown(each.centred, "percent") for each in results]
        rows.append(["mean, chance at 0 %", "centred", *centred, "0.0 %", "", "", "", ""])
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
    if any(task.shortened or task.left_out for result in results for task in result.tasks.values()):
        lines += ["", CUT]
    lines += [f"note: {name}: {text}" for name, text in notes(first).items()]
    seconds = sum(task.seconds for result in results for task in result.tasks.values())
    answers = sum(task.answers for result in results for task in result.tasks.values())
    return [*lines, "", f"{count_text(answers, 'answer')} in {duration_text(seconds)}"]


def _label(name: str, metric: Metric) -> str:
    return f"{name}, low is better" if metric.better == "low" else name


def _counts(tasks: Sequence[TaskResult], kind: str) -> str:
    """One number, or that of each model where they differ."""
    return " / ".join(f"{count:,}" for count in dict.fromkeys(getattr(task, kind) for task in tasks))


def _difference_rows(result: SuiteResult, base: SuiteResult) -> list[list[str]]:
    rows = [[f"{result.model.name} less {base.model.name}", "difference, 95 % interval", "p (sign test)"]]
    for name, task in result.tasks.items():
        if not (task.values or task.parts):
            continue
        found = difference(task, base.tasks[name])
        points = interval(found).replace(" %", " points")
        asked = "" if found.questions == task.questions else f", {found.questions:,} questions of both"
        rows.append([name, f"{points}{asked}", f"{found.p:.2g}"])
    return rows


def notes(result: SuiteResult) -> dict[str, str]:
    """What is known to be wrong with the tasks, by their names."""
    limits = {name: " ".join(task.about.limits.split()) for name, task in result.tasks.items()}
    return {name: text for name, text in limits.items() if text}


def record(results: Sequence[SuiteResult]) -> dict[str, Any]:
    """Plain data for a JSON file; nan and infinite values are null."""
    return {
        "gptpl": __version__,
        "results": [
            {
                "suite": result.suite,
                "model": dataclasses.asdict(result.model),
                "centred": result.centred,
                "tasks": {name: task_record(task) for name, task in result.tasks.items()},
            }
            for result in results
        ],
    }


def task_record(task: TaskResult) -> dict[str, Any]:
    """A task's result as plain data, without the values of single questions."""
    fields = dataclasses.asdict(task)
    fields["groups"] = {
        group: {"questions": count, **dataclasses.asdict(metric)}
        for group, (count, metric) in task.groups.items()
    }
    for name in ("values", "clusters", "statistic", "parts"):
        del fields[name]
    plain: dict[str, Any] = _finite(fields)
    return plain


def metric_of(recorded: Mapping[str, Any]) -> Metric:
    """A metric from plain data. Raises LookupError, TypeError or ValueError for other data."""
    value, low, high = (
        math.nan if recorded[name] is None else float(recorded[name]) for name in ("value", "low", "high")
    )
    chance, form = recorded["chance"], recorded["form"]
    chance = None if chance is None else float(chance)
    if form not in get_args(Form):
        raise ValueError(f"form {form!r} of a metric")
    return Metric(value=value, low=low, high=high, chance=chance, form=form)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- as a web page --------------------------------------------------------------------------------------


def _bar(metric: Metric, **shown: str) -> dict[str, Any]:
    """A value's bar and interval, in percent of the axis: from 0, or, where chance is best, from there."""
    start = metric.chance if metric.better == "chance" and metric.chance is not None else 0.0
    low, high = (metric.value if math.isnan(each) else each for each in (metric.low, metric.high))
    places = {"low": _place(low, metric.form), "high": _place(high, metric.form)}
    places["start"], places["end"] = sorted(_place(each, metric.form) for each in (start, metric.value))
    return {**places, **shown}


def _place(value: float, form: Form) -> float:
    """Where a metric's value is on its axis, in percent."""
    return 50 * (1 + value) if form == "signed" else 100 * value


def page(results: Sequence[SuiteResult], *, facts: Mapping[str, str] | None = None) -> str:
    """One HTML document: bars beside chance and published figures, then every metric in a table."""
    first = results[0]
    limits = notes(first)
    charts: dict[str, list[dict[str, Any]]] = {"high": [], "low": [], "chance": []}
    for name, task in first.tasks.items():
        primary = task.metrics[task.primary]
        if primary.form == "number":
            continue
        bars = [
            _bar(
                own := result.tasks[name].metrics[task.primary],
                colour=COLOURS[place % len(COLOURS)],
                label=result.model.name,
                text=interval(own),
            )
            for place, result in enumerate(results)
        ]
        for model, figures in (task.about.published or {}).items():
            if task.primary in figures:
                published = replace(primary, value=figures[task.primary], low=math.nan, high=math.nan)
                text = f"{interval(published)}, published"
                bars.append(_bar(published, colour=GREY, label=model, text=text))
        chart = {"name": name, "task": task, "metric": primary, "bars": bars, "note": limits.pop(name, "")}
        charts[primary.better].append(chart)
    templates = package_templates()
    templates.globals |= {"label": _label, "interval": interval, "chance": chance_text}
    templates.globals |= {"counts": _counts, "place": _place}
    return templates.get_template("evaluation/suite_page.html").render(
        title=f"{first.suite}: {', '.join(each.model.name for each in results)}",
        facts={**_facts(results), **(facts or {})},
        charts=charts,
        results=results,
        tasks={name: [result.tasks[name] for result in results] for name in first.tasks},
        differences=[_difference_rows(result, first) for result in results[1:]],
        notes=limits,
    )


def _facts(results: Sequence[SuiteResult]) -> dict[str, str]:
    tasks = [task for result in results for task in result.tasks.values()]
    found = {"answers": f"{sum(each.answers for each in tasks):,}"}
    found["time"] = duration_text(sum(each.seconds for each in tasks))
    for result in results:
        model = result.model
        step = f", step {model.step:,}" if model.step else ""
        found[model.name] = f"{model.parameters:,} parameters{step}, {model.sha256[:12]}"
        if result.centred is not None:
            found[f"{model.name}, mean with chance at 0 %"] = shown(result.centred, "percent")
    return found
