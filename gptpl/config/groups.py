"""YAML files of configs in a checkout, a wheel or a user's folder: where they are and what they hold.

This module imports neither Hydra nor torch, so that `--help` comes at once.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gptpl
from gptpl.errors import InputError

Folder = str | Path


def config_folder() -> Path:
    """gptpl's own configs: gptpl/_conf in an installed wheel, conf/ in a checkout."""
    package = Path(gptpl.__file__).parent
    shipped = package / "_conf"
    return shipped if shipped.is_dir() else package.parent / "conf"


def folders(config_dir: Folder | None = None) -> tuple[Path, ...]:
    """The folders that configs are read from: the user's, if one is given, then gptpl's own."""
    if config_dir is None:
        return (config_folder(),)
    own = Path(config_dir).expanduser().absolute()
    if not own.is_dir():
        raise InputError(f"--config-dir {config_dir} is not a folder: give one that holds YAML files")
    return own, config_folder()


def config_file(name: str, config_dir: Folder | None = None) -> Path | None:
    """The YAML of a root (`train`) or of a choice (`model/tiny`), if there is one."""
    files = (folder / f"{name}.yaml" for folder in folders(config_dir))
    return next((file for file in files if file.is_file()), None)


def is_group(key: str, config_dir: Folder | None = None, more: Sequence[Folder] = ()) -> bool:
    """Whether an override's key (`model`, `hydra/launcher`, `data@other`) names a config group."""
    group = key.partition("@")[0]
    places = (*folders(config_dir), *map(Path, more))
    return bool(group) and "." not in group and any((place / group).is_dir() for place in places)


def choices(group: str, config_dir: Folder | None = None) -> list[str]:
    """The choices of a config group in alphabetical order; `_name.yaml` is shared by others, not a choice."""
    files = (file for folder in folders(config_dir) for file in (folder / group).glob("[!_]*.yaml"))
    return sorted({file.stem for file in files})


def default_choices(root: str, config_dir: Folder | None = None) -> dict[str, str]:
    """The config groups of a root, also of one that it extends, each with its default choice or "null"."""
    file = config_file(root, config_dir)
    found: dict[str, str] = {}
    for entry in re.findall(r"^  - (.+?)(?:\s+#.*)?$", file.read_text("utf-8") if file else "", re.MULTILINE):
        group, colon, choice = entry.removeprefix("override ").partition(": ")
        if colon and (group == "hydra/launcher" or not group.startswith("hydra/")):
            found[group.strip("/")] = choice.strip()
        elif not colon and entry not in ("_self_", root):
            found |= default_choices(entry, config_dir)
    return found


def when_to_choose(path: Path) -> str:
    """The first comment of a YAML: what it is and when to choose it."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = (
        line.lstrip("# ").strip() for line in lines if line.startswith("#") and "@package" not in line
    )
    return next(comments, "")


# ------------------------------------------------------------------------------------ what a YAML file holds


def content(name: str, config_dir: Folder | None = None) -> tuple[list[str], dict[str, Any]]:
    """The files that a root or choice extends, of its own group, and its settings, `${...}` not resolved.

    Raises ValueError, OSError or YAMLError for a file that cannot be read.
    """
    from omegaconf import OmegaConf

    file = config_file(name, config_dir)
    settings = OmegaConf.to_container(OmegaConf.load(file), resolve=False) if file else None
    if not isinstance(settings, dict):
        return [], {}
    entries = settings.pop("defaults", [])
    extended = [entry for entry in entries if isinstance(entry, str) and entry != "_self_"]
    return extended, {str(key): value for key, value in settings.items()}


def is_global(name: str, config_dir: Folder | None = None) -> bool:
    """Whether the settings of a YAML belong to the root (`# @package _global_`)."""
    file = config_file(name, config_dir)
    return file is not None and file.read_text(encoding="utf-8").startswith("# @package _global_")


def root_of(config_name: str, config_dir: Folder | None) -> str:
    """The command's root config that a root is, or extends."""
    names = (config_name, *content(config_name, config_dir)[0])
    return next((name for name in names if (config_folder() / f"{name}.yaml").is_file()), "train")


def command_of(root: str) -> str:
    """The command of a root config: `weights fetch` of weights_fetch, `find-lr` of find_lr."""
    grouped = root.startswith(("data_", "runs_", "tokenizer_", "weights_"))
    return root.replace("_", " " if grouped else "-")


def root_of_command(command: str) -> str:
    """The name of a command's root config, whether it has one or not."""
    return command.replace(" ", "_").replace("-", "_")


def members_of(group: str, choice: str, config_dir: Folder | None = None) -> list[str]:
    """The YAML files of its group that a choice such as `callbacks=default` includes."""
    return content(f"{group}/{choice}", config_dir)[0]


def said_by(
    group: str, choice: str, config_dir: Folder | None = None, *, bases: bool = False
) -> dict[str, Any]:
    """The settings of its own group in the YAML of a choice; with `bases`, also of the files it extends."""
    extended, own = content(f"{group}/{choice}", config_dir)
    found: dict[str, Any] = {}
    for base in extended if bases else ():
        found |= said_by(group, base, config_dir, bases=True)
    return found | (own.get(group, {}) if is_global(f"{group}/{choice}", config_dir) else own)


def keys_of(name: str, group: str, config_dir: Folder | None) -> list[str]:
    """The dotted keys that a YAML of a group sets."""
    prefix = "" if not group or is_global(name, config_dir) else f"{group.replace('/', '.')}."
    return [prefix + key for key in dotted(content(name, config_dir)[1])]


def known_keys(root: str, config_dir: Folder | None = None) -> list[str]:
    """Every key in the YAML files of a command, those of its default choices first."""
    groups = default_choices(root, config_dir)
    found: list[str] = [*keys_of(root, "", config_dir), *groups]
    for group, default in groups.items():
        for choice in sorted(choices(group, config_dir), key=lambda each: each != default):
            found += keys_of(f"{group}/{choice}", group, config_dir)
    return found


def dotted(value: object, prefix: str = "") -> Iterator[str]:
    """Every dotted key of plain settings."""
    for key, each in value.items() if isinstance(value, dict) else ():
        yield f"{prefix}{key}"
        yield from dotted(each, f"{prefix}{key}.")


def walk(value: object, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of plain settings with its dotted key, outer before inner, also those in lists."""
    yield key, value
    inner = value.items() if isinstance(value, Mapping) else ()
    for name, each in enumerate(value) if isinstance(value, list) else inner:
        yield from walk(each, f"{key}.{name}" if key else str(name))


def packages_named(config_dir: Folder) -> set[str]:
    """The packages of the classes that the YAML files of a user's folder name."""
    targets = re.findall(r"_target_:\s*['\"]?([\w.]+)", "\n".join(_texts(Path(config_dir))))
    return {target.partition(".")[0] for target in targets}


def stands_in_a_yaml(value: str, config_dir: Folder | None) -> bool:
    """Whether a YAML of gptpl's or of the user's has the text, other than in a comment."""
    lines = (line for folder in folders(config_dir) for text in _texts(folder) for line in text.splitlines())
    return any(value in line for line in lines if not line.lstrip().startswith("#"))


def _texts(folder: Path) -> Iterator[str]:
    return (file.read_text(encoding="utf-8") for file in sorted(folder.rglob("*.yaml")))
