"""GPT-2's byte-pair encoding: OpenAI's vocabulary, which ships with the package, in tiktoken's encoder."""

import functools
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from gptpl.tokenizers.base import END_OF_TEXT, TokenIds, Tokenizer, without_lone_surrogates

if TYPE_CHECKING:
    import tiktoken

# White space as tiktoken's pattern sees it: Python's \s has four control characters more.
_SPACE = r"[^\S\x1c-\x1f]"
_LONG_SPACE = re.compile(rf"(?<!{_SPACE}){_SPACE}{{1000,}}+(?=[\S\x1c-\x1f])(?!{re.escape(END_OF_TEXT)})")


class GPT2Tokenizer(Tokenizer):
    """The 50,257 tokens of GPT-2; lossless for any text.

    The vocabulary is loaded at first use (about 0.1 s) and shared by the whole process; a pickled tokenizer
    carries none of it.
    """

    name: ClassVar[str] = "gpt2"
    vocab_size = 50257
    eot_id = 50256

    def encode(self, text: str) -> TokenIds:
        """GPT-2 token ids."""
        try:
            return _encode(text)
        except UnicodeEncodeError:
            return self.encode(without_lone_surrogates(text))
        except ValueError:
            # The pattern runs out of stack in a million white-space characters with text behind them.
            return cut_at_long_space(text, _encode)

    def encode_many(self, texts: Iterable[str]) -> list[TokenIds]:
        """`encode` of each text, in order, on all cores: tiktoken releases the interpreter lock."""
        _encoding()  # once, before the threads ask for it
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            return list(threads.map(self.encode, texts))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the tokens, in tiktoken."""
        return _encoding().decode(self.known_ids(ids), errors="replace")

    def vocabulary_bytes(self) -> Sequence[bytes]:
        """The byte sequences in the order of the ids."""
        return (*_ranks(), END_OF_TEXT.encode())


def byte_characters() -> list[str]:
    """The character that GPT-2's files write for each byte 0 .. 255.

    A printable byte of Latin-1 is itself; the others are U+0100 and the characters after it, in order
    (Radford et al. 2019, `encoder.py` of the released code).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def token_ids() -> dict[str, int]:
    """Ids of all tokens, in order, each token written in `byte_characters`."""
    merged = [line.replace(" ", "") for line in _merges().splitlines()[1:]]  # below the version
    tokens = [*sorted(byte_characters()), *merged, END_OF_TEXT]
    return {token: number for number, token in enumerate(tokens)}


def vocabulary_files() -> dict[str, bytes]:
    """OpenAI's own `encoder.json` and `vocab.bpe`, to the byte."""
    return {"encoder.json": json.dumps(token_ids()).encode(), "vocab.bpe": _merges().encode()}


def _merges() -> str:
    return (resources.files(__package__) / "gpt2_vocabulary/vocab.bpe").read_text(encoding="utf-8")


@functools.cache
def _ranks() -> dict[bytes, int]:
    """Ids of the tokens as bytes, `<|endoftext|>` apart."""
    byte = {character: number for number, character in enumerate(byte_characters())}
    ids = token_ids()
    del ids[END_OF_TEXT]
    return {bytes([byte[character] for character in token]): number for token, number in ids.items()}


@functools.cache
def _encoding() -> "tiktoken.Encoding":
    return encoding_of(_ranks(), {END_OF_TEXT: GPT2Tokenizer.eot_id})


def encoding_of(ranks: dict[bytes, int], special_tokens: dict[str, int]) -> "tiktoken.Encoding":
    """tiktoken's encoder of a vocabulary, each token with its rank, for words cut as GPT-2 does."""
    import tiktoken

    # r50k_pat_str: how GPT-2 cuts text into pieces before it merges bytes.
    from tiktoken_ext.openai_public import r50k_pat_str

    return tiktoken.Encoding(
        "cut as gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens=special_tokens,
        explicit_n_vocab=len(ranks) + len(special_tokens),
    )


def _encode(text: str) -> TokenIds:
    # The copy makes the array writable; tiktoken's own lies over an immutable buffer.
    return _encoding().encode_to_numpy(text, allowed_special={END_OF_TEXT}).copy()


def cut_at_long_space(text: str, encode: Callable[[str], TokenIds]) -> TokenIds:
    """The tokens of a text with white space so long that the pattern runs out of stack."""
    # The pattern makes one piece of a run of white space, all but its last character where text follows. A
    # run at the end of a string is one piece as well, so a cut before that last character changes no token.
    cuts = [0, *(run.end() - 1 for run in _LONG_SPACE.finditer(text)), len(text)]
    return np.concatenate([encode(text[start:end]) for start, end in itertools.pairwise(cuts)])
