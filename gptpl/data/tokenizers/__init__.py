"""Tokenizers: GPT-2's byte-pair encoding, the book's words, plain bytes. Importing them loads no tiktoken."""

from gptpl.data.tokenizers.base import END_OF_TEXT, TokenIds, Tokenizer
from gptpl.data.tokenizers.bytes import BytesTokenizer
from gptpl.data.tokenizers.gpt2 import GPT2Tokenizer
from gptpl.data.tokenizers.state import tokenizer_from_state
from gptpl.data.tokenizers.words import WordsTokenizer

__all__ = [
    "END_OF_TEXT",
    "BytesTokenizer",
    "GPT2Tokenizer",
    "TokenIds",
    "Tokenizer",
    "WordsTokenizer",
    "tokenizer_from_state",
]
