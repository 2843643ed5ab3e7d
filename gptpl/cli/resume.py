"""`gptpl train resume=RUN_DIR`: the run's own config, and the checkpoint to go on from."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from omegaconf import MISSING, DictConfig, OmegaConf

from gptpl.cli.batch import whole_batch_size
from gptpl.cli.resume_overrides import Settings, asked_settings, given_overrides
from gptpl.cli.resume_rate import Factor, lr_ceiling, words_if_held
from gptpl.cli.resume_rules import INEXACT, Change, changes_between, check_changes
from gptpl.cli.run_folder import read_config, read_run_record
from gptpl.cli.schema import TrainerConf
from gptpl.cli.schema_data import BatchesConf, DataConf
from gptpl.errors import InputError
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
    config: DictConfig
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
        windows, size = self.header["global_batch"], whole_batch_size(self.config.data.batch_size)
        if size * world_size == windows:
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
        """See `gptpl.cli.resume_rate.lr_ceiling`; `old_factor` is the schedule for the horizon there was."""
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
            log.info("  processes: %d -> %d, from step %d%s", before, world_size, self.step + 1, INEXACT)
        held = words_if_held(
            factor, ceiling, step=self.step, total_steps=total_steps, peak_lr=self.config.optimizer.lr
        )
        if held:
            log.info("%s", held)


def resume_plan(cfg: DictConfig, *, overrides: Sequence[str] | None = None) -> Resumption:
    """What `resume=` comes to: the run's settings with the overrides on them, and its newest good checkpoint.

    `cfg` is what Hydra composed: it gives the overrides (None: those of the command line) their types; its
    other values do not matter. Raises InputError for a folder without a run, a run without a checkpoint that
    can be resumed, and an override that would make it another run.
    """
    run_dir = Path(cfg.resume).expanduser().absolute()
    stored = _moved_to(run_dir, read_config(run_dir))
    good = _newest_checkpoint(run_dir)
    checkpoint = read_checkpoint(good.path)
    check_resumable(checkpoint, good.path)
    header, state = checkpoint[HEADER_KEY], checkpoint[RESUME_KEY]
    _warn_of_damage(good, int(state["step"]))
    texts = HydraConfig.get().overrides.task if overrides is None else overrides
    given = given_overrides(texts, stored)
    settings = asked_settings(stored, cfg, given)
    # Compared with the checkpoint's own, as the run's config.yaml may be newer or edited.
    changes = changes_between(_moved_to(run_dir, header["config"]), settings | {"resume": None})
    keys = {override.key_or_group: _as_given(override) for override in given}
    check_changes(changes, keys, run_dir)
    config = OmegaConf.create(settings)
    OmegaConf.set_struct(config, True)
    return Resumption(
        run_dir=run_dir,
        config=config,
        checkpoint=good.path,
        step=int(state["step"]),
        header=header,
        state=state,
        finished=bool(read_run_record(run_dir).get("finished")),
        changes=changes,
        damaged=list(good.damaged),
        rate_asked=any(_is_rate(key) for key in (*keys, *(change.key for change in changes))),
    )


def _as_given(override: Override) -> str:
    """An override as it was written, without the quotes that its value was put in for Hydra."""
    value = override.value()
    return f"{override.key_or_group}={value}" if isinstance(value, str) else str(override.input_line)


def _is_rate(key: str) -> bool:
    return key in _RATE or key.startswith("scheduler.")


def _moved_to(run_dir: Path, stored: Settings) -> Settings:
    """A run's settings with every path into its folder changed to where the folder is now.

    What was meant for one session alone is left out; settings that gptpl did not have yet get their defaults.
    """
    moved: Settings = _moved(stored, str(stored.get("run_dir")), str(run_dir))
    trainer = _defaults(TrainerConf()) | moved["trainer"] | {"stop_at_step": None}
    data = moved["data"]
    known: BatchesConf = BatchesConf() if "_target_" in data else DataConf()
    tune = moved.get("tune", {"_target_": f"{TuneAll.__module__}.{TuneAll.__qualname__}"})
    return moved | {"resume": None, "trainer": trainer, "data": _defaults(known) | data, "tune": tune}


def _defaults(conf: TrainerConf | BatchesConf) -> Settings:
    """Those that are values by themselves."""
    derived = {MISSING, *(value for value in vars(conf).values() if str(value).startswith("${"))}
    return {key: value for key, value in vars(conf).items() if value not in derived}


def _moved(value: Any, old: str, new: str) -> Any:
    if isinstance(value, dict):
        return {key: _moved(item, old, new) for key, item in value.items()}
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
