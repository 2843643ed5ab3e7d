"""Rules that look at the tokens so far, or at a list of tokens: penalties, bans, forced tokens."""

# B batch, T time, V vocabulary

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gptpl.errors import InputError

NO_TOKEN = -1
"""Fills the rows of `tokens` that are shorter than the longest; no rule counts it."""


def penalise_repetition(logits: Tensor, tokens: Tensor, penalty: float) -> Tensor:
    """Make every token that occurs in `tokens` less likely.

    Its logit is divided by `penalty`, or multiplied by it where negative. Logits (B, V), tokens (B, T) int64
    with -1 for "no token". 1 changes nothing, 1.2 is usual; below 1 rewards repetition.

    Source: Keskar et al. 2019, "CTRL: A Conditional Transformer Language Model for Controllable Generation".

    Raises InputError unless penalty is positive and finite.
    """
    check_repetition_penalty(penalty)
    penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(token_counts(tokens, logits.shape[-1]) > 0, penalised, logits)


def penalise_frequency(logits: Tensor, tokens: Tensor, *, frequency: float, presence: float = 0.0) -> Tensor:
    """Subtract from each token's logit `frequency` times its count in `tokens`, and `presence` if it occurs.

    Logits (B, V), tokens (B, T) int64 with -1 for "no token". 0 changes nothing; below 0 rewards repetition.

    Source: OpenAI's API reference, frequency_penalty and presence_penalty.

    Raises InputError unless both are finite.
    """
    check_finite("frequency_penalty", frequency)
    check_finite("presence_penalty", presence)
    counts = token_counts(tokens, logits.shape[-1])
    return logits - frequency * counts - presence * (counts > 0).to(logits.dtype)


def ban_tokens(logits: Tensor, banned: Sequence[int]) -> Tensor:
    """Set the logits (..., V) of the token ids in `banned` to -inf.

    Raises InputError for an id outside 0..V-1, and where no token would be left.
    """
    if not banned:
        return logits
    check_token_ids("banned_tokens", banned, vocab_size=logits.shape[-1])
    return logits.index_fill(-1, torch.tensor(list(banned), device=logits.device), -math.inf)


def force_token(logits: Tensor, token: int) -> Tensor:
    """Leave one token id: its logit becomes 0, every other of logits (..., V) -inf.

    Raises InputError for an id outside 0..V-1.
    """
    check_token_ids("forced_tokens", [token], vocab_size=logits.shape[-1])
    forced = torch.full_like(logits, -math.inf)
    forced[..., token] = 0.0
    return forced


def token_counts(tokens: Tensor, vocab_size: int) -> Tensor:
    """How often each token id occurs in each row: (B, T) int64 with -1 for "no token" -> (B, V) int64."""
    B = tokens.shape[0]
    counts = tokens.new_zeros((B, vocab_size + 1))  # the last column counts what is no token
    places = tokens.masked_fill(tokens == NO_TOKEN, vocab_size)
    return counts.scatter_add_(1, places, torch.ones_like(tokens))[:, :vocab_size]


def check_repetition_penalty(penalty: float) -> None:
    """Raise InputError unless penalty is positive and finite."""
    if not (math.isfinite(penalty) and penalty > 0):
        raise InputError(
            f"repetition_penalty={penalty} is out of range: give a positive number, 1 for no penalty"
        )


def check_finite(name: str, value: float) -> None:
    """Raise InputError unless the value is a finite number."""
    if not math.isfinite(value):
        raise InputError(f"{name}={value} is no number to subtract: give a finite one, 0 for no penalty")


def check_token_ids(name: str, ids: Sequence[int], *, vocab_size: int) -> None:
    """Raise InputError for an id outside 0..vocab_size-1, and for a ban of all of them."""
    for token in ids:
        if not 0 <= token < vocab_size:
            raise InputError(
                f"{name} holds {token}, which is no token id: give ids from 0 to {vocab_size - 1}"
            )
    if name == "banned_tokens" and len(set(ids)) == vocab_size:
        raise InputError(f"banned_tokens holds all {vocab_size} tokens: leave one that can be written")
