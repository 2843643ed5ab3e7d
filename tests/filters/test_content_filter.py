"""Filters and their streams: together the pieces are the whole text's verdict, none too early."""

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass

import pytest

from gptpl.errors import InputError
from gptpl.filters import (
    AllOf,
    Filter,
    Finding,
    NoFilter,
    Patterns,
    PersonalData,
    Rule,
    WordList,
    line_end,
    summary,
)

PIECES = (
    *("4111 1111 1111 1111", "GB82 WEST 1234 5698 7654 32", "+44 20 7946 0958"),
    *("hello", "Ham", "ham", "SPAM", "x", "jo@example.org", "a.b@", "example.com", "GB82", "WEST", "1234"),
    *("5698", "7654", "32", "DE89370400440532013000", "4111", "1111", "4111111111111111", "+44", "(0)20"),
    *(
        "7946 0958",
        "0800-123456",
        "192.168.1.254",
        "1.2",
        "\u00e9",
        "e\u0301",
        "\uff53pam",
        "A",
        "3",
        "(",
        ")",
    ),
    *(" ", " ", " ", " ", "  ", "\n", "\r\n", "\t", "\u00a0", ".", ",", "-", "+", "@"),
)


@dataclass(frozen=True, kw_only=True)
class Shouting(Rule):
    """A user's rule: lines in capitals."""

    def find(self, part: str) -> Iterable[Finding]:
        return [Finding(rule="shouting", start=0, end=len(part))] if part.isupper() else []

    def part_end(self, text: str, start: int) -> int | None:
        return line_end(text, start)


@dataclass(frozen=True, kw_only=True)
class Long(Rule):
    """A user's rule of whole texts."""

    def find(self, part: str) -> Iterable[Finding]:
        return [Finding(rule="long", start=0, end=len(part))] if len(part) > 60 else []


WORDS = WordList(words=["ham", "e\u0301", "spam"])
LINES = Patterns(patterns={"digits": r"\d{2,}", "two words": r"[a-z]+ [a-z]+"})
FILTERS: dict[str, Filter] = {
    "words": WORDS,
    "patterns of lines": LINES,
    "patterns of words": Patterns(patterns={"at": r"\w+@\w+|\d\d"}, unit="word"),
    "patterns of texts": Patterns(patterns={"two lines": r"\w+\s*\n\s*\w+"}, unit="text"),
    "personal data": PersonalData(),
    "a user's": Shouting(),
    "all to mark": AllOf(filters={"a": WORDS, "b": LINES, "c": PersonalData(), "d": Shouting()}),
    "some to report": AllOf(
        filters={"a": WORDS, "b": Patterns(patterns={"n": r"\d"}, action="report"), "c": PersonalData()}
    ),
    "to withhold": AllOf(filters={"a": PersonalData(), "b": WordList(words=["spam"], action="withhold")}),
    "whole texts": AllOf(filters={"a": WORDS, "b": Long(action="report")}),
    "none": NoFilter(),
}


def texts(count: int, pieces: int = 29) -> list[str]:
    """Of up to so many pieces."""
    draw = random.Random(1)
    return ["".join(draw.choices(PIECES, k=draw.randint(1, pieces))) for _ in range(count)]


def cut(text: str, draw: random.Random) -> list[str]:
    """The text in pieces, some of them empty, often of one character."""
    places = sorted(draw.randrange(len(text) + 1) for _ in range(draw.choice([1, 5, len(text)])))
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


def shown(filter: Filter, text: str) -> str:
    """By hand: characters that are marked become one label for each run of overlapping places."""
    found = [(finding, rule.action) for rule in filter.rules for finding in rule.verdict(text).findings]
    order = sorted(found, key=lambda each: (each[0].start, -each[0].end, each[0].rule))
    if notices := [finding.rule for finding, action in order if action == "withhold"]:
        return f"[withheld: {', '.join(dict.fromkeys(notices))}]"
    marked = [finding for finding, action in order if action == "mark"]
    out, place = "", 0
    while place < len(text):
        here = [each for each in marked if each.start == place]
        if not here:
            out, place = out + text[place], place + 1
            continue
        group, end = here, max(each.end for each in here)
        while more := [each for each in marked if place < each.start < end and each not in group]:
            group = group + more
            end = max(each.end for each in group)
        names = dict.fromkeys(each.rule for each in marked if each in group)
        out, place = f"{out}[{', '.join(names)}]", end
    return out


@pytest.mark.parametrize("name", FILTERS)
def test_a_stream_releases_the_whole_texts_verdict_however_the_text_is_cut(name):
    filter, draw = FILTERS[name], random.Random(2)
    found = 0
    for text in texts(200):
        whole = filter.verdict(text)
        found += bool(whole.findings)
        assert whole.text == shown(filter, text)
        stream = filter.stream()
        released = [stream.feed(piece) for piece in cut(text, draw)]
        assert "".join([*released, stream.finish()]) == whole.text
        assert stream.verdict == whole
    assert found > 10 or name == "none"


@pytest.mark.parametrize("name", [name for name in FILTERS if name != "none"])
def test_nothing_is_released_that_what_follows_may_change(name):
    """After any beginning of a text the released part begins the verdicts of all its continuations."""
    filter = FILTERS[name]
    for text in texts(14, pieces=12):
        stream, released = filter.stream(), ""
        for end, character in enumerate(text, start=1):
            released += stream.feed(character)
            for continuation in ("", "a", "7", " 1111", "@example.org", "\nX"):
                verdict = filter.verdict(text[:end] + continuation)
                assert verdict.text.startswith(released), (text[:end], continuation)


def test_text_is_released_as_soon_as_it_is_judged():
    stream = AllOf(filters={"words": WORDS, "data": PersonalData()}).stream()
    pieces = ["Dear", " ", "jo", "@example", ".org,", " call", " 0800", " 123456", " or", " not", " ham"]
    assert [stream.feed(piece) for piece in pieces] == [
        *("", "Dear", " ", "", "", "[e-mail address], ", "call ", "", "[phone number] ", "or ", "not "),
    ]
    assert stream.finish() == "[word]"
    assert WORDS.stream().feed("one two three") == "one two "
    assert LINES.stream().feed("one two 33\nfour") == "[two words] [digits]\n"
    assert Patterns(patterns={"a": "a"}, unit="text").stream().feed("one\ntwo\n") == ""


def test_the_verdict_says_what_was_found_and_where():
    text = "Ham for jo@example.org and ham."
    verdict = AllOf(filters={"a": PersonalData(action="report"), "b": WordList(words=["ham"])}).verdict(text)
    assert [(each.rule, text[each.start : each.end]) for each in verdict.findings] == [
        ("word", "Ham"),
        ("e-mail address", "jo@example.org"),
        ("word", "ham"),
    ]
    assert verdict.counts == {"word": 2, "e-mail address": 1}
    assert verdict.text == "[word] for jo@example.org and [word]."
    assert (verdict.action, verdict.changed) == ("mark", True)
    withheld = WordList(words=["ham"], action="withhold", name="meat").verdict(text)
    assert (withheld.text, withheld.action, withheld.counts) == ("[withheld: meat]", "withhold", {"meat": 2})
    assert (withheld.changed, PersonalData().verdict("none").action) == (True, None)
    reported = WordList(words=["ham"], action="report").verdict(text)
    assert (reported.text, reported.action, reported.changed) == (text, "report", False)


def test_overlapping_places_have_one_label():
    patterns = Patterns(patterns={"one": "abc", "two": "bcd", "three": "xy"})
    assert patterns.verdict("-abcdxy-").text == "-[one, two][three]-"


def test_the_summary_counts_texts_and_findings():
    assert summary([]) == "filter: 0 of 0 texts"
    assert summary([{}]) == "filter: 0 of 1 text"
    counts = [{"e-mail address": 1}, {}, {"spam": 1, "e-mail address": 2}]
    assert summary(counts) == "filter: 2 of 3 texts: e-mail address 3, spam 1"


def test_the_verdict_of_a_stream_comes_at_its_end():
    stream = PersonalData().stream()
    stream.feed("text")
    with pytest.raises(RuntimeError, match="finish"):
        stream.verdict  # noqa: B018


def test_unsuitable_filters_are_refused():
    with pytest.raises(InputError, match=re.escape("action=marc of a filter is unknown: did you mean mark?")):
        PersonalData(action="marc")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="filters has no filter"):
        AllOf(filters={"a": None})
    with pytest.raises(InputError, match=r"filters\.a must be a filter, got str"):
        AllOf(filters={"a": "words"})  # type: ignore[dict-item]
