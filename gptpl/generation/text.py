"""Texts in, texts out: prompts continued by a model and its tokenizer, piece by piece."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from gptpl.errors import InputError
from gptpl.filters import Filter, Verdict
from gptpl.generation.decoding import Decoding, TokenDetails, beam_search
from gptpl.generation.sampling import SamplingRules
from gptpl.model.protocol import Cached, vocab_size
from gptpl.tokenizers import Tokenizer

log = logging.getLogger(__name__)

Finish = Literal["length", "end_of_text", "stop"]

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_DECODED_AGAIN = 64  # tokens at most with every new one: decoding all would take quadratic time
_TOKENS_BEFORE = 8  # enough for what a token's text depends on: a space, a character's first bytes


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One continuation of a prompt.

    Attributes:
        prompt: number of the prompt.
        sample: number of the continuation among those of its prompt.
        text: what follows the prompt, without the end of text or the stop string that ended it.
        tokens: the new token ids, including those of the end of text or stop string.
        finish: "length" (max_new_tokens), "end_of_text" or "stop".
        details: of each token, where they were asked for.
        verdict: of the filter, where there was one; tokens and details, which it has not judged, are then
            left out, unless it only reports.
    """

    prompt: int
    sample: int
    text: str
    tokens: tuple[int, ...]
    finish: Finish
    details: tuple[TokenDetails, ...] | None
    verdict: Verdict | None = None

    def record(self, prompt: str, tokenizer: Tokenizer) -> dict[str, Any]:
        """Plain data for JSON; the details, if any, with the texts of their tokens."""

        def shown(token: int) -> str:  # a model may have more rows than its tokenizer has tokens
            return tokenizer.decode([token]) if token < tokenizer.vocab_size else ""

        record: dict[str, Any] = {"prompt": prompt, "text": self.text, "finish": self.finish}
        record |= {"sample": self.sample, "tokens": list(self.tokens)}
        if self.verdict is not None:
            record["filtered"] = self.verdict.counts
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
    """The next piece of a continuation's text, and the number of its tokens so far.

    The last piece of each, possibly empty, has the whole `completion`.
    """

    prompt: int
    sample: int
    text: str
    tokens: int
    completion: Completion | None


def stream_text(
    model: nn.Module | Cached,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    *,
    rules: SamplingRules,
    max_new_tokens: int,
    num_samples: int = 1,
    stop: Sequence[str] = (),
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    alternatives: int | None = None,
    filter: Filter | None = None,
) -> Iterator[Piece]:
    """Continue every prompt, a text or its token ids, `num_samples` times and yield the texts piece by piece.

    A piece holds whole characters: bytes that are not UTF-8 yet wait for the next token, and what may be the
    start of a stop string for what follows it. A text ends before the first string of `stop` in it, at the
    model's end of text, or after `max_new_tokens` tokens. An empty prompt starts from end-of-text. A `filter`
    judges each continuation, without its prompt, and holds back what it has not judged.

    The other arguments and errors are those of `Decoding`; a `stop` that is empty, or that the tokenizer
    cannot write, raises InputError too.
    """
    check_stop(stop, tokenizer)
    rules = text_rules(rules, tokenizer, vocab_size(model))
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
    make_row = partial(Continuation, tokenizer, stop=stop, detailed=alternatives is not None, filter=filter)
    rows = [
        make_row(ids[prompt], prompt=prompt, sample=sample)
        for prompt in range(len(prompts))
        for sample in range(num_samples)
    ]
    return _pieces(decoding, rows)


def complete(
    model: nn.Module | Cached, tokenizer: Tokenizer, prompts: Sequence[str | Sequence[int]], **settings: Any
) -> list[Completion]:
    """All continuations, in the order of prompts and samples; arguments as for `stream_text`."""
    pieces = stream_text(model, tokenizer, prompts, **settings)
    done = [piece.completion for piece in pieces if piece.completion is not None]
    return sorted(done, key=lambda each: (each.prompt, each.sample))


def search_text(
    model: nn.Module | Cached,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    num_beams: int,
    max_new_tokens: int,
    filter: Filter | None = None,
) -> list[Completion]:
    """The texts of the best beams, best first, judged by `filter`; errors as for `beam_search`."""
    ids = prompt_ids(prompt, tokenizer)
    beams = beam_search(
        model,
        ids,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        eot_id=tokenizer.eot_id,
        banned_tokens=range(tokenizer.vocab_size, vocab_size(model)),
    )
    found = []
    for sample, beam in enumerate(beams):
        row = Continuation(tokenizer, ids, sample=sample, filter=filter)
        for token in beam.tokens:
            row.take(token)
        found.append(row.completion or row.close("length").completion)
    return [each for each in found if each is not None]


def prompt_ids(prompt: str | Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """Token ids of the prompt; end-of-text, which is logged, where it has none."""
    given = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    ids = [int(token) for token in given]
    if not ids:
        log.info("the prompt is empty: starting from end-of-text")
    return ids or [tokenizer.eot_id]


def text_rules(rules: SamplingRules, tokenizer: Tokenizer, vocab_size: int) -> SamplingRules:
    """The rules, with a ban on ids beyond the tokenizer's vocabulary, which the model's may exceed."""
    unknown = range(tokenizer.vocab_size, vocab_size)
    if not unknown:
        return rules
    return dataclasses.replace(rules, banned_tokens=(*rules.banned_tokens, *unknown))


def check_stop(stop: Sequence[str], tokenizer: Tokenizer) -> None:
    """Raise InputError for stop strings that are empty, or that the tokenizer cannot write."""
    if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
        raise InputError(f"stop must be a list of texts of at least one character each, got {stop!r}")
    for text in stop:
        if text not in tokenizer.decode(tokenizer.encode(text).tolist()):
            raise InputError(f"stop {text!r} is unknown to the model's tokenizer: it can never be written")


class Continuation:
    """The text of one continuation in progress: `take` its tokens until the `completion` is there.

    Arguments as for `stream_text`; `ids` are the prompt's tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        ids: Sequence[int],
        *,
        prompt: int = 0,
        sample: int,
        stop: Sequence[str] = (),
        detailed: bool = False,
        filter: Filter | None = None,
    ) -> None:
        self.prompt, self.sample = prompt, sample
        self.eot_id = tokenizer.eot_id
        self.stream, self.stops = TextStream(tokenizer, ids), StopStrings(stop)
        self.filtered = None if filter is None else filter.stream()
        self.hides = filter is not None and filter.changes_texts
        self.tokens: list[int] = []
        self.text = ""
        self.details: list[TokenDetails] | None = [] if detailed else None
        self.completion: Completion | None = None

    def take(self, token: int, details: TokenDetails | None = None) -> Piece:
        """Add a token, which may complete the text."""
        self.tokens.append(token)
        if self.details is not None and details is not None:
            self.details.append(details)
        if token == self.eot_id:
            return self.close("end_of_text")
        text = self.stops.push(self.stream.push(token))
        return self._piece(text, "stop" if self.stops.found else None)

    def close(self, finish: Finish) -> Piece:
        """Complete the text with what was held back; a stop string in it ends it first."""
        text = self.stops.push(self.stream.rest()) + self.stops.rest()
        return self._piece(text, "stop" if self.stops.found else finish)

    def _piece(self, text: str, finish: Finish | None) -> Piece:
        verdict = None
        if self.filtered is not None:
            text = self.filtered.feed(text)
            if finish is not None:
                text += self.filtered.finish()
                verdict = self.filtered.verdict
        self.text += text
        number = {"prompt": self.prompt, "sample": self.sample}
        if finish is not None:
            self.completion = Completion(
                **number,
                text=self.text,
                tokens=() if self.hides else tuple(self.tokens),
                finish=finish,
                details=None if self.details is None or self.hides else tuple(self.details),
                verdict=verdict,
            )
        return Piece(**number, text=text, tokens=len(self.tokens), completion=self.completion)


def _pieces(decoding: Decoding, rows: list[Continuation]) -> Iterator[Piece]:
    while step := decoding.step():
        for place, number in enumerate(step.rows):
            details = None if step.details is None else step.details[place]
            piece = rows[number].take(step.tokens[place], details)
            if piece.completion is not None:
                decoding.end([number])
            if piece.text or piece.completion is not None:
                yield piece
    for row in rows:
        if row.completion is None:
            yield row.close("length")


class TextStream:
    """The text that follows a prompt, token by token.

    New tokens are decoded together with some before them, as word tokens put spaces between them. A character
    whose bytes are spread over several tokens is U+FFFD until its last one: a text that ends so waits.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._begin(prompt)

    def push(self, token: int) -> str:
        """The characters that became certain with this token: often its own, sometimes none."""
        self._new.append(token)
        text = self._text()
        certain = text.rstrip(_REPLACEMENT)
        piece = self._from_given(certain)
        if len(self._new) >= _DECODED_AGAIN and certain == text:
            self._begin([*self._prompt, *self._new])
        return piece

    def with_token(self, token: int) -> str:
        """What would become certain or wait with this token, which is not added."""
        self._new.append(token)
        text = self._text()
        self._new.pop()
        return text[self._given :]

    def rest(self) -> str:
        """What still waits at the end; bytes that never became a character are U+FFFD."""
        return self._from_given(self._text())

    def _begin(self, tokens: Sequence[int]) -> None:
        """Continue after these tokens, whose last character is whole."""
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
    """Passes a text on up to the first stop string, and holds back what may be the start of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.found = False
        """Whether a stop string was found; nothing more is passed on."""

    def push(self, text: str) -> str:
        """What can be passed on after `text` has been added."""
        if self.found:
            return ""
        text = self._held + text
        starts = [start for stop in self._stop if (start := text.find(stop)) >= 0]
        if starts:
            self.found, self._held = True, ""
            return text[: min(starts)]
        longest = ((stop, min(len(stop), len(text) + 1)) for stop in self._stop)
        ends = (n for stop, most in longest for n in range(most) if text.endswith(stop[:n]))
        length = max(ends, default=0)  # of the longest end that starts a stop string
        self._held = text[len(text) - length :]
        return text[: len(text) - length]

    def rest(self) -> str:
        """What is still held back at the end."""
        held, self._held = self._held, ""
        return held
