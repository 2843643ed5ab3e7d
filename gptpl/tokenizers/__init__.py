"""Tokenizers: GPT-2's byte-pair encoding, the book's words, plain bytes. Importing this loads no tiktoken."""

from collections.abc import Mapping
from typing import Any

from gptpl.errors import InputError
from gptpl.tokenizers.base import END_OF_TEXT, BytesTokenizer, TokenIds, Tokenizer
from gptpl.tokenizers.gpt2 import GPT2Tokenizer
from gptpl.tokenizers.words import WordsTokenizer

__all__ = [
    "END_OF_TEXT",
    "BytesTokenizer",
    "GPT2Tokenizer",
    "TokenIds",
    "Tokenizer",
    "WordsTokenizer",
    "tokenizer_from_state",
]

_KINDS: dict[str, type[Tokenizer]] = {
    kind.name: kind for kind in (GPT2Tokenizer, WordsTokenizer, BytesTokenizer)
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
        if type(state[key]) is not type(value) or state[key] != value:
            raise InputError(
                f"the stored tokenizer {name!r} has {key} {state[key]!r}, its vocabulary gives {value!r}:"
                " the checkpoint is damaged or was changed, use the original file"
            )
    return tokenizer
