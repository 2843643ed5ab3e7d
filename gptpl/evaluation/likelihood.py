"""How likely texts are under a model: loss, each token, continuations that may share a beginning.

Questions with several answers are read once: their common beginning, then every rest beside the others, each
of which sees the beginning and itself. A row of four answers of 25 tokens to a question of 70 has 170 tokens
in place of 380, and logits are computed for the answers alone.
"""

# B rows, T time, C context, D model, V vocabulary, N scored positions

import itertools
import math
import random
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
from gptpl.model.inference import padded_rows
from gptpl.model.loss import bits_per_byte, bytes_of, evaluation_loss, perplexity
from gptpl.model.protocol import body_and_head, context_length, device_of, reads_branches, vocab_size
from gptpl.tokenizers import Tokenizer

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
                rows = _details(head(states).float(), targets, alternatives)
            scored += len(states)
            yield from rows


def _details(logits: Tensor, targets: Tensor, alternatives: int) -> list[TokenSurprisal]:
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


# --- continuations --------------------------------------------------------------------------------------

Pair = tuple[Sequence[int], Sequence[int]]
"""The tokens of a text and of a continuation."""

BATCH_TOKENS = {"cpu": 1024}
"""Tokens that are read at a time, by device: more make no faster."""
_MANY_TOKENS = 32_768  # of a GPU
_NO_BRANCH = -1  # of padding


@dataclass(frozen=True)
class ContinuationScore:
    """A continuation's log-probability in nats, and whether greedy decoding would give it.

    `tokens` are those of the continuation; `left_out` those at the text's beginning that the context had no
    room for.
    """

    log_probability: float
    is_greedy: bool
    tokens: int
    left_out: int = 0


def encode_pair(tokenizer: Tokenizer, text: str, continuation: str) -> Pair:
    """The text's own tokens, and those behind as many of both together, as in the LM Evaluation Harness.

    White space at the end of the text belongs to the continuation; an empty text is end-of-text. Raises
    InputError for a continuation that adds no token.
    """
    kept = text.rstrip()
    continuation = text[len(kept) :] + continuation
    if not kept:
        before, whole = [tokenizer.eot_id], [tokenizer.eot_id, *tokenizer.encode(continuation).tolist()]
    else:
        before, whole = (tokenizer.encode(each).tolist() for each in (kept, kept + continuation))
    if len(whole) <= len(before):
        raise InputError(f"the continuation {continuation!r} adds no token to {kept[-40:]!r}")
    return before, whole[len(before) :]


def score_groups(
    model: nn.Module, groups: Sequence[Sequence[Pair]], *, batch_tokens: int | None = None
) -> Iterator[tuple[int, list[ContinuationScore]]]:
    """The scores of each group of (text, continuation), with its place; groups of one length come together.

    What the sequences of a group have in common at their beginning is read once, where the model can, see
    `reads_branches`. Batches have about `batch_tokens` tokens (None: as suits the device), or one group. A
    text that is too long for the context loses its beginning. In evaluation mode, the probabilities in fp32.

    Raises InputError, before the first score, for an empty text or continuation, a continuation that does
    not fit the context, and unknown ids; and for a model whose logits are not numbers.
    """
    C, V = context_length(model), vocab_size(model)
    for place, group in enumerate(groups):
        for text, continuation in group:
            if not text or not 0 < len(continuation) <= C:
                raise InputError(
                    f"pair {place} must have a text of 1 token or more, and a continuation of 1 to {C}, the"
                    f" model's context, got {len(text)} and {len(continuation)}"
                )
    check_prompts([tokens for group in groups for pair in group for tokens in pair], vocab_size=V)
    if batch_tokens is None:
        batch_tokens = BATCH_TOKENS.get(device_of(model).type, _MANY_TOKENS)
    return _scores(model, groups, batch_tokens)


def _scores(
    model: nn.Module, groups: Sequence[Sequence[Pair]], batch_tokens: int
) -> Iterator[tuple[int, list[ContinuationScore]]]:
    C = context_length(model)
    shares = reads_branches(model)
    rows: list[list[_Row]] = []
    for place, group in enumerate(groups):
        sequences = [_Sequence.of(text, continuation, C, place) for text, continuation in group]
        together = [sequences] if shares else [[each] for each in sequences]
        rows.append([row for some in together for row in _rows(some, C)])
    for batch in _batches(rows, batch_tokens):
        # A batch has all of a group, in order.
        for place, own in itertools.groupby(_scored(model, batch), key=lambda scored: scored[0]):
            yield place, [score for _, score in own]


@dataclass(frozen=True)
class _Sequence:
    """What the model reads of a pair, `inputs`, and predicts, `targets`, which end one token later.

    `place` is that of its group.
    """

    inputs: list[int]
    targets: list[int]
    place: int
    left_out: int

    @classmethod
    def of(cls, text: Sequence[int], continuation: Sequence[int], context: int, place: int) -> "_Sequence":
        # The last token is only predicted: one more than the context fits.
        whole = [*text, *continuation]
        kept = whole[-(context + 1) :]
        return cls(kept[:-1], list(continuation), place, len(whole) - len(kept))


class _Row:
    """Sequences in one row: their common beginning, of some tokens, then the rest of each, its branch.

    Attributes:
        tokens, positions: of the row.
        branches: the number of the branch that a token is in; 0: the beginning.
        places: of each sequence, where in the row its targets are predicted.
    """

    def __init__(self, sequences: "Sequence[_Sequence]", beginning: int) -> None:
        self.sequences, P = sequences, beginning
        self.tokens, self.positions, self.branches = sequences[0].inputs[:P], list(range(P)), [0] * P
        self.places: list[list[int]] = []
        for number, each in enumerate(sequences, 1):
            rest, end, behind = each.inputs[P:], len(each.inputs), len(self.tokens) - P
            self.places.append([p if p < P else p + behind for p in range(end - len(each.targets), end)])
            self.tokens += rest
            self.positions += range(P, end)
            self.branches += [number] * len(rest)


def _rows(sequences: Sequence[_Sequence], context: int) -> Iterator[_Row]:
    """As few rows as have room for the sequences."""
    inputs = [each.inputs for each in sequences]
    same = (len(set(tokens)) == 1 for tokens in zip(*inputs, strict=False))
    P = sum(itertools.takewhile(bool, same))
    taken: list[_Sequence] = []
    length = P
    for each in sequences:
        rest = len(each.inputs) - P
        if taken and length + rest > context:
            yield _Row(taken, P)
            taken, length = [], P
        taken.append(each)
        length += rest
    yield _Row(taken, P)


def _batches(groups: list[list[_Row]], batch_tokens: int) -> list[list[_Row]]:
    """Rows of about one length, a group's together.

    The largest batch comes first, the others are shuffled, so that the time that is left is predictable.
    """
    batches: list[list[_Row]] = []
    longest = 0
    for group in sorted(groups, key=lambda rows: -max(len(row.tokens) for row in rows)):
        if not batches or (len(batches[-1]) + len(group)) * longest > batch_tokens:
            batches.append([])
            longest = max(len(row.tokens) for row in group)
        batches[-1] += group
    others = batches[1:]
    random.Random(0).shuffle(others)
    return batches[:1] + others


def _scored(model: nn.Module, rows: list[_Row]) -> Iterator[tuple[int, ContinuationScore]]:
    device = device_of(model)
    body, head = body_and_head(model)
    tokens = padded_rows([row.tokens for row in rows], 0, device)  # (B, T)
    sequences = [each for row in rows for each in row.sequences]
    row_of = torch.tensor([at for at, row in enumerate(rows) for own in row.places for _ in own])
    time_of = torch.tensor([place for row in rows for own in row.places for place in own])
    targets = torch.tensor([token for each in sequences for token in each.targets], device=device)  # (N,)
    with torch.inference_mode(), eval_mode(model):
        if any(row.branches[-1] for row in rows):
            hidden = body(tokens, cache=_Branches(rows, device))  # (B, T, D)
        else:
            hidden = body(tokens)
        states = hidden[row_of.to(device), time_of.to(device)]  # (N, D)
        log_p, greedy = [], []
        for part, wanted in zip(torch.split(states, CHUNK), torch.split(targets, CHUNK), strict=True):
            logits = head(part).float()  # (N, V)
            log_p.append(logits.gather(-1, wanted[:, None])[:, 0] - logits.logsumexp(dim=-1))
            greedy.append(logits.argmax(dim=-1) == wanted)
    if any(bool(part.isnan().any()) for part in log_p):
        raise InputError("the model's logits are nan: its weights are damaged, or have diverged")
    lengths = [len(each.targets) for each in sequences]
    found = zip(
        sequences,
        torch.split(torch.cat(log_p).double().cpu(), lengths),
        torch.split(torch.cat(greedy).cpu(), lengths),
        strict=True,
    )
    for each, own_log_p, is_greedy in found:
        score = ContinuationScore(
            log_probability=own_log_p.sum().item(),
            is_greedy=bool(is_greedy.all()),
            tokens=len(each.targets),
            left_out=each.left_out,
        )
        yield each.place, score


class _Branches:
    """A cache that keeps nothing, for the positions and the mask of rows with branches."""

    def __init__(self, rows: Sequence[_Row], device: torch.device) -> None:
        self._positions = padded_rows([row.positions for row in rows], 0, device)  # (B, T)
        branches = padded_rows([row.branches for row in rows], _NO_BRANCH, device)  # (B, T)
        T = branches.shape[1]
        earlier = torch.ones(T, T, dtype=torch.bool, device=device).tril()
        seen = (branches[:, None, :] == 0) | (branches[:, :, None] == branches[:, None, :])  # (B, T, T)
        self._mask = (seen & earlier)[:, None]  # (B, 1, T, T)

    def positions(self, T: int) -> Tensor:
        return self._positions

    def mask(self, T: int) -> Tensor:
        return self._mask

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return keys, values
