"""Tokenizers: GPT-2's byte-pair encoding, the book's words, plain bytes, and those of other projects.

Importing this loads neither tiktoken nor the tokenizers library.
"""

from collections.abc import Mapping
from typing import Any

from gptpl.errors import InputError
from gptpl.text import shortened
from gptpl.tokenizers.base import END_OF_TEXT, BytesTokenizer, TokenIds, Tokenizer
from gptpl.tokenizers.gpt2 import GPT2Tokenizer
from gptpl.tokenizers.others import FileTokenizer, TiktokenTokenizer, train_bpe
from gptpl.tokenizers.words import WordsTokenizer

__all__ = [
    "END_OF_TEXT",
    "BytesTokenizer",
    "FileTokenizer",
    "GPT2Tokenizer",
    "TiktokenTokenizer",
    "TokenIds",
    "Tokenizer",
    "WordsTokenizer",
    "tokenizer_from_state",
    "train_bpe",
]

_KINDS: dict[str, type[Tokenizer]] = {
    kind.name: kind
    for kind in (GPT2Tokenizer, WordsTokenizer, BytesTokenizer, FileTokenizer, TiktokenTokenizer)
}


def tokenizer_from_state(state: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that a `state()` describes.

    Raises InputError for an unknown name, a missing value, and a vocabulary of another size or hash.
    """
    if missing := {"name", "vocab_size", "sha256"} - state.keys():
        raise InputError(f"the stored tokenizer lacks {min(missing)}: use a checkpoint of gptpl")
    name = state["name"]
    if not isinstance(name, str) or name not in _KINDS:
        raise InputError(f"the stored tokenizer {name!r} is unknown: this gptpl has {', '.join(_KINDS)}")
    tokenizer = _KINDS[name].from_state(state)
    for key, value in tokenizer.state().items():
        if type(state.get(key)) is not type(value) or state[key] != value:
            raise InputError(
                f"the stored tokenizer {name!r} has {key} {shortened(repr(state.get(key)), 80)}, its"
                f" vocabulary gives {shortened(repr(value), 80)}:"
                " the checkpoint is damaged or was changed, use the original file"
            )
    return tokenizer
