"""The teaching tokenizer of the book's chapter 2: one token a word or punctuation mark."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np

from gptpl.errors import InputError
from gptpl.tokenizers.base import END_OF_TEXT, TokenIds, Tokenizer

UNKNOWN = "<|unk|>"
_SPECIAL = (END_OF_TEXT, UNKNOWN)

PUNCTUATION = r"""[,.:;?_!"()']|--"""
"""What the book's split cuts off, as a regular expression."""
NO_SPACE_BEFORE = """,.:;?!"()'"""
"""The characters that are joined to the word before them."""
# The book's split, with the special tokens before it, so that they stay whole next to letters too.
_SPLIT = re.compile(rf"(<\|endoftext\|>|<\|unk\|>|{PUNCTUATION}|\s)")
_SPACE_BEFORE_PUNCTUATION = re.compile(rf"\s+([{NO_SPACE_BEFORE}])")


class WordsTokenizer(Tokenizer):
    """Splits at white space, punctuation and `--`; a word outside the vocabulary becomes `<|unk|>`.

    Not lossless: decoding puts one space between words and none before punctuation. `vocabulary` holds the
    tokens in the order of their ids, `<|endoftext|>` and `<|unk|>` among them, each once. None: not fitted
    yet; everything but `fitted_to` raises InputError.
    """

    name: ClassVar[str] = "words"
    lossless = False

    def __init__(self, vocabulary: Sequence[str] | None = None) -> None:
        self._words = () if vocabulary is None else _checked(vocabulary)
        self._ids = {word: number for number, word in enumerate(self._words)}

    def fitted_to(self, texts: Iterable[str]) -> "WordsTokenizer":
        """A tokenizer of the sorted words of the texts; this one where it has a vocabulary already."""
        if self._words:
            return self
        words = {word for text in texts for word in _split(text)}
        return WordsTokenizer([*sorted(words.difference(_SPECIAL)), *_SPECIAL])

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The tokens in the order of their ids."""
        return tuple(self._fitted_ids)

    @property
    def vocab_size(self) -> int:
        """Number of words, punctuation marks and special tokens."""
        return len(self._fitted_ids)

    @property
    def eot_id(self) -> int:
        """Id of `<|endoftext|>`: the last but one after fitting."""
        return self._fitted_ids[END_OF_TEXT]

    def encode(self, text: str) -> TokenIds:
        """One id a word or punctuation mark."""
        ids = self._fitted_ids
        unknown = ids[UNKNOWN]
        return np.array([ids.get(word, unknown) for word in _split(text)], dtype=np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        """The words with one space between them and none before punctuation."""
        text = " ".join([self._words[token_id] for token_id in self.known_ids(ids)])
        return _SPACE_BEFORE_PUNCTUATION.sub(r"\1", text)

    def vocabulary_bytes(self) -> Sequence[bytes]:
        """The words in UTF-8."""
        return [word.encode("utf-8", "surrogatepass") for word in self.vocabulary]

    def state(self) -> dict[str, Any]:
        """Identity and the vocabulary itself, which is stored nowhere else."""
        return super().state() | {"vocabulary": list(self.vocabulary)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The tokenizer of the stored vocabulary."""
        vocabulary = state.get("vocabulary")
        if not isinstance(vocabulary, list):
            raise InputError("the stored tokenizer 'words' has no vocabulary: the checkpoint is damaged")
        return cls(vocabulary)

    @property
    def _fitted_ids(self) -> Mapping[str, int]:
        if not self._ids:
            raise InputError("tokenizer=words has no vocabulary yet: fit it to a text first (fitted_to)")
        return self._ids


def _split(text: str) -> list[str]:
    """Words and punctuation marks, without white space."""
    return [word for piece in _SPLIT.split(text) if (word := piece.strip())]


def _checked(vocabulary: Sequence[str]) -> tuple[str, ...]:
    words = tuple(vocabulary)
    if isinstance(vocabulary, str) or not all(isinstance(word, str) for word in words):
        raise InputError("the vocabulary of tokenizer=words must be a list of strings, one a token")
    if len(set(words)) != len(words):
        twice = next(word for word in words if words.count(word) > 1)
        raise InputError(f"the vocabulary of tokenizer=words holds {twice!r} twice: give each word once")
    for special in _SPECIAL:
        if special not in words:
            raise InputError(f"the vocabulary of tokenizer=words lacks {special!r}: append it")
    return words
