"""What is done to the overrides on the command line before Hydra reads them."""

import re

from gptpl.errors import InputError

FREE_TEXT = frozenset(
    {
        "data.response_marker",
        "input",
        "instruction",
        "judge.comparison_prompt",
        "judge.comparison_reminder",
        "judge.prompt",
        "judge.reminder",
        "judge.rubric",
        "judge.system",
        "prompt",
        "response_marker",
        "template",
        "text",
    }
)
PATHS = frozenset(
    {
        "checkpoint",
        "compare",
        "data.path",
        "file",
        "hydra.sweep.dir",
        "init.checkpoint",
        "init.path",
        "output",
        "prompt_file",
        "responses",
        "resume",
        "run_dir",
        "text_file",
    }
)
OPEN_NAMESPACES = ("callbacks", "logger")
"""Where the command line may add what no config has: a callback or logger of the user's own."""

OPEN_DICTIONARIES = ("judge.options.",)
"""Keys that begin so are the user's own: a server's options, which gptpl does not know."""

_INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
_FLAGS: dict[str, tuple[str, ...] | None] = {
    **dict.fromkeys(("-m", "--multirun", "--resolve", "--hydra-help"), ()),
    **dict.fromkeys(("-c", "--cfg"), ("job", "hydra", "all")),
    **dict.fromkeys(("-i", "--info"), _INFO),
    **dict.fromkeys(("-cd", "--config-dir"), None),
}
"""Hydra's flags, each with the values it takes: () none, None any one."""


def is_sweep(arguments: list[str]) -> bool:
    """Whether the arguments ask for one run for each of several values."""
    return "-m" in arguments or "--multirun" in arguments


def flags_first(arguments: list[str]) -> list[str]:
    """Flags before overrides, the order that Hydra understands. Raises InputError for an unknown flag."""
    flags: list[str] = []
    overrides: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-"):
            overrides.append(argument)
            continue
        flag, equals, value = argument.partition("=")
        if flag not in _FLAGS:
            raise InputError(f"{flag} is no flag of gptpl: the flags are {', '.join(_FLAGS)} and --debug")
        flags.append(flag)
        if (values := _FLAGS[flag]) == ():
            continue
        if not equals:
            value = rest.pop(0) if rest else ""
        if value == "" or (values and value not in values):
            raise InputError(f"{flag} {value}: give {flag} {'|'.join(values or ['FOLDER'])}")
        flags.append(value)
    return [*flags, *overrides]


def readable_by_hydra(override: str) -> str:
    """An override in Hydra's grammar, for one that was written as if there were no grammar.

    A prompt is text to the last character. A path may hold any character too, but `${...}` in it is filled
    in; null and a quoted path are left to Hydra. A `+` is dropped, so that Hydra refuses an unknown key,
    unless it adds a callback or a logger; one is added where any key is right.
    """
    key, equals, value = override.partition("=")
    name = key.lstrip("+")
    if name.startswith(OPEN_DICTIONARIES):
        key = f"++{name}"
    elif name.partition(".")[0] not in OPEN_NAMESPACES:
        key = name
    left_to_hydra = value in ("", "null") or re.fullmatch(r"(['\"]).*\1", value, flags=re.DOTALL)
    plain_path = name in PATHS and not left_to_hydra
    if equals and name in FREE_TEXT:
        value = quoted(without_interpolation(value))
    elif equals and plain_path:
        value = quoted(value)
    return f"{key}{equals}{value}"


def quoted(text: str) -> str:
    r"""The text in single quotes: Hydra takes one of two backslashes away before a quote and at the end."""
    text = re.sub(r"(\\*)'", lambda match: 2 * match[1] + r"\'", text)
    trailing = len(text) - len(text.rstrip("\\"))
    return f"'{text}{trailing * chr(92)}'"


def without_interpolation(text: str) -> str:
    r"""The text with every `${` escaped: OmegaConf takes one of two backslashes away before it."""
    return re.sub(r"(\\*)\$\{", lambda match: 2 * match[1] + r"\${", text)
