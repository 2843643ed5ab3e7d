"""Answer instructions with a tuned model: one, or a whole file.

examples:
  gptpl respond checkpoint=RUN instruction='Name a colour.'                   # RUN: a run of task=instruct
  gptpl respond checkpoint=RUN instruction='Correct it.' input='He go home.'  # with an input
  gptpl respond checkpoint=RUN split=test output=responses.json               # the run's own test examples
  gptpl respond checkpoint=RUN file=mine.json output=answers.json             # a file; the same again resumes
  gptpl respond init=gpt2_hf template=alpaca instruction='Name a colour.'     # GPT-2 itself

flags:
  --json    print one answer as a JSON object

One answer goes to standard output; those of file= and split= go to output=, each with its instruction and
reference, for gptpl judge.
"""

import json
import logging
from dataclasses import asdict
from functools import partial
from typing import Any

from tqdm import tqdm

from gptpl.cli.arguments import Arguments, configured
from gptpl.cli.model_input import given_model, given_text, in_full, only_one, settings_of
from gptpl.errors import InputError

log = logging.getLogger(__name__)


@configured("respond", flags=["--json"], in_full=in_full)
def run(given: Arguments) -> None:
    """Prints the answer, or writes all answers to `output`."""
    import torch

    from gptpl.cli.texts import show
    from gptpl.evaluation.answers import WELL_FORMED
    from gptpl.generation import SamplingRules
    from gptpl.runs.loaded import load_language_model

    cfg = settings_of(given)
    rules = SamplingRules(**cfg["sampling"])
    many = _check(cfg, as_json=bool(given.flags))
    instruction = None if many else given_text(cfg["instruction"], key="instruction")
    if not many and (instruction is None or not instruction.strip()):
        raise InputError("instruction is not set: give instruction='...', file=FILE, or split=test")
    model = load_language_model(**given_model(cfg), precision=cfg["precision"])
    asked = model.with_template(cfg["template"], cfg["response_marker"])
    settings = {"max_new_tokens": cfg["max_new_tokens"], "seed": cfg["seed"], **asdict(rules)}
    if instruction is None:
        taken = ("output", "instruction_column", "input_column", "batch_size")
        answers = asked.respond_all(
            cfg["file"] if cfg["file"] is not None else asked.split_file(cfg["split"]),
            skip_too_long=cfg["too_long"] == "skip",
            progress=partial(tqdm, unit="batch", desc="answering", disable=None),
            **{name: cfg[name] for name in taken},
            **settings,
        )
        good, count = sum(answer[WELL_FORMED] for answer in answers), len(answers)
        log.info("well-formed answers: %d of %d (%.1f %%)", good, count, 100 * good / count)
        log.info("answers: %s", cfg["output"])
    elif not given.flags:
        show(asked.stream_response(instruction, cfg["input"], **settings))
    else:
        settings["seed"] = int(torch.seed() % 2**32) if cfg["seed"] is None else cfg["seed"]
        answer = asked.answer(instruction, cfg["input"], **settings)
        used = asked.answerer(**asdict(rules)).rules
        record = {
            "instruction": instruction,
            "input": cfg["input"],
            "model_response": answer.text,
            "finish": answer.finish,
            "well_formed": answer.well_formed,
            "template": asked.template.name,
            "checkpoint": str(asked.path),
            "step": asked.step,
            "sampling": {"temperature": used.temperature} | used.changes,
            "seed": settings["seed"],
        }
        print(json.dumps(record, ensure_ascii=False), flush=True)


def _check(cfg: dict[str, Any], *, as_json: bool) -> bool:
    """Whether many answers are asked for; raises InputError for settings that exclude each other."""
    source = only_one({name: cfg[name] for name in ("instruction", "file", "split")})
    many = source in ("file", "split")
    if many and cfg["output"] is None:
        raise InputError(f"{source}= needs a file for the answers: give output=responses.json")
    if not many and cfg["output"] is not None:
        raise InputError(
            f"output={cfg['output']} is for file= or split=: one answer is printed, leave it out"
        )
    if many and as_json:
        raise InputError(f"--json is for one instruction: {source}= writes JSON to output= anyway")
    return many
