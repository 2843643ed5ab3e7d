"""Beam search for the continuations that are most likely as a whole, not token by token."""

# N beams, V vocabulary

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gptpl.errors import InputError
from gptpl.generation.decoding import NextLogits, check_at_least, check_prompts
from gptpl.generation.sampling import ban_tokens
from gptpl.model.protocol import Cached, vocab_size


@dataclass(frozen=True, kw_only=True)
class Beam:
    """A continuation found by `beam_search`; its last token may be the end of text.

    `log_probability` is in nats, `score` is log_probability / len(tokens) ** length_penalty.
    """

    tokens: tuple[int, ...]
    log_probability: float
    score: float


def beam_search(
    model: nn.Module | Cached,
    prompt: Sequence[int],
    *,
    num_beams: int,
    max_new_tokens: int,
    eot_id: int | None = None,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
    banned_tokens: Sequence[int] = (),
) -> list[Beam]:
    """The `num_beams` best continuations of `prompt` (token ids) that the search finds, best first.

    At each step the `num_beams` likeliest unfinished continuations continue. One is finished by `eot_id`, if
    it is among the `num_beams` likeliest at that step, or by `max_new_tokens`. The search ends when
    `num_beams` are finished and the best unfinished one, if finished at once, would not be among them; with
    `early_stopping` as soon as `num_beams` are finished. One beam is greedy decoding.

    `length_penalty` above 0 favours long texts, below 0 short ones; 0 ranks by probability alone. Ids in
    `banned_tokens` are never written.

    Source: Lowerre 1976, "The Harpy Speech Recognition System"; length normalisation: Wu et al. 2016,
    "Google's Neural Machine Translation System"; the end conditions are those of Hugging Face's `generate`.

    Raises InputError for numbers out of range, and as `Decoding` for the prompt.
    """
    check_at_least(0, max_new_tokens=max_new_tokens)
    V = vocab_size(model)
    check_prompts([prompt], vocab_size=V)
    if not 1 <= num_beams <= V:
        raise InputError(f"num_beams must be from 1 to {V}, got {num_beams}")
    if not math.isfinite(length_penalty):
        raise InputError(f"length_penalty must be a finite number (0: no penalty), got {length_penalty}")
    if max_new_tokens == 0:
        return [Beam(tokens=(), log_probability=0.0, score=0.0)]
    following = NextLogits(model, rows=num_beams, room=len(prompt) + max_new_tokens)
    logits = following.start([prompt])  # (1, V); later (N, V)
    running: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    finished: list[Beam] = []
    for n in range(1, max_new_tokens + 1):
        log_p = ban_tokens(logits.float().log_softmax(dim=-1), banned_tokens)
        sums = torch.tensor([log_probability for _, log_probability in running], device=log_p.device)
        # Each beam has one way to end: of twice as many candidates as beams, enough continue.
        totals, places = (log_p + sums[:, None]).flatten().topk(min(2 * num_beams, log_p.numel()))
        best, parents = [], []
        for rank, (total, place) in enumerate(zip(totals.tolist(), places.tolist(), strict=True)):
            parent, token = divmod(place, V)
            tokens = (*running[parent][0], token)
            if token != eot_id and n < max_new_tokens:
                best.append((tokens, total))
                parents.append(parent)
            elif rank < num_beams:
                finished.append(_beam(tokens, total, length_penalty))
        finished = sorted(finished, key=lambda beam: beam.score, reverse=True)[:num_beams]
        running, parents = best[:num_beams], parents[:num_beams]
        if not running:
            break
        likeliest = _beam(*running[0], length_penalty).score
        if len(finished) == num_beams and (early_stopping or likeliest <= finished[-1].score):
            break
        logits = following.advance(parents, [tokens[-1] for tokens, _ in running])
    return finished


def _beam(tokens: tuple[int, ...], log_probability: float, length_penalty: float) -> Beam:
    score = log_probability / len(tokens) ** length_penalty
    return Beam(tokens=tokens, log_probability=log_probability, score=score)
