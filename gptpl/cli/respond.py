"""`gptpl respond`: answers of an instruction-tuned model, to one instruction or to a whole file of them."""

import io
import json
import logging
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from gptpl.cli.console import RunLog
from gptpl.cli.generate import SHORT_KEYS, chosen_seed
from gptpl.cli.hydra_app import run_under_hydra
from gptpl.cli.model_input import given_text, loaded_checkpoint, piped_text
from gptpl.cli.trainer import check_seed
from gptpl.data.instructions.template import PromptTemplate
from gptpl.errors import InputError
from gptpl.generation import Completion, SamplingRules
from gptpl.training.answers import Answerer
from gptpl.training.checkpoint import LoadedCheckpoint

log = logging.getLogger(__name__)

JSON_FLAG = "--json"
TOO_LONG = ("refuse", "skip")


@dataclass(frozen=True, kw_only=True)
class Request:
    """A model that can be asked, and how the command was given."""

    cfg: DictConfig
    loaded: LoadedCheckpoint
    answerer: Answerer
    seed: int

    def generator(self, *numbers: int) -> torch.Generator:
        """Random numbers of the seed and of these numbers."""
        # Mixed into 32 bits because torch's CPU generator ignores the upper half of a seed.
        mixed = np.random.SeedSequence((self.seed, *numbers)).generate_state(1)
        return torch.Generator(self.answerer.net.device).manual_seed(int(mixed[0]))


def run(arguments: list[str]) -> int:
    """Prints the answer to standard output, or writes all answers to the output; returns the exit status."""
    as_json = JSON_FLAG in arguments
    overrides = [_in_full(argument) for argument in arguments if argument != JSON_FLAG]
    run_under_hydra("respond", overrides, lambda cfg: _respond(cfg, as_json=as_json))
    return 0


def _in_full(argument: str) -> str:
    """`temperature=1` is short for `sampling.temperature=1`."""
    return f"sampling.{argument}" if argument.partition("=")[0] in SHORT_KEYS else argument


def _respond(cfg: DictConfig, *, as_json: bool) -> None:
    with RunLog():
        if isinstance(sys.stdout, io.TextIOWrapper):
            # A terminal that lacks a character shows a question mark: better than no text at all.
            sys.stdout.reconfigure(errors="replace")
        rules = SamplingRules(**OmegaConf.to_container(cfg.sampling))  # type: ignore[arg-type]
        if cfg.seed is not None:
            check_seed(cfg.seed)
        _check(cfg, as_json)
        if cfg.file is not None or cfg.split is not None:
            from gptpl.cli.respond_file import respond_to_all

            respond_to_all(_request(cfg, rules))
            return
        # OmegaConf takes this one text for "not set".
        instruction = "???" if OmegaConf.is_missing(cfg, "instruction") else cfg.instruction
        instruction = given_text(instruction, None, key="instruction")
        instruction = piped_text("instruction") if instruction is None else instruction
        if instruction is None or not instruction.strip():
            raise InputError("instruction is not set: give instruction='...', file=FILE, or split=test")
        _answer(_request(cfg, rules), instruction, as_json=as_json)


def _check(cfg: DictConfig, as_json: bool) -> None:
    """Refuses settings that exclude each other."""
    given = [name for name in ("instruction", "file", "split") if OmegaConf.select(cfg, name) is not None]
    if len(given) > 1:
        raise InputError(f"{'= and '.join(given)}= are both set: give one of them")
    many = given in (["file"], ["split"])
    if many and cfg.output is None:
        raise InputError(f"{given[0]}={cfg[given[0]]} has many answers: give output=responses.json for them")
    if not many and cfg.output is not None:
        raise InputError(f"output={cfg.output} is for file= or split=: one answer is printed, leave it out")
    if many and as_json:
        raise InputError(f"--json is for one instruction: {given[0]}= writes JSON to output= anyway")
    if cfg.too_long not in TOO_LONG:
        raise InputError(f"too_long={cfg.too_long} is unknown: choose one of {', '.join(TOO_LONG)}")
    for name in ("max_new_tokens", "batch_size"):
        if cfg[name] < 1:
            raise InputError(f"{name}={cfg[name]} is too small: give 1 or more")


def _request(cfg: DictConfig, rules: SamplingRules) -> Request:
    loaded = loaded_checkpoint(cfg)
    answerer = Answerer(
        net=loaded.net,
        tokenizer=loaded.tokenizer,
        template=_template(cfg, loaded),
        rules=rules.within(loaded.net.config.vocab_size),
        max_new_tokens=cfg.max_new_tokens,
    )
    return Request(cfg=cfg, loaded=loaded, answerer=answerer, seed=chosen_seed(cfg.seed))


def _template(cfg: DictConfig, loaded: LoadedCheckpoint) -> PromptTemplate:
    """The template asked for, else the checkpoint's own. Raises InputError where there is neither."""
    state = loaded.task.get("template")
    if cfg.template is None and state is None:
        raise InputError(
            f"checkpoint={loaded.path} was not tuned to follow instructions (task={loaded.task['name']}):"
            " give template=alpaca to ask it all the same"
        )
    own = None if state is None else PromptTemplate(**state)
    if cfg.template is None:
        assert own is not None
        marker = own.response_marker if cfg.response_marker is None else cfg.response_marker
        return PromptTemplate(own.name, own.source, marker)
    asked = PromptTemplate.named(cfg.template, cfg.response_marker)
    if own is not None and asked.state() != own.state():
        log.warning("the model was tuned with template=%s, not %s", own.name, asked.name)
    return asked


def _answer(request: Request, instruction: str, *, as_json: bool) -> None:
    """Prints one answer: while it is made, or as a JSON object."""
    cfg, answerer = request.cfg, request.answerer
    prompt = answerer.prompt(instruction, cfg.input, place="the instruction")
    completion: Completion | None = None
    begun = False
    try:
        for piece in answerer.stream(prompt, request.generator()):
            # An answer has no white space around it; what is inside is let through as it comes.
            text = piece.text if begun else piece.text.lstrip()
            begun = begun or bool(text)
            if not as_json:
                print(text, end="", flush=True)
            completion = piece.completion or completion
    finally:
        if not as_json:
            print(flush=True)  # also after Ctrl-C: the shell's prompt begins a line of its own
    assert completion is not None
    if as_json:
        print(json.dumps(_record(request, instruction, completion), ensure_ascii=False), flush=True)


def _record(request: Request, instruction: str, completion: Completion) -> dict[str, Any]:
    answer = request.answerer.answer(completion)
    rules = request.answerer.rules
    return {
        "instruction": instruction,
        "input": request.cfg.input,
        "model_response": answer.text,
        "finish": completion.finish,
        "well_formed": answer.well_formed,
        "template": request.answerer.template.name,
        "checkpoint": str(request.loaded.path),
        "step": request.loaded.step,
        "sampling": {"temperature": rules.temperature} | rules.changes,
        "seed": request.seed,
    }
