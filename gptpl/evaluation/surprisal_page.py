"""Surprisals as a web page: the text coloured by loss, and the model's alternatives at each token."""

import html
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from string import Template
from typing import Protocol

from gptpl.evaluation.surprisal import TokenSurprisal
from gptpl.generation.text import TextCodec, TextStream

STEPS = (0.5, 1.0, 2.0, 3.0, 4.5, 6.0, 8.0)
"""Nats at which the colour changes: nearly certain tokens stay white, 8 nats are one chance in 3,000."""
MOST_SURPRISING = 10
CHART_BARS = 300
_NEW_LINE = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"
_SIGNS = {" ": "\N{OPEN BOX}", "\n": _NEW_LINE, "\t": "\N{RIGHTWARDS ARROW}"}


class Vocabulary(TextCodec, Protocol):
    """A tokenizer that can list its tokens."""

    def vocabulary_bytes(self) -> Iterable[bytes]:
        """The bytes of every token, in the order of their ids."""


@dataclass(frozen=True, kw_only=True)
class InspectedText:
    """A text with the surprisal of each of its tokens, of which there is one at least."""

    tokens: Sequence[TokenSurprisal]
    tokenizer: Vocabulary

    @property
    def loss(self) -> float:
        """Mean nats per token."""
        return statistics.fmean(each.surprisal for each in self.tokens)

    @property
    def perplexity(self) -> float:
        """The exponential of the loss; infinite where that is too large for a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @cached_property
    def texts(self) -> list[str]:
        """What each token adds to the text; what is left at the end belongs to the last."""
        stream = TextStream(self.tokenizer, [])
        texts = [stream.push(each.token) for each in self.tokens]
        texts[-1] += stream.rest()
        return texts

    def page(
        self, *, title: str = "How surprising is this text?", facts: Mapping[str, str] | None = None
    ) -> str:
        """The text as a web page, see `surprisal_page`."""
        vocabulary = list(self.tokenizer.vocabulary_bytes())

        def text_of(token: int) -> str:
            # A model may have more rows than its tokenizer has tokens.
            # Bytes that are no text on their own are told apart as `\xe2`.
            return vocabulary[token].decode("utf-8", "backslashreplace") if token < len(vocabulary) else ""

        return surprisal_page(self.tokens, self.texts, title=title, facts=facts or {}, token_text=text_of)


def surprisal_page(
    tokens: Sequence[TokenSurprisal],
    texts: Sequence[str],
    *,
    title: str,
    facts: Mapping[str, str],
    token_text: Callable[[int], str],
) -> str:
    """One HTML document that needs nothing else: no network, no other file.

    Each of `texts` is what a token adds to the text, empty where a character is finished by a later token;
    `token_text` gives that of any token id, for the alternatives. Below the `title` stand the `facts`, with
    the number of tokens, the mean loss and the perplexity. Whatever the texts hold never acts as HTML.
    """
    loss = statistics.fmean(each.surprisal for each in tokens)
    measured = {
        "tokens": f"{len(tokens):,}",
        "loss": f"{loss:.4f} nats per token",
        "perplexity": f"{math.exp(loss):,.2f}" if loss < 700 else "inf",
    }
    shown = [text or token_text(each.token) for each, text in zip(tokens, texts, strict=True)]
    page = resources.files("gptpl.evaluation").joinpath("surprisal_page.html").read_text(encoding="utf-8")
    return Template(page).substitute(
        title=html.escape(title),
        facts="".join(
            f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
            for name, value in {**facts, **measured}.items()
        ),
        legend=_legend(),
        chart=_chart([each.surprisal for each in tokens]),
        text="".join(_span(each, text) for each, text in zip(tokens, texts, strict=True)),
        table=_table(tokens, shown),
        data=_data(tokens, shown, token_text),
    )


def visible(text: str) -> str:
    """The text on one line, with signs for white space and control characters."""
    return "".join(_SIGNS.get(each, each if each.isprintable() else _sign(each)) for each in text)


def _sign(letter: str) -> str:
    # U+2400 and what follows are pictures of the first 32 characters, in their order.
    return chr(0x2400 + ord(letter)) if ord(letter) < 0x20 else "\N{REPLACEMENT CHARACTER}"


def _span(token: TokenSurprisal, text: str) -> str:
    readable = "".join(each if each.isprintable() or each in "\t\n" else _sign(each) for each in text)
    inside = html.escape(readable).replace("\n", f"<i>{_NEW_LINE}</i>\n")
    if not text:
        inside = "<i>\N{MIDDLE DOT}</i>"  # a part of a character that comes with a later token
    colour = sum(token.surprisal >= step for step in STEPS)
    return f'<span class="c{colour}">{inside}</span>'


def _legend() -> str:
    middle = [f"{a:g} to {b:g}" for a, b in itertools.pairwise(STEPS)]
    ranges = [f"&lt; {STEPS[0]:g}", *middle, f"\u2265 {STEPS[-1]:g}"]
    return "".join(f'<span class="c{i}">{label}</span>' for i, label in enumerate(ranges))


def _chart(values: Sequence[float]) -> str:
    """Surprisal along the text as bars, each the mean of an equal share of the tokens."""
    bars = min(len(values), CHART_BARS)
    edges = [len(values) * i // bars for i in range(bars + 1)]
    means = [statistics.fmean(values[start:end]) for start, end in itertools.pairwise(edges)]
    top = max(*means, 1e-9)
    rects = [
        f'<rect x="{i + 0.05:g}" width="0.9" y="{1 - mean / top:.4f}" height="{mean / top:.4f}"/>'
        for i, mean in enumerate(means)
    ]
    label = f"surprisal along the text, highest bar {top:.2f} nats per token"
    return (
        f'<svg viewBox="0 0 {bars} 1" preserveAspectRatio="none" role="img" aria-label="{label}">'
        f'{"".join(rects)}</svg><div class="faint">{label}</div>'
    )


def _table(tokens: Sequence[TokenSurprisal], shown: Sequence[str]) -> str:
    places = sorted(range(len(tokens)), key=lambda i: -tokens[i].surprisal)[:MOST_SURPRISING]
    rows = [
        f"<tr><td>{html.escape(visible(shown[i]))}</td><td>{i + 1:,}</td><td>{tokens[i].surprisal:.2f}</td>"
        f"<td>{math.exp(-tokens[i].surprisal):.2g}</td><td>{tokens[i].rank + 1:,}</td></tr>"
        for i in places
    ]
    return "".join(rows)


def _data(tokens: Sequence[TokenSurprisal], shown: Sequence[str], token_text: Callable[[int], str]) -> str:
    rows = [
        [
            visible(text),
            each.token,
            round(each.surprisal, 4),
            round(each.entropy, 4),
            each.rank,
            [[visible(token_text(other)), other, float(f"{p:.3g}")] for other, p in each.alternatives],
        ]
        for each, text in zip(tokens, shown, strict=True)
    ]
    # "<" begins a tag even here; as an escape it is the same text to JSON.
    return json.dumps(rows, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
