"""Overrides as users write them (`optimizer.lr=1e-3`, `prompt=a, b`), in the grammar that Hydra reads.

Errors of Hydra and OmegaConf become one line that names the value and the remedy.
"""

import re
from collections.abc import Callable, Iterable, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import MissingConfigException, OverrideParseException

from gptpl.config.groups import Folder, choices, command_of, default_choices, known_keys
from gptpl.errors import InputError
from gptpl.text import nearest

FREE_TEXT = frozenset(
    {
        *("input", "instruction", "notes", "prompt", "response_marker", "template", "text"),
        *("data.response_marker", "data.template", "submit.setup"),
        *(f"judge.{name}" for name in ("comparison_prompt", "comparison_reminder", "prompt", "reminder")),
        *("judge.rubric", "judge.system"),
    }
)
"""Keys whose value is text: commas, brackets and quotes have no meaning in it.

Quotes around the whole of a `data.template` or `submit.setup` do not belong to the text.
"""
TYPED = frozenset({"input", "instruction", "prompt", "text"})
"""Those of them that a model is given: the word null is a word in it."""
_PATH = re.compile(r"(\w+\.)*(\w*_)?(path|dir|dirpath|file|checkpoint|compare|keep|output|responses|resume)")
"""Keys whose value is a path, which may hold any character, too; `${...}` in it is resolved."""


def is_path(key: str) -> bool:
    """Whether the value of a key is a path."""
    return bool(_PATH.fullmatch(key)) and not key.endswith((".from_file", "_target_"))


def key_of(override: str) -> str:
    """The key of an override, without the signs of Hydra's grammar."""
    return override.partition("=")[0].lstrip("+~")


def resumed_run(overrides: Sequence[str]) -> tuple[list[str], str | None]:
    """The overrides without `resume=RUN`, and the run that it names; None for a new run."""
    kept, run = [], None
    for text in overrides:
        key, _, value = text.lstrip("+").partition("=")
        if key != "resume":
            kept.append(text)
        elif value not in ("", "null"):
            run = value.strip("'\"")
    return kept, run


def readable(override: str, *, is_group: Callable[[str], bool]) -> str:
    """An override in Hydra's grammar.

    Text and paths are quoted. A setting with a dot (`trainer.limit_val_batches=2`) is added where no YAML has
    it: `gptpl.config.check` asks its class whether it may be.
    """
    written, equals, value = override.partition("=")
    if not equals:
        return override
    key = written.lstrip("+~")
    left_to_hydra = value in ("", "null") or re.fullmatch(r"(['\"]).*\1", value, flags=re.DOTALL)
    is_text = key in FREE_TEXT and (value != "null" or key in TYPED)
    if is_text and not (key in ("data.template", "submit.setup") and left_to_hydra):
        value = quoted(without_interpolation(value))
    elif is_path(key) and not left_to_hydra:
        value = quoted(value)
    if written == key and "." in key and not key.startswith("hydra.") and not is_group(key):
        written = f"++{key}"
    return f"{written}={value}"


def parsed(override: str) -> Override:
    """An override of Hydra's grammar."""
    try:
        [found] = OverridesParser.create().parse_overrides([override])
    except OverrideParseException as error:
        raise InputError(
            f"{override.removeprefix('++')!r} is not an override: give KEY=VALUE, with quotes inside as in"
            " KEY='\"a, b\"'"
        ) from error
    return found


def quoted(text: str) -> str:
    r"""The text in single quotes; Hydra removes one of two backslashes before a quote and at the end."""
    text = re.sub(r"(\\*)'", lambda match: 2 * match[1] + r"\'", text)
    trailing = len(text) - len(text.rstrip("\\"))
    return f"'{text}{trailing * chr(92)}'"


def without_interpolation(text: str) -> str:
    r"""The text with every `${` escaped; OmegaConf removes one of two backslashes before it."""
    return re.sub(r"(\\*)\$\{", lambda match: 2 * match[1] + r"\${", text)


# ---------------------------------------------------------------------------------------------------- errors


def explain(
    error: Exception, root: str, overrides: Iterable[str] = (), config_dir: Folder | None = None
) -> str:
    """One line for an error of Hydra's in the overrides or the configs of a command, given by its root."""
    if isinstance(error, MissingConfigException) and "/" in (error.missing_cfg_file or ""):
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        offered = choices(group, config_dir)
        return f"{group}={choice} is unknown{nearest(choice, offered)}; choices: {', '.join(offered)}"
    text, command = f"{error}\n{error.__cause__ or ''}", f"gptpl {command_of(root)}"
    for pattern, message in _MESSAGES.items():
        if match := re.search(pattern, text, flags=re.DOTALL):
            found, meant = match.groupdict(), ""
            if "group" in found:
                meant = nearest(found["group"], default_choices(root, config_dir))
            elif "unknown" in found:
                meant = nearest_key(found["unknown"], known_keys(root, config_dir))
            return message.format(command=command, meant=meant, **found)
    for override in overrides:
        group, _, choice = override.partition("=")
        is_choice = re.match(r"(?!null$)[\[A-Za-z_]", choice)
        if group in ("", *default_choices(root, config_dir)) and not is_choice:
            return f"{override} does not name a choice of a config group: see {command} --help"
    return f"{' '.join(text.split())}; see {command} --help"


def nearest_key(key: str, known: Iterable[str]) -> str:
    """A question for the key that was meant: one with this very last name, else the nearest."""
    candidates = list(dict.fromkeys(known))
    same = [each for each in candidates if each.rpartition(".")[2] == key]
    return f": did you mean {' or '.join(same[:3])}?" if same else nearest(key, candidates)


_MESSAGES = {
    r"In '(?P<file>[^']+)': Could not override '(?P<group>[^']+)'": (
        "{file}.yaml overrides {group}, but {command} has no such config group{meant}"
    ),
    r"Could not (?:override|delete from config\.) '(?P<unknown>[^']+)'": (
        "{command} has no setting {unknown}{meant}; see {command} --cfg job"
    ),
    r"Could not append to config\. An item is already at '(?P<key>[^']+)'": (
        "+{key} adds a setting that exists: leave out the +"
    ),
    r"Error merging override \+*(?P<override>.+?)\n(?P<reason>[^\n]*)": (
        "{override} does not fit: {reason}; see {command} --help"
    ),
    r"Ambiguous value for argument '\+*(?P<override>.+?)'\n": (
        "{override} has several values: add -m to try each, or make it a list [...]"
    ),
    r"Missing mandatory value: (?P<key>\S+)": "{key} is not set: give {key}=VALUE",
    r"'(?P<key>[\w.]+)'[^\n]* is of type": "{key} does not hold settings; see {command} --cfg job",
}
"""Messages by patterns of Hydra's and OmegaConf's, the special before the general."""
