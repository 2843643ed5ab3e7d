"""Answers of an instruction-tuned model, and whether they are well-formed."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gptpl.checkpoints.resume_state import digest
from gptpl.data.instructions.records import PromptTemplate, question_of
from gptpl.data.sources.records import Record
from gptpl.errors import InputError
from gptpl.files.durable import PartialResults
from gptpl.filters import Filter, Verdict
from gptpl.generation import Completion, Piece, SamplingRules, complete, stream_text
from gptpl.generation.sampling import check_seed, is_greedy, mixed_generator
from gptpl.generation.text import Finish
from gptpl.model.protocol import Cached, cached_form, context_length, device_of, module_of
from gptpl.tokenizers import Tokenizer

log = logging.getLogger(__name__)

RESPONSE = "model_response"
"""The book's name of the model's answer."""
WELL_FORMED = "well_formed"
FILTERED = "filtered"
"""What a filter found in the answer."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A model's answer, see `Answerer.answer`; `text` is stripped of white space, as in the book.

    `verdict` is that of the filter, if there is one: `text` is then what may be shown.
    """

    text: str
    well_formed: bool
    finish: Finish
    verdict: Verdict | None = None


@dataclass(frozen=True, kw_only=True)
class Answerer:
    """A model, or its form for decoding, with all that is needed to ask it as it was tuned."""

    net: nn.Module | Cached
    tokenizer: Tokenizer
    template: PromptTemplate
    rules: SamplingRules
    max_new_tokens: int
    filter: Filter | None = None

    def prompt(self, instruction: str, input: str = "", *, place: str = "the prompt") -> str:
        """The prompt. Raises InputError for one that leaves no room in the model's context."""
        text = self.template.prompt(instruction, input)
        tokens, context = len(self.tokenizer.encode(text)), context_length(self.net)
        if tokens >= context:
            raise InputError(
                f"{place} has {tokens:,} tokens with its template, the model's context_length is {context}:"
                " shorten instruction or input"
            )
        return text

    def stream(self, prompt: str, generator: torch.Generator | None = None) -> Iterator[Piece]:
        """One answer, piece by piece."""
        return stream_text(
            self.net, self.tokenizer, [prompt], generator=generator, filter=self.filter, **self._decoding
        )

    def answers(self, prompts: Sequence[str], generator: torch.Generator | None = None) -> list[Answer]:
        """The answers to several prompts, decoded together."""
        completions = complete(self.net, self.tokenizer, prompts, generator=generator, **self._decoding)
        return [self.answer(completion) for completion in completions]

    @property
    def _decoding(self) -> Any:
        return {"rules": self.rules, "max_new_tokens": self.max_new_tokens}

    def answer(self, completion: Completion) -> Answer:
        """The completion of a prompt, not filtered yet, as an answer.

        It is well-formed if the model ended it by itself, it is not empty, and no line of it begins with the
        template's response marker, whatever the filter finds in it.
        """
        text = completion.text.strip()
        marker = self.template.response_marker.strip()
        again = any(line.lstrip().startswith(marker) for line in text.splitlines())
        well_formed = completion.finish == "end_of_text" and bool(text) and not again
        verdict = None if self.filter is None else self.filter.verdict(completion.text)
        shown = text if verdict is None else verdict.text.strip()
        return Answer(text=shown, well_formed=well_formed, finish=completion.finish, verdict=verdict)


def answer_generator(seed: int | None, device: torch.device, *numbers: int) -> torch.Generator:
    """A generator seeded by `seed`, or by the system, and by these numbers."""
    if seed is None:
        return mixed_generator(device)
    check_seed(seed)
    return mixed_generator(device, seed, *numbers)


def answer_all(
    answerer: Answerer,
    records: Sequence[Record],
    *,
    output: Path,
    instruction_column: str = "instruction",
    input_column: str | None = "input",
    skip_too_long: bool = False,
    batch_size: int = 8,
    seed: int | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> list[dict[str, Any]]:
    """Answers in a JSON file, each with its record: see `gptpl.runs.models.InstructionModel.respond_all`."""
    asked, prompts, kept = [], [], []
    for record in records:
        question = question_of(record, instruction=instruction_column, input=input_column)
        try:
            prompts.append(answerer.prompt(**question, place=record.place))
        except InputError as error:
            if not skip_too_long:
                raise InputError(f"{error}, or set too_long=skip") from error
            log.warning("skipped: %s", error)
        else:
            asked.append({**record.fields, **question})
            kept.append(dict(record.fields))
    if not prompts:
        raise InputError("no record leaves room for an answer: give shorter ones, or a longer context")
    net = module_of(answerer.net)
    settings = {  # what the content of the file depends on
        "model": digest(net.state_dict())[:16],
        "file": hashlib.sha256(json.dumps([prompts, kept]).encode()).hexdigest()[:16],
        "template": answerer.template.state(),
        "max_new_tokens": answerer.max_new_tokens,
        "precision": "32-true" if next(net.parameters()).dtype == torch.float32 else "bf16-true",
        "sampling": {"temperature": answerer.rules.temperature} | answerer.rules.changes,
    }
    if answerer.filter is not None:
        settings["filter"] = hashlib.sha256(answerer.filter.identity.encode()).hexdigest()[:16]
    if not is_greedy(answerer.rules):
        settings |= {"seed": seed, "batch_size": batch_size}
    results = PartialResults(output, settings)
    done = len(results.values)
    if done:
        log.info("%d of %d answers are in %s: resuming", done, len(prompts), results.path)
    rows = min(batch_size, len(prompts))
    many = dataclasses.replace(answerer, net=cached_form(answerer.net, rows=rows) or answerer.net)
    # In whole batches, as before: the random numbers depend on the place in the batch.
    for first in progress(range(done, len(prompts), batch_size)):
        batch = slice(first, first + batch_size)
        answers = many.answers(prompts[batch], answer_generator(seed, device_of(answerer.net), first))
        results.add(
            [
                {**record, RESPONSE: answer.text, WELL_FORMED: answer.well_formed}
                | ({} if answer.verdict is None else {FILTERED: answer.verdict.counts})
                for record, answer in zip(asked[batch], answers, strict=True)
            ]
        )
    results.finish()
    return list(results.values)
