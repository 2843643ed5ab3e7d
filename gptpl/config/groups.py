"""Where config files are, in a checkout, in an installed wheel and in a user's folder, and what they offer.

Read as text, without Hydra or torch, so that `--help` comes at once.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import gptpl
from gptpl.errors import InputError

Folder = str | Path


def config_folder() -> Path:
    """The folder of the commands' root configs and their groups: shipped as gptpl/_conf, kept as conf/."""
    package = Path(gptpl.__file__).parent
    shipped = package / "_conf"
    return shipped if shipped.is_dir() else package.parent / "conf"


def folders(config_dir: Folder | None = None) -> tuple[Path, ...]:
    """The folders that configs are read from: the user's, if one is given, before gptpl's own.

    Raises InputError where the user's is no folder.
    """
    if config_dir is None:
        return (config_folder(),)
    own = Path(config_dir).expanduser().absolute()
    if not own.is_dir():
        raise InputError(f"--config-dir {config_dir} is no folder: give one that holds YAML files")
    return own, config_folder()


def config_file(name: str, config_dir: Folder | None = None) -> Path | None:
    """The YAML of a root (`train`) or of a choice (`model/tiny`); None where there is none."""
    files = (folder / f"{name}.yaml" for folder in folders(config_dir))
    return next((file for file in files if file.is_file()), None)


def choices(group: str, config_dir: Folder | None = None) -> list[str]:
    """The choices of a config group, in alphabetical order; none where there is no such group.

    A file whose name begins with `_` is what others have in common, and no choice.
    """
    files = (file for folder in folders(config_dir) for file in (folder / group).glob("*.yaml"))
    return sorted({file.stem for file in files if not file.stem.startswith("_")})


def default_choices(root: str, config_dir: Folder | None = None) -> dict[str, str]:
    """The config groups of a root, each with the choice that it takes; "null" is none.

    A root that extends another one (`defaults: [train, _self_]`) has its groups.
    """
    file = config_file(root, config_dir)
    found: dict[str, str] = {}
    for entry in re.findall(r"^  - (.+?)(?:\s+#.*)?$", file.read_text("utf-8") if file else "", re.MULTILINE):
        group, colon, choice = entry.removeprefix("override ").partition(": ")
        if colon and (group == "hydra/launcher" or not group.startswith("hydra/")):
            found[group.strip("/")] = choice.strip()
        elif not colon and entry not in ("_self_", root):
            found |= default_choices(entry, config_dir)
    return found


def members_of(group: str, choice: str, config_dir: Folder | None = None) -> list[str]:
    """The YAML files of its group that a choice such as `callbacks=default` includes."""
    file = config_file(f"{group}/{choice}", config_dir)
    defaults = re.search(r"^defaults:\n((?:  .*\n)*)", file.read_text("utf-8") if file else "", re.MULTILINE)
    entries = re.findall(r"^  - (\w+)\s*(?:#.*)?$", defaults[1] if defaults else "", re.MULTILINE)
    return [entry for entry in entries if entry != "_self_"]


def when_to_choose(path: Path) -> str:
    """The comment of a YAML that says what it is and when to choose it."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and "@package" not in line:
            return line.lstrip("# ").strip()
    return ""


def packages_named(config_dir: Folder) -> set[str]:
    """The packages of the classes that the YAML files of a user's folder name."""
    texts = (file.read_text(encoding="utf-8") for file in sorted(Path(config_dir).rglob("*.yaml")))
    targets = re.findall(r"_target_:\s*['\"]?([\w.]+)", "\n".join(texts))
    return {target.partition(".")[0] for target in targets}


def is_global(path: Path) -> bool:
    """Whether a YAML's keys are the root's."""
    return path.read_text(encoding="utf-8").startswith("# @package _global_")


def is_group(key: str, config_dir: Folder | None = None, more: Sequence[Folder] = ()) -> bool:
    """Whether an override's key (`model`, `hydra/launcher`, `data@other`) names a config group."""
    group = key.partition("@")[0]
    places = (*folders(config_dir), *map(Path, more))
    return bool(group) and "." not in group and any((place / group).is_dir() for place in places)
