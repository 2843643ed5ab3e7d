"""Tokenizers of other projects: tokenizer.json files, trained ones, and tiktoken's encodings."""

import base64
import hashlib
import json
import pickle
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken.load
import tiktoken_ext.openai_public
import tokenizers
from hypothesis import event, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from gptpl.errors import InputError
from gptpl.tokenizers import (
    END_OF_TEXT,
    FileTokenizer,
    GPT2Tokenizer,
    TiktokenTokenizer,
    Tokenizer,
    gpt2,
    tokenizer_from_state,
    train_bpe,
)
from gptpl.tokenizers.hugging_face import write_tokenizer

TEXT = "the cat sat on the mat, the cat ate the rat. Zürich 東京 'tis the 42nd\n\n  cat's hat" * 20
TRAINED = train_bpe([TEXT], vocab_size=300)
any_text = st.text(st.characters(exclude_categories=["Cs"]))


AROUND: dict[str, Any] = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {END_OF_TEXT: {"id": END_OF_TEXT, "ids": [0], "tokens": [END_OF_TEXT]}},
}
"""A post-processor that puts the end of text before a text."""


@pytest.fixture(scope="module")
def gpt2_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    write_tokenizer(GPT2Tokenizer(), folder, context_length=1024)
    return folder / "tokenizer.json"


# ---------------------------------------------------------------------------------------- tokenizer.json


@given(text=any_text)
def test_a_trained_tokenizer_loses_nothing_and_counts_the_bytes(text: str) -> None:
    ids = TRAINED.encode(text)
    assert ids.dtype == np.uint32
    assert TRAINED.decode(ids) == text
    lengths = TRAINED.token_bytes()
    assert lengths is not None
    assert lengths[ids].sum() == len(text.replace(END_OF_TEXT, "").encode())


def test_gpt2_as_a_file_gives_the_ids_of_gpt2(gpt2_file: Path) -> None:
    tokenizer, own = FileTokenizer(gpt2_file), GPT2Tokenizer()
    text = f"Every effort moves you{END_OF_TEXT} 東京, isn't it?  \n\n x"
    assert tokenizer.encode(text).tolist() == own.encode(text).tolist()
    assert (tokenizer.vocab_size, tokenizer.eot_id, tokenizer.lossless) == (50257, 50256, True)
    assert list(tokenizer.vocabulary_bytes()) == list(own.vocabulary_bytes())


def test_training_merges_the_most_frequent_pair_first() -> None:
    # By hand: in "abab abab abab xy xy", cut into words with the space before them, "ab" occurs 6 times.
    tokenizer = train_bpe(["abab abab abab xy xy"], vocab_size=257 + 3)
    pairs = Counter({b"ab": 6, b"abab": 3, b" abab": 2, b"xy": 2})
    tokens = list(tokenizer.vocabulary_bytes())
    assert tokens[0] == END_OF_TEXT.encode()
    assert sorted(tokens[1:257]) == [bytes([value]) for value in range(256)]
    assert tokens[257] == pairs.most_common(1)[0][0]
    assert tokens[258] == b"abab"
    assert train_bpe(["abab abab abab xy xy"], vocab_size=260).json == tokenizer.json


def test_the_state_is_the_whole_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    TRAINED.save(path)
    given = FileTokenizer(path)
    assert FileTokenizer(tmp_path).sha256 == given.sha256
    path.unlink()
    state = json.loads(json.dumps(given.state()))
    for again in (tokenizer_from_state(state), pickle.loads(pickle.dumps(given))):  # noqa: S301
        assert again.state() == TRAINED.state()
        assert again.encode(TEXT).tolist() == TRAINED.encode(TEXT).tolist()
    assert given.sha256 != SMALL.sha256
    changed = state | {"json": state["json"].replace('"dropout": null', '"dropout": null ')}
    with pytest.raises(InputError, match=r"has json .*the checkpoint is damaged or was changed"):
        tokenizer_from_state(changed)
    with pytest.raises(InputError, match="has no content"):
        tokenizer_from_state({key: value for key, value in state.items() if key != "json"})


def test_a_file_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "there.json").write_text("mine")
    with pytest.raises(InputError, match=r"there\.json exists: name a new file"):
        TRAINED.save(tmp_path / "there.json")
    assert (tmp_path / "there.json").read_text() == "mine"


def test_other_merges_of_the_same_tokens_are_another_tokenizer() -> None:
    content = json.loads(TRAINED.json)
    content["model"]["merges"] = content["model"]["merges"][::-1]
    other = FileTokenizer.from_json(json.dumps(content))
    assert list(other.vocabulary_bytes()) == list(TRAINED.vocabulary_bytes())
    assert other.sha256 != TRAINED.sha256
    two = train_bpe([TEXT], vocab_size=300, special_tokens=["</s>", END_OF_TEXT])
    assert FileTokenizer.from_json(two.json).sha256 != two.sha256, "another token ends a text"


def test_what_a_file_says_of_truncation_padding_and_tokens_around_is_left_out() -> None:
    content = json.loads(TRAINED.json)
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": END_OF_TEXT,
    }  # fmt: skip
    content["post_processor"] = AROUND
    tokenizer = FileTokenizer.from_json(json.dumps(content))
    assert tokenizer.encode("the cat sat").tolist() == TRAINED.encode("the cat sat").tolist()
    content["added_tokens"].append(added("<|once|>", 300, single_word=True))
    in_library = FileTokenizer.from_json(json.dumps(content))
    assert in_library._fast is None
    assert in_library.encode("the cat sat").tolist() == TRAINED.encode("the cat sat").tolist()


def word_level(**changes: Any) -> str:
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "a": 1, "b": 5}, unk_token="a"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(["</s>"])
    return json.dumps(json.loads(made.to_str()) | changes)


def test_a_tokenizer_that_is_not_byte_level_counts_no_bytes_and_may_have_unused_ids() -> None:
    tokenizer = FileTokenizer.from_json(word_level(), end_of_text="</s>")
    assert tokenizer.encode(f"a b{END_OF_TEXT}b c").tolist() == [1, 5, 0, 5, 1]
    assert tokenizer.vocab_size == 6
    assert list(tokenizer.vocabulary_bytes()) == [b"</s>", b"a", b"", b"", b"", b"b"]
    assert not tokenizer.lossless
    assert tokenizer.token_bytes() is None
    assert FileTokenizer.lossless, "a file's property has become the class's"


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Lowercase"}},
        {
            "pre_tokenizer": {
                "type": "ByteLevel",
                "add_prefix_space": True,
                "use_regex": True,
                "trim_offsets": True,
            }
        },
        {"decoder": {"type": "Fuse"}},
    ],
)
def test_one_that_changes_the_text_counts_no_bytes(change: dict[str, Any]) -> None:
    tokenizer = FileTokenizer.from_json(json.dumps(json.loads(TRAINED.json) | change))
    assert not tokenizer.lossless


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a tokenizer.json"),
        ("[]", "is not a tokenizer.json"),
        ("[" * 100_000, "is not a tokenizer.json"),
        ('{"model": {"type": "Oracle"}}', "is not a tokenizer.json"),
        (word_level(), r"has no token '<\|endoftext\|>': set tokenizer.end_of_text .* of </s>"),
        (TRAINED.json.replace('"dropout": null', '"dropout": 0.1'), "drops merges at random"),
        (b"\xff\xfe\x00", "is not a tokenizer.json"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused(content: str | bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as refused:
        FileTokenizer(path)
    assert str(path) in str(refused.value)
    assert len(str(refused.value)) < 500


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read tokenizer\.path=.*none\.json"):
        FileTokenizer(tmp_path / "none.json")
    with pytest.raises(InputError, match=r"tokenizer\.path is not set"):
        FileTokenizer()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"vocab_size": 256}, "must be at least 257, got 256"),
        ({"vocab_size": 300, "special_tokens": []}, "must be different tokens, one at least"),
        ({"vocab_size": 300, "special_tokens": ["a", "a"]}, "must be different tokens, one at least"),
    ],
)
def test_a_vocabulary_that_cannot_be_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        train_bpe(["a text"], **given)


def test_without_the_library_its_name_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = FileTokenizer.from_json(word_level(), end_of_text="</s>")
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(InputError, match="pip install tokenizers"):
        tokenizer_from_state(tokenizer.state())
    with pytest.raises(InputError, match="pip install tokenizers"):
        train_bpe([TEXT], vocab_size=300)


def test_lone_surrogates_become_replacement_characters() -> None:
    assert TRAINED.decode(TRAINED.encode("a\ud800b")) == "a\ufffdb"


# ------------------------------------------------------------------------------------------------ tiktoken


@pytest.fixture
def r50k(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """tiktoken's own file of GPT-2's vocabulary, by our vocabulary, where tiktoken would keep a download."""
    address = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
    monkeypatch.setenv("GPTPL_CACHE", str(tmp_path))
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.delenv("DATA_GYM_CACHE_DIR", raising=False)
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    ranks = sorted(gpt2._ranks().items(), key=lambda item: item[1])
    content = b"".join(base64.b64encode(token) + b" " + str(rank).encode() + b"\n" for token, rank in ranks)
    path = tmp_path / "tiktoken" / hashlib.sha1(address.encode()).hexdigest()
    path.parent.mkdir()
    path.write_bytes(content)
    return path


def no_network(*_: object) -> bytes:
    raise OSError("no network")


def test_an_encoding_comes_from_the_cache_and_stays_in_the_state(
    r50k: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiktoken.load, "read_file", no_network)
    tokenizer: Tokenizer = TiktokenTokenizer("r50k_base")
    r50k.unlink()
    text = f"Every effort moves you{END_OF_TEXT} 東京\ud800"
    again = tokenizer_from_state(json.loads(json.dumps(tokenizer.state())))
    for each in (tokenizer, again, pickle.loads(pickle.dumps(again))):  # noqa: S301
        assert each.encode(text).tolist() == GPT2Tokenizer().encode(text).tolist()
        assert each.decode(each.encode(text)) == GPT2Tokenizer().decode(GPT2Tokenizer().encode(text))
        assert list(each.vocabulary_bytes()) == list(GPT2Tokenizer().vocabulary_bytes())
        assert each.sha256 == tokenizer.sha256 != GPT2Tokenizer().sha256
    lengths = again.token_bytes()
    assert lengths is not None
    assert lengths[again.encode("東京")].sum() == 6


def test_a_download_that_fails_or_was_changed_is_refused(r50k: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    r50k.write_bytes(r50k.read_bytes()[:-10])
    monkeypatch.setattr(tiktoken.load, "read_file", no_network)
    with pytest.raises(InputError, match=r"cannot fetch tokenizer\.encoding=r50k_base \(no network\)"):
        TiktokenTokenizer("r50k_base")
    monkeypatch.setattr(tiktoken.load, "read_file", lambda *_: b"aGk= 0\n")
    with pytest.raises(InputError, match=r"cannot fetch tokenizer\.encoding=r50k_base"):
        TiktokenTokenizer("r50k_base")
    with pytest.raises(InputError, match=r"encoding=r51k is unknown to tiktoken: it has .*o200k_base"):
        TiktokenTokenizer("r51k")


def test_unused_ids_and_other_special_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = {bytes([value]): value for value in range(256)}
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    monkeypatch.setitem(
        tiktoken.registry.__dict__,
        "ENCODING_CONSTRUCTORS",
        {
            "small": lambda: {
                "name": "small",
                "pat_str": ".|\\n",
                "mergeable_ranks": ranks,
                "special_tokens": {END_OF_TEXT: 256, "<|other|>": 260},
            }
        },
    )
    tokenizer = TiktokenTokenizer("small")
    assert tokenizer.vocab_size == 261
    assert tokenizer.encode("<|other|>").tolist() == list(b"<|other|>")
    assert tokenizer.decode([104, 258, 105, 260]) == "hi<|other|>"


@pytest.mark.parametrize(
    "damage", [{"ranks": "x"}, {"ranks": "aGk="}, {"pattern": "("}, {"special_tokens": {}}]
)
def test_a_damaged_state_is_refused(
    damage: dict[str, Any], r50k: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = TiktokenTokenizer("r50k_base").state()
    with pytest.raises(InputError, match=r"damaged|has no token|token id"):
        tokenizer_from_state(state | damage)


def test_the_encodings_that_the_docstring_names_are_tiktokens() -> None:
    assert {"cl100k_base", "o200k_base"} <= tiktoken_ext.openai_public.ENCODING_CONSTRUCTORS.keys()


# ------------------------------------------------------------------------------------- the two encoders


@lru_cache(maxsize=8)
def library(content: str) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(content)


def in_the_library(tokenizer: FileTokenizer, text: str) -> list[int]:
    return list(library(tokenizer.json).encode(text, add_special_tokens=False).ids)


WORDS = ["abc", "ab", " ", "  ", "aaa", "bbb", "cab", "\n\n", "12", "'ll", "é東", END_OF_TEXT]


@settings(max_examples=300)
@given(words=st.lists(st.sampled_from(WORDS)))
def test_a_trained_tokenizer_encodes_in_tiktoken_what_the_library_encodes(words: list[str]) -> None:
    assert SMALL._fast is not None
    text = "".join(words)
    assert SMALL.encode(text).tolist() == in_the_library(SMALL, text)


SMALL = train_bpe(["abc aaab bbbaa cabcab aaaa aabb abab " * 9 + "cab bca 12 1212"], vocab_size=300)


@settings(max_examples=200)
@given(st.data())
def test_whatever_merges_tiktoken_takes_it_encodes_as_the_library_does(data: st.DataObject) -> None:
    content = json.loads(SMALL.json)
    tokens, merges = ["a", "b", "c"], []
    for _ in range(data.draw(st.integers(1, 8))):
        pair = (data.draw(st.sampled_from(tokens)), data.draw(st.sampled_from(tokens)))
        if "".join(pair) not in tokens:
            tokens.append("".join(pair))
            merges.append(list(pair))
    letters = [token for token in content["model"]["vocab"] if len(token) == 1]
    vocabulary = [END_OF_TEXT, *letters, *tokens[3:]]
    content["model"] |= {"merges": merges, "vocab": {token: n for n, token in enumerate(vocabulary)}}
    tokenizer = FileTokenizer.from_json(json.dumps(content))
    event(f"in tiktoken: {tokenizer._fast is not None}")
    texts = data.draw(st.lists(st.text("abc", min_size=1, max_size=20), min_size=3, max_size=6))
    for text in texts:
        assert tokenizer.encode(text).tolist() == in_the_library(tokenizer, text)


def test_merges_that_meet_in_other_ways_are_left_to_the_library() -> None:
    content = json.loads(SMALL.json)
    letters = [token for token in content["model"]["vocab"] if len(token) == 1]
    for merges, fast in (
        ([["a", "b"], ["ab", "c"]], True),
        ([["b", "c"], ["a", "b"], ["ab", "c"]], False),  # "abc" becomes a, bc, which tiktoken would merge
        ([["ab", "c"], ["a", "b"]], False),
    ):
        vocabulary = [END_OF_TEXT, *letters, *("".join(pair) for pair in merges)]
        content["model"] |= {"merges": merges, "vocab": {token: n for n, token in enumerate(vocabulary)}}
        tokenizer = FileTokenizer.from_json(json.dumps(content))
        assert (tokenizer._fast is not None) == fast
        assert tokenizer.encode("abcabc").tolist() == in_the_library(tokenizer, "abcabc")


def test_words_are_cut_alike_whatever_the_characters() -> None:
    """Above 0x20000 all are Chinese, or unassigned: one of 16 there."""
    different = []
    for start in (*range(0, 0x20000, 64), *range(0x20000, 0x30000, 1024)):
        characters = [chr(code) for code in range(start, start + 64) if not 0xD800 <= code < 0xE000]
        text = "".join(f"a{character}b {character}1 " for character in characters)
        if SMALL.encode(text).tolist() != in_the_library(SMALL, text):
            different += [f"{start:04X}"]
    assert different == []


@pytest.mark.parametrize("in_vocabulary", [True, False])
def test_documents_end_with_the_token_that_ends_a_text(in_vocabulary: bool) -> None:
    special = ["</s>", END_OF_TEXT] if in_vocabulary else ["</s>"]
    tokenizer = train_bpe([TEXT], vocab_size=300, special_tokens=special)
    assert tokenizer._fast is not None
    plain = FileTokenizer.from_json(tokenizer.json, end_of_text="</s>")
    plain._fast = None
    plain._library = tokenizers.Tokenizer.from_str(tokenizer.json)
    text = f"the cat{END_OF_TEXT}the mat</s>{END_OF_TEXT}"
    for each in (tokenizer, plain):
        assert each.encode(text).tolist() == [
            *each.encode("the cat"), each.eot_id, *each.encode("the mat"), each.eot_id, each.eot_id
        ]  # fmt: skip
    with pytest.raises(InputError, match=r"has no token 'the'"):
        FileTokenizer.from_json(tokenizer.json, end_of_text="the")


def added(content: str, number: int, **flags: bool) -> dict[str, Any]:
    names = ("single_word", "lstrip", "rstrip", "normalized")
    return {"id": number, "content": content, **dict.fromkeys(names, False), "special": True} | flags


@pytest.mark.parametrize("text", ["abc", "xabcabx", "bcabc", "ab bc"])
def test_added_tokens_that_are_found_one_after_the_other(text: str) -> None:
    content = json.loads(SMALL.json)
    size = len(content["model"]["vocab"])
    end = content["model"]["vocab"][END_OF_TEXT]
    content["added_tokens"] = [
        added(END_OF_TEXT, end), added("abX", size), added("bc", size + 1),
        added("xab", size + 2, normalized=True),
    ]  # fmt: skip
    tokenizer = FileTokenizer.from_json(json.dumps(content))
    assert tokenizer._fast is None
    assert tokenizer.encode(text).tolist() == in_the_library(tokenizer, text)


@pytest.mark.parametrize("number", [-1, 2**31, 2**40, 300.5, True, "7"])
def test_ids_that_cannot_be_are_refused(number: Any) -> None:
    content = json.loads(SMALL.json)
    last = list(content["model"]["vocab"])[-1]
    content["model"]["vocab"][last] = number
    with pytest.raises(InputError, match=r"token id|is not a tokenizer"):
        FileTokenizer.from_json(json.dumps(content))


def test_a_token_twice_as_long_again_and_again_does_not_stop_us() -> None:
    content = json.loads(SMALL.json)
    token, merges = "a", []
    for _ in range(20):
        merges.append([token, token])
        token += token
        content["model"]["vocab"].setdefault(token, len(content["model"]["vocab"]))
    content["model"]["merges"] = merges
    content["added_tokens"] = [added(END_OF_TEXT, content["model"]["vocab"][END_OF_TEXT])]
    assert FileTokenizer.from_json(json.dumps(content))._fast is None


def test_tokens_that_are_not_written_in_bytes() -> None:
    content = json.loads(SMALL.json)
    content["model"]["vocab"]["東京"] = len(content["model"]["vocab"])
    tokenizer = FileTokenizer.from_json(json.dumps(content))
    assert not tokenizer.lossless
    assert tokenizer.decode(tokenizer.encode("cab 12")) == "cab 12"
    assert "東京".encode() in tokenizer.vocabulary_bytes()


def test_the_separator_is_not_learned() -> None:
    text = END_OF_TEXT.join(["the cat", "the mat"] * 50)
    tokens = train_bpe([text], vocab_size=400).vocabulary_bytes()
    assert not [token for token in tokens if b"endof" in token and token != END_OF_TEXT.encode()]


def test_an_export_puts_nothing_around_a_text(tmp_path: Path) -> None:
    content = json.loads(TRAINED.json)
    content["post_processor"] = AROUND
    tokenizer = FileTokenizer.from_json(json.dumps(content))
    write_tokenizer(tokenizer, tmp_path, context_length=8)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("the cat")["input_ids"] == tokenizer.encode("the cat").tolist()


def test_ids_in_any_order_and_several_special_tokens() -> None:
    content = json.loads(SMALL.json)
    ids = np.random.default_rng(0).permutation(len(content["model"]["vocab"])).tolist()
    content["model"]["vocab"] = dict(zip(content["model"]["vocab"], ids, strict=True))
    content["added_tokens"] = [
        added(END_OF_TEXT, content["model"]["vocab"][END_OF_TEXT]), added("<|user|>", len(ids))
    ]  # fmt: skip
    tokenizer = FileTokenizer.from_json(json.dumps(content))
    assert tokenizer._fast is not None
    text = f"abc<|user|> cab{END_OF_TEXT}aaa<|user|>"
    assert tokenizer.encode(text).tolist() == in_the_library(tokenizer, text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == len(ids) + 1
    content["added_tokens"][1]["id"] = 400  # which the library reads as the next one
    other = FileTokenizer.from_json(json.dumps(content))
    assert other._fast is None
    assert other.encode(text).tolist() == tokenizer.encode(text).tolist()


def test_a_tokenizer_that_tiktoken_can_hold_needs_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    state = SMALL.state()
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    again = tokenizer_from_state(state)
    assert again.decode(again.encode("cab 12")) == "cab 12"


def test_white_space_without_end_is_encoded() -> None:
    text = "abc" + " " * 2_000_000 + "cab" + " " * 1500 + END_OF_TEXT + "ab"
    ids = SMALL.encode(text)
    assert SMALL.decode(ids) == text
    end = ids.tolist().index(SMALL.eot_id)
    assert ids[:end].tolist()[-1500:] == SMALL.encode("cab" + " " * 1500).tolist()[-1500:]
