"""Other tokenizers than GPT-2's: any `tokenizer.json` of the tokenizers library, and tiktoken's encodings.

Both put their whole vocabulary into `state()`, so that a checkpoint needs neither file nor download.
"""

import base64
import hashlib
import itertools
import json
import os
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from gptpl.errors import InputError
from gptpl.files.download import cache_dir
from gptpl.files.durable import write_atomically
from gptpl.text import shortened
from gptpl.tokenizers.base import END_OF_TEXT, TokenIds, Tokenizer, without_lone_surrogates
from gptpl.tokenizers.gpt2 import byte_characters, cut_at_long_space, encoding_of

if TYPE_CHECKING:
    import tiktoken


class FileTokenizer(Tokenizer):
    """The tokenizer of a `tokenizer.json`, as the tokenizers library writes it.

    What the file says of truncation, of padding and of tokens around a text is left out. `<|endoftext|>` in a
    text becomes the token `end_of_text`; other added tokens of the file become theirs. It is `lossless` where
    it is byte-level, as GPT-2's and those of `train_bpe` are; else `token_bytes` is None.

    Args:
        path: the file, or a folder that has it; `~` is the home folder.
        end_of_text: the token that stands between documents, one of the file's added tokens.

    Raises InputError for a file that is not such a tokenizer, that has no token `end_of_text`, or that drops
    merges at random.
    """

    name: ClassVar[str] = "file"

    def __init__(self, path: Path | str | None = None, end_of_text: str = END_OF_TEXT) -> None:
        if path is None:
            raise InputError("tokenizer.path is not set: name a tokenizer.json")
        file = Path(path).expanduser()
        if file.is_dir():
            file /= "tokenizer.json"
        try:
            content = file.read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(
                f"cannot read tokenizer.path={path} ({error.strerror}): name a tokenizer.json"
            ) from error
        except UnicodeDecodeError as error:
            raise _not_a_tokenizer(str(file), error) from error
        self._set(content, end_of_text, str(file))

    @classmethod
    def from_json(cls, content: str, *, end_of_text: str = END_OF_TEXT, source: str = "the text") -> Self:
        """The tokenizer of a file's content; `source` is what errors call it."""
        made = cls.__new__(cls)
        made._set(content, end_of_text, source)
        return made

    def _set(self, content: str, end_of_text: str, source: str) -> None:
        try:
            settings = json.loads(content)
            settings |= {"truncation": None, "padding": None}
            self.json = json.dumps(settings, ensure_ascii=False, sort_keys=True)
            self.added_tokens = _added(settings)
            """The tokens that are found in a text before it is cut, with their ids."""
            dropout = settings["model"].get("dropout")
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise _not_a_tokenizer(source, error) from error
        if dropout:
            raise InputError(f"{source} drops merges at random: set its model's dropout to null")
        self._settings = settings
        self._fast = _in_tiktoken(settings, end_of_text)
        if self._fast is None:
            self._library = _loaded(self.json, source)
            self._ids: dict[str, int] = self._library.get_vocab(with_added_tokens=True)
            self.added_tokens = {content: self._ids[content] for content in self.added_tokens}
        else:
            self._ids = settings["model"]["vocab"] | self.added_tokens
        _check_ids(self._ids.values(), source)
        if end_of_text not in self.added_tokens:
            there = sorted(self.added_tokens)
            raise InputError(
                f"{source} has no token {end_of_text!r}: set tokenizer.end_of_text to the one between texts"
                + (f", of {', '.join(there[:10])}" if there else "")
            )
        self.end_of_text = end_of_text
        self.lossless = _is_byte_level(settings)
        self.cuts_as_gpt2 = _cuts_as_gpt2(settings)
        """Whether it encodes the bytes of the words that GPT-2's tokenizer cuts a text into."""

    @cached_property
    def vocab_size(self) -> int:
        """The largest id and one."""
        return max(self._ids.values()) + 1

    @property
    def eot_id(self) -> int:
        """Id of `end_of_text`."""
        return int(self._ids[self.end_of_text])

    @property
    def tokens(self) -> list[str]:
        """Every token as the file writes it, in the order of the ids; "" for unused ids."""
        named = {number: token for token, number in self._ids.items()}
        return [named.get(number, "") for number in range(self.vocab_size)]

    @property
    def merges(self) -> list[str]:
        """The merges of byte-pair encoding, in order, two tokens with a space between them."""
        found = self._settings["model"].get("merges", [])
        return [each if isinstance(each, str) else " ".join(each) for each in found]

    @cached_property
    def sha256(self) -> str:
        """Hash of everything that the file says, and of `end_of_text`."""
        return hashlib.sha256(f"{self.end_of_text}\n{self.json}".encode(errors="surrogatepass")).hexdigest()

    def encode(self, text: str) -> TokenIds:
        """Token ids, each document between `<|endoftext|>` encoded by itself."""
        try:
            return self._encode(text)
        except (TypeError, UnicodeEncodeError):  # how they refuse lone surrogates
            return self._encode(without_lone_surrogates(text))

    def _encode(self, text: str) -> TokenIds:
        if self._fast is not None:
            return self._fast.encode(text)
        ids: list[int] = []
        for number, document in enumerate(text.split(END_OF_TEXT)):
            if number:
                ids.append(self.eot_id)
            if document:
                ids += self._library.encode(document, add_special_tokens=False).ids
        return np.array(ids, dtype=np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the tokens, special ones as they are written; half a character becomes U+FFFD."""
        if self._fast is not None:
            return super().decode(ids)
        return str(self._library.decode(self.known_ids(ids), skip_special_tokens=False))

    def vocabulary_bytes(self) -> list[bytes]:
        """The bytes of byte-level tokens, else the tokens as the file writes them; nothing for unused ids."""
        return self._bytes

    @cached_property
    def _bytes(self) -> list[bytes]:
        byte = {character: number for number, character in enumerate(byte_characters())}
        return [
            bytes([byte[character] for character in token])
            if self.lossless and token not in self.added_tokens
            else token.encode()
            for token in self.tokens
        ]

    def save(self, path: Path | str) -> None:
        """Write a tokenizer.json. Raises InputError where there is such a file."""
        file = Path(path).expanduser()
        if file.exists():
            raise InputError(f"{file} exists: name a new file")
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(
            file, json.dumps(self._settings, ensure_ascii=False, indent=1, sort_keys=True) + "\n"
        )

    def state(self) -> dict[str, Any]:
        """Identity and the content of the file."""
        return super().state() | {"end_of_text": self.end_of_text, "json": self.json}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The tokenizer of the stored content."""
        content, end_of_text = state.get("json"), state.get("end_of_text")
        if not isinstance(content, str) or not isinstance(end_of_text, str):
            raise InputError("the stored tokenizer 'file' has no content: the checkpoint is damaged")
        return cls.from_json(content, end_of_text=end_of_text, source="the stored tokenizer")


def train_bpe(
    texts: Iterable[str], *, vocab_size: int, special_tokens: Sequence[str] = (END_OF_TEXT,)
) -> FileTokenizer:
    """Byte-level byte-pair encoding of the texts, cut into words as GPT-2 does; the same for the same texts.

    The vocabulary has `vocab_size` tokens, or fewer where no pair of tokens is left that occurs twice; the
    first are `special_tokens`, of which the first ends a text. Memory grows with the number of different
    words. Raises InputError for fewer than 256 tokens beside the special ones.
    """
    least = 256 + len(special_tokens)
    if vocab_size < least:
        raise InputError(
            f"tokenizer.vocab_size must be at least {least}, got {vocab_size}: 256 bytes and special tokens"
        )
    if not special_tokens or len({*special_tokens, ""}) <= len(special_tokens):
        raise InputError(
            f"tokenizer.special_tokens must be different tokens, one at least, got {list(special_tokens)}"
        )
    tokenizer = _library().ByteLevelBPETokenizer()
    tokenizer.post_processor = None
    between = re.compile("|".join(map(re.escape, special_tokens)))
    parts = (part for text in texts for part in between.split(without_lone_surrogates(text)))
    tokenizer.train_from_iterator(
        parts,
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(special_tokens),
        show_progress=sys.stderr.isatty(),
    )
    return FileTokenizer.from_json(tokenizer.to_str(), end_of_text=special_tokens[0])


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise InputError(
            "tokenizer.json files need a package that is not installed: pip install tokenizers"
        ) from error
    return tokenizers


def _loaded(content: str, source: str) -> Any:
    try:
        return _library().Tokenizer.from_str(content)
    except Exception as error:
        if type(error) is not Exception:  # the library raises nothing narrower for a file
            raise
        raise _not_a_tokenizer(source, error) from error


def _not_a_tokenizer(source: str, error: Exception) -> InputError:
    return InputError(
        f"{source} is not a tokenizer.json of the tokenizers library ({shortened(str(error), 200)})"
    )


_MOST_UNUSED = 100_000
"""Ids without a token, at most: arrays are as long as the largest id."""


def _check_ids(ids: Collection[Any], source: str) -> None:
    """Raise InputError unless the ids are distinct integers from 0 on, with few unused ones."""
    largest = len(ids) + _MOST_UNUSED
    if wrong := [each for each in ids if type(each) is not int or not 0 <= each < largest]:
        raise InputError(f"{source} has the token id {shortened(repr(wrong[0]), 40)}: it is damaged")
    if len(set(ids)) != len(ids):
        raise InputError(f"{source} has two tokens with the same id: it is damaged")


def _is_byte_level(settings: Mapping[str, Any]) -> bool:
    """Whether the tokens of any text are its bytes, written in `byte_characters`."""
    model, level = settings["model"], settings.get("pre_tokenizer") or {}
    levels = level.get("pretokenizers", [level])
    splits = [each for each in levels if each.get("type") == "Split"]
    known = [each for each in levels if each.get("type") == "ByteLevel" and not each.get("add_prefix_space")]
    added, bytes_written = _added(settings), set(byte_characters())
    return (
        model.get("type") == "BPE"
        and len(known) == 1
        and len(known) + len(splits) == len(levels)
        and all(each.get("behavior") != "Removed" for each in splits)
        and not settings.get("normalizer")
        and not any(map(model.get, ("continuing_subword_prefix", "end_of_word_suffix")))
        and (settings.get("decoder") or {}).get("type") == "ByteLevel"
        and not any(each.get("lstrip") or each.get("rstrip") for each in settings.get("added_tokens") or ())
        and bytes_written <= model["vocab"].keys()
        and bytes_written.issuperset("".join(token for token in model["vocab"] if token not in added))
    )


def _cuts_as_gpt2(settings: Mapping[str, Any]) -> bool:
    """Whether GPT-2's pattern, byte-level merges and added tokens are all there is to it."""
    level = settings.get("pre_tokenizer") or {}
    return (
        _is_byte_level(settings)
        and level.get("type") == "ByteLevel"
        and bool(level.get("use_regex", True))
        and not settings["model"].get("ignore_merges")
        and not any(each.get("single_word") for each in settings.get("added_tokens") or ())
    )


def _added(settings: Mapping[str, Any]) -> dict[str, int]:
    return {each["content"]: each["id"] for each in settings.get("added_tokens") or ()}


@dataclass(frozen=True)
class _InTiktoken:
    """The encoder of a `tokenizer.json` in tiktoken, which is several times as fast.

    Attributes:
        encoding: its ranks are the order of the merges.
        ids: of each rank.
        special: the ids of what is found in a text before it is cut.
    """

    encoding: "tiktoken.Encoding"
    ids: TokenIds
    special: Mapping[str, int]

    def encode(self, text: str) -> TokenIds:
        """Token ids. Raises UnicodeEncodeError for lone surrogates."""
        try:
            return self.ids[self.encoding.encode_to_numpy(text, allowed_special="all")]
        except UnicodeEncodeError:
            raise
        except ValueError:  # white space without end
            parts = re.split(f"({'|'.join(map(re.escape, self.special))})", text)
            return np.concatenate([self._part(part) for part in parts])

    def _part(self, part: str) -> TokenIds:
        if part in self.special:
            return np.array([self.special[part]], dtype=np.uint32)
        return self.ids[cut_at_long_space(part, self.encoding.encode_to_numpy)]


def _in_tiktoken(settings: Mapping[str, Any], end_of_text: str) -> _InTiktoken | None:
    """See `_InTiktoken`; None where it would not be the same encoder.

    tiktoken merges any neighbours that make a token, the file's encoder the two that its merges name. They
    are the same where each token, encoded by the merges before it, is those two: no other two can meet with
    nothing merged across their ends.
    """
    try:
        model, added = settings["model"], _added(settings)
        new = [content for content in added if content not in model["vocab"]]
        numbered = {content: len(model["vocab"]) + number for number, content in enumerate(new)}
        known = added == {content: model["vocab"].get(content) for content in added} | numbered
        special = added | {END_OF_TEXT: added[end_of_text]}
        overlap = any(one != other and other.startswith(one) for one in special for other in special)
        # Those that are normalized are looked for in what the others leave.
        at_once = len({bool(each.get("normalized")) for each in settings["added_tokens"]}) == 1
        if not (_cuts_as_gpt2(settings) and known and at_once) or overlap:
            return None
        byte = {character: number for number, character in enumerate(byte_characters())}
        ranks = {bytes([number]): number for number in range(256)}
        ids = [model["vocab"][character] for character in byte]
        for merge in model["merges"]:
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            pair = [bytes([byte[character] for character in part]) for part in (left, right)]
            token = b"".join(pair)
            if token in ranks or len(token) > _LONGEST or _merged(token, ranks) != pair:
                return None
            ranks[token] = len(ranks)
            ids.append(model["vocab"][left + right])
        _check_ids([*ids, *added.values()], "the file")
        places = {content: len(ids) + number for number, content in enumerate(special)}
        table = np.array([*ids, *special.values()], dtype=np.uint32)
        return _InTiktoken(encoding_of(ranks, places), table, special)
    except (LookupError, TypeError, ValueError, AttributeError):  # the library says what is wrong with it
        return None


_LONGEST = 1000
"""Bytes of a token whose merges are checked."""


def _merged(word: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """Byte-pair encoding of a word: the neighbours of the lowest rank are merged, until none has one."""
    parts = [bytes([value]) for value in word]
    while True:
        found = [(ranks.get(left + right), n) for n, (left, right) in enumerate(itertools.pairwise(parts))]
        known = [(rank, place) for rank, place in found if rank is not None]
        if not known:
            return parts
        _, place = min(known)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


class TiktokenTokenizer(Tokenizer):
    """One of tiktoken's encodings, such as cl100k_base (GPT-4) and o200k_base (GPT-4o).

    tiktoken downloads it once and checks its hash; the file is kept in the cache folder, or in
    TIKTOKEN_CACHE_DIR. Special tokens but `<|endoftext|>` are plain text.

    Raises InputError for an unknown encoding, one without `<|endoftext|>`, and where the download fails.
    """

    name: ClassVar[str] = "tiktoken"

    def __init__(self, encoding: str = "cl100k_base") -> None:
        import tiktoken

        if encoding not in (known := tiktoken.list_encoding_names()):
            raise InputError(
                f"tokenizer.encoding={encoding} is unknown to tiktoken: it has {', '.join(known)}"
            )
        has_folder = {"TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"} & os.environ.keys()
        if not has_folder:
            os.environ["TIKTOKEN_CACHE_DIR"] = str(cache_dir() / "tiktoken")
        try:
            found = tiktoken.get_encoding(encoding)
        except (OSError, ValueError) as error:  # of requests, and of a file with another hash
            raise InputError(
                f"cannot fetch tokenizer.encoding={encoding} ({shortened(str(error), 200)}): try again with a"
                " network; it is kept then"
            ) from error
        finally:
            if not has_folder:
                del os.environ["TIKTOKEN_CACHE_DIR"]
        self._set(encoding, found)

    def _set(self, encoding: str, found: "tiktoken.Encoding") -> None:
        if END_OF_TEXT not in found.special_tokens_set:
            raise InputError(f"tokenizer.encoding={encoding} has no token {END_OF_TEXT}: choose another")
        self.encoding = encoding
        self._tiktoken = found

    @property
    def vocab_size(self) -> int:
        """The largest id and one."""
        return self._tiktoken.n_vocab

    @property
    def eot_id(self) -> int:
        """Id of `<|endoftext|>`."""
        return self._tiktoken.eot_token

    def encode(self, text: str) -> TokenIds:
        """Token ids. Raises InputError for white space so long that tiktoken cannot search it."""
        try:
            text.encode()
        except UnicodeEncodeError:
            text = without_lone_surrogates(text)
        try:
            found = self._tiktoken.encode_to_numpy(text, allowed_special={END_OF_TEXT}, disallowed_special=())
        except ValueError as error:
            raise InputError(
                f"tiktoken cannot encode a text ({shortened(str(error), 100)}): shorten its white space"
            ) from error
        return found.copy()

    def vocabulary_bytes(self) -> Sequence[bytes]:
        """The byte sequences in the order of the ids; nothing for unused ids."""
        return self._tokens

    @cached_property
    def _tokens(self) -> list[bytes]:
        # Private names, as tiktoken's own README has them for a new encoding of an old one's parts.
        tokens = [b""] * self.vocab_size
        for token, number in self._tiktoken._mergeable_ranks.items():
            tokens[number] = token
        for special, number in self._tiktoken._special_tokens.items():
            tokens[number] = special.encode()
        return tokens

    @cached_property
    def sha256(self) -> str:
        """Hash of the tokens, and of the pattern by which a text is cut."""
        return hashlib.sha256(f"{super().sha256} {self._tiktoken._pat_str}".encode()).hexdigest()

    def state(self) -> dict[str, Any]:
        """Identity and everything of which tiktoken makes the encoding."""
        ranks = self._tiktoken._mergeable_ranks
        ordered = sorted(ranks, key=ranks.__getitem__)
        return super().state() | {
            "encoding": self.encoding,
            "pattern": self._tiktoken._pat_str,
            "special_tokens": dict(self._tiktoken._special_tokens),
            "ranks": " ".join(f"{base64.b64encode(token).decode()} {ranks[token]}" for token in ordered),
        }

    def __reduce__(self) -> Any:
        """With the vocabulary: tiktoken pickles a name, for which another process would fetch it."""
        return type(self).from_state, (self.state(),)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The tokenizer of the stored vocabulary."""
        import tiktoken

        made, damage = cls.__new__(cls), "the stored tokenizer 'tiktoken' is damaged: use the original file"
        try:
            words, pattern = iter(state["ranks"].split(" ")), state["pattern"]
            ranks = {base64.b64decode(token): int(next(words)) for token in words}
            special = {str(content): number for content, number in state["special_tokens"].items()}
            _check_ids([*ranks.values(), *special.values()], "the stored tokenizer")
            bytes_there = all(bytes([value]) in ranks for value in range(256))
            # A pattern of tiktoken's own is short, and repeats nothing a thousand times.
            if not bytes_there or len(pattern) > 1000 or re.search(r"\{\d*,?\d{3}", pattern):
                raise InputError(damage)
            found = tiktoken.Encoding(
                state["encoding"], pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
            )
        except (LookupError, ValueError, TypeError, AttributeError, StopIteration) as error:
            raise InputError(damage) from error
        made._set(state["encoding"], found)
        return made
