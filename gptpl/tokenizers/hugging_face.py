"""A tokenizer as the files that Hugging Face's `AutoTokenizer` reads, and whether such files are GPT-2's."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptpl.errors import InputError
from gptpl.tokenizers.base import END_OF_TEXT, BytesTokenizer, Tokenizer
from gptpl.tokenizers.gpt2 import GPT2Tokenizer, vocabulary_files
from gptpl.tokenizers.words import UNKNOWN, WordsTokenizer


def byte_characters() -> list[str]:
    """The character that GPT-2's files write for each byte 0 .. 255.

    A printable byte of Latin-1 is itself; the others are U+0100 and the characters after it, in order
    (Radford et al. 2019, `encoder.py` of the released code).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def write_tokenizer(tokenizer: Tokenizer, folder: Path, *, context_length: int) -> None:
    """`tokenizer.json` and `tokenizer_config.json`; GPT-2's older pair of files beside them.

    Raises InputError for a tokenizer that these files have no form for.
    """
    if isinstance(tokenizer, GPT2Tokenizer):
        files = vocabulary_files()
        vocabulary = files["encoder.json"].read_text(encoding="utf-8")
        merges = files["vocab.bpe"].read_text(encoding="utf-8")
        (folder / "vocab.json").write_text(vocabulary, encoding="utf-8")
        (folder / "merges.txt").write_text(merges, encoding="utf-8")
        pairs = [line for line in merges.split("\n")[1:] if line]
        content = _byte_level(json.loads(vocabulary), pairs, tokenizer.eot_id, cuts_words=True)
    elif isinstance(tokenizer, BytesTokenizer):
        ids = {character: byte for byte, character in enumerate(byte_characters())}
        content = _byte_level(ids | {END_OF_TEXT: tokenizer.eot_id}, [], tokenizer.eot_id, cuts_words=False)
    elif isinstance(tokenizer, WordsTokenizer):
        content = _words(tokenizer)
    else:
        raise InputError(
            f"tokenizer={tokenizer.name} has no form in Hugging Face's files: use another format"
        )
    gpt2, words = isinstance(tokenizer, GPT2Tokenizer), isinstance(tokenizer, WordsTokenizer)
    config = {
        "tokenizer_class": "GPT2Tokenizer" if gpt2 else "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": UNKNOWN if words else END_OF_TEXT,
    }
    for name, value in (("tokenizer.json", content), ("tokenizer_config.json", config)):
        text = json.dumps(value, ensure_ascii=False, indent=1) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


def is_gpt2_vocabulary(folder: Path) -> bool | None:
    """Whether the tokenizer files of a folder hold GPT-2's vocabulary; None: there are none."""
    if (folder / "vocab.json").is_file():
        ids = _json(folder / "vocab.json")
    elif (folder / "tokenizer.json").is_file():
        content = _json(folder / "tokenizer.json")
        try:
            ids = dict(content["model"]["vocab"])
            ids |= {token["content"]: token["id"] for token in content.get("added_tokens", [])}
        except (LookupError, TypeError, ValueError):  # of another kind than byte-pair encoding
            return False
    else:
        return None
    characters = byte_characters()
    tokenizer = GPT2Tokenizer()
    ours = {
        "".join(characters[byte] for byte in token): number
        for number, token in enumerate(tokenizer.vocabulary_bytes())
        if number != tokenizer.eot_id
    }
    return ids == ours | {END_OF_TEXT: tokenizer.eot_id}


def _byte_level(
    vocabulary: Mapping[str, int], merges: list[str], eot_id: int, *, cuts_words: bool
) -> dict[str, Any]:
    """Byte-pair encoding; `cuts_words`: after the text has been cut by GPT-2's regular expression."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": cuts_words}
    return {
        **_frame({END_OF_TEXT: eot_id}),
        "pre_tokenizer": level,
        "decoder": level,
        "model": {
            "type": "BPE",
            **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")),
            **dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False),
            "vocab": dict(vocabulary),
            "merges": merges,
        },
    }


def _words(tokenizer: WordsTokenizer) -> dict[str, Any]:
    """White space taken away, then punctuation cut off, each piece looked up."""
    ids = {word: number for number, word in enumerate(tokenizer.vocabulary)}
    special = {word: ids[word] for word in (END_OF_TEXT, UNKNOWN)}
    cuts = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}
        for pattern, behavior in ((r"\s+", "Removed"), (r"""[,.:;?_!"()']|--""", "Isolated"))
    ]
    # WordPiece puts a space before every word but the first, and none before what has its prefix: nothing.
    spaced = {"type": "WordPiece", "prefix": "\0", "cleanup": False}
    joined = [
        {"type": "Replace", "pattern": {"String": f" {mark}"}, "content": mark} for mark in ",.:;?!\"()'"
    ]
    return {
        **_frame(special),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts},
        "decoder": {"type": "Sequence", "decoders": [spaced, *joined]},
        "model": {"type": "WordLevel", "vocab": ids, "unk_token": UNKNOWN},
    }


def _frame(special: Mapping[str, int]) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": word, **flags} for word, number in special.items()],
        "normalizer": None,
        "post_processor": None,
    }


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is no vocabulary in JSON ({error}): fetch it anew") from error
    return content if isinstance(content, dict) else {}
