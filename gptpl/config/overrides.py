"""Overrides as users write them (`optimizer.lr=1e-3`, `prompt=a, b`), in the grammar that Hydra reads."""

import re
from collections.abc import Callable, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import OverrideParseException

from gptpl.errors import InputError

FREE_TEXT = frozenset(
    {
        *("input", "instruction", "notes", "prompt", "response_marker", "template", "text"),
        *("data.response_marker", "data.template"),
        *(f"judge.{name}" for name in ("comparison_prompt", "comparison_reminder", "prompt", "reminder")),
        *("judge.rubric", "judge.system"),
    }
)
"""Keys whose value is text to the last character: a comma, a bracket or a quote in it has no meaning.

Quotes around the whole of a `data.template` are none of it.
"""
TYPED = frozenset({"input", "instruction", "prompt", "text"})
"""Of these, what a model is given: the word null is a word in it."""
_PATH = re.compile(r"(\w+\.)*(\w*_)?(path|dir|dirpath|file|checkpoint|compare|keep|output|responses|resume)")
"""Keys whose value is a path, which may hold any character, too; `${...}` in it is filled in."""


def is_path(key: str) -> bool:
    """Whether the value of a key is a path."""
    return bool(_PATH.fullmatch(key)) and not key.endswith((".from_file", "_target_"))


def readable(overrides: Sequence[str], *, is_group: Callable[[str], bool]) -> list[str]:
    """The overrides in Hydra's grammar.

    Text and paths are quoted, also any value that Hydra cannot parse (`name=a: b`). A setting below another
    one (`trainer.limit_val_batches=2`) is added if no YAML has it: the class that it is for decides whether
    it can be, see `gptpl.config.check`.
    """
    return [_readable(override, is_group) for override in overrides]


def _readable(override: str, is_group: Callable[[str], bool]) -> str:
    written, equals, value = override.partition("=")
    if not equals:
        return override
    key = written.lstrip("+~")
    left_to_hydra = value in ("", "null") or re.fullmatch(r"(['\"]).*\1", value, flags=re.DOTALL)
    is_text = key in FREE_TEXT and (value != "null" or key in TYPED)
    if is_text and not (key == "data.template" and left_to_hydra):
        value = quoted(without_interpolation(value))
    elif is_path(key) and not left_to_hydra:
        value = quoted(value)
    if written == key and "." in key and not key.startswith("hydra.") and not is_group(key):
        written = f"++{key}"
    return f"{written}={value}"


def parsed(override: str) -> Override:
    """An override of Hydra's grammar. Raises InputError for what is none."""
    try:
        [found] = OverridesParser.create().parse_overrides([override])
    except OverrideParseException as error:
        raise InputError(not_an_override(override)) from error
    return found


def not_an_override(text: str) -> str:
    """What to say of text that Hydra cannot parse."""
    return (
        f"{text.removeprefix('++')!r} is no override: give KEY=VALUE, with quotes inside as in KEY='\"a, b\"'"
    )


def quoted(text: str) -> str:
    r"""The text in single quotes: Hydra takes one of two backslashes away before a quote and at the end."""
    text = re.sub(r"(\\*)'", lambda match: 2 * match[1] + r"\'", text)
    trailing = len(text) - len(text.rstrip("\\"))
    return f"'{text}{trailing * chr(92)}'"


def without_interpolation(text: str) -> str:
    r"""The text with every `${` escaped: OmegaConf takes one of two backslashes away before it."""
    return re.sub(r"(\\*)\$\{", lambda match: 2 * match[1] + r"\${", text)
