"""Texts of a scripted model: pieces are whole characters, stops cut, and nothing is lost between them."""

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptpl.errors import InputError
from gptpl.filters import Patterns, PersonalData, WordList
from gptpl.generation import SamplingRules, complete, search_text, stream_text
from gptpl.generation.text import StopStrings, TextStream
from gptpl.model import GPTConfig, GPTModel
from gptpl.tokenizers import BytesTokenizer, GPT2Tokenizer, WordsTokenizer

EOT = 256
GREEDY = SamplingRules()


def model(vocab_size: int = 257, context_length: int = 64) -> GPTModel:
    torch.manual_seed(0)
    return GPTModel(
        GPTConfig(
            vocab_size=vocab_size,
            context_length=context_length,
            emb_dim=16,
            n_heads=2,
            n_layers=1,
            drop_rate=0.0,
            qkv_bias=False,
        )
    )


def scripted(text: str | bytes, *, then_end: bool = True) -> GPTModel:
    """Writes these bytes after the prompt "p", whatever it is asked: the position decides the token."""
    script = text.encode() if isinstance(text, str) else text
    net = model(context_length=len(script) + 2)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    tokens = [*script, *([EOT] if then_end else [])]
    size = max(len(tokens), 2)
    net = GPTModel(GPTConfig(**{**vars(net.config), "emb_dim": size, "n_heads": 1}))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net.final_norm.weight.fill_(1.0)
        for position, token in enumerate(tokens):
            net.pos_emb.weight[position, position] = 1.0
            net.out_head.weight[token, position] = 1.0
    return net


def texts(net: GPTModel, prompt: str = "p", **settings: Any) -> list[str]:
    defaults: dict[str, Any] = {"rules": GREEDY, "max_new_tokens": 100}
    return [piece.text for piece in stream_text(net, BytesTokenizer(), [prompt], **(defaults | settings))]


# --- pieces -------------------------------------------------------------------------------------------


def test_every_character_comes_as_soon_as_it_is_whole() -> None:
    assert texts(scripted("aé🙂b")) == ["a", "é", "🙂", "b", ""]


def test_bytes_that_never_become_a_character_come_at_the_end() -> None:
    net = scripted(b"a\xf0\x9f\x99", then_end=False)
    assert texts(net, max_new_tokens=4) == ["a", "\ufffd"]


def test_bytes_that_are_no_character_come_with_the_next_one() -> None:
    assert texts(scripted(b"a\xff\xfeb")) == ["a", "\ufffd\ufffdb", ""]


def test_the_pieces_make_up_the_completion() -> None:
    pieces = list(stream_text(scripted("héllo"), BytesTokenizer(), ["p"], rules=GREEDY, max_new_tokens=100))
    (done,) = [piece.completion for piece in pieces if piece.completion]
    assert pieces[-1].completion is done
    assert done.text == "".join(piece.text for piece in pieces) == "héllo"
    assert done.tokens == (*"héllo".encode(), EOT)
    assert (done.prompt, done.sample, done.finish, done.details) == (0, 0, "end_of_text", None)


@pytest.mark.parametrize(
    ("tokenizer", "text"),
    [
        (BytesTokenizer(), "naïve 日本語 🙂\r\n\x00\u2028 <|endoftext|> x"),
        (GPT2Tokenizer(), "naïve 日本語 🙂🙂 \u0301e\n\n  two  spaces, \U00010348\U00010349 ﷽"),
        (WordsTokenizer(["a", ",", "b", '"', "--", "<|endoftext|>", "<|unk|>"]), 'a, b "a" -- b, a'),
    ],
)
def test_a_stream_is_the_text_of_its_tokens(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text).tolist()
    whole = [cut for cut in range(1, len(ids)) if not tokenizer.decode(ids[:cut]).endswith("\ufffd")]
    for cut in whole:  # a prompt is a text: it ends with a whole character
        stream = TextStream(tokenizer, ids[:cut])
        pieces = [stream.push(token) for token in ids[cut:]] + [stream.rest()]
        assert tokenizer.decode(ids[:cut]) + "".join(pieces) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    "text",
    [
        "a, b -- a " * 60,
        "🙂日本é" * 40,
        "\n\ufffd" * 50 + "\ufffd" * 80 + "x" * 70,
        "x" * 62 + "🙂" * 3 + "<|endoftext|>",
    ],
)
@pytest.mark.parametrize(
    "tokenizer",
    [BytesTokenizer(), GPT2Tokenizer(), WordsTokenizer(["a", ",", "b", "--", "<|endoftext|>", "<|unk|>"])],
)
def test_a_long_stream_gives_what_decoding_all_would(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text).tolist()
    stream, given = TextStream(tokenizer, []), ""
    for end, token in enumerate(ids, start=1):
        given += stream.push(token)
        assert given == tokenizer.decode(ids[:end]).rstrip("\ufffd")
    assert given + stream.rest() == tokenizer.decode(ids)


# --- filters ------------------------------------------------------------------------------------------


def test_a_filter_holds_back_what_it_has_not_judged() -> None:
    written = "to jo@example.org now"
    filter = PersonalData()
    assert texts(scripted(written), filter=filter) == ["to", " ", "[e-mail address]", " ", "now"]
    pieces = list(
        stream_text(
            scripted(written), BytesTokenizer(), ["p"], rules=GREEDY, max_new_tokens=100, filter=filter
        )
    )
    done = pieces[-1].completion
    assert done is not None
    assert done.text == "".join(piece.text for piece in pieces) == "to [e-mail address] now"
    assert (done.tokens, done.finish) == ((), "end_of_text")
    assert done.verdict == filter.verdict(written)
    assert done.record("p", BytesTokenizer())["filtered"] == {"e-mail address": 1}


def test_a_filter_judges_what_a_stop_string_leaves() -> None:
    filter = WordList(words=["ham"], action="withhold")
    settings: dict[str, Any] = {"rules": GREEDY, "max_new_tokens": 100, "filter": filter, "alternatives": 1}
    net = scripted("a ham.b")
    (done,) = complete(net, BytesTokenizer(), ["p"], stop=["ham"], **settings)
    assert (done.text, done.finish, done.verdict) == ("a ", "stop", filter.verdict("a "))
    assert (done.tokens, done.details) == ((), None)  # they have the stop string, and likely words
    (done,) = complete(net, BytesTokenizer(), ["p"], stop=["."], **settings)
    assert (done.text, done.finish) == ("[withheld: word]", "stop")
    assert (done.tokens, done.details) == ((), None)


def test_a_text_that_is_only_reported_keeps_its_tokens() -> None:
    filter = Patterns(patterns={"letters": "[a-z]+"}, action="report")
    (done,) = complete(
        scripted("ab c"), BytesTokenizer(), ["p"], rules=GREEDY, max_new_tokens=100, filter=filter
    )
    assert (done.text, done.tokens) == ("ab c", (*b"ab c", EOT))
    assert done.verdict is not None
    assert done.verdict.counts == {"letters": 2}


def test_texts_that_are_searched_for_are_judged_too() -> None:
    net, filter = scripted("my ham"), WordList(words=["ham"])
    found = search_text(net, BytesTokenizer(), "p", num_beams=2, max_new_tokens=7, filter=filter)
    assert [each.text for each in found][:1] == ["my [word]"]
    assert all(each.verdict is not None for each in found)


# --- ends ---------------------------------------------------------------------------------------------


def test_a_text_ends_before_a_stop_string_spread_over_tokens() -> None:
    (done,) = complete(
        scripted("one.two END three"), BytesTokenizer(), ["p"], rules=GREEDY, max_new_tokens=100, stop=["END"]
    )
    assert (done.text, done.finish) == ("one.two ", "stop")
    assert bytes(done.tokens) == b"one.two END"


def test_what_may_begin_a_stop_string_waits() -> None:
    assert texts(scripted("xaaab"), stop=["aab"]) == ["x", "a", ""]
    assert texts(scripted("x\n\ny"), stop=["\n\n\n"]) == ["x", "\n\ny", ""]
    assert texts(scripted("x\n", then_end=False), stop=["\n\n"], max_new_tokens=2) == ["x", "\n"]


def test_the_first_of_several_stop_strings_counts() -> None:
    (done,) = complete(
        scripted("abcdef"), BytesTokenizer(), ["p"], rules=GREEDY, max_new_tokens=100, stop=["ef", "cd", "d"]
    )
    assert done.text == "ab"


@given(
    text=st.text("ab\n", max_size=20),
    stop=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 20), max_size=6),
)
def test_stop_strings_cut_as_a_search_in_the_whole_text(text: str, stop: list[str], cuts: list[int]) -> None:
    filtered, let_through, start = StopStrings(stop), "", 0
    for end in [*sorted(cuts), len(text)]:
        let_through += filtered.push(text[start:end])
        start = max(start, end)
        if filtered.found:
            break
    let_through += filtered.rest()
    ends = [text.find(each) for each in stop if each in text[:start]]
    assert filtered.found == bool(ends)
    if not ends:
        assert let_through == text
    else:
        # Another stop string may begin earlier but be complete only in a later piece.
        assert text.startswith(let_through)
        assert any(text[len(let_through) :].startswith(each) for each in stop)
        assert not any(each in let_through for each in stop)


def test_each_row_stops_for_itself() -> None:
    net = scripted("ab.cd")
    done = complete(net, BytesTokenizer(), ["p", "pp", "ppp"], rules=GREEDY, max_new_tokens=3, stop=["b"])
    assert [(each.prompt, each.text, each.finish) for each in done] == [
        (0, "a", "stop"),
        (1, "", "stop"),
        (2, ".cd", "length"),
    ]


def test_samples_are_numbered_and_details_come_on_request() -> None:
    done = complete(
        model(),
        BytesTokenizer(),
        ["x", "yz"],
        rules=SamplingRules(temperature=2.0),
        max_new_tokens=4,
        num_samples=3,
        generator=torch.Generator().manual_seed(0),
        alternatives=2,
    )
    assert [(each.prompt, each.sample) for each in done] == [(p, s) for p in (0, 1) for s in (0, 1, 2)]
    for each in done:
        assert each.details is not None
        assert len(each.details) == len(each.tokens) <= 4
        assert all(len(token.alternatives) == 2 for token in each.details)


def test_no_new_tokens_make_an_empty_text() -> None:
    (done,) = complete(model(), BytesTokenizer(), ["x"], rules=GREEDY, max_new_tokens=0)
    assert (done.text, done.tokens, done.finish) == ("", (), "length")


def test_rows_of_the_model_that_are_no_tokens_are_never_written() -> None:
    (done,) = complete(
        model(300),
        BytesTokenizer(),
        ["x"],
        rules=SamplingRules(temperature=50.0),
        max_new_tokens=200,
        generator=torch.Generator().manual_seed(0),
    )
    assert len(done.tokens) > 20
    assert max(done.tokens) <= EOT


# --- prompts and bad input ----------------------------------------------------------------------------


def test_an_empty_prompt_starts_from_end_of_text_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    (empty,) = complete(model(), BytesTokenizer(), [""], rules=GREEDY, max_new_tokens=5)
    (end,) = complete(model(), BytesTokenizer(), ["<|endoftext|>"], rules=GREEDY, max_new_tokens=5)
    assert empty.tokens == end.tokens
    assert [record.getMessage() for record in caplog.records] == [
        "the prompt is empty: starting from end-of-text"
    ]


@pytest.mark.parametrize(
    ("stop", "words"),
    [
        ([""], r"at least one character each, got \[''\]"),
        ([3], r"at least one character each, got \[3\]"),
        ("END", "stop must be a list of texts .*got 'END'"),
    ],
)
def test_stops_that_are_no_texts_are_refused(stop: Sequence[Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        stream_text(model(), BytesTokenizer(), ["x"], rules=GREEDY, max_new_tokens=1, stop=stop)


def test_a_stop_that_the_tokenizer_cannot_write_is_refused() -> None:
    tokenizer = WordsTokenizer(["a", "b", "<|endoftext|>", "<|unk|>"])
    settings: Any = {"rules": GREEDY, "max_new_tokens": 1}
    with pytest.raises(InputError, match="stop 'zebra' is unknown to the model's tokenizer"):
        stream_text(model(4), tokenizer, ["a"], stop=["zebra"], **settings)
    stream_text(model(4), tokenizer, ["a"], stop=["b"], **settings)
