"""What Hydra and OmegaConf complain about, each in one line that names the value and the remedy."""

import re
from collections.abc import Callable, Iterable

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf

from gptpl.config.groups import Folder, choices, config_file, default_choices, is_global
from gptpl.config.overrides import not_an_override
from gptpl.text import nearest


def explain(
    error: Exception, root: str, overrides: Iterable[str] = (), config_dir: Folder | None = None
) -> str:
    """One line for an error in the overrides or the configs of a command, given by its root config's name."""
    said = _explained(error, root, overrides, config_dir)
    return said.replace(f"gptpl {root}", f"gptpl {command_of(root)}")


def command_of(root: str) -> str:
    """The command of a root config: `weights fetch` of weights_fetch, `find-lr` of find_lr."""
    return root.replace("_", " ") if root.startswith("weights_") else root.replace("_", "-")


def _explained(error: Exception, root: str, overrides: Iterable[str], config_dir: Folder | None) -> str:
    if isinstance(error, OverrideParseException):
        return not_an_override(error.override)
    if isinstance(error, MissingConfigException) and "/" in (error.missing_cfg_file or ""):
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        offered = choices(group, config_dir)
        return f"{group}={choice} is unknown{nearest(choice, offered)}; choices: {', '.join(offered)}"
    text = f"{error}\n{error.__cause__ or ''}"
    for pattern, say in _SAYINGS.items():
        if match := re.search(pattern, text, flags=re.DOTALL):
            return say(match, root, config_dir)
    for override in overrides:
        group, _, choice = override.partition("=")
        if group in ("", *default_choices(root, config_dir)) and not re.match(
            r"(?!null$)[\[A-Za-z_]", choice
        ):
            return f"{override} names no choice of a config group: see gptpl {root} --help"
    return f"{' '.join(text.split())}; see gptpl {root} --help"


def _unknown_override(match: re.Match[str], root: str, config_dir: Folder | None) -> str:
    """A key on the command line that the composed config does not have."""
    given = match["given"]
    meant = nearest_key(given, known_keys(root, config_dir))
    return f"{given} is no key of gptpl {root}{meant}; see gptpl {root} --cfg job"


def nearest_key(key: str, known: Iterable[str]) -> str:
    """A question for the key that was meant; one of that very name, wherever it stands, before all others."""
    candidates = list(dict.fromkeys(known))
    same = [each for each in candidates if each.rpartition(".")[2] == key]
    return f": did you mean {' or '.join(same[:3])}?" if same else nearest(key, candidates)


def known_keys(root: str, config_dir: Folder | None = None) -> list[str]:
    """Every key that the YAML files of a command have, those of its default choices first."""
    groups = default_choices(root, config_dir)
    found: list[str] = [*keys_of(root, "", config_dir), *groups]
    for group, default in groups.items():
        for choice in sorted(choices(group, config_dir), key=lambda each: each != default):
            found += keys_of(f"{group}/{choice}", group.replace("/", "."), config_dir)
    return found


def keys_of(name: str, prefix: str, config_dir: Folder | None) -> list[str]:
    """The dotted keys that a YAML sets; `prefix` is its group."""
    file = config_file(name, config_dir)
    content = OmegaConf.load(file) if file else None
    if not isinstance(content, DictConfig):
        return []
    if file is not None and is_global(file):
        prefix = ""
    return [
        key
        for key in dotted(OmegaConf.to_container(content), f"{prefix}." if prefix else "")
        if key.partition(".")[0] != "defaults" and ".defaults" not in key
    ]


def dotted(value: object, prefix: str = "") -> Iterable[str]:
    """Every dotted key of plain settings."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield f"{prefix}{key}"
            yield from dotted(each, f"{prefix}{key}.")


_SAYINGS: dict[str, Callable[[re.Match[str], str, Folder | None], str]] = {
    r"In '([^']+)': Could not override '([^']+)'": (
        lambda match, root, folder: (
            f"{match[2]} in {match[1]}.yaml is no config group of gptpl {root}"
            f"{nearest(match[2], default_choices(root, folder))}"
        )
    ),
    r"Could not (?:override|delete from config\.) '(?P<given>[^']+)'": _unknown_override,
    r"Could not append to config\. An item is already at '([^']+)'": (
        lambda match, root, folder: f"+{match[1]} would add a key that is there: leave out the +"
    ),
    r"Error merging override (.+?)\n([^\n]*)": (
        lambda match, root, folder: (
            f"{match[1].lstrip('+')} cannot be taken: {match[2]}; see gptpl {root} --help"
        )
    ),
    r"Ambiguous value for argument '(.+?)'\n": (
        lambda match, root, folder: (
            f"{match[1].lstrip('+')} has several values: add -m to try each, or make it a list [...]"
        )
    ),
    r"Missing mandatory value: (\S+)": (
        lambda match, root, folder: f"{match[1]} is not set: give {match[1]}=VALUE"
    ),
    r"'([\w.]+)'[^\n]* is of type": (
        lambda match, root, folder: f"{match[1]} is no group of settings; see gptpl {root} --cfg job"
    ),
}
"""What to say to which complaint, the special before the general."""
