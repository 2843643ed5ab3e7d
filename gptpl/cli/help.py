"""What `--help` prints; made from conf/ itself, without Hydra or torch, so that it comes at once."""

import dataclasses
import re
import textwrap
from collections.abc import Collection, Mapping
from pathlib import Path

from gptpl.cli.configs import config_folder, default_choices, when_to_choose
from gptpl.cli.help_runs import RUNS_HELP
from gptpl.cli.schema_sampling import SamplingConf
from gptpl.cli.schema_sweep import SearchConf

EXAMPLES = {
    "train": [
        ("gptpl train", "the default run: 124M parameters on the shipped tale"),
        ("gptpl train model=tiny data=text_file data.path=my.txt", "a small model on your own text"),
        ("gptpl train init=gpt2_hf model=gpt2_small data=text_file data.path=F", "from GPT-2"),
        ("gptpl train -m optimizer.lr=1e-4,4e-4 experiment=quick", "one run for each value, then a table"),
    ],
    "sweep": [
        ("gptpl sweep experiment=quick optimizer.lr=1e-4,4e-4 tokenizer=bytes,words", "every combination"),
        ("gptpl sweep experiment=quick sweep=learning_rate", "a ready search; again, it goes on"),
        ("gptpl sweep experiment=quick sweep=tpe 'optimizer.lr=tag(log,interval(1e-4,1e-1))'", "your own"),
        ("gptpl sweep ... hydra.launcher.n_jobs=2", "two trials at a time"),
        ("gptpl sweep ... hydra/launcher=slurm hydra.launcher.timeout_min=120", "a SLURM job for each trial"),
        ("gptpl sweep ... sweep.retry_failed=true", "try the trials that failed again"),
    ],
    "generate": [
        ("gptpl generate checkpoint=RUN prompt='Once upon a time'", "RUN is a folder such as runs/tale/..."),
        ("echo 'Once upon a time' | gptpl generate checkpoint=RUN sampling=creative", "a piped prompt"),
        ("gptpl generate checkpoint=RUN temperature=0.8 top_p=0.9 seed=1", "rules of your own, reproducible"),
        ("gptpl generate checkpoint=RUN num_samples=5 --json", "five texts, a JSON object a line"),
        ("gptpl generate checkpoint=RUN -i", "type prompts and change the rules; /help says how"),
    ],
    "respond": [
        (
            "gptpl respond checkpoint=RUN instruction='Name a colour.'",
            "RUN is a folder of a task=instruct run",
        ),
        ("gptpl respond checkpoint=RUN instruction='Correct it.' input='He go home.'", "with an input"),
        ("gptpl respond checkpoint=RUN split=test output=responses.json", "the run's own test entries"),
        ("gptpl respond checkpoint=RUN file=mine.json output=answers.json", "again, it goes on"),
        ("gptpl respond init=gpt2_hf template=alpaca instruction='Name a colour.'", "GPT-2 itself"),
    ],
    "inspect": [
        ("gptpl inspect checkpoint=RUN text='Every effort moves you'", "writes surprisal.html"),
        ("gptpl inspect checkpoint=RUN text_file=my.txt output=my.html", "a whole file"),
        ("echo 'Every effort' | gptpl inspect checkpoint=RUN alternatives=10", "a piped text"),
    ],
    "classify": [
        ("gptpl classify checkpoint=RUN text='You have won a prize'", "every class with its probability"),
        ("gptpl classify checkpoint=RUN file=messages.csv output=answers.csv", "a whole file"),
        ("gptpl classify checkpoint=RUN file=messages.txt --json", "a text a line, a JSON object a line"),
        ("echo 'See you at six' | gptpl classify checkpoint=RUN", "a piped text"),
    ],
    "evaluate": [
        ("gptpl evaluate checkpoint=RUN", "the validation part of the shipped tale"),
        (
            "gptpl evaluate checkpoint=RUN data=text_file data.path=my.txt split=all",
            "a whole text of your own",
        ),
        ("gptpl evaluate checkpoint=RUN/checkpoints/best.ckpt data=the_verdict", "a certain checkpoint"),
        (
            "gptpl evaluate checkpoint=CLASSIFIER split=test",
            "accuracy, F1, calibration on its test texts",
        ),
        ("gptpl evaluate checkpoint=CLASSIFIER data=labelled data.path=F split=all", "on a file of yours"),
        ("gptpl evaluate init=gpt2_hf data=text_file data.path=my.txt split=all", "GPT-2 itself"),
    ],
    "judge": [
        ("gptpl judge responses=responses.json", "scores from 0 to 100 by llama3, which Ollama serves here"),
        ("gptpl judge responses=responses.json judge=none", "against the references alone, without a server"),
        ("gptpl judge responses=A.json compare=B.json both_orders=true", "which of two models is better?"),
        ("gptpl judge responses=A.json judge=openai judge.model=NAME", "the key from OPENAI_API_KEY"),
        (
            "gptpl judge responses=A.json judge=openai judge.address=URL judge.api_key_env=null",
            "without a key",
        ),
    ],
    "weights fetch": [
        ("gptpl weights fetch", "124M from the Hugging Face hub"),
        ("gptpl weights fetch size=355M source=openai", "OpenAI's TensorFlow files"),
        ("gptpl weights fetch size=1558M mirror=https://hf-mirror.com", "from another server"),
    ],
    "weights convert": [
        ("gptpl weights convert checkpoint=RUN format=hf output=my-model", "for transformers"),
        ("gptpl weights convert checkpoint=RUN format=book output=my-model", "for the book's code"),
        ("gptpl weights convert init=gpt2_hf format=nanogpt output=gpt2", "for nanoGPT"),
        ("gptpl weights convert checkpoint=RUN format=adapter output=my-adapter", "LoRA's part, for PEFT"),
        (
            "gptpl weights convert checkpoint=model.pth model=gpt_124m format=gptpl output=mine",
            "from the book",
        ),
    ],
}

VERIFY_RESUME = """\
gptpl verify-resume: train straight, train again with interruptions, and compare the two bit by bit

usage: gptpl verify-resume [overrides of gptpl train] [verify.key=value] ...

examples:
  gptpl verify-resume experiment=quick                      # 12 steps, 3 random stops
  gptpl verify-resume experiment=quick verify.steps=80 verify.stops=[5,39,40]
  gptpl verify-resume experiment=quick trainer=ddp trainer.accelerator=cpu trainer.devices=2

settings:
  verify.steps: 12     # optimizer steps to compare; the schedule stays that of the whole run
  verify.stops: null   # steps to stop after, such as [3,7]; null: 3 random ones
  verify.seed: 0       # of the random stops
  verify.keep: null    # a folder to leave both runs in; null: the temporary folder (TMPDIR), then removed

Every part runs in a process of its own; a run that ends before verify.steps is compared at its end, and
trainer.max_time does not count. Printed are, for each step, whether the batches were the same and the
loss of both runs, then the hashes of weights, optimizer, schedule, random states, position and callbacks.
Exit status: 0 all the same, 1 a difference (or a part failed), 2 bad input."""


PLAN = """\
gptpl plan: what a run will cost, before it begins: memory, steps, time

usage: gptpl plan [overrides of gptpl train] [plan.key=value] ... [--json]

examples:
  gptpl plan                                            # of the default run
  gptpl plan model=gpt2_xl data=text_file data.path=my.txt
  gptpl plan experiment=fast_recipe plan.timed_steps=0 --json

settings:
  plan.output: learning_rate.png   # the picture of the learning rate
  plan.timed_steps: null           # real steps to time; 0: none; null: 3, where they take a minute at most

Parameters, memory by part, windows, steps, tokens, arithmetic, learning rate, time, and the largest batch
that fits. No weights are made but for the timed steps, so it works for models larger than the machine.
Nothing is left behind but the picture."""


FIND_LR = """\
gptpl find-lr: learning rates at which training falls fastest, and diverges

usage: gptpl find-lr [overrides of gptpl train] [find.key=value] ...

examples:
  gptpl find-lr experiment=quick
  gptpl find-lr model=gpt_18m data=python_stdlib optimizer=muon
  gptpl find-lr init=gpt2_hf model=gpt2_small data=text_file data.path=my.txt find.max_lr=1e-2

settings:
  find.min_lr: 1e-6    # optimizer.lr of the first step
  find.max_lr: 1.0     # and of the last, unless the loss diverges before
  find.steps: 100      # optimizer steps; the rate grows by the same factor in each
  find.output: .       # folder of lr_finder.png and lr_finder.csv

The range test of Smith 2017, with the run's own model, text, optimizer and precision; the rates of all
parameter groups grow together. Nothing is left behind but the two files."""


FIND_BATCH_SIZE = """\
gptpl find-batch-size: speed and memory of every batch size that fits

usage: gptpl find-batch-size [overrides of gptpl train] [find.key=value] ...

examples:
  gptpl find-batch-size model=gpt_18m
  gptpl find-batch-size model=gpt2_small data=python_stdlib find.max_batch_size=8
  gptpl find-batch-size experiment=quick trainer.recompute_activations=true

settings:
  find.max_batch_size: null   # the largest to try; null: until memory, text or the gain in speed ends
  find.timed_steps: 3         # of each size, after one to warm up
  find.output: .              # folder of batch_size_finder.png and batch_size_finder.csv

Batches of 1, 2, 4, ... windows are tried, each only if its estimated memory is free. On a CPU the memory is
that of the whole process at its peak. Nothing is left behind but the two files."""


WEIGHTS_LIST = """\
gptpl weights list: which GPT-2 weights are in the cache

usage: gptpl weights list

For each size and source: whether all its files are there, how many bytes, and the folder.
It has no settings."""


REPORT = """\
gptpl report: compare runs: ranking, curves, settings and samples, as a web page and Markdown

usage: gptpl report RUN_OR_SWEEP... [output=FOLDER]

examples:
  gptpl report runs/sweeps/quick_1a2b3c4d      # all trials of a sweep
  gptpl report runs/quick                      # all runs below a folder
  gptpl report RUN_A RUN_B output=compared     # two runs; without output= the files go to this folder
  gptpl report RUN                             # one run

settings:
  output: null    # folder of the files; null: the folder given, or this one where several are given

Writes report.html, which needs no other file and no network, report.md and its pictures report-*.png, and
prints the ranking. Runs are ranked by their lowest validation loss. Those with another text, split or
tokenizer are ranked apart: their losses cannot be compared. What settings did is weighed from 10 finished
runs on. Exit status: 0, 1 (some runs are damaged; the others are reported), 2 bad input."""


def program_help(commands: Mapping[str, str]) -> str:
    """The overview: every command in a line."""
    lines = [
        "gptpl: experiments with GPT-2-style language models",
        "",
        "usage: gptpl COMMAND [overrides]",
        "",
    ]
    lines += [f"  {name:<15} {text}" for name, text in commands.items()]
    lines += [
        "",
        "gptpl COMMAND --help shows a command's settings; --debug shows tracebacks; --version the version.",
    ]
    return "\n".join(lines)


def command_help(command: str, summary: str) -> str:
    """One command: usage, examples, settings of its own, config groups with their choices."""
    without_config = {
        "plan": PLAN,
        "find-lr": FIND_LR,
        "find-batch-size": FIND_BATCH_SIZE,
        "verify-resume": VERIFY_RESUME,
        "weights list": WEIGHTS_LIST,
        "report": REPORT,
        **RUNS_HELP,
    }
    if command in without_config:
        return without_config[command]
    folder = config_folder()
    name = command.replace(" ", "_")
    root = (folder / f"{name}.yaml").read_text(encoding="utf-8")
    groups = default_choices(name)
    lines = [f"gptpl {command}: {summary}", "", f"usage: gptpl {command} [group=choice] [key=value] ...", ""]
    lines.append("examples:")
    width = max(len(example) for example, _ in EXAMPLES[command])
    lines += [f"  {example:<{width}}  # {text}" for example, text in EXAMPLES[command]]
    if settings := _settings(root):
        lines += ["", "settings:", *settings]
    if groups:
        lines += ["", "groups (* is the default):"]
    for group, default in groups.items():
        lines += _group(folder, group, default)
    lines += ["", f"All keys with their values: gptpl {command} --cfg job"]
    if command in ("generate", "respond"):
        lines += ["Sampling rules, with or without `sampling.` before them:", *_fields(SamplingConf)]
    if command == "sweep":
        own = _fields(SearchConf, without=("sampler", "params"))
        lines += ["Settings of a search, with `sweep.` before them:", *own]
        lines += ["All other settings and groups are those of gptpl train: see gptpl train --help"]
    if command == "train":
        lines += ["Settings of a group: e.g. optimizer.lr=1e-3, trainer.max_epochs=20, data.batch_size=4"]
    return "\n".join(lines)


def _settings(root: str) -> list[str]:
    """The root's own `key: value  # comment` lines, without sections and what is Hydra's."""
    return [f"  {line}" for line in root.splitlines() if re.match(r"\w+: ", line)]


def _fields(schema: type, *, without: Collection[str] = ()) -> list[str]:
    """The fields of a schema with their defaults, some to a line."""
    shown = [field for field in dataclasses.fields(schema) if field.name not in without]
    fields = [f"{field.name}={_default(field)}" for field in shown]
    return textwrap.wrap(", ".join(fields), width=100, initial_indent="  ", subsequent_indent="  ")


def _default(field: "dataclasses.Field[object]") -> object:
    value = field.default
    if value is dataclasses.MISSING:
        return "[]"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else value


def _group(folder: Path, group: str, default: str) -> list[str]:
    """The group's choices, one a line, each with when to choose it."""
    lines = [f"  {group}"]
    choices = sorted((folder / group).glob("*.yaml"))
    width = max(len(choice.stem) for choice in choices)
    for choice in choices:
        mark = "*" if choice.stem == default else " "
        lines.append(f"   {mark} {choice.stem:<{width}}  {when_to_choose(choice)}")
    return lines
