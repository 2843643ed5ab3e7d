"""`gptpl train resume=RUN_DIR`: the run's config with the overrides on it, and its newest good checkpoint."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptpl.checkpoints.files import CheckpointFolder, Damaged
from gptpl.checkpoints.format import HEADER_KEY, check_resumable, read_checkpoint
from gptpl.checkpoints.resume_state import RESUME_KEY
from gptpl.config.check import check
from gptpl.config.compose import Composed, Config, composed, from_plain, plain
from gptpl.config.groups import Folder, choices, config_file, default_choices, members_of, said_by
from gptpl.config.instantiate import check_paths_inside, check_trusted
from gptpl.data.training_data import TrainingData
from gptpl.errors import InputError
from gptpl.files.run_record import read_config, read_run_json
from gptpl.model.tuning import TuneAll
from gptpl.runs.resume_rules import (
    ABSENT,
    NO_LONGER_EXACT,
    Change,
    Factor,
    changes_between,
    check_changes,
    words_if_held,
)

log = logging.getLogger(__name__)

Settings = dict[str, Any]
OPEN_GROUPS = ("callbacks", "logger")
"""Groups of which several choices may be taken at a time."""
_OWN = ("resume", "trust")
"""Overrides that say how to resume, not what the run is."""
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

    def check_text(self, datamodule: TrainingData) -> None:
        """Raises InputError if the data are not those that the run was trained on, by their hash."""
        recorded = read_run_json(self.run_dir).get("data")
        rows = recorded.get("rows") if isinstance(recorded, dict) else None
        if difference := datamodule.difference(self.header["data_sha256"], rows):
            data = self.config.data
            what = f"data.path={data.path}" if data.get("path") else f"data.corpus={data.corpus._target_}"
            raise InputError(
                f"{what} holds another text than the run in {self.run_dir} was trained on ({difference}):"
                " restore the text, or start a new run"
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
        processes = "1 process" if world_size == 1 else f"{world_size} processes"
        raise InputError(
            f"data.batch_size={size} in {processes} is {size * world_size} windows a batch, the"
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
    run_dir: str | Path, overrides: Sequence[str] = (), *, config_dir: Folder | None = None, own: bool = False
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
    stored = read_config(run_dir, needs=("data", "model", "optimizer", "scheduler", "trainer"))
    good = CheckpointFolder(run_dir / "checkpoints", keep=1).newest_good()
    if good is None:
        raise InputError(f"resume={run_dir} has no checkpoint to go on from: start the run anew")
    checkpoint = read_checkpoint(good.path, verified=True)
    check_resumable(checkpoint, good.path)
    header, state = checkpoint[HEADER_KEY], checkpoint[RESUME_KEY]
    step = int(state["step"])
    for damaged in good.damaged:
        log.warning("checkpoint %s %s: going on from step %d instead", damaged.path, damaged.reason, step)
    asked = composed(
        overrides, config_dir=config_dir, checked=False, before=_own_choices(stored, overrides, config_dir)
    )
    source = f"resume={run_dir}"
    trusted = frozenset({*asked.trusted, *asked.cfg.get("trust", [])})
    for settings in () if own else (stored, header["config"]):
        check_trusted(settings, source, trusted)
    stored, made_with = (_as_now(settings, run_dir, asked) for settings in (stored, header["config"]))
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
    settings = plain(config)
    # Compared with the checkpoint's own, as the run's config.yaml may be newer or edited.
    changes = changes_between(made_with, settings | {"resume": None})
    changes = [change for change in changes if change.key.partition(".")[0] not in ("choices", "trust")]
    check_changes(changes, given, run_dir)
    touched = (*given, *(change.key for change in changes))
    return Resumption(
        run_dir=run_dir,
        config=config,
        checkpoint=good.path,
        step=step,
        header=header,
        state=state,
        finished=bool(read_run_json(run_dir).get("finished")),
        changes=changes,
        damaged=list(good.damaged),
        rate_asked=any(key in _RATE or key.startswith("scheduler.") for key in touched),
        trusted=trusted,
    )


def _as_now(stored: Settings, run_dir: Path, asked: Composed) -> Settings:
    """A run's settings as this gptpl writes them: paths into its folder where the folder is now.

    What was meant for one session alone is left out; settings that gptpl did not have yet get their defaults.
    """
    moved: Settings = _moved(stored, str(stored.get("run_dir")), str(run_dir)) | {"run_dir": str(run_dir)}
    tune_all = {"_target_": f"{TuneAll.__module__}.{TuneAll.__qualname__}"}
    absent: Settings = {"trust": [], "tags": [], "notes": None, "choices": None, "tune": tune_all}
    moved |= {name: value for name, value in absent.items() if name not in moved}
    # Of the YAML, as what was composed has the overrides on it.
    own, choice = moved.get("data"), asked.choices.get("data")
    if isinstance(own, dict) and isinstance(choice, str):
        now = said_by("data", choice, asked.config_dir, bases=True)
        if own.get("_target_") == now.get("_target_"):
            plain_ones = {
                name: value
                for name, value in now.items()
                if not isinstance(value, dict) and not (isinstance(value, str) and "${" in value)
            }
            moved["data"] = plain_ones | own
    if isinstance(moved.get("trainer"), dict):
        moved["trainer"] = said_by("trainer", "auto", bases=True) | moved["trainer"] | {"stop_at_step": None}
    return moved | {"resume": None}


def _moved(value: Any, old: str, new: str) -> Any:
    """Also without what Hydra once needed in every node."""
    if isinstance(value, dict):
        return {key: _moved(item, old, new) for key, item in value.items() if key != "_partial_"}
    if isinstance(value, list):
        return [_moved(item, old, new) for item in value]
    inside = isinstance(value, str) and (value == old or value.startswith((f"{old}/", f"{old}\\")))
    return new + value[len(old) :] if inside else value


# --- the run's settings with the overrides on them ------------------------------------------------------


def _own_choices(stored: Settings, overrides: Sequence[str], config_dir: Folder | None) -> list[str]:
    """The choices that a run was composed of, where they are to be had, not the default, and not chosen anew.

    A run that does not say what they were (`choices`) has those whose YAML has the run's classes and keys.
    """
    given = {override.lstrip("+~").partition("=")[0] for override in overrides}
    said = stored.get("choices")
    found = {}
    defaults = default_choices("train", config_dir)
    for group, default in defaults.items():
        if group in ("experiment", *OPEN_GROUPS):
            continue
        choice = said.get(group) if isinstance(said, dict) else _guessed(group, stored.get(group))
        if choice not in (None, default) and choice in choices(group, config_dir):
            found[group] = choice
    for group in OPEN_GROUPS:
        names = stored.get(group)
        default = str(defaults.get(group))
        there = members_of(group, default, config_dir)
        more = [name for name in names or () if name not in there and name in choices(group, config_dir)]
        if more:
            found[group] = f"[{','.join((default, *more))}]"
    return [f"{group}={choice}" for group, choice in found.items() if group not in given]


def _guessed(group: str, settings: Any) -> str | None:
    """The choice whose YAML has the classes and the keys of these settings."""

    def classes(leaves: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in leaves.items() if key.endswith("_target_")}

    wanted = dict(_leaves(settings))
    best, most = None, 0
    for choice in choices(group) if classes(wanted) else ():
        own = dict(_leaves(said_by(group, choice, bases=True)))
        fits = classes(own) == classes(wanted) and own.keys() <= wanted.keys() - {"_partial_"}
        if fits and len(own) > most:
            best, most = choice, len(own)
    return best


def _asked_settings(stored: Settings, asked: Composed) -> Settings:
    """The stored settings with what the overrides ask for on them, as plain data.

    A group's choice asks for what its YAML says, and not for what every choice of the group has in common:
    `trainer=cpu` leaves `trainer.max_steps` as it was. Raises InputError for an override that the run has no
    place for.
    """
    settings = deepcopy(stored)
    raw = plain(asked.cfg, resolve=False)
    overrides = [each for each in asked.given if each.key_or_group not in _OWN]
    groups = default_choices("train", asked.config_dir)
    given = {override.key_or_group for override in overrides}
    # A setting is given on top of its group's choice, in whatever order they stand.
    for override in sorted(overrides, key=lambda override: override.key_or_group not in groups):
        key, value = override.key_or_group, override.value()
        if key == "experiment":
            if value is not None:
                raise InputError(
                    f"experiment={value} cannot be compared with the run in {stored['run_dir']}, which goes"
                    " on with its own config: leave it out, and give the settings that are to change"
                )
        elif key in groups:
            _choose(settings, raw, key, value, asked.config_dir)
        elif key == "run_dir":
            folder = Path(stored[key] if value is None else str(value)).expanduser()
            if folder.resolve() != Path(stored[key]).resolve():
                settings[key] = str(folder.absolute())
        elif override.is_delete():
            holder, name = _holder(settings, key)
            if not isinstance(holder, dict) or name not in holder:
                raise _no_key(settings, key)
            del holder[name]
        else:
            _set(settings, raw, key, but=given)
    return _filled_in(settings, stored)


def _choose(settings: Settings, raw: Settings, group: str, choice: Any, config_dir: Folder | None) -> None:
    """Takes over what a choice of a group says: everything where it is another kind than the run's."""
    new, old = raw[group], settings.get(group)
    file = config_file(f"{group}/{choice}", config_dir)
    same_kind = isinstance(old, dict) and isinstance(new, dict) and old.get("_target_") == new.get("_target_")
    if group in OPEN_GROUPS or not same_kind or file is None:
        settings[group] = new
        return
    said = said_by(group, str(choice), config_dir)
    # A task's YAML has defaults for other groups, too: they are for new runs.
    for name in said:
        settings[group][name] = new[name]


def _set(settings: Settings, raw: Settings, key: str, *, but: set[str]) -> None:
    """Takes over one setting's value, also for those that are defined as the same, but those given."""
    followers = [name for name, value in _leaves(raw) if value == f"${{{key}}}" and name not in but]
    before, value = _at(settings, key), _at(raw, key)
    for name in (key, *followers):
        if name == key or _at(settings, name) == before:
            holder, last = _holder(settings, name)
            holder[int(last) if isinstance(holder, list) else last] = value


def _filled_in(settings: Settings, stored: Settings) -> Settings:
    """The settings without interpolations, and with a number where null stands for one."""
    filled = plain(from_plain(settings))
    if filled["name"] is None:
        filled["name"] = stored["name"]
    data, model, tokenizer = (filled[group] for group in ("data", "model", "tokenizer"))
    if all(isinstance(group, dict) for group in (data, model, tokenizer)):
        if "max_length" in data and data["max_length"] is None:
            data["max_length"] = model.get("context_length")
        if "stride" in data and data["stride"] is None:
            data["stride"] = data["max_length"]
        if model.get("vocab_size") is None and "vocab_size" in stored["model"]:
            # Of a vocabulary made from the text only the run knows the size.
            model["vocab_size"] = tokenizer.get("vocab_size") or stored["model"]["vocab_size"]
    return filled


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting that holds no others, by its dotted key."""
    for name, value in (tree or {}).items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _at(tree: Any, key: str) -> Any:
    """The part of the settings under a dotted key; all of them under none; ABSENT where there is no such."""
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
    return InputError(f"{key} is no key of the run in {settings['run_dir']}: see its config.yaml")
