"""Text out of tokens one by one, as soon as no later token can change it."""

from collections.abc import Iterable, Sequence
from typing import Protocol

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_DECODED_AGAIN = 64  # tokens, at most, with every new one: all would take quadratic time
_TOKENS_BEFORE = 8  # enough for what a token's text depends on: a space, a character's first bytes


class _Decodes(Protocol):
    def decode(self, ids: Iterable[int]) -> str:
        """Text of the tokens; bytes that are not UTF-8 become U+FFFD."""


class TextStream:
    """The text that follows a prompt's, token by token.

    New tokens are decoded together with some before them, because the tokens of words put spaces between
    them. A character whose bytes are spread over several tokens shows as U+FFFD until its last one: whatever
    ends in such characters waits.
    """

    def __init__(self, tokenizer: _Decodes, prompt: Sequence[int]) -> None:
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
        length = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - length :]
        return text[: len(text) - length]

    def rest(self) -> str:
        """At the end: what was still held back."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
