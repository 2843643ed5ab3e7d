"""Texts in, texts out: prompts continued by a model and its tokenizer, piece by piece."""

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn

from gptpl.errors import InputError
from gptpl.generation.beam_search import beam_search
from gptpl.generation.decoding import Decoding, TokenDetails
from gptpl.generation.sampling import SamplingRules
from gptpl.model.protocol import Cached, vocab_size

log = logging.getLogger(__name__)

Finish = Literal["length", "end_of_text", "stop"]

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_DECODED_AGAIN = 64  # tokens, at most, with every new one: all would take quadratic time
_TOKENS_BEFORE = 8  # enough for what a token's text depends on: a space, a character's first bytes


class TextCodec(Protocol):
    """What is needed of a tokenizer; `gptpl.tokenizers.Tokenizer` has it."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""

    @property
    def eot_id(self) -> int:
        """Id of end-of-text."""

    def encode(self, text: str) -> Any:
        """One-dimensional array of token ids."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the tokens; bytes that are not UTF-8 become U+FFFD."""


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

        record: dict[str, Any] = {"prompt": prompt, "text": self.text, "finish": self.finish}
        record |= {"sample": self.sample, "tokens": list(self.tokens)}
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
    """The next bit of a continuation's text, and how many tokens that has so far.

    The last one of each, maybe empty, comes with the whole `completion`.
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
    detailed = alternatives is not None
    rows = [
        _Row(tokenizer, ids[prompt], prompt=prompt, sample=sample, stop=stop, detailed=detailed)
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
    rows = [_Row(tokenizer, ids, sample=sample) for sample in range(len(beams))]
    for row, beam in zip(rows, beams, strict=True):
        for token in beam.tokens:
            row.take(token, None)
    return [row.completion or row.close("length") for row in rows]


def prompt_ids(prompt: str, tokenizer: TextCodec) -> list[int]:
    """Token ids of the prompt; of one that holds no token, end-of-text, which the log says."""
    ids = [int(token) for token in tokenizer.encode(prompt)]
    if not ids:
        log.info("the prompt is empty: starting from end-of-text")
    return ids or [tokenizer.eot_id]


def check_stop(stop: Sequence[str], tokenizer: TextCodec) -> None:
    """Raise InputError for a stop string that is no text or that can never be in this tokenizer's texts."""
    if isinstance(stop, str):
        raise InputError(f"stop={stop!r} is one text: give a list of texts")
    for text in stop:
        if not isinstance(text, str) or not text:
            raise InputError(f"stop {text!r} is no text to stop at: give at least one character")
        if text not in tokenizer.decode(tokenizer.encode(text)):
            raise InputError(f"stop {text!r} is unknown to the model's tokenizer: it can never be written")


class _Row:
    """A continuation while it is made."""

    def __init__(
        self,
        tokenizer: TextCodec,
        ids: Sequence[int],
        *,
        prompt: int = 0,
        sample: int,
        stop: Sequence[str] = (),
        detailed: bool = False,
    ) -> None:
        self.prompt, self.sample, self.detailed = prompt, sample, detailed
        self.eot_id = tokenizer.eot_id
        self.stream, self.stops = TextStream(tokenizer, ids), StopStrings(stop)
        self.tokens: list[int] = []
        self.texts: list[str] = []
        self.details: list[TokenDetails] = []
        self.completion: Completion | None = None

    def take(self, token: int, details: TokenDetails | None) -> None:
        """One more token, which may complete the text."""
        self.tokens.append(token)
        if details is not None:
            self.details.append(details)
        if token == self.eot_id:
            self.close("end_of_text")
            return
        self.texts.append(self.stops.push(self.stream.push(token)))
        if self.stops.found:
            self._complete("stop")

    def close(self, finish: Finish) -> Completion:
        """The end, with what still waited; a stop string in it comes first."""
        self.texts.append(self.stops.push(self.stream.rest()) + self.stops.rest())
        return self._complete("stop" if self.stops.found else finish)

    def piece(self) -> Piece:
        """What the last token, or the end, has brought."""
        text, tokens = self.texts[-1], len(self.tokens)
        return Piece(
            prompt=self.prompt, sample=self.sample, text=text, tokens=tokens, completion=self.completion
        )

    def _complete(self, finish: Finish) -> Completion:
        self.completion = Completion(
            prompt=self.prompt,
            sample=self.sample,
            text="".join(self.texts),
            tokens=tuple(self.tokens),
            finish=finish,
            details=tuple(self.details) if self.detailed else None,
        )
        return self.completion


def _pieces(decoding: Decoding, rows: list[_Row]) -> Iterator[Piece]:
    while step := decoding.step():
        for place, number in enumerate(step.rows):
            row = rows[number]
            row.take(step.tokens[place], None if step.details is None else step.details[place])
            if row.completion is not None:
                decoding.end([number])
            if row.texts[-1] or row.completion is not None:
                yield row.piece()
    for row in rows:
        if row.completion is None:
            row.close("length")
            yield row.piece()


class TextStream:
    """The text that follows a prompt's, token by token.

    New tokens are decoded together with some before them, because the tokens of words put spaces between
    them. A character whose bytes are spread over several tokens shows as U+FFFD until its last one: whatever
    ends in such characters waits.
    """

    def __init__(self, tokenizer: TextCodec, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._begin(prompt)

    def push(self, token: int) -> str:
        """The characters that have become certain with this token; often its own, sometimes none."""
        self._new.append(token)
        text = self._text()
        certain = text.rstrip(_REPLACEMENT)
        piece = self._from_given(certain)
        if len(self._new) >= _DECODED_AGAIN and certain == text:
            self._begin([*self._prompt, *self._new])
        return piece

    def rest(self) -> str:
        """At the end: what was still waiting, bytes that never became a character as U+FFFD."""
        return self._from_given(self._text())

    def _begin(self, tokens: Sequence[int]) -> None:
        """Go on behind these tokens, whose last character is whole."""
        self._prompt = list(tokens[-_TOKENS_BEFORE:])
        self._prompt_text = self._tokenizer.decode(self._prompt)
        self._new: list[int] = []
        self._given = 0  # characters

    def _text(self) -> str:
        whole = self._tokenizer.decode([*self._prompt, *self._new])
        if whole.startswith(self._prompt_text):
            return whole[len(self._prompt_text) :]
        return self._tokenizer.decode(self._new)

    def _from_given(self, text: str) -> str:
        new = text[self._given :]
        self._given = max(self._given, len(text))
        return new


class StopStrings:
    """Lets a text through up to the first stop string, holding back what may be the beginning of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.found = False
        """Whether a stop string has come; nothing more is let through."""

    def push(self, text: str) -> str:
        """What can be let through now that `text` has come."""
        if self.found:
            return ""
        text = self._held + text
        starts = [start for stop in self._stop if (start := text.find(stop)) >= 0]
        if starts:
            self.found, self._held = True, ""
            return text[: min(starts)]
        ends = (n for stop in self._stop for n in range(len(stop)) if text.endswith(stop[:n]))
        length = max(ends, default=0)  # of the longest end that is a beginning of a stop string
        self._held = text[len(text) - length :]
        return text[: len(text) - length]

    def rest(self) -> str:
        """At the end: what was still held back."""
        held, self._held = self._held, ""
        return held
