"""`gptpl train resume=RUN_DIR`: the run's own config, and the checkpoint to go on from."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptpl.config.check import check
from gptpl.config.compose import Composed, Config, Override, composed, from_plain, said_by
from gptpl.config.compose import plain as to_plain
from gptpl.config.groups import Folder
from gptpl.config.instantiate import check_paths_inside, check_trusted
from gptpl.errors import InputError
from gptpl.records.run_record import read_run_json
from gptpl.runs.folder import read_config
from gptpl.runs.resume_rules import (
    NO_LONGER_EXACT,
    Change,
    Factor,
    changes_between,
    check_changes,
    lr_ceiling,
    words_if_held,
)
from gptpl.runs.resume_settings import Settings, asked_settings, choices_of
from gptpl.training.checkpoint import HEADER_KEY, check_resumable, read_checkpoint
from gptpl.training.checkpoint_files import CheckpointFolder, Damaged, GoodCheckpoint
from gptpl.training.resume_state import RESUME_KEY
from gptpl.training.tuning import TuneAll

log = logging.getLogger(__name__)

_RATE = ("optimizer.lr", "optimizer.muon_lr", "scheduler")


@dataclass(frozen=True, kw_only=True)
class Resumption:
    """A run that goes on: where it is, from which step, and what is no longer as it was."""

    run_dir: Path
    config: Config
    """The run's own settings with the overrides on them."""
    checkpoint: Path
    step: int
    """Optimizer steps that the checkpoint has behind it."""
    header: dict[str, Any]
    """What the checkpoint says of the run that wrote it."""
    state: dict[str, Any]
    """What the checkpoint holds under RESUME_KEY."""
    finished: bool
    """Whether the run had come to its end."""
    changes: list[Change]
    damaged: list[Damaged]
    """Newer checkpoints that cannot be used, to be set aside when training starts."""
    rate_asked: bool
    """Whether learning rates or the schedule were given, be it with the values that they had."""
    trusted: frozenset[str] = frozenset()
    """Packages of the user's."""

    def check_text(self, content_sha256: str) -> None:
        """Raises InputError if the text is not the one that the run was trained on, by its hash."""
        trained_on = self.header["data_sha256"]
        if content_sha256 != trained_on:
            data = self.config.data
            what = f"data.path={data.path}" if data.get("path") else f"data.corpus={data.corpus._target_}"
            raise InputError(
                f"{what} holds another text (SHA-256 {content_sha256[:12]}) than the run in {self.run_dir}"
                f" was trained on ({trained_on[:12]}): restore the text, or start a new run"
            )

    def check_global_batch(self, world_size: int) -> None:
        """Raises InputError if all processes together would have another number of windows in a batch."""
        windows, size = self.header["global_batch"], self.config.data.get("batch_size")
        if size is None or size * world_size == windows:
            return
        if world_size == self.header["world_size"]:
            remedy = f"leave it out (the run has {windows // world_size}), or start a new run"
        elif windows % world_size == 0:
            remedy = f"set data.batch_size={windows // world_size}"
        else:
            fitting = [str(count) for count in range(1, windows + 1) if windows % count == 0]
            remedy = f"set trainer.devices so that {' or '.join(fitting)} processes train"
        raise InputError(
            f"data.batch_size={size} in {_processes(world_size)} is {size * world_size} windows a batch, the"
            f" run in {self.run_dir} has {windows}, which cannot change when it is resumed: {remedy}"
        )

    def check_horizon(self, total_steps: int) -> None:
        """Raises InputError if the run is to end before the step that it has reached."""
        if total_steps < self.step:
            trainer = self.config.trainer
            given = f"trainer.max_steps={trainer.max_steps}"
            if trainer.max_steps != total_steps:
                given = f"trainer.max_epochs={trainer.max_epochs}"
            raise InputError(
                f"{given} ends the run after {total_steps} optimizer steps, but it has reached step"
                f" {self.step}: give more than {self.step} steps, or start a new run"
            )

    def lr_ceiling(self, old_factor: Factor, total_steps: int) -> float | None:
        """See `gptpl.runs.resume_rules.lr_ceiling`; `old_factor` is the schedule of the run before."""
        if self.rate_asked:
            return None
        return lr_ceiling(
            old_factor,
            step=self.step,
            old_total_steps=self.header["total_steps"],
            total_steps=total_steps,
            ceiling=self.header["lr_ceiling"],
        )

    def report(self, world_size: int, factor: Factor, ceiling: float | None, total_steps: int) -> None:
        """Logs from where the run goes on, and each setting that takes effect from there."""
        log.info("resuming at step %d from %s", self.step, self.checkpoint)
        for change in self.changes:
            log.info("%s", change.line(self.step))
        before = self.header["world_size"]
        if world_size != before:
            log.info(
                "  processes: %d -> %d, from step %d%s", before, world_size, self.step + 1, NO_LONGER_EXACT
            )
        held = words_if_held(
            factor,
            ceiling,
            step=self.step,
            total_steps=total_steps,
            peak_lr=self.config.optimizer.get("lr") or 0.0,
        )
        if held:
            log.info("%s", held)


def resume_plan(
    run_dir: str | Path,
    overrides: Sequence[str] = (),
    *,
    config_dir: Folder | None = None,
    own: bool = False,
) -> Resumption:
    """What resuming comes to: the run's settings with the overrides on them, and its newest good checkpoint.

    What the run's folder names is used only as `gptpl.config.instantiate` allows: classes of gptpl, torch and
    Lightning, and of packages that an override (`trust=[mine]`) or the user's config folder names; what it
    writes stays inside of it. A run that is this process's `own` needs no such trust.

    Raises InputError for a folder without a run, a run without a checkpoint that can be resumed, and an
    override that would make it another run.
    """
    run_dir = Path(run_dir).expanduser().absolute()
    if ".." in run_dir.parts:  # which the run's record would keep
        run_dir = run_dir.resolve()
    stored = read_config(run_dir)
    good = _newest_checkpoint(run_dir)
    checkpoint = read_checkpoint(good.path)
    check_resumable(checkpoint, good.path)
    header, state = checkpoint[HEADER_KEY], checkpoint[RESUME_KEY]
    _warn_of_damage(good, int(state["step"]))
    asked = composed(
        overrides, config_dir=config_dir, checked=False, before=_own_choices(stored, overrides, config_dir)
    )
    source = f"resume={run_dir}"
    trusted = frozenset({*asked.trusted, *asked.cfg.get("trust", [])})
    for settings in () if own else (stored, header["config"]):
        check_trusted(settings, source, trusted)
    stored, made_with = (_as_now(settings, run_dir, asked) for settings in (stored, header["config"]))
    settings = asked_settings(stored, asked)
    given = {each.key_or_group: _as_given(each) for each in asked.given if each.key_or_group not in _OWN}
    if not own:
        check_trusted(settings, source, trusted)
        check_paths_inside(settings, run_dir, source=source, given=frozenset(given), config_dir=config_dir)
    config = from_plain(settings)
    check(
        config,
        root="train",
        overrides=asked.given,
        config_dir=config_dir,
        only=frozenset(given),
        written=asked.cfg,
    )
    settings = to_plain(config)
    # Compared with the checkpoint's own, as the run's config.yaml may be newer or edited.
    changes = changes_between(made_with, settings | {"resume": None})
    changes = [change for change in changes if change.key.partition(".")[0] not in ("choices", "trust")]
    check_changes(changes, given, run_dir)
    return Resumption(
        run_dir=run_dir,
        config=config,
        checkpoint=good.path,
        step=int(state["step"]),
        header=header,
        state=state,
        finished=bool(read_run_json(run_dir).get("finished")),
        changes=changes,
        damaged=list(good.damaged),
        rate_asked=any(_is_rate(key) for key in (*given, *(change.key for change in changes))),
        trusted=trusted,
    )


_OWN = ("resume", "trust")
"""Overrides that say how to resume, not what the run is."""


def _own_choices(stored: Settings, overrides: Sequence[str], config_dir: Folder | None) -> list[str]:
    """The run's own choices of the groups that no override chooses."""
    given = {override.lstrip("+~").partition("=")[0] for override in overrides}
    return [each for each in choices_of(stored, config_dir) if each.partition("=")[0] not in given]


def _as_given(override: Override) -> str:
    """An override as it was written, without the quotes and signs that were added for Hydra."""
    value = override.value()
    if isinstance(value, str):
        return f"{override.key_or_group}={value}"
    return str(override.input_line).removeprefix("++")


def _is_rate(key: str) -> bool:
    return key in _RATE or key.startswith("scheduler.")


def _as_now(stored: Settings, run_dir: Path, asked: Composed) -> Settings:
    """A run's settings as this gptpl writes them: paths into its folder where the folder is now.

    What was meant for one session alone is left out; settings that gptpl did not have yet get their defaults.
    """
    moved: Settings = _moved(stored, str(stored.get("run_dir")), str(run_dir)) | {"run_dir": str(run_dir)}
    for name in ("trust", "tags", "notes", "choices"):
        moved.setdefault(name, [] if name in ("trust", "tags") else None)
    moved.setdefault("tune", {"_target_": f"{TuneAll.__module__}.{TuneAll.__qualname__}"})
    # Of the YAML, as what was composed has the overrides on it.
    own, choice = moved.get("data"), asked.choices.get("data")
    if isinstance(own, dict) and isinstance(choice, str):
        now = said_by("data", choice, asked.config_dir, bases=True)
        if own.get("_target_") == now.get("_target_"):
            moved["data"] = {name: value for name, value in now.items() if _is_default(value)} | own
    if isinstance(moved.get("trainer"), dict):
        moved["trainer"] = {**_trainer_defaults(), **moved["trainer"], "stop_at_step": None}
    return moved | {"resume": None}


def _is_default(value: Any) -> bool:
    """Whether a value of a YAML is one by itself."""
    return not isinstance(value, dict) and not (isinstance(value, str) and "${" in value)


def _trainer_defaults() -> Settings:
    return said_by("trainer", "auto", bases=True)


def _moved(value: Any, old: str, new: str) -> Any:
    """Also without what Hydra once needed in every node."""
    if isinstance(value, dict):
        return {key: _moved(item, old, new) for key, item in value.items() if key != "_partial_"}
    if isinstance(value, list):
        return [_moved(item, old, new) for item in value]
    inside = isinstance(value, str) and (value == old or value.startswith((f"{old}/", f"{old}\\")))
    return new + value[len(old) :] if inside else value


def _newest_checkpoint(run_dir: Path) -> GoodCheckpoint:
    good = CheckpointFolder(run_dir / "checkpoints", keep=1).newest_good()
    if good is None:
        raise InputError(f"resume={run_dir} has no checkpoint to go on from: start the run anew")
    return good


def _warn_of_damage(good: GoodCheckpoint, step: int) -> None:
    """Says which newer checkpoints cannot be used, and what is used instead."""
    for damaged in good.damaged:
        log.warning("checkpoint %s %s: going on from step %d instead", damaged.path, damaged.reason, step)
    if good.unverified:
        log.warning("checkpoint %s has no SHA-256 recorded beside it: it could only be read", good.path)


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"
