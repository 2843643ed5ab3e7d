"""How likely given continuations of given texts are: what multiple-choice and cloze benchmarks ask for."""

# B batch, T time, D model, V vocabulary

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gptpl.errors import InputError
from gptpl.generation.decoding import check_prompts
from gptpl.model import eval_mode
from gptpl.model.protocol import body_and_head, context_length, device_of, vocab_size

Pair = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class ContinuationScore:
    """A continuation under a model.

    Attributes:
        log_probability: of all its tokens after the text, in nats.
        is_greedy: whether each of its tokens is the most likely one at its place.
    """

    log_probability: float
    is_greedy: bool


def score_continuations(
    model: nn.Module, pairs: Sequence[Pair], *, batch_size: int = 8
) -> Iterator[ContinuationScore]:
    """The score of each (text, continuation), both token ids, in order.

    Of a pair that is longer than the context the text's beginning is left out, as the LM Evaluation Harness
    does. Computed in evaluation mode, the probabilities in fp32.

    Raises InputError, before the first score, for an empty text or continuation, one that does not fit the
    context, and unknown ids.
    """
    C, V = context_length(model), vocab_size(model)
    for number, (text, continuation) in enumerate(pairs):
        if not text or not continuation:
            raise InputError(f"pair {number} has an empty text or continuation: give each a token at least")
        if len(continuation) > C:
            raise InputError(
                f"the continuation of pair {number} has {len(continuation)} tokens, the model's context {C}:"
                " shorten it"
            )
    check_prompts([token for pair in pairs for token in pair], vocab_size=V)
    return _scores(model, pairs, batch_size)


def _scores(model: nn.Module, pairs: Sequence[Pair], batch_size: int) -> Iterator[ContinuationScore]:
    C = context_length(model)
    body, head = body_and_head(model)
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        # The last token is only predicted: C + 1 of them fit.
        rows = [[*text, *continuation][-(C + 1) :] for text, continuation in batch]
        T = max(len(row) for row in rows) - 1
        inputs = torch.zeros(len(rows), T, dtype=torch.int64)  # padded behind, where nobody looks
        for row, tokens in zip(inputs, rows, strict=True):
            row[: len(tokens) - 1] = torch.tensor(tokens[:-1])
        with torch.inference_mode(), eval_mode(model):
            hidden = body(inputs.to(device_of(model)))  # (B, T, D)
            found = [
                _score(head, states[: len(tokens) - 1], tokens[-len(continuation) :])
                for states, tokens, (_, continuation) in zip(hidden, rows, batch, strict=True)
            ]
        yield from found


def _score(head: nn.Module, states: Tensor, continuation: Sequence[int]) -> ContinuationScore:
    """Of hidden states (T, D), the last of which predicts the continuation's last token."""
    targets = torch.tensor(continuation, device=states.device)
    log_p = head(states[-len(continuation) :]).float().log_softmax(dim=-1)
    return ContinuationScore(
        log_probability=log_p.gather(-1, targets[:, None]).sum().item(),
        is_greedy=bool((log_p.argmax(dim=-1) == targets).all()),
    )
