"""Settings of runs on one level, under current names, and what runs differ in."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptpl.files.run_record import RunRecord

NOT_COMPARED = ("choices", "notes", "resume", "run_dir", "tags", "trust")
LEFT_OUT = ("callbacks", "logger", *NOT_COMPARED)
"""Settings of where a run writes, what it shows and how it is found, not of what it learns."""

Setting = bool | int | float | str

_MOVED = {
    "gptpl.callbacks.classification_report": "gptpl.callbacks.classification",
    "gptpl.callbacks.early_stopping": "gptpl.callbacks.stopping",
    "gptpl.callbacks.exact_resume": "gptpl.callbacks.checkpoints",
    "gptpl.callbacks.final_scores": "gptpl.callbacks.classification",
    "gptpl.callbacks.hyperparameters": "gptpl.callbacks.metrics",
    "gptpl.callbacks.learning_rate": "gptpl.callbacks.metrics",
    "gptpl.callbacks.loss_curve": "gptpl.callbacks.metrics",
    "gptpl.callbacks.record_file": "gptpl.callbacks.records",
    "gptpl.callbacks.sample_responses": "gptpl.callbacks.samples",
    "gptpl.callbacks.sample_text": "gptpl.callbacks.samples",
    "gptpl.callbacks.step_trace": "gptpl.callbacks.records",
    "gptpl.callbacks.throughput": "gptpl.callbacks.metrics",
    "gptpl.checkpoints.starting_run": "gptpl.checkpoints.loading",
    "gptpl.data.corpora": "gptpl.data.sources",
    "gptpl.data.datamodule": "gptpl.data.pretraining.datamodule",
    "gptpl.data.instructions.splits": "gptpl.data.instructions.records",
    "gptpl.data.instructions.template": "gptpl.data.instructions.records",
    "gptpl.data.labelled.corpora": "gptpl.data.sources",
    "gptpl.data.labelled": "gptpl.data.classification",
    "gptpl.data.sources.canaries": "gptpl.data.sources.text",
    "gptpl.data.sources.labelled": "gptpl.data.sources.records",
    "gptpl.data.tokenizers": "gptpl.tokenizers",
    "gptpl.evaluation.bias.Occupations": "gptpl.evaluation.bias_words.Occupations",
    "gptpl.evaluation.bias.Templates": "gptpl.evaluation.bias_words.Templates",
    "gptpl.evaluation.privacy": "gptpl.evaluation.memorisation",
    "gptpl.model.tuning": "gptpl.model.parameters",
    "gptpl.sweeps.executors": "gptpl.sweeps.jobs",
    "gptpl.training.starting_run": "gptpl.checkpoints.loading",
    "gptpl.training.tuning": "gptpl.model.parameters",
}
"""Modules and classes in the settings of older runs, and where they are now."""

_RENAMED = {"train_share": "train_ratio", "val_share": "val_ratio", "test_share": "test_ratio"}
"""Settings of older runs' data, and what they are called now."""


def current_name(name: str) -> str:
    """The dotted name that a class has now."""
    for old, new in _MOVED.items():
        if name == old or name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    return name


def with_current_names(settings: Any) -> Any:
    """The settings of a run, perhaps of an older gptpl, under the names that they have now."""
    if isinstance(settings, dict):
        current = {key: with_current_names(value) for key, value in settings.items()}
        if isinstance(target := current.get("_target_"), str):
            current["_target_"] = current_name(target)
            if target == "gptpl.data.corpora.TextFiles":  # which read JSON Lines as plain text
                current.setdefault("field", None)
            if current["_target_"].startswith("gptpl.data."):
                return _current_data(current)
        return current
    return [with_current_names(each) for each in settings] if isinstance(settings, list) else settings


def _current_data(settings: dict[str, Any]) -> dict[str, Any]:
    current = {_RENAMED.get(key, key): value for key, value in settings.items()}
    if "test_share" in settings:  # of instructions, when a question of two splits stayed in training
        current["precedence"] = "train"
    if "truncate" in current:
        current["too_long"] = "truncate" if current.pop("truncate") else "refuse"
    return current


def flat_settings(
    config: Mapping[str, Any], prefix: str = "", *, left_out: Sequence[str] = LEFT_OUT
) -> dict[str, Setting]:
    """A nested configuration on one level: `{"model": {"n_layers": 2}}` becomes `{"model.n_layers": 2}`.

    A class (`_target_`) becomes its last name. Left out are `_partial_`, `left_out` at the top, and what
    repeats a setting of an outer part, such as `data.corpus.path` with the value of `data.path`.
    """
    flat: dict[str, Setting] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if name in left_out or key == "_partial_":
            continue
        if key == "_target_":
            flat[prefix.removesuffix(".")] = str(value).rpartition(".")[2]
        elif isinstance(value, Mapping):
            flat |= flat_settings(value, f"{name}.", left_out=left_out)
        else:
            flat[name] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat if prefix else {name: value for name, value in flat.items() if not _repeats(flat, name)}


def _repeats(flat: Mapping[str, Setting], name: str) -> bool:
    """Whether an outer part has a setting of the same last name and value, as by interpolation."""
    *parts, last = name.split(".")
    outer = (".".join([*parts[:depth], last]) for depth in range(1, len(parts)))
    return any(repr(flat.get(each)) == repr(flat[name]) for each in outer)


# ----------------------------------------------------------------------------------- what runs differ in

Differences = Mapping[str, Sequence[Setting | None]]
"""The values of each difference, in the order of the runs; None where a run has no such entry."""

BESIDE = ("data", "tokenizer", "parameters", "start", "versions", "git_commit", "hardware", "performance")
"""Entries of `run.json` that a run depends on besides its settings."""
_KNOWN = ("start.crop_", "start.parent.")
"""Entries of `start` that are settings, or follow from where the first weights are."""


def differing(settings: Sequence[Mapping[str, Setting]]) -> Differences:
    """The settings whose values are not the same in all, a missing one being a value of its own."""
    names = dict.fromkeys(name for each in settings for name in each)
    values = {name: [each.get(name) for each in settings] for name in names}
    return {name: found for name, found in values.items() if len(set(map(repr, found))) > 1}


def differing_settings(runs: Sequence["RunRecord"]) -> Differences:
    """The settings in which runs differ; a path in a run's own folder counts as `RUN/loss.png`."""

    def settings(run: "RunRecord") -> dict[str, Setting]:
        own = str(run.config.get("run_dir") or run.path)
        return {
            name: f"RUN{value.removeprefix(own)}"
            if isinstance(value, str) and (value == own or value.startswith(f"{own}/"))
            else value
            for name, value in flat_settings(run.config, left_out=NOT_COMPARED).items()
        }

    return differing([settings(run) for run in runs])


def differing_beside(runs: Sequence["RunRecord"]) -> Differences:
    """The entries of `BESIDE` in which runs differ, and the steps at which they were resumed."""

    def beside(run: "RunRecord") -> dict[str, Setting]:
        steps = ", ".join(str(each.get("step")) for each in run.record.get("resumed", []))
        entries = flat_settings({name: run.record[name] for name in BESIDE if name in run.record})
        entries = {name: value for name, value in entries.items() if not name.startswith(_KNOWN)}
        return entries | ({"resumed": steps} if steps else {})

    return differing([beside(run) for run in runs])
