"""The rules of `resume=`: which settings may change when a run is resumed, and which make it another run.

How a setting may change is declared by the class that takes it: see `gptpl.settings`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptpl.config.signatures import locate
from gptpl.config.slots import resume_of, settings_of, slot_of
from gptpl.errors import InputError
from gptpl.settings import FREE, INEXACT, NEVER, Resume

ABSENT: Any = object()
"""The value of a missing setting."""
NO_LONGER_EXACT = " (no longer bit-identical with the uninterrupted run)"


@dataclass(frozen=True, kw_only=True)
class Change:
    """A setting that differs from the one the checkpoint was made with; None is null, or missing."""

    key: str
    old: Any
    new: Any
    kind: Resume

    def line(self, step: int) -> str:
        """The change in words, of a run that is resumed after `step` optimizer steps."""
        key, old, new = self.key, spelt(self.old), spelt(self.new)
        if key.endswith("._target_"):  # a class: the last of its names says enough
            key, old, new = key.removesuffix("._target_"), old.rpartition(".")[2], new.rpartition(".")[2]
        when = " (from now on)" if self.kind == FREE else f", from step {step + 1}"
        return f"  {key}: {old} -> {new}{when}{NO_LONGER_EXACT if self.kind == INEXACT else ''}"


def changes_between(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Every setting that is not the same in two configurations of plain data."""
    return [
        Change(
            key=key,
            old=_or_none(before),
            new=_or_none(after),
            kind=resume_of(key, old if after is ABSENT else new),
        )
        for key, before, after in _differences(old, new, "")
    ]


def _differences(old: Any, new: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        defaults = _defaults(new, key) if old.get("_target_") == new.get("_target_") else {}
        for name in dict.fromkeys((*old, *new)):
            inner, default = f"{key}.{name}" if key else str(name), defaults.get(name, ABSENT)
            yield from _differences(old.get(name, default), new.get(name, default), inner)
        return
    before, after = _or_none(old), _or_none(new)
    # In Python True == 1.
    if before != after or isinstance(before, bool) != isinstance(after, bool):
        yield key, old, new


def _defaults(node: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The defaults of a node's class, for settings that are not given, or that it did not have yet."""
    target = node.get("_target_") or slot_of(key).implicit
    if target is None:
        return {}
    parameters = settings_of(locate(str(target), key), key).parameters
    defaults = {name: each.default for name, each in parameters.items() if not each.required}
    return {name: list(each) if isinstance(each, tuple) else each for name, each in defaults.items()}


def _or_none(value: Any) -> Any:
    return None if value is ABSENT else value


def check_changes(changes: list[Change], given: Mapping[str, str], run_dir: Path) -> None:
    """Raises InputError for the first change that would make it another run.

    `given` are the overrides of the command line by key; a change that none of them asked for was made in the
    run's config.yaml.
    """

    def asked_by(change: Change) -> str | None:
        """The override of the setting, or of a larger part of the settings that has it."""
        parts = change.key.split(".")
        keys = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
        return next((given[key] for key in keys if key in given), None)

    fatal = [(change, asked_by(change)) for change in changes if change.kind == NEVER]
    # First what was asked for: another setting may have followed it.
    for change, override in sorted(fatal, key=lambda pair: pair[1] is None):
        if override is None:
            raise InputError(
                f"{change.key}={spelt(change.old)} made the checkpoint, but {run_dir / 'config.yaml'} has"
                f" {spelt(change.new)}: restore it there, or start a new run"
            )
        raise InputError(
            f"{change.key} cannot change when a run is resumed: it was {spelt(change.old)}, asked for is"
            f" {spelt(change.new)}; leave {override} out, or start a new run with it"
        )


def spelt(value: Any) -> str:
    """A setting's value in a line of text, nearly as one would give it."""
    if isinstance(value, Mapping):
        return "{...}"
    if isinstance(value, list):
        return f"[{', '.join(spelt(item) for item in value)}]"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


# --- the learning rate ----------------------------------------------------------------------------------

Factor = Callable[[int], float]
"""The multiple of the peak learning rate for the update after so many finished ones."""


def lr_ceiling(
    old_factor: Factor, *, step: int, old_total_steps: int, total_steps: int, ceiling: float | None
) -> float | None:
    """The multiple of the peak learning rate that a resumed run stays at or below; None: no limit.

    `old_factor` is the schedule for `old_total_steps`, of which `step` are finished, under its `ceiling`. A
    run with as many steps as before keeps its schedule.
    """
    if total_steps == old_total_steps:
        return ceiling
    # The highest that was still to come; after the last step, the last.
    left = range(step, old_total_steps) or (old_total_steps - 1,)
    highest = max(old_factor(later) for later in left)
    return highest if ceiling is None else min(highest, ceiling)


def held_text(
    factor: Factor, ceiling: float | None, *, step: int, total_steps: int, peak_lr: float
) -> str | None:
    """A line for the log where a ceiling cuts off updates after `step`; `peak_lr` is `optimizer.lr`."""
    highest = max((factor(later) for later in range(step, total_steps)), default=0.0)
    if ceiling is None or highest <= ceiling:
        return None
    return (
        f"learning rate: held at or below {ceiling * peak_lr:.2g} (the schedule for the new horizon would"
        f" raise it to {highest * peak_lr:.2g}; give optimizer.lr=... to let it)"
    )
