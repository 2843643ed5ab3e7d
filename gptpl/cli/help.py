"""What `--help` prints and a shell completes: docstrings of the commands and conf/, read as text."""

import ast
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from gptpl.config.groups import (
    Folder,
    choices,
    command_of,
    config_file,
    default_choices,
    known_keys,
    root_of_command,
    when_to_choose,
)
from gptpl.errors import InputError

FOLDER = Path(__file__).parent / "commands"
ORDER = (
    *("train", "submit", "sweep", "plan", "find-lr", "find-batch-size", "autotune", "verify-resume"),
    *("generate", "respond", "serve"),
    *("classify", "inspect", "evaluate", "judge", "report", "runs list", "runs show", "runs diff"),
    *("runs tag", "runs note", "runs rm", "data encode", "data show", "tokenizer train"),
    *("weights fetch", "weights list", "weights convert", "card", "doctor"),
)
"""The commands in the order of the overview; others come last."""


class Command(NamedTuple):
    """A function of a module in `commands/`, and what its docstring says."""

    module: str
    function: str
    summary: str
    text: str


@cache
def _found() -> dict[str, Command]:
    """The commands by name: `run` of a module is the one that the module is named after.

    A module without it holds a family: `runs_list` is `runs list`, `find_lr` is `find-lr`.
    """
    found = {}
    for file in FOLDER.glob("[!_]*.py"):
        module = ast.parse(file.read_text(encoding="utf-8"))
        public = [each for each in module.body if isinstance(each, ast.FunctionDef) and each.name[0] != "_"]
        alone = any(each.name == "run" for each in public)
        for name, node in [(file.stem, module)] if alone else [(each.name, each) for each in public]:
            summary, _, text = (ast.get_docstring(node) or "").partition("\n")
            found[command_of(name)] = Command(
                module=f"gptpl.cli.commands.{file.stem}",
                function="run" if alone else name,
                summary=summary.rstrip("."),
                text=text,
            )
    order = [*ORDER, *sorted(found)]
    return dict(sorted(found.items(), key=lambda item: order.index(item[0])))


def commands() -> dict[str, str]:
    """Every command with the summary of its docstring, in the order of the overview."""
    return {name: each.summary for name, each in _found().items()}


def function_of(command: str) -> Callable[[Sequence[str]], int]:
    """The function that runs a command; imports its module."""
    found = _found()[command]
    function: Callable[[Sequence[str]], int] = getattr(import_module(found.module), found.function)
    return function


def program_help(listed: Mapping[str, str]) -> str:
    """The overview: one line for each command."""
    width = max(map(len, listed))
    lines = "\n".join(f"  {name:<{width}}  {text}" for name, text in listed.items())
    return f"""\
gptpl: experiments with GPT-2-style language models

usage: gptpl COMMAND [overrides]

{lines}

gptpl COMMAND --help shows a command's settings; --debug shows tracebacks; --version the version.
gptpl completion bash (or zsh) prints a script that completes commands, choices and settings."""


def command_help(command: str, config_dir: Folder | None = None) -> str:
    """The help of one command: its docstring, its own settings, config groups with their choices."""
    root = root_of_command(command)
    summary, text = _found()[command].summary, _found()[command].text
    lines = [f"gptpl {command}: {summary}"]
    file = config_file(root, config_dir)
    if file and "usage:" not in text:
        lines += ["", f"usage: gptpl {command} [group=choice] [key=value] ..."]
    if text.strip():
        lines += ["", text.strip("\n")]
    if file is None:
        return "\n".join(lines)
    yaml = file.read_text(encoding="utf-8")
    if settings := _settings(yaml):
        lines += ["", "settings:", *settings]
    extends = "  - train\n" in yaml
    groups = {} if extends else default_choices(root, config_dir)
    lines += ["", "groups (* is the default):"] if groups else []
    for group, default in groups.items():
        lines += _group(group, default, config_dir)
    lines += ["", f"All keys with their values: gptpl {command} --cfg job"]
    if extends or command == "sweep":
        lines.append("All other settings and groups are those of gptpl train: see gptpl train --help")
    if "sampling" in groups:
        lines += ["Sampling rules, with or without `sampling.` before them:", *_keys_of("sampling/greedy")]
    if command == "sweep":
        lines += ["Settings of a search, with `sweep.` before them:", *_keys_of("sweep/grid")]
    if command in ("train", "sweep"):
        lines += [
            "Settings of a group: e.g. optimizer.lr=1e-3, trainer.max_epochs=20, data.batch_size=4;",
            "whatever its class takes, also lightning.Trainer: trainer.limit_val_batches=2",
        ]
    if command in ("train", "sweep") or extends:
        lines.append("Your own configs: --config-dir FOLDER (FOLDER/callbacks/mine.yaml is callbacks=mine)")
        if command != "submit":  # which starts gptpl train, with overrides alone
            lines.append("and a root of your own that extends one: --config-name NAME")
    return "\n".join(lines)


def _settings(root: str) -> list[str]:
    """The lines `key: value  # comment` of a root, those of a node with its name before them."""
    lines, node = [], ""
    for line in root.splitlines():
        if match := re.match(r"(\w+):(\s*#.*)?$", line):
            node = "" if match[1] in ("defaults", "hydra") else match[1]
        elif re.match(r"\w+: ", line):
            lines.append(f"  {line}")
        elif node and re.match(r"  \w+: ", line):
            lines.append(f"  {node}.{line.strip()}")
    return lines


def _keys_of(name: str) -> list[str]:
    """The settings of a YAML with their values, several to a line."""
    file = config_file(name)
    text = file.read_text(encoding="utf-8") if file else ""
    keys = [f"{key}={value.strip()}" for key, value in re.findall(r"^(\w+):([^#\n]*)", text, re.MULTILINE)]
    keys = [key for key in keys if not key.startswith(("params=", "sampler=", "_target_="))]
    return textwrap.wrap(", ".join(keys), width=100, initial_indent="  ", subsequent_indent="  ")


def _group(group: str, default: str, config_dir: Folder | None) -> list[str]:
    """The choices of a group, each in a line that says when to choose it."""
    names = choices(group, config_dir)
    width = max(map(len, names), default=0)
    lines = [f"  {group}"]
    for name in names:
        file = config_file(f"{group}/{name}", config_dir)
        mark = "*" if name == default else " "
        lines.append(f"   {mark} {name:<{width}}  {when_to_choose(file) if file else ''}".rstrip())
    return lines


# --- completion in a shell ------------------------------------------------------------------------------

SCRIPT = """\
_gptpl() {
    local IFS=$'\\n'
    COMPREPLY=($(gptpl completion words "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
    [[ "${COMPREPLY[0]}" == *= ]] && compopt -o nospace
    COMPREPLY=("${COMPREPLY[@]#"${COMP_WORDS[COMP_CWORD]%"${COMP_WORDS[COMP_CWORD]##*=}"}"}")
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -F _gptpl gptpl
"""
ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def completion(arguments: Sequence[str]) -> str:
    """For `bash` and `zsh` a script to `eval`; for `words` the candidates for the last word of a line."""
    kind = arguments[0] if arguments else ""
    if kind in ("bash", "zsh"):
        return (ZSH if kind == "zsh" else "") + SCRIPT.rstrip()
    if kind != "words":
        raise InputError(f'completion {kind}: choose bash or zsh, as in eval "$(gptpl completion bash)"')
    *before, word = arguments[1:] or [""]
    names = [name.split() for name in commands()]
    command = next((" ".join(name) for name in names if name == before[: len(name)]), None)
    group, equals, _ = word.partition("=")
    if command is None:
        place = len(before)
        offered = {name[place] for name in names if name[:place] == before and len(name) > place}
    elif equals:
        offered = {f"{group}={choice}" for choice in choices(group)}
    else:
        root = root_of_command(command)
        offered = {f"{name}=" for name in (*default_choices(root), *known_keys(root))}
    return "\n".join(sorted(each for each in offered if each.startswith(word)))
