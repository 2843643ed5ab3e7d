"""The decoding loop: a prompt in, the prompt and its continuation out, one token at a time."""

# B batch, T time, V vocabulary

import torch
from torch import Tensor

from gptpl.errors import InputError
from gptpl.generation.rules import check_temperature, check_top_k, next_token
from gptpl.model import GPTModel, eval_mode


def generate(
    model: GPTModel,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    eot_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue each row of `prompt` (B, T) int64, on the model's device, by up to `max_new_tokens` tokens.

    Returns (B, T + n) int64, n <= max_new_tokens: the prompt, whole, and what follows it. Each new token is
    chosen by `next_token` from the last `context_length` tokens before it. A row ends at the first `eot_id`
    it emits (one in the prompt does not count) and is filled with `eot_id` from there; decoding stops when
    every row has ended.

    The model works in evaluation mode, without gradients, and gets its mode back, also after an error. Greedy
    decoding (temperature 0) draws no random numbers; with a `generator` the global ones stay untouched.

    Every step computes the whole window again: the time for n tokens grows as n times the window.

    Raises InputError for an empty or unbatched prompt, max_new_tokens below 0, a negative or infinite
    temperature, and a top_k outside 1..V.
    """
    check_temperature(temperature)
    if top_k is not None:
        check_top_k(top_k, vocab_size=model.config.vocab_size)
    _check_lengths(prompt, max_new_tokens)
    B, T = prompt.shape
    tokens = prompt.new_empty((B, T + max_new_tokens))
    tokens[:, :T] = prompt
    ended = torch.zeros(B, dtype=torch.bool, device=prompt.device)
    with torch.no_grad(), eval_mode(model):
        for end in range(T, T + max_new_tokens):
            logits = _last_logits(model, tokens[:, :end])  # (B, V)
            chosen = next_token(logits, temperature=temperature, top_k=top_k, generator=generator)  # (B,)
            if eot_id is not None:
                chosen = chosen.masked_fill(ended, eot_id)
                ended = ended | (chosen == eot_id)
            tokens[:, end] = chosen
            if eot_id is not None and ended.all():
                return tokens[:, : end + 1]
    return tokens


def _last_logits(model: GPTModel, tokens: Tensor) -> Tensor:
    """Logits (B, V) of the token that follows `tokens` (B, T), of which the last context_length are seen."""
    window = tokens[:, -model.config.context_length :]
    return model.out_head(model.hidden(window)[:, -1])  # the head on one position, not on all


def _check_lengths(prompt: Tensor, max_new_tokens: int) -> None:
    shape = tuple(prompt.shape)
    if len(shape) != 2:
        raise InputError(f"prompt has shape {shape}: give a batch of token ids, (B, T), such as ids[None]")
    if prompt.numel() == 0:
        raise InputError(f"prompt of shape {shape} is empty: give at least one token, such as end-of-text")
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens={max_new_tokens} is negative: give 0 or more")
