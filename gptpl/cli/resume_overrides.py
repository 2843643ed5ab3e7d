"""What the overrides of `gptpl train resume=RUN` ask for, put onto the settings of the run."""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gptpl.cli.configs import choices, config_folder, default_choices
from gptpl.cli.known_keys import is_global, known_keys
from gptpl.cli.quoting import OPEN_NAMESPACES
from gptpl.cli.resume_rules import ABSENT
from gptpl.cli.run_folder import read_config
from gptpl.errors import InputError

Settings = dict[str, Any]


def with_choices_of_run(arguments: list[str]) -> list[str]:
    """The arguments of `gptpl train`, in front of them the choices of groups that have the run's keys.

    A key such as `optimizer.muon_lr` can be overridden only where `optimizer=muon` is composed: the run to be
    resumed says what is, not the user. `resume=` comes between these choices and the rest, by which
    `given_overrides` tells them apart. Without `resume=`, or without a run there, nothing changes.
    """
    resume = next((text for text in reversed(arguments) if text.lstrip("+").startswith("resume=")), "")
    folder = resume.partition("=")[2].strip("'\"")
    if folder in ("", "null"):
        return arguments
    try:
        stored = read_config(Path(folder).expanduser())
    except InputError:
        return arguments  # refused later, with everything else that is wrong with the run
    given = {argument.lstrip("+~").partition("=")[0] for argument in arguments}
    chosen = [choice for choice in choices_of(stored) if choice.partition("=")[0] not in given]
    return [*chosen, resume, *(argument for argument in arguments if argument != resume)]


def choices_of(stored: Mapping[str, Any]) -> list[str]:
    """The choices, where they are not the default ones, that have the keys of a run's settings."""
    found = []
    known = known_keys("train")
    for group, default in default_choices("train").items():
        settings = stored.get(group)
        if not isinstance(settings, dict):
            continue
        if group in OPEN_NAMESPACES:
            there = _yaml(config_folder() / group / f"{default}.yaml").get("defaults", [])
            more = [name for name in settings if name not in there and name in choices(group)]
            found += [f"{group}=[{','.join((default, *more))}]"] if more else []
            continue
        keys = {f"{group}.{key}" for key, _ in leaves(settings)}
        offered = (default, *choices(group))
        matching = [choice for choice in offered if _settings_of(f"{group}={choice}", known) == keys]
        found += [f"{group}={matching[0]}"] if matching and matching[0] != default else []
    return found


def _settings_of(choice: str, known: Mapping[str, list[str]]) -> set[str]:
    """The settings that a choice of a group brings, without the parts that hold others."""
    brought = {key for key, choices in known.items() if choice in choices}
    return brought - {key.rpartition(".")[0] for key in brought}


def given_overrides(texts: Sequence[str], stored: Mapping[str, Any]) -> list[Override]:
    """The overrides that the user gave, without `resume=` and without what `with_choices_of_run` added."""
    added = set(choices_of(stored))
    parsed = OverridesParser.create().parse_overrides(list(texts))
    keys = [override.key_or_group for override in parsed]
    front = keys.index("resume") if "resume" in keys else 0
    return [
        override
        for number, override in enumerate(parsed)
        if override.key_or_group != "resume" and not (number < front and override.input_line in added)
    ]


def asked_settings(stored: Settings, composed: DictConfig, overrides: Sequence[Override]) -> Settings:
    """The stored settings with what the overrides ask for on them, as plain data.

    A group's choice asks for what its YAML says, and not for what every choice of the group has in common:
    `trainer=cpu` leaves `trainer.max_steps` as it was. `composed` is what Hydra made of the overrides: it has
    their values, checked by type. Raises InputError for an override that the run has no place for.
    """
    settings = deepcopy(stored)
    raw: Settings = _plain(composed, resolve=False)
    groups = default_choices("train")
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
            _choose(settings, raw, key, value)
        elif key == "run_dir":
            settings[key] = _run_dir(value, stored[key])
        elif override.is_delete():
            _delete(settings, key)
        else:
            _set(settings, raw, key, add=override.is_add(), but=given)
    return _filled_in(settings, stored)


def _choose(settings: Settings, raw: Settings, group: str, choice: Any) -> None:
    """Takes over what a choice of a group says: everything where it is another kind than the run's."""
    new, old = raw[group], settings.get(group)
    path = config_folder() / group / f"{choice}.yaml"
    same_kind = isinstance(old, dict) and isinstance(new, dict) and old.get("_target_") == new.get("_target_")
    if group in OPEN_NAMESPACES or not same_kind or not path.is_file():
        settings[group] = new
        return
    said = _yaml(path)
    # A task's YAML has defaults for other groups, too: they are for new runs.
    for name in said.get(group, {}) if is_global(path) else said:
        if name != "defaults":
            settings[group][name] = new[name]


def _set(settings: Settings, raw: Settings, key: str, *, add: bool, but: set[str]) -> None:
    """Takes over one setting's value, also for those that are defined as the same, but those given."""
    followers = [name for name, value in leaves(raw) if value == f"${{{key}}}" and name not in but]
    before = _at(settings, key)
    parent = _at(settings, key.rpartition(".")[0])
    if before is ABSENT and not (add and isinstance(parent, dict)):
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
    try:
        filled = _plain(OmegaConf.create(settings), resolve=True)
    except OmegaConfBaseException as error:
        raise InputError(f"{' '.join(str(error).split())}: give a value without ${{...}}") from error
    if filled["name"] is None:
        filled["name"] = stored["name"]
    data, model, tokenizer = (filled[group] for group in ("data", "model", "tokenizer"))
    if all(isinstance(group, dict) for group in (data, model, tokenizer)):
        if data.get("max_length") is None:
            data["max_length"] = model.get("context_length")
        if "stride" in data and data["stride"] is None:
            data["stride"] = data["max_length"]
        if model.get("vocab_size") is None:
            # Of a vocabulary made from the text only the run knows the size.
            model["vocab_size"] = tokenizer.get("vocab_size") or stored["model"]["vocab_size"]
    return filled


def _yaml(path: Path) -> Settings:
    config = OmegaConf.load(path)
    assert isinstance(config, DictConfig)
    return _plain(config, resolve=False)


def _plain(config: DictConfig, *, resolve: bool) -> Settings:
    plain = OmegaConf.to_container(config, resolve=resolve)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting that holds no others, by its dotted key."""
    for name, value in tree.items():
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
