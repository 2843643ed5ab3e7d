"""Texts in, texts out: prompts continued by a model and its tokenizer, piece by piece."""

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import nn

from gptpl.errors import InputError
from gptpl.generation.beam_search import beam_search
from gptpl.generation.decoding import Decoding, TokenDetails
from gptpl.generation.sampling import SamplingRules
from gptpl.generation.text_stream import StopStrings, TextStream
from gptpl.model.protocol import Cached, vocab_size

log = logging.getLogger(__name__)

Finish = Literal["length", "end_of_text", "stop"]


class TextCodec(Protocol):
    """What is needed of a tokenizer; `gptpl.data.tokenizers.Tokenizer` has it."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""

    @property
    def eot_id(self) -> int:
        """Id of end-of-text."""

    def encode(self, text: str) -> Any:
        """One-dimensional array of token ids."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the tokens."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One continuation of a prompt.

    Attributes:
        prompt: number of the prompt.
        sample: number of the continuation among those of its prompt.
        text: what follows the prompt, without the end of text or the stop string that ended it.
        tokens: the new token ids, those of the end of text or stop string among them.
        finish: "length" (max_new_tokens), "end_of_text" or "stop".
        details: of each token what the model thought; None where that was not asked for.
    """

    prompt: int
    sample: int
    text: str
    tokens: tuple[int, ...]
    finish: Finish
    details: tuple[TokenDetails, ...] | None

    def record(self, prompt: str, tokenizer: TextCodec) -> dict[str, Any]:
        """Plain data for JSON; the details, where there are some, with the texts of their tokens."""

        def shown(token: int) -> str:
            # A model may have more rows than its tokenizer has tokens.
            return tokenizer.decode([token]) if token < tokenizer.vocab_size else ""

        record: dict[str, Any] = {
            "prompt": prompt,
            "text": self.text,
            "finish": self.finish,
            "sample": self.sample,
            "tokens": list(self.tokens),
        }
        if self.details is not None:
            record["details"] = [
                {
                    "text": shown(token),
                    "log_probability": each.log_probability,
                    "entropy": each.entropy,
                    "alternatives": [
                        {"token": other, "text": shown(other), "log_probability": log_probability}
                        for other, log_probability in each.alternatives
                    ],
                }
                for token, each in zip(self.tokens, self.details, strict=True)
            ]
        return record


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The next bit of a continuation's text; the last one of each, maybe empty, comes with the completion.

    Attributes:
        prompt: number of the prompt.
        sample: number of the continuation among those of its prompt.
        text: what has come to it.
        tokens: how many tokens the continuation has so far.
        completion: the whole, at its end; None before.
    """

    prompt: int
    sample: int
    text: str
    tokens: int
    completion: Completion | None


def stream_text(
    model: nn.Module | Cached,
    tokenizer: TextCodec,
    prompts: Sequence[str],
    *,
    rules: SamplingRules,
    max_new_tokens: int,
    num_samples: int = 1,
    stop: Sequence[str] = (),
    generator: torch.Generator | None = None,
    alternatives: int | None = None,
) -> Iterator[Piece]:
    """Continue every prompt `num_samples` times and yield the texts piece by piece, as they are made.

    A piece holds whole characters alone: bytes that are not UTF-8 yet wait for the next token, and what may
    be the beginning of a stop string for what follows it. The pieces of a continuation make up its
    `Completion.text`. It ends before the first string of `stop` in it, at the model's end of text, or after
    `max_new_tokens` tokens. An empty prompt starts from end-of-text, which the log says.

    The other arguments and errors are those of `Decoding`; a `stop` that is empty, or that the tokenizer
    cannot write, raises InputError too.
    """
    check_stop(stop, tokenizer)
    if len(unknown := range(tokenizer.vocab_size, vocab_size(model))):
        # A model may have more rows than its tokenizer has tokens; no text has those.
        rules = dataclasses.replace(rules, banned_tokens=(*rules.banned_tokens, *unknown))
    ids = [prompt_ids(prompt, tokenizer) for prompt in prompts]
    decoding = Decoding(
        model,
        ids,
        rules=rules,
        max_new_tokens=max_new_tokens,
        num_samples=num_samples,
        eot_id=tokenizer.eot_id,
        generator=generator,
        alternatives=alternatives,
    )
    rows = [
        _Row(
            prompt=prompt,
            sample=sample,
            stream=TextStream(tokenizer, ids[prompt]),
            stops=StopStrings(stop),
            eot_id=tokenizer.eot_id,
            details=None if alternatives is None else [],
        )
        for prompt in range(len(prompts))
        for sample in range(num_samples)
    ]
    return _pieces(decoding, rows)


def complete(
    model: nn.Module | Cached, tokenizer: TextCodec, prompts: Sequence[str], **settings: Any
) -> list[Completion]:
    """Every continuation at once, in the order of prompts and samples; arguments as for `stream_text`."""
    pieces = stream_text(model, tokenizer, prompts, **settings)
    done = [piece.completion for piece in pieces if piece.completion is not None]
    return sorted(done, key=lambda each: (each.prompt, each.sample))


def search_text(
    model: nn.Module | Cached, tokenizer: TextCodec, prompt: str, *, num_beams: int, max_new_tokens: int
) -> list[Completion]:
    """The texts of the best beams, best first; see `beam_search` for the search and its errors."""
    ids = prompt_ids(prompt, tokenizer)
    beams = beam_search(
        model,
        ids,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        eot_id=tokenizer.eot_id,
        banned_tokens=range(tokenizer.vocab_size, vocab_size(model)),
    )
    completions = []
    for sample, beam in enumerate(beams):
        ended = beam.tokens[-1:] == (tokenizer.eot_id,)
        stream = TextStream(tokenizer, ids)
        texts = [stream.push(token) for token in beam.tokens[: len(beam.tokens) - ended]]
        completion = Completion(
            prompt=0,
            sample=sample,
            text="".join([*texts, stream.rest()]),
            tokens=beam.tokens,
            finish="end_of_text" if ended else "length",
            details=None,
        )
        completions.append(completion)
    return completions


def prompt_ids(prompt: str, tokenizer: TextCodec) -> list[int]:
    """Token ids of the prompt; of one that holds no token, end-of-text, which the log says."""
    ids = [int(token) for token in tokenizer.encode(prompt)]
    if ids:
        return ids
    log.info("the prompt is empty: starting from end-of-text")
    return [tokenizer.eot_id]


def check_stop(stop: Sequence[str], tokenizer: TextCodec) -> None:
    """Raise InputError for a stop string that is no text or that can never be in this tokenizer's texts."""
    if isinstance(stop, str):
        raise InputError(f"stop={stop!r} is one text: give a list of texts")
    for text in stop:
        if not isinstance(text, str) or not text:
            raise InputError(f"stop {text!r} is no text to stop at: give at least one character")
        if text not in tokenizer.decode(tokenizer.encode(text)):
            raise InputError(f"stop {text!r} is unknown to the model's tokenizer: it can never be written")


@dataclass(kw_only=True)
class _Row:
    """A continuation while it is made."""

    prompt: int
    sample: int
    stream: TextStream
    stops: StopStrings
    eot_id: int
    details: list[TokenDetails] | None
    tokens: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    finish: Finish | None = None

    def take(self, token: int, details: TokenDetails | None) -> Piece:
        """The piece that one more token makes."""
        self.tokens.append(token)
        if self.details is not None and details is not None:
            self.details.append(details)
        if token == self.eot_id:
            return self.close("end_of_text")
        text = self.stops.push(self.stream.push(token))
        return self._closed(text, "stop") if self.stops.found else self._piece(text)

    def close(self, finish: Finish) -> Piece:
        """The last piece, with what still waited; a stop string in it comes first."""
        text = self.stops.push(self.stream.rest()) + self.stops.rest()
        return self._closed(text, "stop" if self.stops.found else finish)

    def _piece(self, text: str, completion: Completion | None = None) -> Piece:
        self.texts.append(text)
        return Piece(
            prompt=self.prompt,
            sample=self.sample,
            text=text,
            tokens=len(self.tokens),
            completion=completion,
        )

    def _closed(self, text: str, finish: Finish) -> Piece:
        self.finish = finish
        completion = Completion(
            prompt=self.prompt,
            sample=self.sample,
            text="".join([*self.texts, text]),
            tokens=tuple(self.tokens),
            finish=finish,
            details=None if self.details is None else tuple(self.details),
        )
        return self._piece(text, completion)


def _pieces(decoding: Decoding, rows: list[_Row]) -> Iterator[Piece]:
    while step := decoding.step():
        for place, number in enumerate(step.rows):
            row = rows[number]
            piece = row.take(step.tokens[place], None if step.details is None else step.details[place])
            if row.finish is not None:
                decoding.end([number])
            if piece.text or piece.completion is not None:
                yield piece
    for row in rows:
        if row.finish is None:
            yield row.close("length")
