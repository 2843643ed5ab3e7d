"""Where the YAML files of conf/ are, in a checkout and in an installed wheel, and what they offer."""

import re
from pathlib import Path

import gptpl


def config_folder() -> Path:
    """The folder of the commands' root configs and their groups: shipped as gptpl/_conf, kept as conf/."""
    package = Path(gptpl.__file__).parent
    shipped = package / "_conf"
    return shipped if shipped.is_dir() else package.parent / "conf"


def default_choices(command: str) -> dict[str, str]:
    """The config groups of a command, each with the choice that its root config takes; "null" is none."""
    root = (config_folder() / f"{command}.yaml").read_text(encoding="utf-8")
    return dict(re.findall(r"^  - (?:override )?(\w+|hydra/launcher): (\S+)$", root, flags=re.MULTILINE))


def choices(group: str) -> list[str]:
    """The choices of a config group, in alphabetical order; none where there is no such group."""
    return sorted(choice.stem for choice in (config_folder() / group).glob("*.yaml"))


def when_to_choose(path: Path) -> str:
    """The comment of a YAML that says what it is and when to choose it."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and "@package" not in line:
            return line.lstrip("# ").strip()
    return ""
