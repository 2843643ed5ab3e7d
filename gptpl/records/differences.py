"""In what runs differ: their settings, and what a run depends on beside them."""

from collections.abc import Mapping, Sequence

from gptpl.records.run_record import RunRecord
from gptpl.records.settings import Setting, differing, flat_settings

BESIDE = ("data", "tokenizer", "parameters", "start", "versions", "git_commit", "hardware")
"""Entries of `run.json` that say what a run depends on beside its settings."""

_SAID_ELSEWHERE = ("start.crop_", "start.parent.")
"""What is a setting, too, and what follows from where the first weights lie."""

Differences = Mapping[str, Sequence[Setting | None]]
"""The values of what differs, in the order of the runs; None where a run has no such entry."""


def differing_settings(runs: Sequence[RunRecord]) -> Differences:
    """The settings in which runs differ.

    A path in a run's own folder is the same in all, as `RUN/loss.png`; `run_dir` and `resume` do not count.
    """
    return _differences([_settings(run) for run in runs])


def differing_beside(runs: Sequence[RunRecord]) -> Differences:
    """What differs beside settings: the data's hash, versions, git commit, first weights, hardware, ...

    The steps at which a run was resumed are among it: `resumed` is `10, 20`.
    """
    return _differences([_beside(run) for run in runs])


def _differences(values: Sequence[Mapping[str, Setting]]) -> Differences:
    return {name: [each.get(name) for each in values] for name in differing(values)}


def _settings(run: RunRecord) -> dict[str, Setting]:
    own = str(run.config.get("run_dir") or run.path)
    settings = flat_settings(run.config, left_out=("run_dir", "resume"))
    return {
        name: f"RUN{value.removeprefix(own)}" if isinstance(value, str) and _is_in(value, own) else value
        for name, value in settings.items()
    }


def _is_in(value: str, folder: str) -> bool:
    return value == folder or value.startswith(f"{folder}/")


def _beside(run: RunRecord) -> dict[str, Setting]:
    resumed = run.record.get("resumed") or []
    steps = ", ".join(str(each.get("step")) for each in resumed if isinstance(each, Mapping))
    entries = flat_settings({name: run.record[name] for name in BESIDE if name in run.record})
    entries = {name: value for name, value in entries.items() if not name.startswith(_SAID_ELSEWHERE)}
    return entries | ({"resumed": steps} if steps else {})
