"""The commands that write texts: continue a prompt, answer instructions."""

import json
import logging
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from gptpl.cli.arguments import Arguments, configured
from gptpl.cli.console import collector_paused
from gptpl.cli.model_input import given_filter, given_model, given_text, in_full, only_one, settings_of
from gptpl.errors import InputError
from gptpl.filters import Filter, Verdict, summary

if TYPE_CHECKING:
    from gptpl.generation import Completion, SamplingRules
    from gptpl.runs.models import LanguageModel

log = logging.getLogger(__name__)


# --- gptpl generate -------------------------------------------------------------------------------------


@configured("generate", flags=["--json", "-i", "--interactive"], in_full=in_full)
def generate(given: Arguments) -> None:
    """Continue a prompt with a trained model.

    examples:
      gptpl generate checkpoint=latest prompt='Once upon a time'    # with the newest run; or a folder, or a .ckpt
      echo 'Once upon a time' | gptpl generate checkpoint=RUN sampling=creative  # a piped prompt, a preset
      gptpl generate checkpoint=RUN temperature=0.8 top_p=0.9 seed=1  # your own sampling rules, reproducible
      gptpl generate checkpoint=RUN num_samples=5 --json            # five texts as JSON lines
      gptpl generate checkpoint=RUN filter=personal_data            # with e-mail addresses and others marked
      gptpl generate checkpoint=RUN -i                              # type prompts, change the rules; /help

    flags:
      --json               print a JSON object for each text
      -i, --interactive    a conversation: prompt after prompt

    The text goes to standard output while it is generated, everything else to standard error.
    """
    with collector_paused():
        import torch

        from gptpl.cli.texts import converse
        from gptpl.evaluation.memorisation import memorisation_lines
        from gptpl.evaluation.statistics import statistics_lines
        from gptpl.generation import SamplingRules
        from gptpl.runs.loaded import load_language_model

    as_json, interactive = "--json" in given.flags, bool({"-i", "--interactive"} & {*given.flags})
    if as_json and interactive:
        raise InputError("--json and -i exclude each other: leave one out")
    cfg = settings_of(given)
    rules = SamplingRules(**cfg["sampling"])
    prompt = given_text(cfg["prompt"], cfg["prompt_file"], key="prompt", piped=not interactive)
    filter = given_filter(cfg)
    for setting in ("statistics", "memorisation") if filter else ():
        if cfg[setting]:
            raise InputError(f"{setting}=true is about the model's own text: leave it or filter= out")
    if filter and cfg["alternatives"] is not None:
        raise InputError(
            f"alternatives={cfg['alternatives']} shows text that no filter has judged: leave it or filter= out"
        )
    model = load_language_model(**given_model(cfg), precision=cfg["precision"])
    if interactive:
        converse(model, given, filter)
        return
    prompt = "Every effort moves you" if prompt is None else prompt
    read = model.tokenizer.decode(model.tokenizer.encode(prompt))
    if read != prompt:  # a vocabulary of words does not know every word
        log.info("the model reads the prompt as: %s", read)
    cfg["seed"] = int(torch.seed() % 2**32) if cfg["seed"] is None else cfg["seed"]
    # Read first, as it may be refused.
    training = model.training_text(cfg["training_text"]) if cfg["memorisation"] else None
    completions = _written(cfg, model, prompt, rules, filter, as_json=as_json)
    if filter is not None:
        log.info("%s", summary(each.verdict.counts for each in completions if each.verdict is not None))
    lines = statistics_lines(completions) if cfg["statistics"] else []
    if training is not None:
        lines += memorisation_lines(completions, training, decode=model.tokenizer.decode)
    for line in lines:
        log.info("%s", line)


def _written(
    cfg: dict[str, Any],
    model: "LanguageModel",
    prompt: str,
    rules: "SamplingRules",
    filter: Filter | None,
    *,
    as_json: bool,
) -> list["Completion"]:
    """Generates the texts and prints them, a single one meanwhile."""
    from gptpl.cli.texts import completed

    settings = {name: cfg[name] for name in ("max_new_tokens", "num_samples", "stop", "seed", "alternatives")}
    if settings["alternatives"] is None and cfg["statistics"]:
        settings["alternatives"] = 0
    settings |= asdict(rules) | {"filter": filter}
    streamed = cfg["num_beams"] is None and cfg["num_samples"] == 1 and not as_json
    facts: dict[str, Any] = {"checkpoint": str(model.path), "step": model.step}
    if cfg["num_beams"] is None:
        completions = completed(model, prompt, settings, streamed=streamed)
        used = model.rules(**asdict(rules))
        facts |= {"sampling": {"temperature": used.temperature} | used.changes, "seed": cfg["seed"]}
    else:
        completions = model.complete([prompt], num_beams=cfg["num_beams"], **settings)
        log.info("beam search: the sampling rules were not used")
        facts |= {"num_beams": cfg["num_beams"]}
    for completion in completions:
        if as_json:
            record = completion.record(prompt, model.tokenizer)
            print(json.dumps(record | facts, ensure_ascii=False), flush=True)
        elif not streamed:
            if len(completions) > 1:
                print(f"--- {completion.sample + 1} of {len(completions)}")
            print(prompt + completion.text, flush=True)
    return completions


# --- gptpl respond --------------------------------------------------------------------------------------


@configured("respond", flags=["--json"], in_full=in_full)
def respond(given: Arguments) -> None:
    """Answer instructions with a tuned model: one, or a whole file.

    examples:
      gptpl respond checkpoint=RUN instruction='Name a colour.'                   # RUN: a run of task=instruct
      gptpl respond checkpoint=RUN instruction='Correct it.' input='He go home.'  # with an input
      gptpl respond checkpoint=RUN split=test output=responses.json               # the run's own test examples
      gptpl respond checkpoint=RUN file=mine.json output=answers.json             # a file; the same again resumes
      gptpl respond init=gpt2_hf template=alpaca instruction='Name a colour.'     # GPT-2 itself
      gptpl respond checkpoint=RUN instruction='Name a colour.' filter=personal_data  # e-mail addresses ... marked

    flags:
      --json    print one answer as a JSON object

    One answer goes to standard output; those of file= and split= go to output=, each with its instruction and
    reference, for gptpl judge.
    """
    import torch

    from gptpl.cli.texts import show, texts_of
    from gptpl.evaluation.answers import FILTERED, WELL_FORMED
    from gptpl.generation import SamplingRules
    from gptpl.runs.loaded import load_language_model

    cfg = settings_of(given)
    rules = SamplingRules(**cfg["sampling"])
    many = _check(cfg, as_json=bool(given.flags))
    instruction = None if many else given_text(cfg["instruction"], key="instruction")
    if not many and (instruction is None or not instruction.strip()):
        raise InputError("instruction is not set: give instruction='...', file=FILE, or split=test")
    filter = given_filter(cfg)
    counts: list[dict[str, int]] = []
    model = load_language_model(**given_model(cfg), precision=cfg["precision"])
    asked = model.with_template(cfg["template"], cfg["response_marker"])
    settings = {"max_new_tokens": cfg["max_new_tokens"], "seed": cfg["seed"], **asdict(rules)}
    settings["filter"] = filter
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
        counts = [answer.get(FILTERED, {}) for answer in answers]
    elif not given.flags:
        verdicts: list[Verdict] = []
        show(texts_of(asked.response_pieces(instruction, cfg["input"], **settings), verdicts))
        counts = [verdict.counts for verdict in verdicts]
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
        if answer.verdict is not None:
            counts = [answer.verdict.counts]
            record[FILTERED] = answer.verdict.counts
        print(json.dumps(record, ensure_ascii=False), flush=True)
    if filter is not None:
        log.info("%s", summary(counts))


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
