"""What `--help` prints: of the docstrings of the commands and of conf/, as text, so that it comes at once."""

import ast
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from gptpl.config.groups import Folder, choices, config_file, default_choices, when_to_choose

FOLDER = Path(__file__).parent / "commands"
ORDER = (
    *("train", "sweep", "plan", "find-lr", "find-batch-size", "verify-resume", "generate", "respond"),
    *(
        "classify",
        "inspect",
        "evaluate",
        "judge",
        "report",
        "runs list",
        "runs show",
        "runs diff",
        "runs tag",
    ),
    *("runs note", "runs rm", "weights fetch", "weights list", "weights convert"),
)
"""In which the overview has them; others come after."""
SUBCOMMANDS = ("runs", "weights")
"""First words of commands of two words."""


@cache
def commands() -> dict[str, str]:
    """Every command with its summary: a file in `commands/` each, whose docstring begins with it."""
    files = (file for file in sorted(FOLDER.glob("*.py")) if not file.stem.startswith("_"))
    found = {name_of(file.stem): _docstring(file)[0] for file in files}
    place = {name: number for number, name in enumerate(ORDER)}
    return dict(sorted(found.items(), key=lambda item: place.get(item[0], len(ORDER))))


def name_of(module: str) -> str:
    """The command of a module: `find-lr` of find_lr, `runs list` of runs_list."""
    first, _, rest = module.partition("_")
    return f"{first} {rest}" if first in SUBCOMMANDS and rest else module.replace("_", "-")


def module_of(command: str) -> str:
    """The module of a command."""
    return command.replace("-", "_").replace(" ", "_")


def _docstring(file: Path) -> tuple[str, str]:
    """The summary of a command's docstring, without the command's name before it, and the rest."""
    found = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    summary, _, rest = found.partition("\n")
    return re.sub(r"^`gptpl [^:]*: ", "", summary).rstrip("."), rest


def program_help(listed: Mapping[str, str]) -> str:
    """The overview: every command in a line."""
    width = max(map(len, listed))
    lines = [
        "gptpl: experiments with GPT-2-style language models",
        "",
        "usage: gptpl COMMAND [overrides]",
        "",
    ]
    lines += [f"  {name:<{width}}  {text}" for name, text in listed.items()]
    lines += [
        "",
        "gptpl COMMAND --help shows a command's settings; --debug shows tracebacks; --version the version.",
        "gptpl completion bash (or zsh) prints a script that completes commands, choices and settings.",
    ]
    return "\n".join(lines)


def command_help(command: str, config_dir: Folder | None = None) -> str:
    """One command: what its docstring says, settings of its own, config groups with their choices."""
    summary, text = _docstring(FOLDER / f"{module_of(command)}.py")
    lines = [f"gptpl {command}: {summary}"]
    root = module_of(command)
    file = config_file(root, config_dir)
    if file and "usage:" not in text:
        lines += ["", f"usage: gptpl {command} [group=choice] [key=value] ..."]
    if text.strip():
        lines += ["", text.strip("\n")]
    if file is None:
        return "\n".join(lines)
    if settings := _settings(file.read_text(encoding="utf-8")):
        lines += ["", "settings:", *settings]
    extends = "  - train\n" in file.read_text(encoding="utf-8")
    groups = {} if extends else default_choices(root, config_dir)
    if groups:
        lines += ["", "groups (* is the default):"]
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
        lines += [
            "Your own configs: --config-dir FOLDER (FOLDER/callbacks/mine.yaml is callbacks=mine),",
            "and a root of your own that extends one: --config-name NAME",
        ]
    return "\n".join(lines)


def _settings(root: str) -> list[str]:
    """The root's own `key: value  # comment` lines; those of a section with its name before them."""
    lines, section = [], ""
    for line in root.splitlines():
        if match := re.match(r"(\w+):(\s*#.*)?$", line):
            section = "" if match[1] in ("defaults", "hydra") else match[1]
        elif re.match(r"\w+: ", line):
            lines.append(f"  {line}")
        elif section and re.match(r"  \w+: ", line):
            lines.append(f"  {section}.{line.strip()}")
    return lines


def _keys_of(name: str) -> list[str]:
    """The settings of a YAML with their values, some to a line."""
    import textwrap

    file = config_file(name)
    text = file.read_text(encoding="utf-8") if file else ""
    keys = [f"{key}={value.strip()}" for key, value in re.findall(r"^(\w+):([^#\n]*)", text, re.MULTILINE)]
    keys = [key for key in keys if not key.startswith(("params=", "sampler=", "_target_="))]
    return textwrap.wrap(", ".join(keys), width=100, initial_indent="  ", subsequent_indent="  ")


def _group(group: str, default: str, config_dir: Folder | None) -> list[str]:
    """The group's choices, one a line, each with when to choose it."""
    names = choices(group, config_dir)
    width = max(map(len, names), default=0)
    lines = [f"  {group}"]
    for name in names:
        file = config_file(f"{group}/{name}", config_dir)
        mark = "*" if name == default else " "
        lines.append(f"   {mark} {name:<{width}}  {when_to_choose(file) if file else ''}".rstrip())
    return lines
