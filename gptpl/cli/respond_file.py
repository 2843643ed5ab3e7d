"""Answers to a whole file of instructions, beside the right ones; broken off, it goes on where it was."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gptpl.cli.respond import Request
from gptpl.data.instructions.entries import PlacedRecord, read_records
from gptpl.data.instructions.split import SPLITS
from gptpl.data.instructions.split_files import split_file
from gptpl.errors import InputError
from gptpl.files.partial_results import PartialResults
from gptpl.generation.sampling import is_greedy
from gptpl.model import CachedGPT
from gptpl.training.answers import Answer, Answerer
from gptpl.training.state_digest import digest

log = logging.getLogger(__name__)

RESPONSE = "model_response"
"""What the book calls the answer of the model."""
WELL_FORMED = "well_formed"
"""See `Answerer.answer`; the text alone does not show whether the model ended it."""


def respond_to_all(request: Request) -> None:
    """Writes a JSON list: every entry as it was, with `instruction`, `input`, and the answer beside them.

    Raises InputError for a file or an output that cannot be used, and for a prompt that leaves no room.
    """
    cfg = request.cfg
    records = _with_room(request, read_records(_file(request)))
    questions = [_question(request, record) for record in records]
    prompts = [request.answerer.prompt(*question) for question in questions]
    results = PartialResults(Path(cfg.output).expanduser(), _settings(request, prompts, records))
    done = len(results.values)
    if done:
        log.info("%d of %d answers are in %s: going on", done, len(records), results.path)
    with tqdm(total=len(records), initial=done, unit="answer", desc="answering", disable=None) as bar:
        for first, answers in _answered(request, prompts, done):
            made = [
                {**records[place].fields, **_named(questions[place]), **_said(answer)}
                for place, answer in enumerate(answers, first)
            ]
            results.add(made)
            bar.update(len(made))
    results.finish()
    good, all_of_them = sum(value[WELL_FORMED] for value in results.values), len(records)
    log.info("well-formed answers: %d of %d (%.1f %%)", good, all_of_them, 100 * good / all_of_them)
    log.info("answers: %s", results.output)


def _with_room(request: Request, records: Sequence[PlacedRecord]) -> list[PlacedRecord]:
    """The entries whose prompts leave room to answer. Raises InputError for another, unless it is skipped."""
    kept = []
    for record in records:
        question = _question(request, record)
        try:
            request.answerer.prompt(*question, place=record.place)
        except InputError as error:
            if request.cfg.too_long != "skip":
                raise InputError(f"{error}, or set too_long=skip") from error
            log.warning("skipped: %s", error)
        else:
            kept.append(record)
    if not kept:
        raise InputError("too_long=skip leaves no entry: give shorter ones, or a model with a longer context")
    return kept


def _answered(request: Request, prompts: Sequence[str], done: int) -> Iterator[tuple[int, list[Answer]]]:
    """Batch by batch from the first prompt without an answer: its number, and the answers."""
    batch_size = request.cfg.batch_size
    answerer: Answerer = dataclasses.replace(
        request.answerer, net=CachedGPT.of(request.answerer.net, rows=min(batch_size, len(prompts)))
    )
    # In whole batches, as they were made: what is drawn depends on the place in the batch.
    for first in range(done, len(prompts), batch_size):
        answers = answerer.answers(prompts[first : first + batch_size], request.generator(first))
        yield first, answers


def _file(request: Request) -> Path:
    """The file given, or that of the run's split. Raises InputError where there is none."""
    cfg, checkpoint = request.cfg, request.loaded.path
    if cfg.file is not None:
        return Path(cfg.file).expanduser()
    if cfg.split not in SPLITS:
        raise InputError(f"split={cfg.split} is unknown: choose one of {', '.join(SPLITS)}")
    found = split_file(checkpoint.parent.parent, cfg.split)
    if not found.is_file():
        raise InputError(
            f"split={cfg.split}: {found} is not there, for checkpoint={checkpoint} lies in no run of"
            " task=instruct, or one without that split: give file=FILE instead"
        )
    return found


def _question(request: Request, record: PlacedRecord) -> tuple[str, str]:
    cfg = request.cfg
    text = "" if cfg.input_column is None else record.text(cfg.input_column, may_be_empty=True)
    return record.text(cfg.instruction_column), text


def _named(question: tuple[str, str]) -> dict[str, str]:
    return {"instruction": question[0], "input": question[1]}


def _said(answer: Answer) -> dict[str, Any]:
    return {RESPONSE: answer.text, WELL_FORMED: answer.well_formed}


def _settings(request: Request, prompts: Sequence[str], records: Sequence[PlacedRecord]) -> dict[str, Any]:
    """What the answers, and what stands beside them, depend on."""
    answerer, cfg = request.answerer, request.cfg
    asked = [list(prompts), [record.fields for record in records]]
    rules = answerer.rules
    settings = {
        "model": digest(request.loaded.net.state_dict())[:16],
        "file": hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16],
        "template": answerer.template.state(),
        "max_new_tokens": answerer.max_new_tokens,
        "precision": cfg.precision,
        "sampling": {"temperature": rules.temperature} | rules.changes,
    }
    if not is_greedy(rules):
        settings |= {"seed": cfg.seed, "batch_size": cfg.batch_size}
    return settings
