"""A text as a model sees it: the numbers of every part of `gptpl inspect`, and its page."""

# T time, D model, H heads, L blocks, V vocabulary

import base64
import itertools
import math
import statistics
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptpl.errors import InputError
from gptpl.evaluation.likelihood import TokenSurprisal
from gptpl.files.template import package_templates
from gptpl.generation.text import TextStream
from gptpl.inspection import measures
from gptpl.inspection.measures import Recording, record
from gptpl.model.gpt import GPTModel
from gptpl.model.loss import perplexity
from gptpl.model.protocol import gpt_model
from gptpl.text import readable, visible
from gptpl.tokenizers import GPT2Tokenizer, Tokenizer

TABS = {
    "surprisal": "Surprisal",
    "attention": "Attention",
    "lens": "Logit lens",
    "tokens": "Tokens",
    "embeddings": "Embeddings",
    "activations": "Activations",
    "ablation": "Ablation",
    "steps": "Steps",
}
"""The parts of the page and their titles."""
_ANY_MODEL = ("surprisal", "tokens")
"""Those that need no look inside: for models of any class."""

MOST_TOKENS = 256
ABLATION_TOKENS = 32
KIND = 0.4
"""The least score that gives a head the name of a kind."""
_ATTENTION_BYTES = 2_400_000  # of packed weights in a page, before they are compressed
_LEVELS = 15  # of a weight in the page: its root in four bits
_NEIGHBOURS, _LISTED = 6, 40  # of a token; tokens of the text whose neighbours are listed
_POSITIONS = 64  # rows of the table of position similarities
_SHOWN = 6  # numbers of a vector
_TOP = 10


class Inspection:
    """A text of one token or more, and what a model computes for it, each number when it is asked for.

    The first token is predicted from end-of-text, which the model is given before the text. What is recorded
    of its inside are the first `max_tokens` tokens of both, or as many as the context holds.

    Args:
        net: the model; one that is no `GPTModel` has surprisals and tokens only.
        tokenizer: the model's.
        tokens: the surprisal of each token of the text; read when all else has been checked.
        max_tokens: most tokens that are recorded, end-of-text included.
        ablation_tokens: most tokens that parts are left out for.
    """

    def __init__(
        self,
        net: nn.Module,
        tokenizer: Tokenizer,
        tokens: Iterable[TokenSurprisal],
        *,
        max_tokens: int = MOST_TOKENS,
        ablation_tokens: int = ABLATION_TOKENS,
    ) -> None:
        for name, value in {"max_tokens": max_tokens, "ablation_tokens": ablation_tokens}.items():
            if value < 2:
                raise InputError(f"{name} must be at least 2, got {value}")
        self.net, self.tokenizer, self.tokens = net, tokenizer, list(tokens)
        self.max_tokens, self.ablation_tokens = max_tokens, ablation_tokens

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

    @cached_property
    def vocabulary(self) -> list[bytes]:
        """The tokenizer's tokens."""
        return list(self.tokenizer.vocabulary_bytes())

    def text_of(self, token: int) -> str:
        """Any token in one line; bytes that are not text on their own are shown as hexadecimal numbers."""
        # A model may have more rows than its tokenizer has tokens.
        return _bytes_text(self.vocabulary[token]) if token < len(self.vocabulary) else ""

    @cached_property
    def shown(self) -> list[str]:
        """Each token of the text in one line; one that only begins a character by its bytes."""
        found = zip(self.tokens, self.texts, strict=True)
        return [visible(text) if text else self.text_of(each.token) for each, text in found]

    @property
    def gpt(self) -> GPTModel:
        """The model as one that can be looked into. Raises InputError for a model of another class."""
        return gpt_model(self.net, f"only a GPTModel has more than {' and '.join(_ANY_MODEL)}")

    @cached_property
    def recording(self) -> Recording:
        """What every part computed, for end-of-text and the text's first tokens."""
        ids = [self.tokenizer.eot_id, *(each.token for each in self.tokens)]
        return record(self.gpt, ids[: min(self.max_tokens, self.gpt.config.context_length)])

    @cached_property
    def heads(self) -> measures.HeadScores:
        """Where each head attends to."""
        return measures.head_scores([block.weights for block in self.recording.blocks])

    @cached_property
    def induction(self) -> Tensor:
        """How much each head is an induction head, (L, H)."""
        return measures.induction_scores(self.gpt)

    @property
    def scores(self) -> dict[str, Tensor]:
        """The scores (L, H) of each kind of head, by its name."""
        return {
            "previous token": self.heads.previous,
            "first token": self.heads.first,
            "same token": self.heads.itself,
            "induction": self.induction,
        }

    @property
    def kinds(self) -> list[list[str]]:
        """The name of each head's kind, L lists of H: that of its highest score if `KIND` or more, or ""."""
        names = list(self.scores)
        best, index = torch.stack(list(self.scores.values())).max(dim=0)  # (L, H)
        return [
            [names[i] if score >= KIND else "" for i, score in zip(*row, strict=True)]
            for row in zip(index.tolist(), best.tolist(), strict=True)
        ]

    @cached_property
    def lens(self) -> measures.LogitLens:
        """What the model would say at each depth."""
        return measures.logit_lens(self.gpt, self.recording)

    @cached_property
    def ablation(self) -> measures.Ablation:
        """The loss on the first tokens without each part."""
        return measures.ablation(self.gpt, self.recording.tokens[: self.ablation_tokens].tolist())

    def tabs(self, wanted: Iterable[str] | None = None) -> list[str]:
        """The parts of the page that this model can have; those wanted, or all.

        Raises InputError for unknown ones, none, and those that a model of another class cannot have.
        """
        if wanted is None:
            return list(TABS if type(self.net) is GPTModel else _ANY_MODEL)
        chosen = list(wanted)
        check_tabs(chosen)
        if set(chosen) - set(_ANY_MODEL):
            _ = self.gpt
        return [each for each in TABS if each in chosen]

    def page(
        self,
        *,
        title: str = "What does the model see?",
        facts: Mapping[str, str] | None = None,
        tabs: Iterable[str] | None = None,
        beside: "tuple[Inspection, Mapping[str, str]] | None" = None,
        progress: Callable[[Iterable[str]], Iterable[str]] = iter,
    ) -> str:
        """One HTML document with a tab for each part, that needs no network and no other file.

        `beside` is another model's look at the same text, with facts of its own. Text is displayed and never
        interpreted as HTML.
        """
        models = [(self, facts or {})] + ([beside] if beside else [])
        names = self.tabs(tabs)
        if beside:
            names = [each for each in names if each in beside[0].tabs(tabs)]
        environment = package_templates()
        environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
        parts = _PARTS | {"attention": partial(_attention, room=_ATTENTION_BYTES // len(models))}
        content: list[dict[str, Any]] = [{} for _ in models]
        for tab in progress(names):
            for (inspection, _), made in zip(models, content, strict=True):
                made[tab] = parts[tab](inspection)
        if set(names) - set(_ANY_MODEL):
            for (inspection, _), made in zip(models, content, strict=True):
                first, *others = inspection.recording.tokens.tolist()
                made["read"] = [inspection.text_of(first), *inspection.shown[: len(others)]]
        return environment.get_template("inspection/page.html").render(
            title=title,
            tabs={name: TABS[name] for name in names},
            models=[
                {"facts": {**facts, **_summary(inspection)}, **_surprisal_rows(inspection)}
                for inspection, facts in models
            ],
            legend=[
                f"< {STEPS[0]:g}",
                *itertools.starmap("{:g} to {:g}".format, itertools.pairwise(STEPS)),
                f"≥ {STEPS[-1]:g}",
            ],
            new_line=visible("\n"),
            data=content,
        )


def check_tabs(wanted: Sequence[str]) -> None:
    """Raise InputError for tabs that there are not, and for none."""
    if unknown := [each for each in wanted if each not in TABS]:
        raise InputError(f"tabs has no {unknown[0]}: choose of {', '.join(TABS)}")
    if not wanted:
        raise InputError(f"tabs is empty: choose one or more of {', '.join(TABS)}")


# --- surprisal ------------------------------------------------------------------------------------------

STEPS = (0.5, 1.0, 2.0, 3.0, 4.5, 6.0, 8.0)
"""Nats at which the colour changes: nearly certain tokens stay white, 8 nats are one chance in 3,000."""
MOST_SURPRISING = 10
CHART_BARS = 300


def _summary(inspection: Inspection) -> dict[str, str]:
    return {
        "tokens": f"{len(inspection.tokens):,}",
        "loss": f"{inspection.loss:.4f} nats per token",
        "perplexity": f"{inspection.perplexity:,.2f}",
    }


def _surprisal_rows(inspection: Inspection) -> dict[str, Any]:
    """What the page has of the surprisal tab before any script runs."""
    values = [each.surprisal for each in inspection.tokens]
    bars = min(len(values), CHART_BARS)
    edges = [len(values) * i // bars for i in range(bars + 1)]
    return {
        "bars": [statistics.fmean(values[start:end]) for start, end in itertools.pairwise(edges)],
        "spans": [
            (sum(value >= step for step in STEPS), readable(text).split("\n") if text else [])
            for value, text in zip(values, inspection.texts, strict=True)
        ],
        "most_surprising": [
            (inspection.shown[i], i + 1, values[i], math.exp(-values[i]), inspection.tokens[i].rank + 1)
            for i in sorted(range(len(values)), key=lambda i: -values[i])[:MOST_SURPRISING]
        ],
    }


def _surprisal(inspection: Inspection) -> Any:
    return [
        [
            *(text, each.token, round(each.surprisal, 4), round(each.entropy, 4), each.rank),
            [[inspection.text_of(other), other, float(f"{p:.3g}")] for other, p in each.alternatives],
        ]
        for each, text in zip(inspection.tokens, inspection.shown, strict=True)
    ]


# --- attention ------------------------------------------------------------------------------------------


def _attention(inspection: Inspection, room: int) -> Any:
    """Weights of as many tokens as `room` bytes hold, the scores and the kinds of the heads."""
    blocks = inspection.recording.blocks
    H, T, _ = blocks[0].weights.shape
    fits = (math.isqrt(1 + 16 * room // (len(blocks) * H)) - 1) // 2  # L * H * t (t + 1) / 4 bytes
    t = min(T, fits)
    weights = torch.stack([block.weights[:, :t, :t] for block in blocks]).cpu().numpy()  # (L, H, t, t)
    scores = inspection.scores | {"spread": inspection.heads.entropy}
    return {
        "size": t,
        "recorded": T,
        "weights": pack_weights(weights),
        "scores": {name: _rounded(score, 3) for name, score in scores.items()},
        "kinds": inspection.kinds,
        "threshold": KIND,
    }


def pack_weights(weights: Any) -> str:
    """Lower triangles of weights (L, H, T, T), four bits of each one's root, row by row, zlib, base64."""
    rows, columns = np.tril_indices(weights.shape[-1])
    levels = np.rint(np.sqrt(weights[..., rows, columns].clip(0, 1)) * _LEVELS).astype(np.uint8).ravel()
    levels = np.pad(levels, (0, len(levels) % 2))
    return base64.b64encode(zlib.compress((levels[::2] << 4) | levels[1::2], 9)).decode()


# --- the other parts ------------------------------------------------------------------------------------


def _lens(inspection: Inspection) -> Any:
    lens = inspection.lens
    return {
        "best": lens.best.tolist(),
        "texts": {token: inspection.text_of(token) for token in set(lens.best.flatten().tolist())},
        "probability": _rounded(lens.probability, 3),
        "rank": lens.rank.tolist(),
        "surprisal": _rounded(lens.surprisal[:, :-1], 2),
    }


def _tokens(inspection: Inspection) -> Any:
    vocabulary, ranks = inspection.vocabulary, None
    if isinstance(inspection.tokenizer, GPT2Tokenizer):
        ranks = {piece: number for number, piece in enumerate(vocabulary)}
    rows = []
    for each, text in zip(inspection.tokens, inspection.shown, strict=True):
        piece = vocabulary[each.token] if each.token < len(vocabulary) else b""
        merged = [] if ranks is None or len(piece) > 30 else merges(piece, ranks)
        steps = [" ".join(map(_bytes_text, step)) for step in merged]
        rows.append([text, each.token, piece.hex(" "), steps])
    return {
        "rows": rows,
        "bytes": len("".join(inspection.texts).encode()),
        "tokenizer": inspection.tokenizer.name,
        "vocabulary": inspection.tokenizer.vocab_size,
    }


def merges(piece: bytes, ranks: Mapping[bytes, int]) -> list[list[bytes]]:
    """How byte-pair encoding puts a token together: from its bytes on, one merge a step, lowest id first."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    steps = [parts]
    while len(parts) > 1:
        pairs = [(ranks.get(a + b), i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
        known = [(rank, i) for rank, i in pairs if rank is not None]
        if not known:
            break  # `<|endoftext|>`, which is never put together
        _, i = min(known)
        parts = [*parts[:i], parts[i] + parts[i + 1], *parts[i + 2 :]]
        steps.append(parts)
    return steps


def _embeddings(inspection: Inspection) -> Any:
    table = inspection.gpt.tok_emb.weight.detach()
    tokens = list(dict.fromkeys(inspection.recording.tokens.tolist()))[:_LISTED]
    near = measures.neighbours(table, tokens, number=_NEIGHBOURS)
    others = list(dict.fromkeys(other for each in near for other, _ in each[:2] if other not in tokens))
    places, shares = measures.principal_components(table[[*tokens, *others]])
    positions = getattr(inspection.gpt, "pos_emb", None)
    similar = None
    if positions is not None:
        C = len(positions.weight)
        some = torch.linspace(0, C - 1, min(_POSITIONS, C)).round().long()
        rows = positions.weight.detach()[some].float()  # (N, D)
        similarity = F.cosine_similarity(rows[:, None], rows, dim=-1)  # (N, N)
        similar = {"places": some.tolist(), "similarity": _rounded(similarity, 2)}
    return {
        "tokens": [
            [inspection.text_of(token), token, [[inspection.text_of(o), o, round(s, 3)] for o, s in each]]
            for token, each in zip(tokens, near, strict=True)
        ],
        "map": [
            [inspection.text_of(token), token, *place, token in tokens]
            for token, place in zip([*tokens, *others], _rounded(places, 3), strict=True)
        ],
        "shares": [round(share, 3) for share in shares],
        "positions": similar,
    }


def _activations(inspection: Inspection) -> Any:
    blocks, hidden = inspection.recording.blocks, inspection.recording.hidden
    after = torch.stack([measures.rms(states) for states in hidden])  # (L + 1, T)
    return {
        "rms": _rounded(after, 3),
        "blocks": [
            {
                "attention": _mean(measures.rms(block.attention)),
                "feed-forward": _mean(measures.rms(block.feed_forward)),
                "before norm": [_mean(block.input.mean(-1)), _mean(block.input.std(-1, correction=0))],
                "after norm": [_mean(block.norm1.mean(-1)), _mean(block.norm1.std(-1, correction=0))],
                "largest": round(float(block.output.abs().max()), 2),
                "dead": int(measures.dead_units(block.units).sum()),
                "active": round(float((block.units > 0).float().mean()), 3),
            }
            for block in blocks
        ],
        "units": blocks[0].units.shape[1],
        "norm": inspection.gpt.config.norm,
    }


def _ablation(inspection: Inspection) -> Any:
    found, parts = inspection.ablation, ("heads", "attention", "feed_forward", "blocks")
    return {
        "tokens": min(inspection.ablation_tokens, len(inspection.recording.tokens)),
        "loss": round(found.loss, 4),
        **{name: _rounded(getattr(found, name), 4) for name in parts},
    }


@torch.no_grad()
def _steps(inspection: Inspection) -> Any:
    """The way of the last recorded token, from its id to the probabilities of the next."""
    recording, net = inspection.recording, inspection.gpt
    config, T = net.config, len(recording.tokens)
    D, H = config.emb_dim, config.n_heads
    last = int(recording.tokens[-1])
    logits = measures.lens_logits(net, recording.hidden[-1][-1:])[0]  # (V,)
    p = logits.softmax(dim=-1)

    all_of = f"({T}, {D})"

    def vector(name: str, why: str, values: Tensor, shape: str = all_of) -> dict[str, Any]:
        return {
            "name": name,
            "why": why,
            "shape": shape,
            "values": _rounded(values[:_SHOWN], 3),
            "mean": round(float(values.mean()), 3),
            "std": round(float(values.std(correction=0)), 3),
        }

    steps: list[dict[str, Any]] = [
        {
            "name": "token ids",
            "why": f"The text is cut into {T} tokens, end-of-text before it. We follow the last, "
            f"{inspection.text_of(last)}, id {last}, which predicts what comes next.",
            "shape": f"({T},)",
            "values": recording.tokens[-_SHOWN:].tolist(),
        },
        vector(
            "token embedding", "The row of the table that the id points to.", recording.token_embeddings[-1]
        ),
    ]
    if recording.position_embeddings is not None:
        why = f"The row of position {T - 1}, for every text the same."
        steps.append(vector("position embedding", why, recording.position_embeddings[-1]))
    steps.append(vector("hidden state", "Their sum.", recording.hidden[0][-1]))
    for i, block in enumerate(recording.blocks):
        strongest = block.weights[:, -1].max(dim=-1)
        head = int(strongest.values.argmax())
        target = int(strongest.indices[head])
        to = inspection.text_of(int(recording.tokens[target]))
        steps += [
            {"block": i},
            vector("norm", "Mean 0 and spread 1 for every token, then a learnt scale.", block.norm1[-1]),
            vector(
                "attention",
                f"{H} heads of width {D // H} mix what earlier tokens offer. Head {head} attends most to one"
                f" token: {float(strongest.values[head]):.0%} to {to} at place {target}.",
                block.attention[-1],
                f"({H}, {T}, {D // H}) → {all_of}",
            ),
            vector("shortcut", "Added to what was there.", block.between[-1]),
            vector("norm", "Once more, for the feed-forward network.", block.norm2[-1]),
            vector(
                "feed-forward",
                f"To {config.ff_width} units, {int((block.units[-1] > 0).sum())} of them above 0, and back.",
                block.feed_forward[-1],
                f"{all_of} → ({T}, {config.ff_width}) → {all_of}",
            ),
            vector("shortcut", "Added again: the block's output.", block.output[-1]),
        ]
    best = logits.topk(min(_TOP, len(logits)))
    steps += [
        {"block": -1},
        vector("final norm", "As before every part.", recording.final[-1]),
        vector(
            "logits",
            f"The product with each of the {config.vocab_size:,} rows of the head: one number a token.",
            logits,
            f"({T}, {config.vocab_size})",
        ),
        {
            "name": "probabilities",
            "why": "exp(logit), divided by the sum over all tokens.",
            "shape": f"({config.vocab_size},)",
            "next": [
                [inspection.text_of(token), token, round(logit, 2), float(f"{float(p[token]):.3g}")]
                for token, logit in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ],
        },
    ]
    return steps


_PARTS: dict[str, Callable[..., Any]] = {
    "surprisal": _surprisal,
    "lens": _lens,
    "tokens": _tokens,
    "embeddings": _embeddings,
    "activations": _activations,
    "ablation": _ablation,
    "steps": _steps,
}


# --- texts and numbers ----------------------------------------------------------------------------------


def _bytes_text(piece: bytes) -> str:
    return visible(piece.decode("utf-8", "backslashreplace"))


def _mean(values: Tensor) -> float:
    return round(float(values.mean()), 3)


def _rounded(values: Tensor, digits: int) -> Any:
    """Nested lists of numbers; what is not finite is null."""
    table = np.round(values.detach().double().cpu().numpy(), digits).astype(object)
    table[values.detach().cpu().isfinite().logical_not().numpy()] = None
    return table.tolist()
