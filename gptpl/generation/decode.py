"""Tokens in, tokens out: the book's `generate`, with a cache and for rows that end at different times."""

# B batch, T time

import torch
from torch import Tensor, nn

from gptpl.errors import InputError
from gptpl.generation.decoding import Decoding
from gptpl.generation.sampling import SamplingRules
from gptpl.model.protocol import Cached

GREEDY = SamplingRules()


def generate(
    model: nn.Module | Cached,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    rules: SamplingRules = GREEDY,
    eot_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue each row of `prompt` (B, T) int64, on the model's device, by up to `max_new_tokens` tokens.

    Returns (B, T + n) int64, n <= max_new_tokens: the prompt, whole, and what follows it. A row ends at the
    first `eot_id` it emits (one in the prompt does not count) and is filled with `eot_id` from there;
    decoding stops when every row has ended. One row alone draws the numbers that the book's loop draws from
    the same seed, so it gives the book's text. See `Decoding` for the rest.

    Raises InputError for an empty or unbatched prompt, and as `Decoding`.
    """
    shape = tuple(prompt.shape)
    if len(shape) != 2:
        raise InputError(f"prompt has shape {shape}: give a batch of token ids, (B, T), such as ids[None]")
    if prompt.numel() == 0:
        raise InputError(f"prompt of shape {shape} is empty: give at least one token, such as end-of-text")
    decoding = Decoding(
        model,
        prompt.tolist(),
        rules=rules,
        max_new_tokens=max_new_tokens,
        eot_id=eot_id,
        generator=generator,
    )
    while decoding.step():
        pass
    n = max(map(len, decoding.written))
    # Only rows that end are shorter than others, and only an eot_id ends them.
    filled = [row + [eot_id or 0] * (n - len(row)) for row in decoding.written]
    written = torch.tensor(filled, dtype=torch.int64, device=prompt.device).view(len(filled), n)
    return torch.cat([prompt, written], dim=1)
