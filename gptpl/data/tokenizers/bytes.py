"""The smallest tokenizer: one token a byte."""

from collections.abc import Iterable
from typing import ClassVar

import numpy as np

from gptpl.data.tokenizers.base import END_OF_TEXT, TokenIds, Tokenizer, without_lone_surrogates

_EOT_ID = 256
_TOKENS = (*(bytes([value]) for value in range(256)), END_OF_TEXT.encode())


class BytesTokenizer(Tokenizer):
    """The UTF-8 bytes of the text, and token 256 for `<|endoftext|>`. Lossless and without training."""

    name: ClassVar[str] = "bytes"

    @property
    def vocab_size(self) -> int:
        """256 bytes and the end of text."""
        return len(_TOKENS)

    @property
    def eot_id(self) -> int:
        """256, the first id that is no byte."""
        return _EOT_ID

    def encode(self, text: str) -> TokenIds:
        """One id a byte of UTF-8."""
        try:
            data = text.encode()
        except UnicodeEncodeError:
            data = without_lone_surrogates(text).encode()
        first, *others = data.split(END_OF_TEXT.encode())
        pieces = [np.frombuffer(first, dtype=np.uint8)]
        for document in others:
            pieces += [np.array([_EOT_ID], dtype=np.uint32), np.frombuffer(document, dtype=np.uint8)]
        return np.concatenate(pieces, dtype=np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the bytes; what is not UTF-8 becomes U+FFFD."""
        return b"".join([_TOKENS[token_id] for token_id in self.known_ids(ids)]).decode(errors="replace")

    def vocabulary_bytes(self) -> Iterable[bytes]:
        """The 256 bytes in order, then `<|endoftext|>`."""
        return _TOKENS
