"""The page shows the text and nothing but the text, whatever is in it, and asks no network."""

import json
import re
from html import unescape
from html.parser import HTMLParser

import pytest

from gptpl.evaluation.surprisal import TokenSurprisal, surprisal_page, visible

NASTY = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "<!-- ]]> &amp; &lt;",
    "\"quotes' $title ${title}",
    "a\n\n\tb  c",
    "über 日本 🙂",
    "\u2028\u2029 \\u003c",
]


def token(surprisal: float, **changes: object) -> TokenSurprisal:
    fields = {"token": 1, "entropy": 1.0, "rank": 0, "alternatives": ((2, 0.5), (3, 0.25)), **changes}
    return TokenSurprisal(surprisal=surprisal, **fields)  # type: ignore[arg-type]


def page(texts: list[str], values: list[float] | None = None) -> str:
    values = values or [1.0] * len(texts)
    return surprisal_page(
        [token(value) for value in values],
        texts,
        title="T <b>",
        facts={"checkpoint": "<i>run</i>"},
        token_text=lambda number: f"<u>{number}</u>",
    )


class Reader(HTMLParser):
    """Collects the tags, the text of every token, and the JSON."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tokens: list[tuple[str, str]] = []
        self.data = ""
        self.path: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "rect"):
            self.path.append(f"{tag}#{dict(attrs).get('id', '')}")
        if tag == "span" and "div#text" in self.path:
            self.tokens.append(("", str(dict(attrs)["class"])))

    def handle_endtag(self, tag: str) -> None:
        if tag != "rect":
            self.path.pop()

    def handle_data(self, data: str) -> None:
        if "script#data" in self.path:
            self.data += data
        elif "div#text" in self.path and "i#" not in self.path:
            text, colour = self.tokens[-1]
            self.tokens[-1] = (text + data, colour)


@pytest.mark.parametrize("text", NASTY)
def test_texts_are_shown_and_never_act(text: str) -> None:
    read = Reader(page(["plain ", text, " end"]))
    plain, shown, _ = [text for text, _ in read.tokens]
    assert plain == "plain "
    assert shown == re.sub("[\u2028\u2029]", "\ufffd", text)
    rows = json.loads(read.data)
    assert rows[1][0] == visible(text)
    assert rows[1][5] == [["<u>2</u>", 2, 0.5], ["<u>3</u>", 3, 0.25]]
    harmless = Reader(page(["plain ", "x", " end"]))
    tags, expected = ([tag for tag, _ in each.tags if tag != "i"] for each in (read, harmless))
    assert tags == expected  # but for our own signs of line breaks


def test_nothing_is_loaded_from_anywhere() -> None:
    source = page(["a", "b"])
    assert "http://" not in source
    assert "https://" not in source
    assert not re.search(r"\b(src|href|url|import|fetch|XMLHttpRequest)\s*[=(]", source)
    (policy,) = [attrs for tag, attrs in Reader(source).tags if attrs.get("http-equiv")]
    assert "default-src 'none'" in str(policy["content"])


def test_colours_rise_with_the_loss_and_agree_with_the_legend() -> None:
    values = [0.0, 0.49, 0.5, 1.5, 2.5, 4.0, 5.0, 7.0, 8.0, 30.0]
    read = Reader(page(["x"] * len(values), values))
    assert [int(colour[1:]) for _, colour in read.tokens] == [0, 0, 1, 2, 3, 4, 5, 6, 7, 7]
    legend = page(["x"]).partition("nats per token: ")[2].partition("</div>")[0]
    labels = [unescape(label) for label in re.findall(r'class="c\d">([^<]*)</span>', legend)]
    assert labels == ["< 0.5", "0.5 to 1", "1 to 2", "2 to 3", "3 to 4.5", "4.5 to 6", "6 to 8", "≥ 8"]


def test_parts_of_a_character_and_line_breaks_have_signs() -> None:
    source = page(["", "é", "a\nb"])
    assert '<span class="c2"><i>·</i></span><span class="c2">é</span>' in source
    assert '<span class="c2">a<i>↵</i>\nb</span>' in source


def test_summary_is_that_of_the_tokens() -> None:
    source = page(["low", "high", "mid"], [1.0, 6.0, 2.0])
    assert "<dt>tokens</dt><dd>3</dd>" in source
    assert "<dt>loss</dt><dd>3.0000 nats per token</dd>" in source
    assert "<dt>perplexity</dt><dd>20.09</dd>" in source
    table = source.partition("<table>")[2].partition("</table>")[0]
    found = re.findall(r"<tr><td>(\w+)</td><td>(\d)</td>", table)
    assert found == [("high", "2"), ("mid", "3"), ("low", "1")]
    bars = re.findall(r'height="([\d.]+)"', source)
    assert [float(bar) for bar in bars] == pytest.approx([1 / 6, 1, 1 / 3], abs=1e-3)


def test_white_space_and_control_characters_can_be_seen() -> None:
    assert visible(" a\n\t\x00\x1b\x7f") == "␣a↵→␀␛\ufffd"
