"""Tokenizers as the files that Hugging Face's `AutoTokenizer` reads, and whether such files are GPT-2's.

The files are plain JSON: the `tokenizers` package, which could write them, is needed for nothing else.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptpl.errors import InputError
from gptpl.tokenizers.base import END_OF_TEXT, BytesTokenizer, Tokenizer
from gptpl.tokenizers.gpt2 import GPT2Tokenizer, byte_characters, token_ids, vocabulary_files
from gptpl.tokenizers.others import FileTokenizer
from gptpl.tokenizers.words import NO_SPACE_BEFORE, PUNCTUATION, UNKNOWN, WordsTokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path, *, context_length: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`; of GPT-2 also the older `vocab.json`, `merges.txt`.

    Raises InputError for a class of tokenizer that these files cannot express.
    """
    kind, end_of_text = "PreTrainedTokenizerFast", END_OF_TEXT
    unknown: str | None = END_OF_TEXT
    if isinstance(tokenizer, GPT2Tokenizer):
        kind = "GPT2Tokenizer"
        files = vocabulary_files()
        (folder / "vocab.json").write_bytes(files["encoder.json"])
        (folder / "merges.txt").write_bytes(files["vocab.bpe"])
        content = _byte_level(token_ids(), files["vocab.bpe"].decode().splitlines()[1:], cuts_words=True)
    elif isinstance(tokenizer, BytesTokenizer):
        characters = [*byte_characters(), END_OF_TEXT]
        content = _byte_level({each: number for number, each in enumerate(characters)}, [], cuts_words=False)
    elif isinstance(tokenizer, FileTokenizer):
        end_of_text, unknown = tokenizer.end_of_text, None
        # gptpl puts no tokens around a text.
        content = json.loads(tokenizer.json) | {"post_processor": None}
    elif isinstance(tokenizer, WordsTokenizer):
        unknown = UNKNOWN
        content = _words({word: number for number, word in enumerate(tokenizer.vocabulary)})
    else:
        raise InputError(
            f"Hugging Face's files cannot hold tokenizer={tokenizer.name}: convert to another format"
        )
    config = {
        "tokenizer_class": kind,
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        "bos_token": end_of_text,
        "eos_token": end_of_text,
    }
    if unknown:
        config |= {"unk_token": unknown, "add_prefix_space": False}
    for name, value in (("tokenizer.json", content), ("tokenizer_config.json", config)):
        text = json.dumps(value, ensure_ascii=False, indent=1) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


def is_gpt2_vocabulary(folder: Path) -> bool | None:
    """Whether the tokenizer files of a folder hold GPT-2's vocabulary; None: it has no such files."""
    paths = [folder / name for name in ("vocab.json", "tokenizer.json") if (folder / name).is_file()]
    if not paths:
        return None
    path = paths[0]
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a JSON file ({error}): download it again") from error
    if path.name == "tokenizer.json":
        try:
            added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
            content = {**content["model"]["vocab"], **added}
        except (LookupError, TypeError, ValueError, AttributeError):  # not byte-pair encoding
            return False
    return bool(content == token_ids())


def _byte_level(vocabulary: Mapping[str, int], merges: list[str], *, cuts_words: bool) -> dict[str, Any]:
    """Byte-pair encoding; `cuts_words`: after the text has been cut by GPT-2's regular expression."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": cuts_words}
    model = {
        "type": "BPE",
        **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")),
        **dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False),
        "vocab": vocabulary,
        "merges": merges,
    }
    return _file(model, [END_OF_TEXT], pre_tokenizer=level, decoder=level)


def _words(vocabulary: Mapping[str, int]) -> dict[str, Any]:
    """White space removed, then punctuation cut off, each piece looked up."""
    cuts = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}
        for pattern, behavior in ((r"\s+", "Removed"), (PUNCTUATION, "Isolated"))
    ]
    # WordPiece puts a space before every word but the first, and none before what has its prefix: nothing.
    spaced = {"type": "WordPiece", "prefix": "\0", "cleanup": False}
    joined = [
        {"type": "Replace", "pattern": {"String": f" {mark}"}, "content": mark} for mark in NO_SPACE_BEFORE
    ]
    return _file(
        {"type": "WordLevel", "vocab": vocabulary, "unk_token": UNKNOWN},
        [END_OF_TEXT, UNKNOWN],
        pre_tokenizer={"type": "Sequence", "pretokenizers": cuts},
        decoder={"type": "Sequence", "decoders": [spaced, *joined]},
    )


def _file(model: Mapping[str, Any], special: list[str], **parts: Any) -> dict[str, Any]:
    """A whole `tokenizer.json`."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    added = [{"id": model["vocab"][word], "content": word, **flags} for word in special]
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    return {"version": "1.0", "added_tokens": added, **empty, **parts, "model": model}
