"""What `--help` prints; made from conf/ itself, without Hydra or torch, so that it comes at once."""

import re
from collections.abc import Mapping
from pathlib import Path

from gptpl.cli.configs import config_folder, default_choices, when_to_choose

EXAMPLES = {
    "train": [
        ("gptpl train", "the default run: 124M parameters on the shipped tale"),
        ("gptpl train model=tiny data=text_file data.path=my.txt", "a small model on your own text"),
        ("gptpl train -m optimizer.lr=1e-4,4e-4 experiment=quick", "one run for each value, then a table"),
    ],
    "generate": [
        (
            "gptpl generate checkpoint=RUN prompt='Every effort moves you'",
            "RUN is a folder such as runs/tale/...",
        ),
        ("gptpl generate checkpoint=RUN temperature=0 max_new_tokens=100", "greedy"),
        (
            "gptpl generate checkpoint=RUN temperature=1 top_k=null seed=1",
            "the whole vocabulary, reproducible",
        ),
    ],
    "evaluate": [
        ("gptpl evaluate checkpoint=RUN", "the validation part of the shipped tale"),
        (
            "gptpl evaluate checkpoint=RUN data=text_file data.path=my.txt split=all",
            "a whole text of your own",
        ),
        ("gptpl evaluate checkpoint=RUN/checkpoints/best.ckpt data=the_verdict", "a certain checkpoint"),
    ],
}


def program_help(commands: Mapping[str, str]) -> str:
    """The overview: every command in a line."""
    lines = [
        "gptpl: experiments with GPT-2-style language models",
        "",
        "usage: gptpl COMMAND [overrides]",
        "",
    ]
    lines += [f"  {name:<10} {text}" for name, text in commands.items()]
    lines += [
        "",
        "gptpl COMMAND --help shows a command's settings; --debug shows tracebacks; --version the version.",
    ]
    return "\n".join(lines)


def command_help(command: str, summary: str) -> str:
    """One command: usage, examples, settings of its own, config groups with their choices."""
    folder = config_folder()
    root = (folder / f"{command}.yaml").read_text(encoding="utf-8")
    groups = default_choices(command)
    lines = [f"gptpl {command}: {summary}", "", f"usage: gptpl {command} [group=choice] [key=value] ...", ""]
    lines.append("examples:")
    width = max(len(example) for example, _ in EXAMPLES[command])
    lines += [f"  {example:<{width}}  # {text}" for example, text in EXAMPLES[command]]
    lines += ["", "settings:", *_settings(root)]
    if groups:
        lines += ["", "groups (* is the default):"]
    for group, default in groups.items():
        lines += _group(folder / group, default)
    lines += ["", f"All keys with their values: gptpl {command} --cfg job"]
    if command == "train":
        lines += ["Settings of a group: e.g. optimizer.lr=1e-3, trainer.max_epochs=20, data.batch_size=4"]
    return "\n".join(lines)


def _settings(root: str) -> list[str]:
    """The root's own `key: value  # comment` lines, without sections and what is Hydra's."""
    return [f"  {line}" for line in root.splitlines() if re.match(r"\w+: ", line)]


def _group(folder: Path, default: str) -> list[str]:
    """The group's choices, one a line, each with when to choose it."""
    lines = [f"  {folder.name}"]
    choices = sorted(folder.glob("*.yaml"))
    width = max(len(choice.stem) for choice in choices)
    for choice in choices:
        mark = "*" if choice.stem == default else " "
        lines.append(f"   {mark} {choice.stem:<{width}}  {when_to_choose(choice)}")
    return lines
