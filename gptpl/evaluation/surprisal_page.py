"""Surprisals as a web page: the text coloured by loss, and the model's alternatives for each token."""

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import jinja2

from gptpl.evaluation.surprisal import TokenSurprisal
from gptpl.generation.text import TextStream
from gptpl.model.loss import perplexity
from gptpl.tokenizers import Tokenizer

STEPS = (0.5, 1.0, 2.0, 3.0, 4.5, 6.0, 8.0)
"""Nats at which the colour changes: nearly certain tokens stay white, 8 nats are one chance in 3,000."""
MOST_SURPRISING = 10
CHART_BARS = 300
_SIGNS = {
    " ": "\N{OPEN BOX}",
    "\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}",
    "\t": "\N{RIGHTWARDS ARROW}",
}


@dataclass(frozen=True, kw_only=True)
class InspectedText:
    """A text with the surprisal of each of its tokens, one or more."""

    tokens: Sequence[TokenSurprisal]
    tokenizer: Tokenizer

    @property
    def loss(self) -> float:
        """Mean nats per token."""
        return statistics.fmean(each.surprisal for each in self.tokens)

    @property
    def perplexity(self) -> float:
        """The exponential of the loss; infinite where that is too large for a float."""
        return perplexity(self.loss)

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
            # A model may have more rows than its tokenizer has tokens. Bytes that are not text on their own
            # are shown as `\xe2`.
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

    Each of `texts` is what a token adds to the text, empty if a later token completes its character;
    `token_text` gives that of any token id, for the alternatives. The `facts` are shown below the `title`,
    with number of tokens, mean loss and perplexity. Text is displayed and never interpreted as HTML.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gptpl.evaluation", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    values = [each.surprisal for each in tokens]
    loss = statistics.fmean(values)
    measured = {
        "tokens": f"{len(tokens):,}",
        "loss": f"{loss:.4f} nats per token",
        "perplexity": f"{perplexity(loss):,.2f}",
    }
    shown = [visible(text or token_text(each.token)) for each, text in zip(tokens, texts, strict=True)]
    bars = min(len(values), CHART_BARS)
    edges = [len(values) * i // bars for i in range(bars + 1)]
    return environment.get_template("surprisal_page.html").render(
        title=title,
        facts={**facts, **measured},
        legend=[
            f"< {STEPS[0]:g}",
            *itertools.starmap("{:g} to {:g}".format, itertools.pairwise(STEPS)),
            f"≥ {STEPS[-1]:g}",
        ],
        bars=[statistics.fmean(values[start:end]) for start, end in itertools.pairwise(edges)],
        spans=[
            (sum(value >= step for step in STEPS), _readable(text).split("\n") if text else [])
            for value, text in zip(values, texts, strict=True)
        ],
        new_line=_SIGNS["\n"],
        most_surprising=[
            (shown[i], i + 1, values[i], math.exp(-values[i]), tokens[i].rank + 1)
            for i in sorted(range(len(values)), key=lambda i: -values[i])[:MOST_SURPRISING]
        ],
        data=[
            [
                *(text, each.token, round(each.surprisal, 4), round(each.entropy, 4), each.rank),
                [[visible(token_text(other)), other, float(f"{p:.3g}")] for other, p in each.alternatives],
            ]
            for each, text in zip(tokens, shown, strict=True)
        ],
    )


def visible(text: str) -> str:
    """The text on one line, with signs for white space and control characters."""
    return _readable("".join(_SIGNS.get(each, each) for each in text))


def _readable(text: str) -> str:
    """The text with signs for control characters but tab and line feed."""
    return "".join(each if each.isprintable() or each in "\t\n" else _sign(each) for each in text)


def _sign(letter: str) -> str:
    # U+2400 and what follows are pictures of the first 32 characters, in their order.
    return chr(0x2400 + ord(letter)) if ord(letter) < 0x20 else "\N{REPLACEMENT CHARACTER}"
