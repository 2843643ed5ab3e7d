"""`gptpl generate`: prompts continued by a trained model, as text, as JSON lines, or in a conversation."""

import io
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from gptpl.cli.console import RunLog
from gptpl.cli.hydra_app import run_under_hydra
from gptpl.cli.model_input import given_text, loaded_checkpoint, piped_text
from gptpl.cli.quoting import quoted, without_interpolation
from gptpl.cli.schema_sampling import SamplingConf
from gptpl.cli.trainer import check_seed
from gptpl.errors import InputError
from gptpl.generation import Completion, SamplingRules, search_text, stream_text
from gptpl.training.checkpoint import LoadedCheckpoint

log = logging.getLogger(__name__)

DEFAULT_PROMPT = "Every effort moves you"
FLAGS = {"--json": "json", "-i": "interactive", "--interactive": "interactive"}
SHORT_KEYS = frozenset(field.name for field in fields(SamplingConf))
"""May be given without the `sampling.` before them."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of the model, checked."""

    loaded: LoadedCheckpoint
    cfg: DictConfig
    prompt: str
    rules: SamplingRules
    seed: int

    def settings(self) -> dict[str, Any]:
        """Arguments of `stream_text` and `complete`."""
        device = self.loaded.net.device
        alternatives = self.cfg.alternatives
        if alternatives is None and self.cfg.statistics:
            alternatives = 0
        return {
            "rules": self.rules,
            "max_new_tokens": self.cfg.max_new_tokens,
            "num_samples": self.cfg.num_samples,
            "stop": list(self.cfg.stop),
            "generator": torch.Generator(device).manual_seed(self.seed),
            "alternatives": alternatives,
        }


def run(arguments: list[str]) -> int:
    """Prints texts to standard output, everything else to standard error; returns the exit status."""
    modes = {FLAGS[argument] for argument in arguments if argument in FLAGS}
    if len(modes) > 1:
        raise InputError("--json and -i exclude each other: -i is for people, --json for programs")
    overrides = [_in_full(argument) for argument in arguments if argument not in FLAGS]
    run_under_hydra("generate", overrides, lambda cfg: _generate(cfg, "".join(modes)))
    return 0


def _in_full(argument: str) -> str:
    """`temperature=1` is short for `sampling.temperature=1`, and a single stop string for a list of it."""
    key, _, value = argument.partition("=")
    if key == "stop" and value and not value.startswith("["):
        return f"stop=[{quoted(without_interpolation(value))}]"
    return f"sampling.{argument}" if key in SHORT_KEYS else argument


def _generate(cfg: DictConfig, mode: str) -> None:
    run_log = RunLog()
    try:
        if isinstance(sys.stdout, io.TextIOWrapper):
            # A terminal that lacks a character shows a question mark: better than no text at all.
            sys.stdout.reconfigure(errors="replace")
        rules = SamplingRules(**OmegaConf.to_container(cfg.sampling))  # type: ignore[arg-type]
        if cfg.seed is not None:
            check_seed(cfg.seed)
        # OmegaConf takes this one text for "not set".
        prompt = "???" if OmegaConf.is_missing(cfg, "prompt") else cfg.prompt
        prompt = given_text(prompt, cfg.prompt_file, key="prompt")
        if mode == "interactive":
            from gptpl.cli.conversation import converse

            converse(loaded_checkpoint(cfg), cfg, rules)
            return
        if prompt is None:
            prompt = piped_text("prompt")
        loaded = loaded_checkpoint(cfg)
        prompt = DEFAULT_PROMPT if prompt is None else prompt
        read = loaded.tokenizer.decode(loaded.tokenizer.encode(prompt))
        if read != prompt:  # a vocabulary of words does not know every word
            log.info("the model reads the prompt as: %s", read)
        request = Request(
            loaded=loaded,
            cfg=cfg,
            prompt=prompt,
            rules=rules.within(loaded.net.config.vocab_size),
            seed=chosen_seed(cfg.seed),
        )
        report = _reports(request)
        completions = _written(request, as_json=mode == "json")
        for make in report:
            for line in make(completions):
                log.info("%s", line)
    finally:
        run_log.close()


def chosen_seed(seed: int | None) -> int:
    """The seed, or one from the system."""
    return int(torch.seed() % 2**32) if seed is None else seed


def _written(request: Request, *, as_json: bool) -> list[Completion]:
    """Makes the texts and prints them, a single one while it is made."""
    cfg, prompt = request.cfg, request.prompt
    if cfg.num_beams is None and cfg.num_samples == 1 and not as_json:
        return _streamed(request)
    completions = _searched(request) if cfg.num_beams is not None else _completed(request)
    for completion in completions:
        if as_json:
            print(json.dumps(_record(request, completion), ensure_ascii=False), flush=True)
        else:
            if len(completions) > 1:
                print(f"--- {completion.sample + 1} of {len(completions)}")
            print(prompt + completion.text, flush=True)
    return completions


def _streamed(request: Request) -> list[Completion]:
    loaded = request.loaded
    pieces = stream_text(loaded.net, loaded.tokenizer, [request.prompt], **request.settings())
    completions = []
    print(request.prompt, end="", flush=True)
    try:
        for piece in pieces:
            print(piece.text, end="", flush=True)
            if piece.completion is not None:
                completions.append(piece.completion)
    finally:
        print(flush=True)  # also after Ctrl-C: the shell's prompt begins a line of its own
    return completions


def _completed(request: Request) -> list[Completion]:
    """Several texts at once, with a progress bar, in order."""
    cfg, loaded = request.cfg, request.loaded
    pieces = stream_text(loaded.net, loaded.tokenizer, [request.prompt], **request.settings())
    tokens = [0] * cfg.num_samples
    completions: list[Completion] = []
    total = cfg.num_samples * cfg.max_new_tokens
    with tqdm(total=total, unit="token", desc="writing", disable=None, leave=False) as bar:
        for piece in pieces:
            bar.update(piece.tokens - tokens[piece.sample])
            tokens[piece.sample] = piece.tokens
            if piece.completion is not None:
                completions.append(piece.completion)
                bar.total -= cfg.max_new_tokens - piece.tokens
    return sorted(completions, key=lambda completion: completion.sample)


def _searched(request: Request) -> list[Completion]:
    """The best beams, as many as num_samples says."""
    cfg, loaded = request.cfg, request.loaded
    if cfg.num_samples > cfg.num_beams:
        raise InputError(f"num_samples={cfg.num_samples} exceeds num_beams={cfg.num_beams}: raise num_beams")
    if cfg.stop or cfg.alternatives is not None or cfg.statistics:
        raise InputError("num_beams knows no stop, alternatives or statistics: leave them out, or num_beams")
    log.info("beam search: the sampling rules are not used")
    found = search_text(
        loaded.net,
        loaded.tokenizer,
        request.prompt,
        num_beams=cfg.num_beams,
        max_new_tokens=cfg.max_new_tokens,
    )
    return found[: cfg.num_samples]


def _reports(request: Request) -> list[Callable[[list[Completion]], list[str]]]:
    """What is to be said of the texts; what that needs is read before they are made, and may be refused."""
    # Imported where used, for it takes a second.
    if not (request.cfg.statistics or request.cfg.memorisation):
        return []
    from gptpl.cli.text_report import memorisation_report, statistics_lines

    reports: list[Callable[[list[Completion]], list[str]]] = []
    if request.cfg.statistics:
        reports.append(statistics_lines)
    if request.cfg.memorisation:
        reports.append(memorisation_report(request.loaded))
    return reports


def _record(request: Request, completion: Completion) -> dict[str, Any]:
    """One line of `--json`."""
    record: dict[str, Any] = {
        "prompt": request.prompt,
        "text": completion.text,
        "finish": completion.finish,
        "sample": completion.sample,
        "tokens": list(completion.tokens),
        "checkpoint": str(request.loaded.path),
        "step": request.loaded.step,
    }
    if request.cfg.num_beams is None:
        record |= {"sampling": {"temperature": request.rules.temperature} | request.rules.changes}
        record |= {"seed": request.seed}
    else:
        record |= {"num_beams": request.cfg.num_beams}
    if completion.details is not None:
        record["details"] = [
            {
                "text": _shown(request, token),
                "log_probability": each.log_probability,
                "entropy": each.entropy,
                "alternatives": [
                    {"token": other, "text": _shown(request, other), "log_probability": log_probability}
                    for other, log_probability in each.alternatives
                ],
            }
            for token, each in zip(completion.tokens, completion.details, strict=True)
        ]
    return record


def _shown(request: Request, token: int) -> str:
    # A model may have more rows than its tokenizer has tokens.
    return request.loaded.tokenizer.decode([token]) if token < request.loaded.tokenizer.vocab_size else ""
