"""Rules that reshape next-token logits: pure functions from logits to logits, and the draw at their end.

A rule keeps the shape and lets tokens out by setting their logits to -inf, so that rules compose in any
order; `gptpl.generation.sampling` composes them in the usual one. Penalties and bans are in
`gptpl.generation.penalties`.
"""

# B batch, V vocabulary

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gptpl.errors import InputError

_USUAL_NUCLEUS = 1024  # tokens


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


def check_share(name: str, share: float) -> None:
    """Raise InputError unless 0 < share <= 1; `name` is how the user calls it, such as top_p."""
    if not 0 < share <= 1:
        raise InputError(f"{name}={share} is out of range: give a number above 0 and at most 1 (1: no limit)")


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Divide logits (..., V) by temperature: below 1 sharpens the distribution, above 1 flattens it.

    Source: Ackley, Hinton and Sejnowski 1985, "A Learning Algorithm for Boltzmann Machines".

    Raises InputError for a temperature that is negative or not finite, and for 0, which is no division but
    the greedy choice that `next_token` makes.
    """
    check_temperature(temperature)
    if temperature == 0:
        raise InputError("temperature=0 cannot divide logits: it means greedy, take their argmax instead")
    return logits / temperature


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest logits (..., V) of each row and set the others to -inf.

    Exactly k survive: where several logits tie for the last place, the lowest token ids win, as in argmax. So
    k = 1 is greedy even among equals, which bf16 logits often are. (A plain threshold would keep them all.)

    Source: Fan, Lewis and Dauphin 2018, "Hierarchical Neural Story Generation".

    Raises InputError unless 1 <= k <= V.
    """
    check_top_k(k, vocab_size=logits.shape[-1])
    return _keep_largest(logits, logits.topk(k, dim=-1).values[..., -1:], count=k)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest most likely tokens whose probabilities reach p together (nucleus sampling).

    The most likely token always stays. Among equals the lowest token ids come first. p = 1 keeps every token.

    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration".

    Raises InputError unless 0 < p <= 1.
    """
    check_share("top_p", p)
    if p == 1:
        return logits
    # The nucleus is small as a rule: the largest thousand are found ten times faster than all are sorted.
    for count in (min(_USUAL_NUCLEUS, logits.shape[-1]), logits.shape[-1]):
        largest = logits.topk(count, dim=-1).values  # (..., count) descending
        probabilities = (largest - logits.logsumexp(dim=-1, keepdim=True)).exp()
        before = probabilities.cumsum(dim=-1) - probabilities  # what the likelier tokens have together
        within = (before < p).sum(dim=-1, keepdim=True).clamp(min=1)  # (..., 1) the nucleus
        if count == logits.shape[-1] or bool((within < count).all()):
            break
    return _keep_largest(logits, largest.gather(-1, within - 1), count=within)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep the tokens that are at least p times as likely as the most likely one.

    Source: Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM Outputs".

    Raises InputError unless 0 <= p <= 1; 0 keeps every token, 1 only the most likely and its equals.
    """
    if not 0 <= p <= 1:
        raise InputError(f"min_p={p} is out of range: give a number from 0 (no limit) to 1")
    if p == 0:
        return logits
    best = logits.amax(dim=-1, keepdim=True)  # (..., 1)
    return logits.masked_fill(logits < best + math.log(p), -math.inf)


def keep_typical(logits: Tensor, mass: float) -> Tensor:
    """Keep the tokens whose surprise is closest to the expected one, the fewest that reach `mass` together.

    A token's surprise is -log p, the expected one is the distribution's entropy: a dull and a far-fetched
    token are let out alike. Among equals the lowest token ids come first. mass = 1 keeps every token.

    Source: Meister et al. 2023, "Locally Typical Sampling".

    Raises InputError unless 0 < mass <= 1.
    """
    check_share("typical_p", mass)
    if mass == 1:
        return logits
    log_p = torch.log_softmax(logits, dim=-1)
    # A token that another rule has let out has probability 0, and 0 log 0 = 0 in an entropy.
    entropy = -(log_p.exp() * log_p).nan_to_num(nan=0.0).sum(dim=-1, keepdim=True)  # (..., 1)
    order = (-log_p - entropy).abs().argsort(dim=-1, stable=True)  # (..., V)
    return _keep_first_of(logits, order, mass=mass)


def _keep_largest(logits: Tensor, threshold: Tensor, *, count: int | Tensor) -> Tensor:
    """Keep the `count` largest logits of each row; threshold (..., 1) is the smallest of them.

    Of equals at the threshold the lowest token ids stay.
    """
    keep = logits >= threshold
    if bool((keep.sum(dim=-1, keepdim=True) != count).any()):
        above, tied = logits > threshold, logits == threshold
        places_left = count - above.sum(dim=-1, keepdim=True)  # (..., 1)
        keep = above | (tied & (tied.cumsum(dim=-1) <= places_left))
    return logits.masked_fill(~keep, -math.inf)


def _keep_first_of(logits: Tensor, order: Tensor, *, mass: float) -> Tensor:
    """Keep the first tokens of `order` (..., V) until their probabilities reach `mass`, at least one."""
    probabilities = torch.softmax(logits, dim=-1).gather(-1, order)
    before = probabilities.cumsum(dim=-1) - probabilities  # what the tokens before each one have together
    out = torch.empty_like(order, dtype=torch.bool).scatter_(-1, order, before >= mass)
    first = order[..., :1]
    return logits.masked_fill(out.scatter(-1, first, False), -math.inf)


def draw(logits: Tensor, generators: Sequence[torch.Generator] | torch.Generator | None = None) -> Tensor:
    """One multinomial draw a row from softmax(logits), computed in fp32: (B, V) -> (B,) int64.

    By the one generator for all rows, one generator a row, or torch's global one (None); they must live on
    the logits' device. With a generator of its own a row's draw does not depend on the other rows.

    NaN logits make torch raise.
    """
    logits = logits.float()
    # Softmax does not feel the shift, and the best logit, now 0, cannot overflow.
    probabilities = torch.softmax(logits - logits.amax(dim=-1, keepdim=True), dim=-1)  # (B, V)
    if generators is None or isinstance(generators, torch.Generator):
        return torch.multinomial(probabilities, num_samples=1, generator=generators).squeeze(-1)
    rows = zip(probabilities, generators, strict=True)
    return torch.cat([torch.multinomial(row, num_samples=1, generator=own) for row, own in rows])
