"""Answer instructions with a tuned model: one, or a whole file.

examples:
  gptpl respond checkpoint=RUN instruction='Name a colour.'                   # RUN: a run of task=instruct
  gptpl respond checkpoint=RUN instruction='Correct it.' input='He go home.'  # with an input
  gptpl respond checkpoint=RUN split=test output=responses.json               # the run's own test examples
  gptpl respond checkpoint=RUN file=mine.json output=answers.json             # a file; the same again resumes
  gptpl respond init=gpt2_hf template=alpaca instruction='Name a colour.'     # GPT-2 itself

flags:
  --json    print one answer as a JSON object

One answer goes to standard output; those of file= and split= go to output=, each beside its instruction and
reference, for gptpl judge.
"""

import json
import logging
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from gptpl.cli.console import Console
from gptpl.cli.model_input import (
    composed,
    given_model,
    given_text,
    piped_text,
    replace_unknown_letters,
)
from gptpl.data.splits import SPLITS
from gptpl.errors import InputError
from gptpl.generation import SamplingRules
from gptpl.generation.sampling import check_seed
from gptpl.model.protocol import vocab_size
from gptpl.runs.loaded import load_language_model
from gptpl.runs.models import InstructionModel
from gptpl.training.answers import WELL_FORMED

log = logging.getLogger(__name__)

TOO_LONG = ("refuse", "skip")


def run(arguments: list[str]) -> int:
    """Prints the answer to standard output, or writes all answers to the output; returns the exit status."""
    cfg, flags = composed("respond", arguments, flags={"--json": "json"})
    as_json = "json" in flags
    if cfg is None:
        return 0
    with Console():
        replace_unknown_letters()
        rules = SamplingRules(**cfg["sampling"])
        _check(cfg, as_json)
        many = cfg["file"] is not None or cfg["split"] is not None
        instruction = None if many else _instruction(cfg)
        model = load_language_model(**given_model(cfg), precision=cfg["precision"])
        asked = model.with_template(cfg["template"], cfg["response_marker"])
        if instruction is None:
            _answer_all(cfg, asked, rules)
        else:
            _answer(cfg, asked, rules, instruction, as_json=as_json)
    return 0


def _instruction(cfg: dict[str, Any]) -> str:
    instruction = given_text(cfg["instruction"], None, key="instruction")
    instruction = piped_text("instruction") if instruction is None else instruction
    if instruction is None or not instruction.strip():
        raise InputError("instruction is not set: give instruction='...', file=FILE, or split=test")
    return instruction


def _check(cfg: dict[str, Any], as_json: bool) -> None:
    """Refuses settings that exclude each other."""
    if cfg["seed"] is not None:
        check_seed(cfg["seed"])
    given = [name for name in ("instruction", "file", "split") if cfg[name] is not None]
    if len(given) > 1:
        raise InputError(f"{'= and '.join(given)}= are both set: give one of them")
    many = given in (["file"], ["split"])
    if many and cfg["output"] is None:
        raise InputError(f"{given[0]}={cfg[given[0]]} has many answers: give output=responses.json for them")
    if not many and cfg["output"] is not None:
        raise InputError(
            f"output={cfg['output']} is for file= or split=: one answer is printed, leave it out"
        )
    if many and as_json:
        raise InputError(f"--json is for one instruction: {given[0]}= writes JSON to output= anyway")
    if cfg["too_long"] not in TOO_LONG:
        raise InputError(f"too_long={cfg['too_long']} is unknown: choose one of {', '.join(TOO_LONG)}")
    if cfg["split"] is not None and cfg["split"] not in SPLITS:
        raise InputError(f"split={cfg['split']} is unknown: choose one of {', '.join(SPLITS)}")
    for name in ("max_new_tokens", "batch_size"):
        if cfg[name] < 1:
            raise InputError(f"{name}={cfg[name]} is too small: give 1 or more")


def _answer_all(cfg: dict[str, Any], model: InstructionModel, rules: SamplingRules) -> None:
    taken = ("output", "instruction_column", "input_column", "max_new_tokens", "batch_size", "seed")
    answers = model.respond_all(
        cfg["file"] if cfg["file"] is not None else model.split_file(cfg["split"]),
        skip_too_long=cfg["too_long"] == "skip",
        progress=partial(tqdm, unit="batch", desc="answering", disable=None),
        **{name: cfg[name] for name in taken},
        **asdict(rules),
    )
    good = sum(answer[WELL_FORMED] for answer in answers)
    log.info("well-formed answers: %d of %d (%.1f %%)", good, len(answers), 100 * good / len(answers))
    log.info("answers: %s", cfg["output"])


def _answer(
    cfg: dict[str, Any], model: InstructionModel, rules: SamplingRules, instruction: str, *, as_json: bool
) -> None:
    """Prints one answer: while it is made, or as a JSON object."""
    seed = int(torch.seed() % 2**32) if cfg["seed"] is None else cfg["seed"]
    settings = {"max_new_tokens": cfg["max_new_tokens"], "seed": seed, **asdict(rules)}
    if not as_json:
        texts = model.stream_response(instruction, cfg["input"], **settings)
        try:
            for text in texts:
                print(text, end="", flush=True)
        finally:
            print(flush=True)  # also after Ctrl-C: the shell's prompt begins a line of its own
        return
    answer = model.answer(instruction, cfg["input"], **settings)
    used = rules.within(vocab_size(model.net))
    record = {
        "instruction": instruction,
        "input": cfg["input"],
        "model_response": answer.text,
        "finish": answer.finish,
        "well_formed": answer.well_formed,
        "template": model.template.name,
        "checkpoint": str(model.path),
        "step": model.step,
        "sampling": {"temperature": used.temperature} | used.changes,
        "seed": seed,
    }
    print(json.dumps(record, ensure_ascii=False), flush=True)
