"""All that a `GPTModel` computes in a forward pass, and measures of it: heads, lens, ablation, embeddings."""

# B rows, T time, D model, H heads, K head width, L blocks, V vocabulary, N tokens of a list,
# W inner width of the feed-forward network

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptpl.errors import InputError
from gptpl.generation.decoding import check_prompts
from gptpl.model.gpt import GPTModel, MultiHeadAttention
from gptpl.model.protocol import eval_mode


@dataclass(frozen=True, kw_only=True)
class Block:
    """What one block computed."""

    input: Tensor
    """(T, D), the hidden states before it."""
    norm1: Tensor
    """(T, D), normalised for attention."""
    weights: Tensor
    """(H, T, T), query by key: where each head attended, rows that sum to 1."""
    attention: Tensor
    """(T, D), what attention adds."""
    between: Tensor
    """(T, D), the hidden states between attention and feed-forward network."""
    norm2: Tensor
    """(T, D), normalised for the feed-forward network."""
    units: Tensor
    """(T, W), its units after the activation function."""
    feed_forward: Tensor
    """(T, D), what the feed-forward network adds."""
    output: Tensor
    """(T, D), the hidden states after the block."""


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What a model computed for tokens (T,), in evaluation mode."""

    tokens: Tensor
    token_embeddings: Tensor
    """(T, D)"""
    position_embeddings: Tensor | None
    """(T, D); None with rotary positions, which have no table."""
    blocks: Sequence[Block]
    final: Tensor
    """(T, D), normalised for the head."""

    @property
    def hidden(self) -> list[Tensor]:
        """The hidden states (T, D) before the first block and after each: L + 1 of them."""
        return [self.blocks[0].input, *(block.output for block in self.blocks)]


def record(model: GPTModel, tokens: Iterable[int]) -> Recording:
    """Read tokens, as many as the context holds or fewer, and keep what every part computed.

    Attention is written out for it, see `explicit_attention`; the model is as before when it ends. Takes the
    memory of all attention weights: 38 MB for 256 tokens and GPT-2 small in fp32.

    Raises InputError for no tokens, unknown ids and more than the context holds.
    """
    tokens = [int(token) for token in tokens]  # a tokenizer's are an array
    check_prompts([tokens], vocab_size=model.config.vocab_size)
    kept: dict[nn.Module, dict[str, Tensor]] = {module: {} for module in model.modules()}

    def keep(module: nn.Module, name: str, value: Tensor) -> None:
        kept[module][name] = (value[0] if value.dim() > 2 else value).float()  # positions have no batch

    def keep_call(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        keep(module, "input", inputs[0])
        keep(module, "output", output)

    given = torch.tensor([tokens], device=model.device)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(eval_mode(model))
        for module in model.modules():
            stack.callback(module.register_forward_hook(keep_call).remove)
        for layer in attention_layers(model):
            stack.callback(setattr, layer, "kernel", layer.kernel)
            stack.callback(setattr, layer, "observe", layer.observe)
            layer.kernel, layer.observe = "explicit", partial(keep, layer, "weights")
        final = model.hidden(given)[0].float()
    by_name = {name: kept[module] for name, module in model.named_modules()}
    return Recording(
        tokens=given[0],
        token_embeddings=by_name["tok_emb"]["output"],
        position_embeddings=by_name.get("pos_emb", {}).get("output"),
        blocks=[_block(by_name, f"blocks.{i}") for i in range(len(model.blocks))],
        final=final,
    )


def _block(kept: dict[str, dict[str, Tensor]], name: str) -> Block:
    def of(part: str, what: str = "output") -> Tensor:
        return kept[f"{name}.{part}"][what]

    return Block(
        input=kept[name]["input"],
        norm1=of("norm1"),
        weights=of("attn", "weights"),
        attention=of("attn"),
        between=of("norm2", "input"),
        norm2=of("norm2"),
        units=of("ff.down_proj", "input"),
        feed_forward=of("ff"),
        output=kept[name]["output"],
    )


def attention_layers(model: nn.Module) -> list[MultiHeadAttention]:
    """The attention layers in the order of the blocks."""
    return [module for module in model.modules() if isinstance(module, MultiHeadAttention)]


LENS_POSITIONS = 128  # whose logits exist at the same time: 26 MB of GPT-2's
NEAR_ZERO = 0.01
"""Absolute activation below which a unit of the feed-forward network passes on next to nothing."""

# --- attention ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class HeadScores:
    """How much attention goes where, each (L, H), from 0 to 1, a mean over positions.

    The first position, which can only attend to itself, does not count.
    """

    previous: Tensor
    """To the token before."""
    first: Tensor
    """To the first token, which heads attend to when they have nothing to add."""
    itself: Tensor
    """To the token itself."""
    entropy: Tensor
    """The entropy of the weights over that of equal weights: 0, one token; 1, all alike."""


def head_scores(weights: Sequence[Tensor]) -> HeadScores:
    """Scores of the attention weights (H, T, T) of each block. Raises InputError for a single token."""
    all_weights = torch.stack(list(weights))  # (L, H, T, T)
    T = all_weights.shape[-1]
    if T < 2:
        raise InputError("the kind of a head shows from two tokens on: give a longer text")
    later = all_weights[:, :, 1:]
    entropies = torch.special.entr(later).sum(dim=-1)  # (L, H, T - 1)
    most = torch.arange(2, T + 1, device=later.device).log()
    return HeadScores(
        previous=all_weights.diagonal(-1, -2, -1).mean(dim=-1),
        first=later[..., 0].mean(dim=-1),
        itself=all_weights.diagonal(0, -2, -1)[..., 1:].mean(dim=-1),
        entropy=(entropies / most).mean(dim=-1),
    )


def induction_scores(model: GPTModel, *, length: int = 50, rows: int = 4, seed: int = 0) -> Tensor:
    """How much each head looks for what followed the same token before, (L, H), from 0 to 1.

    The model reads `rows` texts of `length` random tokens, each written twice: a text that repeats and has no
    other meaning. At a token of the second half, an induction head attends to the token after its first
    occurrence, which is what comes next. Shorter texts are used if the context holds no 2 * length.

    Source: Olsson et al. 2022, "In-context Learning and Induction Heads".
    """
    length = min(length, model.config.context_length // 2)
    if length < 2:
        raise InputError("induction shows in a text that repeats: the context must hold 4 tokens or more")
    generator = torch.Generator().manual_seed(seed)
    scores = []
    for _ in range(rows):
        once = torch.randperm(model.config.vocab_size, generator=generator)[:length].tolist()
        once = (once * length)[:length]  # a vocabulary may be smaller
        weights = torch.stack([block.weights for block in record(model, [*once, *once]).blocks])
        copied = weights.diagonal(1 - len(once), -2, -1)[..., 1:]  # the second half's, (L, H, T / 2)
        scores.append(copied.mean(dim=-1))
    return torch.stack(scores).mean(dim=0)


# --- the logit lens -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LogitLens:
    """What the model would say at each depth, each (L + 1, T): before the first block, after each."""

    best: Tensor
    """The likeliest next token."""
    probability: Tensor
    """Its probability."""
    rank: Tensor
    """Tokens likelier than the true next one; -1 at the last position, whose next token is not known."""
    surprisal: Tensor
    """-log of the true next token's probability, in nats; NaN at the last position."""


@torch.no_grad()
def logit_lens(model: GPTModel, recording: Recording) -> LogitLens:
    """Final norm and head applied to the hidden states of every depth.

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens".
    """
    states = torch.stack(recording.hidden)  # (L + 1, T, D)
    following = recording.tokens.roll(-1).expand(len(states), -1)  # (L + 1, T)
    pieces = (torch.split(each, LENS_POSITIONS) for each in (states.flatten(0, 1), following.flatten()))
    parts = []
    with eval_mode(model):
        for some_states, some_following in zip(*pieces, strict=True):
            log_p = lens_logits(model, some_states).log_softmax(dim=-1)  # (LENS_POSITIONS, V)
            probability, best = log_p.max(dim=-1)
            own = log_p.gather(-1, some_following[:, None])  # (LENS_POSITIONS, 1)
            parts.append((best, probability.exp(), (log_p > own).sum(dim=-1), -own[:, 0]))
    best, probability, rank, surprisal = (
        torch.cat(each).view_as(following) for each in zip(*parts, strict=True)
    )
    rank[:, -1], surprisal[:, -1] = -1, math.nan
    return LogitLens(best=best, probability=probability, rank=rank, surprisal=surprisal)


def lens_logits(model: GPTModel, states: Tensor) -> Tensor:
    """The logits that final norm and head make of hidden states of any depth: (..., D) -> (..., V)."""
    return model.out_head(model.final_norm(states.to(model.tok_emb.weight.dtype))).float()


# --- ablation -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Factors:
    """What the outputs of a block's parts are multiplied with, in each of B rows."""

    heads: Tensor
    """(B, H)"""
    attention: Tensor
    """(B,)"""
    feed_forward: Tensor
    """(B,)"""


@contextmanager
def ablate(
    model: GPTModel,
    *,
    heads: Collection[tuple[int, int]] = (),
    attention: Collection[int] = (),
    feed_forward: Collection[int] = (),
) -> Iterator[None]:
    """Have parts of the model add nothing as long as this lasts: heads (block, head), parts of blocks.

    What a part would add to the hidden states is replaced by zero; that of a head is its values, and the
    output projection's bias stays. Raises InputError for blocks and heads that the model does not have.
    """
    L, H = model.config.n_layers, model.config.n_heads
    for block, head in [*heads, *((block, 0) for block in [*attention, *feed_forward])]:
        if not (0 <= block < L and 0 <= head < H):
            raise InputError(f"block {block}, head {head}: the model has {L} blocks of {H} heads, from 0")
    with ExitStack() as stack:
        for block in range(L):
            kept = [[0.0 if (block, head) in heads else 1.0 for head in range(H)]]
            factors = _Factors(
                heads=torch.tensor(kept, device=model.device),
                attention=torch.tensor([float(block not in attention)], device=model.device),
                feed_forward=torch.tensor([float(block not in feed_forward)], device=model.device),
            )
            stack.enter_context(_multiplied(model.blocks[block], factors))
        yield


@contextmanager
def _multiplied(block: nn.Module, factors: _Factors) -> Iterator[None]:
    def of_heads(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        B, T, D = inputs[0].shape
        H = factors.heads.shape[1]
        return (inputs[0].view(B, T, H, D // H) * factors.heads[:, None, :, None]).view(B, T, D)

    def of_part(factor: Tensor, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * factor[:, None, None]

    attn, ff = block.get_submodule("attn"), block.get_submodule("ff")
    with ExitStack() as stack:
        for handle in (
            attn.get_submodule("out_proj").register_forward_pre_hook(of_heads),
            attn.register_forward_hook(partial(of_part, factors.attention)),
            ff.register_forward_hook(partial(of_part, factors.feed_forward)),
        ):
            stack.callback(handle.remove)
        yield


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """Mean loss in nats per token: of the whole model, and without each of its parts."""

    loss: float
    heads: Tensor
    """(L, H), without that head."""
    attention: Tensor
    """(L,), without the attention of that block."""
    feed_forward: Tensor
    """(L,), without its feed-forward network."""
    blocks: Tensor
    """(L,), without the whole block."""


@torch.no_grad()
def ablation(model: GPTModel, tokens: Sequence[int]) -> Ablation:
    """The loss on tokens, two or more, without each head, each part and each block in turn, as `ablate`.

    Takes about L / 2 * (H + 3) forward passes: all versions of a block are computed side by side, and what
    comes before it once. Raises InputError for fewer than two tokens and as `record`.
    """
    if len(tokens) < 2:
        raise InputError("a loss needs two tokens or more: give a longer text")
    recording = record(model, tokens)
    targets = recording.tokens[1:]
    H = model.config.n_heads
    factors = _Factors(
        heads=1 - torch.eye(H + 3, H, device=model.device),  # row i without head i, the last three with all
        attention=torch.tensor([*[1.0] * H, 0.0, 1.0, 0.0], device=model.device),
        feed_forward=torch.tensor([*[1.0] * (H + 1), 0.0, 0.0], device=model.device),
    )
    losses = []
    rope = model.rope(torch.arange(len(tokens), device=model.device))
    with eval_mode(model):
        for i in range(len(model.blocks)):
            x = recording.blocks[i].input.to(model.tok_emb.weight.dtype)
            x = x.expand(H + 3, *x.shape)  # (B, T, D)
            with _multiplied(model.blocks[i], factors):
                x = model.blocks[i](x, rope=rope)
            for block in list(model.blocks)[i + 1 :]:
                x = block(x, rope=rope)
            losses.append(torch.stack([_mean_loss(model, row, targets) for row in x]))  # (B,)
        loss = _mean_loss(model, recording.blocks[-1].output, targets)
    table = torch.stack(losses)  # (L, H + 3)
    return Ablation(
        loss=float(loss),
        heads=table[:, :H],
        attention=table[:, H],
        feed_forward=table[:, H + 1],
        blocks=table[:, H + 2],
    )


def _mean_loss(model: GPTModel, states: Tensor, targets: Tensor) -> Tensor:
    """Of the last block's output (T, D)."""
    return F.cross_entropy(lens_logits(model, states[:-1]), targets)


# --- embeddings and units -------------------------------------------------------------------------------


def neighbours(table: Tensor, tokens: Sequence[int], *, number: int) -> list[list[tuple[int, float]]]:
    """For each token the most similar others of the embeddings (V, D), with their cosine similarity."""
    unit = F.normalize(table.float(), dim=-1)
    similar = unit[list(tokens)] @ unit.T  # (N, V)
    similar[torch.arange(len(tokens)), list(tokens)] = -math.inf
    values, ids = similar.topk(min(number, len(table) - 1), dim=-1)
    return [list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]


def principal_components(rows: Tensor) -> tuple[Tensor, list[float]]:
    """Rows (N, D) in the two directions in which they vary most, (N, 2), and their shares of the variance."""
    centred = rows.float() - rows.float().mean(dim=0)
    _, sizes, directions = torch.linalg.svd(centred, full_matrices=False)
    shares = (sizes**2 / (sizes**2).sum().clamp(min=1e-30))[:2].tolist()
    places = centred @ directions[:2].T
    missing = 2 - places.shape[1]
    return F.pad(places, (0, missing)), [*shares, *[0.0] * missing]


def rms(states: Tensor) -> Tensor:
    """Root mean square of the numbers of each vector: (..., D) -> (...)."""
    return states.square().mean(dim=-1).sqrt()


def dead_units(units: Tensor) -> Tensor:
    """Which of the W units (..., W) are near zero at every position, (W,)."""
    return (units.abs() < NEAR_ZERO).flatten(0, -2).all(dim=0)
