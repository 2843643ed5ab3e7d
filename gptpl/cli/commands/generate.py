"""Continue a prompt with a trained model.

examples:
  gptpl generate checkpoint=latest prompt='Once upon a time'    # with the newest run; or a folder, or a .ckpt
  echo 'Once upon a time' | gptpl generate checkpoint=RUN sampling=creative  # a piped prompt, a preset
  gptpl generate checkpoint=RUN temperature=0.8 top_p=0.9 seed=1  # your own sampling rules, reproducible
  gptpl generate checkpoint=RUN num_samples=5 --json            # five texts as JSON lines
  gptpl generate checkpoint=RUN -i                              # type prompts, change the rules; /help

flags:
  --json               print a JSON object for each text
  -i, --interactive    a conversation: prompt after prompt

The text goes to standard output while it is generated, everything else to standard error.
"""

import json
import logging
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gptpl.cli.arguments import Arguments, configured
from gptpl.cli.console import collector_paused
from gptpl.cli.model_input import given_model, given_text, in_full, settings_of
from gptpl.errors import InputError

if TYPE_CHECKING:
    from gptpl.generation import Completion, SamplingRules
    from gptpl.runs.models import LanguageModel

log = logging.getLogger(__name__)


@configured("generate", flags=["--json", "-i", "--interactive"], in_full=in_full)
def run(given: Arguments) -> None:
    """Prints the texts."""
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
    model = load_language_model(**given_model(cfg), precision=cfg["precision"])
    if interactive:
        converse(model, given)
        return
    prompt = "Every effort moves you" if prompt is None else prompt
    read = model.tokenizer.decode(model.tokenizer.encode(prompt))
    if read != prompt:  # a vocabulary of words does not know every word
        log.info("the model reads the prompt as: %s", read)
    cfg["seed"] = int(torch.seed() % 2**32) if cfg["seed"] is None else cfg["seed"]
    # Read first, as it may be refused.
    training = model.training_text(cfg["training_text"]) if cfg["memorisation"] else None
    completions = _written(cfg, model, prompt, rules, as_json=as_json)
    lines = statistics_lines(completions) if cfg["statistics"] else []
    if training is not None:
        lines += memorisation_lines(completions, training, decode=model.tokenizer.decode)
    for line in lines:
        log.info("%s", line)


def _written(
    cfg: dict[str, Any], model: "LanguageModel", prompt: str, rules: "SamplingRules", *, as_json: bool
) -> list["Completion"]:
    """Generates the texts and prints them, a single one meanwhile."""
    from gptpl.cli.texts import completed

    settings = {name: cfg[name] for name in ("max_new_tokens", "num_samples", "stop", "seed", "alternatives")}
    if settings["alternatives"] is None and cfg["statistics"]:
        settings["alternatives"] = 0
    settings |= asdict(rules)
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
