"""The interface of tokenizers, from text to token ids and back, and the simplest of them: bytes."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from gptpl.errors import InputError

END_OF_TEXT = "<|endoftext|>"

TokenIds = npt.NDArray[np.uint32]


class Tokenizer(ABC):
    """A reversible map between text and token ids 0 .. vocab_size - 1.

    `<|endoftext|>` in a text always becomes the single token `eot_id`. Tokenizers hold no open resources and
    can be pickled.
    """

    name: ClassVar[str]
    lossless: bool = True
    """Whether the tokens of a text have all its bytes."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""

    @property
    @abstractmethod
    def eot_id(self) -> int:
        """Id of `<|endoftext|>`, which stands between unrelated documents."""

    @abstractmethod
    def encode(self, text: str) -> TokenIds:
        """Token ids of the text, one-dimensional. A lone surrogate (no valid text has one) becomes U+FFFD."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the tokens; bytes that are not UTF-8 (half a character) become U+FFFD.

        Raises InputError for an id outside the vocabulary.
        """
        tokens = self.vocabulary_bytes()
        return b"".join([tokens[token_id] for token_id in self.known_ids(ids)]).decode(errors="replace")

    @abstractmethod
    def vocabulary_bytes(self) -> Sequence[bytes]:
        """Every token as bytes, in the order of the ids; nothing for unused ids."""

    def encode_many(self, texts: Iterable[str]) -> list[TokenIds]:
        """`encode` of each text, in order."""
        return [self.encode(text) for text in texts]

    def fitted_to(self, texts: Iterable[str]) -> "Tokenizer":
        """A tokenizer with a vocabulary: this one, unless its kind learns the vocabulary from the texts."""
        return self

    @cached_property
    def sha256(self) -> str:
        """Hash of every token in the order of the ids, each preceded by its length."""
        digest = hashlib.sha256()
        for token in self.vocabulary_bytes():
            digest.update(len(token).to_bytes(4, "little") + token)
        return digest.hexdigest()

    def token_bytes(self) -> npt.NDArray[np.int64] | None:
        """Bytes of text in each token, (vocab_size,), none in end-of-text; None where a text loses some."""
        if not self.lossless:
            return None
        lengths = np.array([len(token) for token in self.vocabulary_bytes()], dtype=np.int64)
        lengths[self.eot_id] = 0
        return lengths

    def state(self) -> dict[str, Any]:
        """Plain values from which `tokenizer_from_state` rebuilds the tokenizer."""
        return {"name": self.name, "vocab_size": self.vocab_size, "sha256": self.sha256}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The tokenizer of that state, unchecked: `tokenizer_from_state` compares the hash."""
        return cls()

    def known_ids(self, ids: Iterable[int]) -> list[int]:
        """The ids as integers. Raises InputError for an id outside the vocabulary."""
        known = [int(token_id) for token_id in ids]
        for token_id in (min(known), max(known)) if known else ():
            if not 0 <= token_id < self.vocab_size:
                raise InputError(
                    f"token id {token_id} is outside the {self.name} vocabulary of {self.vocab_size} tokens: "
                    "use the tokenizer that the model was trained with"
                )
        return known


def without_lone_surrogates(text: str) -> str:
    """The text with surrogate pairs joined and lone surrogates, which UTF-8 cannot hold, as U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


_BYTE_TOKENS = (*(bytes([value]) for value in range(256)), END_OF_TEXT.encode())


class BytesTokenizer(Tokenizer):
    """The UTF-8 bytes of the text, and token 256 for `<|endoftext|>`. Lossless and without training."""

    name: ClassVar[str] = "bytes"
    vocab_size = 257
    eot_id = 256

    def encode(self, text: str) -> TokenIds:
        """One id a byte of UTF-8."""
        try:
            data = text.encode()
        except UnicodeEncodeError:
            data = without_lone_surrogates(text).encode()
        first, *others = data.split(END_OF_TEXT.encode())
        pieces = [np.frombuffer(first, dtype=np.uint8)]
        for document in others:
            pieces += [np.array([self.eot_id], dtype=np.uint32), np.frombuffer(document, dtype=np.uint8)]
        return np.concatenate(pieces, dtype=np.uint32)

    def vocabulary_bytes(self) -> Sequence[bytes]:
        """The 256 bytes in order, then `<|endoftext|>`."""
        return _BYTE_TOKENS
