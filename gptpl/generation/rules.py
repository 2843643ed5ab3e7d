"""Rules that turn next-token logits into a token: pure functions, randomness through a generator."""

# B batch, V vocabulary

import math

import torch
from torch import Tensor

from gptpl.errors import InputError


def check_temperature(temperature: float) -> None:
    """Raise InputError unless temperature is finite and at least 0."""
    if not (math.isfinite(temperature) and temperature >= 0):
        raise InputError(f"temperature={temperature} is out of range: give 0 (greedy) or a positive number")


def check_top_k(top_k: int, *, vocab_size: int) -> None:
    """Raise InputError unless 1 <= top_k <= vocab_size."""
    if not 1 <= top_k <= vocab_size:
        raise InputError(
            f"top_k={top_k} is out of range: give 1 to {vocab_size} (the vocabulary) or leave it out"
        )


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Divide logits (..., V) by temperature: below 1 sharpens the distribution, above 1 flattens it.

    Raises InputError for a temperature that is negative or not finite, and for 0, which is no division but
    the greedy choice that `next_token` makes.
    """
    check_temperature(temperature)
    if temperature == 0:
        raise InputError("temperature=0 cannot divide logits: it means greedy, take their argmax instead")
    return logits / temperature


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest logits (..., V) of each row and set the others to -inf (Fan et al. 2018).

    Exactly k survive: where several logits tie for the last place, the lowest token ids win, as in argmax. So
    k = 1 is greedy even among equals, which bf16 logits often are. (A plain threshold would keep them all.)

    Raises InputError unless 1 <= k <= V.
    """
    check_top_k(k, vocab_size=logits.shape[-1])
    threshold = logits.topk(k, dim=-1).values[..., -1:]  # (..., 1) the k-th largest
    above = logits > threshold
    tied = logits == threshold
    places_left = k - above.sum(dim=-1, keepdim=True)  # (..., 1)
    keep = above | (tied & (tied.cumsum(dim=-1) <= places_left))
    return logits.masked_fill(~keep, -math.inf)


def next_token(
    logits: Tensor,
    *,
    temperature: float,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Choose one token a row: logits (B, V) -> (B,) int64.

    temperature 0 is greedy (argmax; the lowest id among equals) and draws no random number. Otherwise one
    multinomial draw a row from softmax(keep_top_k(logits) / temperature), computed in fp32, by `generator`,
    which must live on the logits' device, or by torch's global one.

    Raises InputError for a negative or infinite temperature and a top_k outside 1..V. NaN logits make torch
    raise when it draws.
    """
    check_temperature(temperature)
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    logits = logits.float()
    if temperature < torch.finfo(logits.dtype).tiny:  # nothing that fp32 can divide by: the limit, greedy
        return logits.argmax(dim=-1)
    # Softmax does not feel the shift, and the best logit, now 0, cannot overflow at a tiny temperature.
    logits = logits - logits.amax(dim=-1, keepdim=True)
    probabilities = torch.softmax(apply_temperature(logits, temperature), dim=-1)  # (B, V)
    return torch.multinomial(probabilities, num_samples=1, generator=generator).squeeze(-1)
