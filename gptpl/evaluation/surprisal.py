"""How likely texts are under a model: loss, and each token."""

# B batch, T time, D model, V vocabulary

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gptpl.errors import InputError
from gptpl.generation.decoding import check_prompts, token_details
from gptpl.model import eval_mode
from gptpl.model.loss import bits_per_byte, bytes_of, evaluation_loss, perplexity
from gptpl.model.protocol import body_and_head, context_length, device_of, vocab_size

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
