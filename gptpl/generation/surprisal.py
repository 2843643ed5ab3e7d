"""How surprised a model is by each token of a given text."""

# T time, V vocabulary

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gptpl.errors import InputError
from gptpl.generation.decoding import check_prompts
from gptpl.model import eval_mode
from gptpl.model.protocol import body_and_head, context_length, device_of, vocab_size

CHUNK = 128  # positions whose logits exist at the same time: 26 MB of GPT-2's in fp32


@dataclass(frozen=True, kw_only=True)
class TokenSurprisal:
    """One token of a text, as the model saw it coming.

    Attributes:
        token: its id.
        surprisal: -log of its probability, in nats: the loss at this token.
        entropy: of the distribution it comes from, in nats: the surprisal that was to be expected.
        rank: how many tokens were more likely; 0 is the most likely one.
        alternatives: the most likely tokens, best first, each with its probability.
    """

    token: int
    surprisal: float
    entropy: float
    rank: int
    alternatives: tuple[tuple[int, float], ...]


def surprisals(
    model: nn.Module, tokens: Sequence[int], *, eot_id: int, alternatives: int = 5
) -> Iterator[TokenSurprisal]:
    """The surprisal of every token, in order, each once; the first is predicted from end-of-text.

    A text longer than the context is read in windows that begin half a context before the first token they
    score, so that every token is predicted from half a context or more, or from the whole text before it.
    Computed in evaluation mode, the probabilities in fp32.

    Raises InputError, before the first token, for no tokens, unknown ids and alternatives outside 0..V.
    """
    if not tokens:
        raise InputError("the text is empty: give at least one token to be surprised by")
    V = vocab_size(model)
    check_prompts([tokens], vocab_size=V)
    if not 0 <= alternatives <= V:
        raise InputError(f"alternatives={alternatives} is out of range: give 0 to {V}")
    return _surprisals(model, [eot_id, *tokens], alternatives)


def _surprisals(model: nn.Module, text: list[int], alternatives: int) -> Iterator[TokenSurprisal]:
    """Of text[1:], each from what is before it."""
    device, C = device_of(model), context_length(model)
    body, head = body_and_head(model)
    scored = 0
    while scored < len(text) - 1:
        start = max(0, scored - C // 2)
        window = torch.tensor(text[start : min(start + C, len(text) - 1)], device=device)
        with torch.inference_mode(), eval_mode(model):
            hidden = body(window[None])[0, scored - start :]  # (T, D) of what is not scored yet
        for states in torch.split(hidden, CHUNK):
            targets = torch.tensor(text[scored + 1 : scored + 1 + len(states)], device=device)
            # A mode that is on while a generator waits would be on for whoever called it.
            with torch.inference_mode():
                rows = list(_rows(head(states).float(), targets, alternatives))
            scored += len(states)
            yield from rows


def _rows(logits: Tensor, targets: Tensor, alternatives: int) -> Iterator[TokenSurprisal]:
    log_p = logits.log_softmax(dim=-1)  # (T, V)
    own = log_p.gather(-1, targets[:, None])  # (T, 1)
    entropy = -(log_p.exp() * log_p).sum(dim=-1)  # (T,)
    rank = (log_p > own).sum(dim=-1)  # (T,)
    best, ids = log_p.topk(alternatives, dim=-1)  # (T, alternatives)
    rows = zip(
        targets.tolist(), own[:, 0].tolist(), entropy.tolist(), rank.tolist(), ids.tolist(), best.tolist(),
        strict=True,
    )  # fmt: skip
    for token, log_probability, row_entropy, row_rank, row_ids, row_best in rows:
        yield TokenSurprisal(
            token=token,
            surprisal=-log_probability,
            entropy=row_entropy,
            rank=row_rank,
            alternatives=tuple(zip(row_ids, map(math.exp, row_best), strict=True)),
        )
