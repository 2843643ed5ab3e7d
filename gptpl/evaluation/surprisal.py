"""How likely texts are under a model: loss, and each token, also as a web page."""

# B batch, T time, D model, V vocabulary

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jinja2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gptpl.errors import InputError
from gptpl.generation.decoding import check_prompts, token_details
from gptpl.generation.text import TextStream
from gptpl.model import eval_mode
from gptpl.model.loss import bits_per_byte, bytes_of, evaluation_loss, perplexity
from gptpl.model.protocol import body_and_head, context_length, device_of, vocab_size
from gptpl.tokenizers import Tokenizer

CHUNK = 128  # positions whose logits exist at the same time: 26 MB of GPT-2's in fp32


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Mean nats per token, its exponential, and the number of tokens scored.

    `bits_per_byte` is the loss over the bytes of the text, comparable between tokenizers; None where it is
    not known. `data` says what was scored, and `context` from what each token was predicted, where that is
    known.
    """

    loss: float
    perplexity: float
    tokens: int
    bits_per_byte: float | None = None
    data: str = ""
    context: str = ""


def evaluate(
    net: nn.Module, batches: Iterable[Sequence[Any]], *, token_bytes: NDArray[np.int64] | None = None
) -> Evaluation:
    """Mean next-token loss over all targets of all batches, in evaluation mode.

    A batch begins with inputs and targets, each (B, T), a text in each row; targets of -100 are not counted.
    `token_bytes` (V,) are the bytes of each token, for `bits_per_byte`.
    """
    device = device_of(net)
    lengths = None if token_bytes is None else torch.from_numpy(token_bytes)
    total, count, size = 0.0, 0.0, 0
    with torch.inference_mode(), eval_mode(net):
        for inputs, targets, *_ in batches:
            loss, tokens = evaluation_loss(net, inputs.to(device), targets.to(device)).tolist()
            total, count = total + loss, count + tokens
            size += 0 if lengths is None else int(bytes_of(targets, lengths))
    mean = total / count
    bits = bits_per_byte(total, size) if size else None
    return Evaluation(loss=mean, perplexity=perplexity(mean), tokens=int(count), bits_per_byte=bits)


@dataclass(frozen=True, kw_only=True)
class TokenSurprisal:
    """A token of a text, as the model predicted it."""

    token: int
    surprisal: float
    """-log of its probability, in nats: the loss at this token."""
    entropy: float
    """Of the predicted distribution, in nats: the surprisal that was to be expected."""
    rank: int
    """Tokens that were more likely."""
    alternatives: tuple[tuple[int, float], ...]
    """The most likely tokens, best first, each with its probability."""


def surprisals(
    model: nn.Module, tokens: Sequence[int], *, eot_id: int, alternatives: int = 5
) -> Iterator[TokenSurprisal]:
    """The surprisal of every token, in order, each once; the first is predicted from end-of-text.

    A text longer than the context is read in sequences that begin half a context before the first token they
    score, so that every token is predicted from half a context or more, or from the whole text before it.
    In evaluation mode, the probabilities in fp32.

    Raises InputError, before the first token, for no tokens, unknown ids and alternatives outside 0..V.
    """
    if not tokens:
        raise InputError("the text has no tokens: give one or more")
    V = vocab_size(model)
    check_prompts([tokens], vocab_size=V)
    if not 0 <= alternatives <= V:
        raise InputError(f"alternatives must be 0 to {V}, got {alternatives}")
    return _surprisals(model, [eot_id, *tokens], alternatives)


def _surprisals(model: nn.Module, text: list[int], alternatives: int) -> Iterator[TokenSurprisal]:
    device, C = device_of(model), context_length(model)
    body, head = body_and_head(model)
    scored = 0
    while scored < len(text) - 1:
        start = max(0, scored - C // 2)
        inputs = torch.tensor([text[start : min(start + C, len(text) - 1)]], device=device)
        with torch.inference_mode(), eval_mode(model):
            hidden = body(inputs)[0, scored - start :]  # (T, D) of what is not scored yet
        for states in torch.split(hidden, CHUNK):
            targets = torch.tensor(text[scored + 1 : scored + 1 + len(states)], device=device)
            # Not around the yields: the caller's code would run in inference mode.
            with torch.inference_mode():
                rows = _rows(head(states).float(), targets, alternatives)
            scored += len(states)
            yield from rows


def _rows(logits: Tensor, targets: Tensor, alternatives: int) -> list[TokenSurprisal]:
    log_p = logits.log_softmax(dim=-1)  # (T, V)
    ranks = (log_p > log_p.gather(-1, targets[:, None])).sum(dim=-1)  # (T,)
    details = token_details(log_p, targets, alternatives)
    return [
        TokenSurprisal(
            token=token,
            surprisal=-each.log_probability,
            entropy=each.entropy,
            rank=rank,
            alternatives=tuple((other, math.exp(p)) for other, p in each.alternatives),
        )
        for token, rank, each in zip(targets.tolist(), ranks.tolist(), details, strict=True)
    ]


# --- as a web page --------------------------------------------------------------------------------------

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
