"""`gptpl train resume=RUN`: the run's settings with the overrides on them, and its newest good checkpoint."""

import logging
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptpl.checkpoints.files import CheckpointFolder, Damaged, GoodCheckpoint
from gptpl.checkpoints.format import HEADER_KEY, check_resumable, read_checkpoint
from gptpl.checkpoints.resume_state import RESUME_KEY
from gptpl.config.check import check
from gptpl.config.compose import Composed, Config, composed, from_plain, plain
from gptpl.config.groups import Folder, choices, config_file, default_choices, members_of, said_by, walk
from gptpl.config.instantiate import check_paths_inside, check_trusted
from gptpl.config.overrides import key_of
from gptpl.data.training_data import TrainingData
from gptpl.errors import InputError
from gptpl.files.run_record import CHECKPOINT_FOLDER, read_config, read_run_json, recorded_rows
from gptpl.model.parameters import TuneAll
from gptpl.runs.resume_rules import (
    ABSENT,
    NO_LONGER_EXACT,
    Change,
    changes_between,
    check_changes,
    held_text,
)
from gptpl.settings import POSITIVE
from gptpl.text import count_text
from gptpl.training.module import TrainingModule
from gptpl.training.processes import Processes

log = logging.getLogger(__name__)

Settings = dict[str, Any]
OPEN_GROUPS = ("callbacks", "logger")
"""Groups of which several choices may be taken at a time."""
_OWN = ("resume", "trust")
"""Overrides that say how to resume, not what the run is."""
_LEARNING_RATE = ("optimizer.lr", "optimizer.muon_lr", "scheduler")


@dataclass(frozen=True, kw_only=True)
class Resumption:
    """A run to be resumed: its checkpoint, its settings, and what has changed.

    Attributes:
        config: the run's own settings with the overrides on them.
        step: optimizer steps that the checkpoint was saved after.
        header: what the checkpoint says of the run that wrote it.
        state: the checkpoint's RESUME_KEY.
        finished: whether the run had ended.
        changes: settings that differ from those the checkpoint was made with.
        damaged: newer checkpoints that cannot be used, to be set aside when training starts.
        lr_asked: whether learning rates or the schedule were given, be it with the values that they had.
        trusted: packages of the user's.
        performance: the fast path that the run chose, as in `Run`; empty where it was not recorded yet.
    """

    run_dir: Path
    config: Config
    checkpoint: Path
    step: int
    header: dict[str, Any]
    state: dict[str, Any]
    finished: bool
    changes: list[Change]
    damaged: list[Damaged]
    lr_asked: bool
    trusted: frozenset[str] = frozenset()
    performance: Mapping[str, Any] = field(default_factory=dict)

    def check_text(self, datamodule: TrainingData) -> None:
        """Raises InputError if the data are not those that the run was trained on, by their hash."""
        if difference := datamodule.difference(self.header["data_sha256"], recorded_rows(self.run_dir)):
            data = self.config.data
            corpus = data.get("corpus")
            what = f"data.corpus={corpus._target_}" if corpus else f"data={datamodule.name}"
            what = f"data.path={data.path}" if data.get("path") else what
            raise InputError(
                f"{what} holds another text than the run in {self.run_dir} was trained on ({difference}):"
                " restore the text, or start a new run"
            )

    def batch_of(self, world_size: int) -> tuple[int, int] | None:
        """The size of a process's batches and how many of them are one of the run's global batches.

        As many processes as before have the batches that they had. Others share them: at most
        `data.batch_size` sequences at a time, exactly so many where that was given for this session. None:
        data that make their own batches. Raises InputError where the sequences cannot be shared so.
        """
        sequences, size = self.header["global_batch"], self.config.data.get("batch_size")
        if size == "auto":
            raise InputError("data.batch_size=auto is for a new run: give a number, or leave it out")
        if size is None or size * world_size == sequences:
            return None if size is None else (size, 1)
        POSITIVE.check("data.batch_size", size)
        what = f"the run in {self.run_dir} has {sequences} sequences a batch, which cannot change on resume"
        if sequences % world_size:
            raise InputError(
                f"{what}, and {count_text(world_size, 'device')} cannot share them equally: use a divisor of"
                f" {sequences}"
            )
        share = sequences // world_size
        if any(change.key == "data.batch_size" for change in self.changes):
            if share % size:
                raise InputError(
                    f"data.batch_size={size}: {what}, {share} of them on each of"
                    f" {count_text(world_size, 'device')}: give a divisor of {share}"
                )
            return size, share // size
        parts = next(parts for parts in range(-(-share // size), share + 1) if share % parts == 0)
        return share // parts, parts

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

    def report(self, world_size: int, module: TrainingModule) -> None:
        """Log the step that the run resumes from, and every setting that changes there."""
        log.info("resuming at step %d from %s", self.step, self.checkpoint)
        for change in self.changes:
            log.info("%s", change.line(self.step))
        if (before := self.header["world_size"]) != world_size:
            log.info(
                "  processes: %d -> %d, from step %d%s", before, world_size, self.step + 1, NO_LONGER_EXACT
            )
        if (batch := self.batch_of(world_size)) not in (None, (self.config.data.get("batch_size"), 1)):
            assert batch is not None
            log.info(
                "  batches of %d sequences as before: %d at a time on each process, %s",
                self.header["global_batch"], batch[0], count_text(batch[1], "time"),
            )  # fmt: skip
        held = held_text(
            module.lr_factor, module.lr_ceiling, step=self.step, total_steps=module.total_steps,
            peak_lr=self.config.optimizer.get("lr") or 0.0,
        )  # fmt: skip
        if held:
            log.info("%s", held)


def resume_plan(
    run_dir: str | Path,
    overrides: Sequence[str] = (),
    *,
    config_dir: Folder | None = None,
    own: bool = False,
    find: Callable[[Config, CheckpointFolder], GoodCheckpoint | None] | None = None,
) -> Resumption:
    """The settings of a run with the overrides on them, and its newest good checkpoint.

    Of the classes that the run's folder names, only those are used that `gptpl.config.instantiate` allows:
    of gptpl, torch and Lightning, and of packages that an override (`trust=[mine]`) or the user's config
    folder names; paths that it writes to must lie inside it. This process's `own` run needs no such trust.
    `find` looks for the checkpoint of a run with such settings, in place of `CheckpointFolder.newest_good`.

    Raises InputError for a folder without a run, a run without a checkpoint that can be resumed, and an
    override that would make it another run.
    """
    run_dir = Path(run_dir).expanduser().absolute()
    if ".." in run_dir.parts:  # which the run's record would keep
        run_dir = run_dir.resolve()
    stored = read_config(run_dir, needs=("data", "model", "optimizer", "scheduler", "trainer"))
    folder = CheckpointFolder(run_dir / CHECKPOINT_FOLDER, keep=1)
    own_choices = _own_choices(stored, overrides, config_dir)
    asked = composed(overrides, config_dir=config_dir, checked=False, before=own_choices)
    source = f"resume={run_dir}"
    trusted = frozenset({*asked.trusted, *asked.cfg.get("trust", [])})
    if not own:
        check_trusted(stored, source, trusted)
    stored = _as_now(stored, run_dir)
    settings = _asked_settings(stored, asked)
    given = {}
    for each in asked.given:  # as it was written, without the quotes and signs that were added for Hydra
        if each.key_or_group not in _OWN:
            value, text = each.value(), str(each.input_line).removeprefix("++")
            given[each.key_or_group] = f"{each.key_or_group}={value}" if isinstance(value, str) else text
    if not own:
        check_trusted(settings, source, trusted)
        check_paths_inside(settings, run_dir, source=source, given=frozenset(given), config_dir=config_dir)
    config = from_plain(settings)
    check(
        config,
        overrides=asked.given,
        config_dir=config_dir,
        only=frozenset(given),
        written=asked.cfg,
    )
    good = find(config, folder) if find else folder.newest_good()  # which takes long
    if good is None:
        raise InputError(f"resume={run_dir} has no checkpoint to resume from: start a new run")
    checkpoint = read_checkpoint(good.path, verified=True, whole=False)
    check_resumable(checkpoint, good.path)
    header, state = checkpoint[HEADER_KEY], checkpoint[RESUME_KEY]
    step = int(state["step"])
    for damaged in good.damaged:
        log.warning("checkpoint %s %s: resuming from step %d instead", damaged.path, damaged.reason, step)
    if not own:
        check_trusted(header["config"], source, trusted)
    made_with = _as_now(header["config"], run_dir)
    # Compared with the checkpoint's own, as the run's config.yaml may be newer or edited.
    changes = changes_between(made_with, plain(config) | {"resume": None})
    changes = [change for change in changes if change.key.partition(".")[0] not in ("choices", "trust")]
    check_changes(changes, given, run_dir)
    record = read_run_json(run_dir)
    touched = (*given, *(change.key for change in changes))
    return Resumption(
        run_dir=run_dir,
        config=config,
        checkpoint=good.path,
        step=step,
        header=header,
        state=state,
        finished=bool(record.get("finished")),
        changes=changes,
        damaged=list(good.damaged),
        lr_asked=any(key in _LEARNING_RATE or key.startswith("scheduler.") for key in touched),
        trusted=trusted,
        performance=record.get("performance", {}),
    )


def found_by_node(folder: CheckpointFolder, together: Processes) -> GoodCheckpoint | None:
    """The newest good checkpoint, which one process of every node looks for and tells the others of.

    It reads whole files, to compare their hashes. A process that begins a new run gathers None meanwhile.
    """
    launcher = together.launcher
    if launcher.local_rank == 0:
        found = folder.newest_good()
        damaged = [] if found is None else [(each.path.name, each.reason) for each in found.damaged]
        name = None if found is None else found.path.name
        together.gathered({"node": launcher.node_rank, "name": name, "damaged": damaged})
        return found
    for host, said in zip(together.hosts, together.gathered(None), strict=True):
        if said and (host, said["node"]) == (together.hosts[launcher.rank], launcher.node_rank):
            if said["name"] is None:
                return None
            return GoodCheckpoint(
                path=folder.folder / said["name"],
                damaged=[Damaged(path=folder.folder / name, reason=why) for name, why in said["damaged"]],
            )
    return folder.newest_good()


def _as_now(stored: Settings, run_dir: Path) -> Settings:
    """A run's settings as this gptpl writes them: paths into its folder where the folder is now.

    Settings for one session alone are left out; those of the run and the Trainer that gptpl did not have yet
    get their defaults, as classes give others theirs.
    """
    moved: Settings = _moved(stored, str(stored.get("run_dir")), str(run_dir)) | {"run_dir": str(run_dir)}
    tune_all = {"_target_": f"{TuneAll.__module__}.{TuneAll.__qualname__}"}
    absent: Settings = {"trust": [], "tags": [], "notes": None, "choices": None, "tune": tune_all}
    moved |= {name: value for name, value in absent.items() if name not in moved}
    if isinstance(moved.get("trainer"), dict):
        moved["trainer"] = said_by("trainer", "auto", bases=True) | moved["trainer"] | {"stop_at_step": None}
    return moved | {"resume": None}


def _moved(value: Any, old: str, new: str) -> Any:
    """Settings with a folder in place of another, and without what Hydra once needed in every node."""
    if isinstance(value, dict):
        return {key: _moved(item, old, new) for key, item in value.items() if key != "_partial_"}
    if isinstance(value, list):
        return [_moved(item, old, new) for item in value]
    inside = isinstance(value, str) and (value == old or value.startswith((f"{old}/", f"{old}\\")))
    return new + value[len(old) :] if inside else value


# --- the run's settings with the overrides on them ------------------------------------------------------


def _own_choices(stored: Settings, overrides: Sequence[str], config_dir: Folder | None) -> list[str]:
    """The recorded choices that a run was composed of, as overrides, without defaults and those given now."""
    given = {key_of(override) for override in overrides}
    recorded, defaults, found = stored.get("choices"), default_choices("train", config_dir), {}
    for group, default in defaults.items():
        if group in OPEN_GROUPS:
            members = {default, *members_of(group, str(default), config_dir)}
            there = set(choices(group, config_dir)) - members
            if more := [name for name in stored.get(group) or () if name in there]:
                found[group] = f"[{','.join((str(default), *more))}]"
        elif group != "experiment" and isinstance(recorded, dict):
            choice = recorded.get(group)
            if choice not in (None, default) and choice in choices(group, config_dir):
                found[group] = choice
    return [f"{group}={choice}" for group, choice in found.items() if group not in given]


def _asked_settings(stored: Settings, asked: Composed) -> Settings:
    """The stored settings with what the overrides ask for on them, as plain data.

    A group's choice asks for what its YAML says, not for what all choices of the group have in common:
    `trainer=cpu` leaves `trainer.max_steps` as it was. Raises InputError for an override that the run has no
    place for.
    """
    settings = deepcopy(stored)
    raw = plain(asked.cfg, resolve=False)
    overrides = [each for each in asked.given if each.key_or_group not in _OWN]
    groups = default_choices("train", asked.config_dir)
    given = {override.key_or_group for override in overrides}
    # A setting is given on top of its group's choice, in whatever order they come.
    for override in sorted(overrides, key=lambda override: override.key_or_group not in groups):
        key, value = override.key_or_group, override.value()
        if key == "experiment":
            if value is not None:
                raise InputError(
                    f"experiment={value} cannot be compared with the run in {stored['run_dir']}, which keeps"
                    " its own config: leave it out, and give the settings that are to change"
                )
        elif key in groups:
            _choose(settings, raw, key, value, asked.config_dir)
        elif key == "run_dir":
            folder = Path(str(value or stored[key])).expanduser()
            if folder.resolve() != Path(stored[key]).resolve():
                settings[key] = str(folder.absolute())
        elif override.is_delete():
            holder, name = _holder(settings, key)
            if name not in holder:
                raise _no_key(settings, key)
            del holder[name]
        else:
            _set(settings, raw, key, but=given)
    return _filled_in(settings, stored)


def _choose(settings: Settings, raw: Settings, group: str, choice: Any, config_dir: Folder | None) -> None:
    """Take what a choice of a group says; all of it where its class is another one than the run's."""
    new, old = raw[group], settings.get(group)
    same_class = (
        isinstance(old, dict) and isinstance(new, dict) and old.get("_target_") == new.get("_target_")
    )
    if group in OPEN_GROUPS or not same_class or config_file(f"{group}/{choice}", config_dir) is None:
        settings[group] = new
        return
    # A task's YAML has defaults for other groups, too: they are for new runs.
    for name in said_by(group, str(choice), config_dir):
        settings[group][name] = new[name]


def _set(settings: Settings, raw: Settings, key: str, *, but: set[str]) -> None:
    """Take one setting's value, also for those that are defined as the same, unless they are given."""
    followers = [name for name, value in walk(raw) if value == f"${{{key}}}" and name not in but]
    before, value = _at(settings, key), _at(raw, key)
    for name in (key, *followers):
        if name == key or _at(settings, name) == before:
            holder, last = _holder(settings, name)
            holder[int(last) if isinstance(holder, list) else last] = value


def _filled_in(settings: Settings, stored: Settings) -> Settings:
    """The settings without interpolations, and with the numbers that null stands for."""
    filled = plain(from_plain(settings))
    if filled["name"] is None:
        filled["name"] = stored["name"]
    data, model, tokenizer = (filled[group] for group in ("data", "model", "tokenizer"))
    if all(isinstance(group, dict) for group in (data, model, tokenizer)):
        settle_lengths(data, model)
        if model.get("vocab_size") is None and "vocab_size" in stored["model"]:
            # The size of a vocabulary made from the text is recorded only with the run.
            model["vocab_size"] = tokenizer.get("vocab_size") or stored["model"]["vocab_size"]
    return filled


def settle_lengths(data: Any, model: Any) -> None:
    """Put the lengths that follow from others into the settings `data`."""
    if "max_length" in data and data["max_length"] is None:
        data["max_length"] = model.get("context_length")
    if "stride" in data and data["stride"] is None:
        data["stride"] = data["max_length"]


def _at(tree: Any, key: str) -> Any:
    """The part of the settings under a dotted key; all of them under ""; ABSENT where there is none."""
    for name in key.split(".") if key else ():
        if isinstance(tree, list) and name.isdigit() and int(name) < len(tree):
            tree = tree[int(name)]
        elif isinstance(tree, dict) and name in tree:
            tree = tree[name]
        else:
            return ABSENT
    return tree


def _holder(settings: Settings, key: str) -> tuple[Any, str]:
    parent, _, name = key.rpartition(".")
    holder = _at(settings, parent)
    if not isinstance(holder, dict | list):
        raise _no_key(settings, key)
    return holder, name


def _no_key(settings: Settings, key: str) -> InputError:
    return InputError(f"{key} is not a key of the run in {settings['run_dir']}: see its config.yaml")
