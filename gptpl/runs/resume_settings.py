"""What overrides ask for, put onto the settings of a run that is resumed."""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from gptpl.config.compose import Composed, from_plain, plain, said_by
from gptpl.config.groups import Folder, choices, config_file, default_choices, members_of
from gptpl.errors import InputError
from gptpl.runs.resume_rules import ABSENT

Settings = dict[str, Any]
OPEN_GROUPS = ("callbacks", "logger")
"""Groups of which several choices may be taken at a time."""


def choices_of(stored: Mapping[str, Any], config_dir: Folder | None) -> list[str]:
    """The choices that a run was composed of, where they differ from the default ones and are to be had.

    A run that does not say what they were (`choices`) has those whose YAML has the run's classes and keys.
    """
    said = stored.get("choices")
    found = []
    defaults = default_choices("train", config_dir)
    for group, default in defaults.items():
        if group in ("experiment", *OPEN_GROUPS):
            continue
        choice = said.get(group) if isinstance(said, Mapping) else _guessed(group, stored.get(group))
        if choice not in (None, default) and choice in choices(group, config_dir):
            found.append(f"{group}={choice}")
    for group in OPEN_GROUPS:
        names = stored.get(group)
        default = str(defaults.get(group))
        there = members_of(group, default, config_dir)
        more = [name for name in names or () if name not in there and name in choices(group, config_dir)]
        found += [f"{group}=[{','.join((default, *more))}]"] if more else []
    return found


def _guessed(group: str, settings: Any) -> str | None:
    """The choice whose YAML has the classes and the keys of these settings."""
    wanted = {key: value for key, value in leaves(settings) if key.endswith("_target_")}
    keys = {key for key, _ in leaves(settings)} - {"_partial_"}
    best: tuple[int, str] | None = None
    if not wanted:
        return None
    for choice in choices(group):
        own = dict(leaves(said_by(group, choice, bases=True)))
        classes = {key: value for key, value in own.items() if key.endswith("_target_")}
        if classes == wanted and set(own) <= keys and (best is None or len(own) > best[0]):
            best = len(own), choice
    return best[1] if best else None


def asked_settings(stored: Settings, composed: Composed) -> Settings:
    """The stored settings with what the overrides ask for on them, as plain data.

    A group's choice asks for what its YAML says, and not for what every choice of the group has in common:
    `trainer=cpu` leaves `trainer.max_steps` as it was. Raises InputError for an override that the run has no
    place for.
    """
    settings = deepcopy(stored)
    raw = plain(composed.cfg, resolve=False)
    overrides = [each for each in composed.given if each.key_or_group not in ("resume", "trust")]
    groups = default_choices("train", composed.config_dir)
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
            _choose(settings, raw, key, value, composed.config_dir)
        elif key == "run_dir":
            settings[key] = _run_dir(value, stored[key])
        elif override.is_delete():
            _delete(settings, key)
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
    followers = [name for name, value in leaves(raw) if value == f"${{{key}}}" and name not in but]
    before = _at(settings, key)
    if not isinstance(_at(settings, key.rpartition(".")[0]), dict | list):
        raise InputError(f"{key} is no key of the run in {settings['run_dir']}: see its config.yaml")
    value = _at(raw, key)
    for name in (key, *followers):
        if name == key or _at(settings, name) == before:
            _put(settings, name, value)


def _run_dir(given: Any, own: str) -> str:
    """The folder asked for; the run's own one as it is written there."""
    folder = Path(own if given is None else str(given)).expanduser()
    return own if folder.resolve() == Path(own).resolve() else str(folder.absolute())


def _delete(settings: Settings, key: str) -> None:
    parent, _, name = key.rpartition(".")
    holder = _at(settings, parent)
    if not isinstance(holder, dict) or name not in holder:
        raise InputError(f"{key} is no key of the run in {settings['run_dir']}: see its config.yaml")
    del holder[name]


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


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting that holds no others, by its dotted key."""
    for name, value in (tree or {}).items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{name}.")
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


def _put(tree: Settings, key: str, value: Any) -> None:
    parent, _, name = key.rpartition(".")
    holder = _at(tree, parent)
    holder[int(name) if isinstance(holder, list) else name] = value
