"""Beam search for the continuations that are most likely as a whole, not token by token."""

# N beams, V vocabulary

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gptpl.errors import InputError
from gptpl.generation.decoding import NextLogits, check_prompts
from gptpl.generation.sampling import ban_tokens
from gptpl.model.protocol import Cached, vocab_size


@dataclass(frozen=True, kw_only=True)
class Beam:
    """A continuation found by `beam_search`; its last token may be the end of text."""

    tokens: tuple[int, ...]
    log_probability: float

    @property
    def score(self) -> float:
        """Mean log-probability per token, in nats."""
        return self.log_probability / max(1, len(self.tokens))


def beam_search(
    model: nn.Module | Cached,
    prompt: Sequence[int],
    *,
    num_beams: int,
    max_new_tokens: int,
    eot_id: int | None = None,
    banned_tokens: Sequence[int] = (),
) -> list[Beam]:
    """The `num_beams` best continuations of `prompt` (token ids) that the search finds, by score.

    At each step the `num_beams` likeliest unfinished continuations continue. One is finished by `eot_id`, if
    it is among the `num_beams` likeliest at that step, or by `max_new_tokens`. The search ends when
    `num_beams` are finished and the best unfinished one, if finished at once, would not be among them. One
    beam is greedy decoding. Ids in `banned_tokens` are never written.

    Source: Lowerre 1976, "The Harpy Speech Recognition System"; scores: Wu et al. 2016, "Google's Neural
    Machine Translation System"; the end conditions are those of Hugging Face's `generate`.

    Raises InputError for numbers out of range, and as `Decoding` for the prompt.
    """
    V = vocab_size(model)
    check_prompts([prompt], vocab_size=V, max_new_tokens=max_new_tokens)
    if not 1 <= num_beams <= V:
        raise InputError(f"num_beams must be from 1 to {V}, got {num_beams}")
    running, finished = [Beam(tokens=(), log_probability=0.0)], list[Beam]()
    if max_new_tokens == 0:
        return running
    following = NextLogits(model, rows=num_beams, room=len(prompt) + max_new_tokens)
    logits = following.start([prompt])  # (1, V); later (N, V)
    for n in range(1, max_new_tokens + 1):
        log_p = ban_tokens(logits.float().log_softmax(dim=-1), banned_tokens)
        sums = torch.tensor([beam.log_probability for beam in running], device=log_p.device)
        # Each beam has one way to end: of twice as many candidates as beams, enough continue.
        totals, places = (log_p + sums[:, None]).flatten().topk(min(2 * num_beams, log_p.numel()))
        best, parents = [], []
        for rank, (total, place) in enumerate(zip(totals.tolist(), places.tolist(), strict=True)):
            parent, token = divmod(place, V)
            beam = Beam(tokens=(*running[parent].tokens, token), log_probability=total)
            if token != eot_id and n < max_new_tokens:
                best.append(beam)
                parents.append(parent)
            elif rank < num_beams:
                finished.append(beam)
        finished = sorted(finished, key=lambda beam: beam.score, reverse=True)[:num_beams]
        running, parents = best[:num_beams], parents[:num_beams]
        if not running or (len(finished) == num_beams and running[0].score <= finished[-1].score):
            break
        logits = following.advance(parents, [beam.tokens[-1] for beam in running])
    return finished
