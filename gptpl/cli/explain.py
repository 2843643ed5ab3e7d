"""What Hydra and OmegaConf complain about, each in one line that names the value and the remedy."""

import re
from collections.abc import Callable, Iterable

from hydra.errors import InstantiationException, MissingConfigException, OverrideParseException

from gptpl.cli.configs import choices, default_choices
from gptpl.cli.known_keys import fields_of, known_keys
from gptpl.cli.nearest import nearest

_NOT_IN_SCHEMA = r"Key '(?P<key>[^']+)'.* not in '(?P<schema>\w+)'\n +full_key: (?P<full>\S+)"
"""OmegaConf's words for an unknown key."""


def explain(error: Exception, command: str, overrides: Iterable[str] = ()) -> str:
    """One line for an error in the overrides or the configs of a command, given by its root config's name."""
    said = _explained(error, command, overrides)
    return said.replace(f"gptpl {command}", f"gptpl {command.replace('_', ' ')}")


def _explained(error: Exception, command: str, overrides: Iterable[str]) -> str:
    if isinstance(error, OverrideParseException):
        return f"{error.override!r} is no override: give KEY=VALUE, with quotes inside as in KEY='\"a, b\"'"
    if isinstance(error, InstantiationException):
        return _instantiation(error)
    if isinstance(error, MissingConfigException) and "/" in (error.missing_cfg_file or ""):
        return _unknown_choice(error)
    text = f"{error}\n{error.__cause__ or ''}"
    for pattern, say in _SAYINGS.items():
        if match := re.search(pattern, text, flags=re.DOTALL):
            return say(match, command)
    for override in overrides:
        group, _, choice = override.partition("=")
        if group in ("", *default_choices(command)) and not re.match(r"(?!null$)[\[A-Za-z_]", choice):
            return f"{override} names no choice of a config group: see gptpl {command} --help"
    return f"{' '.join(text.split())}; see gptpl {command} --help"


def _unknown_choice(error: MissingConfigException) -> str:
    group, _, choice = str(error.missing_cfg_file).rpartition("/")
    offered = error.options or choices(group)
    return f"{group}={choice} is unknown{nearest(choice, offered)}; choices: {', '.join(offered)}"


def _unknown_override(match: re.Match[str], command: str) -> str:
    """A key on the command line, or inside the value of one, that the schemas do not have."""
    given = match["given"]
    inner = re.search(_NOT_IN_SCHEMA, match.string)
    if inner and not given.startswith(inner["full"]):
        return f"{inner['key']} is no key in {given}{nearest(inner['key'], fields_of(inner['schema']))}"
    known = known_keys(command)
    if given in known:
        return f"{given} is a key of {' or '.join(known[given])}: add that, or leave {given} out"
    return f"{given} is no key of gptpl {command}{nearest(given, known)}; see gptpl {command} --cfg job"


def _unknown_in_yaml(match: re.Match[str], command: str) -> str:
    key, schema, full = match["key"], match["schema"], match["full"]
    everywhere = known_keys(command)
    if everywhere.get(full):
        return (
            f"{match['file']}.yaml sets {full}, a key of {' or '.join(everywhere[full])}: keep that choice,"
            f" or give the settings of {match['file']}.yaml that are wanted one by one"
        )
    known = fields_of(schema) if full == key else everywhere
    return f"{full} in {match['file']}.yaml is no key of gptpl {command}{nearest(full, known)}"


_SAYINGS: dict[str, Callable[[re.Match[str], str], str]] = {
    rf"In '(?P<file>[^']+)': .*{_NOT_IN_SCHEMA}": _unknown_in_yaml,
    r"In '([^']+)': ValidationError [^\n]*\n([^\n]*)\n +full_key: (\S+)": (
        lambda match, command: f"{match[3]} in {match[1]}.yaml cannot be taken: {match[2]}"
    ),
    r"In '([^']+)': Could not override '([^']+)'": (
        lambda match, command: (
            f"{match[2]} in {match[1]}.yaml is no config group of gptpl {command}"
            f"{nearest(match[2], default_choices(command))}"
        )
    ),
    r"Could not (?:override|delete from config\.) '(?P<given>[^']+)'": _unknown_override,
    r"Could not append to config\. An item is already at '([^']+)'": (
        lambda match, command: f"+{match[1]} would add a key that is there: leave out the +"
    ),
    r"Error merging override (.+?)\n([^\n]*)": (
        lambda match, command: f"{match[1]} cannot be taken: {match[2]}; see gptpl {command} --help"
    ),
    r"Ambiguous value for argument '(.+?)'\n": (
        lambda match, command: f"{match[1]} has several values: add -m to try each, or make it a list [...]"
    ),
    r"Missing mandatory value: (\S+)": (
        lambda match, command: f"{match[1]} is not set: give {match[1]}=VALUE"
    ),
}
"""What to say to which complaint, the special before the general."""


def _instantiation(error: InstantiationException) -> str:
    """An object that could not be made: its class and what it said."""
    target = re.search(r"target '([^']+)'", str(error))
    name = target[1] if target else "an object of the config"
    if "Error locating target" in str(error):
        return f"_target_={name} cannot be imported: check its spelling"
    return f"{name} refuses its settings: {' '.join(str(error.__cause__ or error).split())}"
