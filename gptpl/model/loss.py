"""Next-token cross-entropy and perplexity, and a model's head fused with the loss, without all logits.

At GPT-2's vocabulary the logits are the largest tensor of a training step: for 4 x 1024 tokens 0.8 GB in
fp32, and as much again for their gradient. `head_loss` computes them for some rows at a time, in the type of
the matrix product, and turns them into their own gradient in place: the forward pass knows the loss, so it
knows the gradient too, up to a factor.
"""

# B batch, T time, N positions (B x T), D model, V vocabulary

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptpl.errors import InputError
from gptpl.model.lora import LowRankLinear
from gptpl.model.protocol import body_and_head, class_path, has_fused_head, takes_segments

Head = Literal["fused", "plain"]
Sums = Callable[[Tensor, Tensor], Tensor]
"""Sums over positions, from logits (N, V) and targets (N,): `summed_next_token_loss`, `summed_scores`."""
IGNORED_TARGET = -100
"""Target id of a position that has no next token to predict (torch's default `ignore_index`)."""
PRODUCT_ROWS = 2048
"""Positions whose logits are computed at a time; each time the head's V x D gradient is read and written."""
SOFTMAX_ROWS, SOFTMAX_ROWS_ELSEWHERE = 32, 512
"""Positions whose logits are in fp32 at a time, on a CPU 6 MB, which stay in its cache, and elsewhere."""
MULTIPLE = 64
"""The products have a multiple of so many columns, padded with zeros: GPT-2's vocabulary of 50,257 is odd."""


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats per target token, a float32 scalar; nan when every target is ignored.

    Logits are (..., V) in any floating type, the softmax is in float32. Targets are (...) int64; positions
    with `IGNORED_TARGET` count neither in the sum nor in the mean.
    """
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORED_TARGET)


def wide_dtype(device: torch.device) -> torch.dtype:
    """The type of sums over many batches: float64, or float32 on mps, which lacks it."""
    return torch.float32 if device.type == "mps" else torch.float64


def summed_next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross-entropies and number of targets, for exact means over many batches: (2,).

    Arguments as for `next_token_loss`.
    """
    wide = wide_dtype(logits.device)
    total = F.cross_entropy(
        logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORED_TARGET, reduction="sum"
    )
    return torch.stack([total.to(wide), (targets != IGNORED_TARGET).sum().to(wide)])


def summed_scores(logits: Tensor, targets: Tensor) -> Tensor:
    """`summed_next_token_loss` and the targets with the highest logit (of equals the lowest id): (3,)."""
    sums = summed_next_token_loss(logits, targets)
    return torch.cat([sums, (logits.argmax(-1) == targets).sum().to(sums.dtype)[None]])


def perplexity(loss: float) -> float:
    """exp(loss), the number of equally likely tokens that are as surprising; inf beyond float's range."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """The summed loss of a text over its bytes, in bits: comparable between tokenizers."""
    return nats / math.log(2) / text_bytes


def bytes_of(targets: Tensor, token_bytes: Tensor) -> Tensor:
    """Bytes in the text of the targets, (1,) int64, by those of each token (V,); -100 has none."""
    return (token_bytes.to(targets.device)[targets.clamp(min=0)] * (targets >= 0)).sum()[None]


# ----------------------------------------------------------------------------------------- loss of a model


def training_loss(
    net: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    head: Head,
    segments: Tensor | None = None,
    compiled: bool = False,
) -> Tensor:
    """Mean loss of the model's next tokens, float32; inputs and targets (B, T).

    `head` "fused" is `head_loss`, `compiled` or not; "plain" computes all logits, then the loss. `segments`
    (B, T) as for `GPTBackbone.hidden`; None: a row is one text.
    """
    given = _given(net, inputs, segments)
    if head == "fused":
        check_fused_head(net)
        return head_loss(*head_factors(net, *given), targets, compiled=compiled)
    return next_token_loss(net(*given), targets)


def evaluation_loss(
    net: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    segments: Tensor | None = None,
    sums_of: Sums = summed_next_token_loss,
) -> Tensor:
    """`sums_of` the model's logits, without all of them at once where it has a head to call apart.

    `segments` as for `training_loss`.
    """
    given = _given(net, inputs, segments)
    if has_fused_head(net):
        return head_sums(*head_factors(net, *given), targets, sums_of)
    body, head = body_and_head(net)
    parts = _in_parts(PRODUCT_ROWS, body(*given).flatten(0, -2), targets.flatten())
    return torch.stack([sums_of(head(rows), aims) for rows, aims in parts]).sum(0)


def _given(net: nn.Module, inputs: Tensor, segments: Tensor | None) -> tuple[Tensor, ...]:
    if segments is None:
        return (inputs,)
    if not takes_segments(net):
        raise InputError(
            f"packed rows need a model whose forward takes segments, {class_path(net)}'s does not: leave"
            " data.packing out"
        )
    return inputs, segments


def check_fused_head(net: nn.Module) -> None:
    """Raise InputError for a model whose head cannot be fused with the loss."""
    if not has_fused_head(net):
        raise InputError(
            f"trainer.head=fused needs a model with hidden() and a linear out_head without bias,"
            f" {class_path(net)} has none: use trainer.head=plain"
        )


def head_factors(net: nn.Module, *given: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of the logits: the input (..., D) of the model's head and its weight (V, D).

    A low-rank head has R more columns, those of its small matrices; the gradient of the whole weight is then
    computed, as if all of it trained.
    """
    body, head = body_and_head(net)
    hidden = body(*given)
    if isinstance(head, LowRankLinear):
        return head.one_product(hidden)
    assert isinstance(head, nn.Linear)
    return hidden, head.weight


# ----------------------------------------------------------------------------------- head and loss in one


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor, *, compiled: bool = False) -> Tensor:
    """Mean cross-entropy in nats per target token: `next_token_loss(hidden @ weight.T, targets)`.

    Normalised hidden states (..., D), the head's weight (V, D), targets (...) int64. The product is computed
    in autocast's type where that is on, else in `hidden`'s, fp32 or bf16: fp16 would lose small gradients,
    as no loss scale has been applied yet. Softmax and sums are in fp32. Can be differentiated once, with
    respect to `hidden` and `weight`.

    `compiled`: have torch's compiler join what turns the logits into their gradient: on a GPU a fraction of
    the memory traffic. On a CPU, where they stay in its cache and it gained 1 % of a step, it is ignored.
    """
    dtype = _product_dtype(hidden)
    if dtype == torch.float16:
        raise TypeError("head_loss in fp16 would lose small gradients: use next_token_loss")
    if not torch.is_grad_enabled():
        weight = weight.detach()  # else its gradient would be computed all the same
    loss: Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden.flatten(0, -2), weight, targets.flatten(), dtype, compiled and hidden.device.type != "cpu"
    )
    return loss


def head_sums(hidden: Tensor, weight: Tensor, targets: Tensor, sums_of: Sums) -> Tensor:
    """The sum over positions of `sums_of(logits, targets)`, such as `summed_next_token_loss`; no gradients.

    The other arguments are those of `head_loss`, fp16 included.
    """
    dtype, counted = _product_dtype(hidden), targets != IGNORED_TARGET
    hidden, targets = hidden[counted], targets[counted]  # (N, D), (N,)
    total = sums_of(weight.new_empty(0, 1), targets[:0])  # zeros
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        low = weight.to(dtype)
        for rows, aims in _in_parts(PRODUCT_ROWS, hidden.to(dtype), targets):
            for logits, aim in _in_parts(_softmax_rows(rows), rows @ low.t(), aims):
                total = total + sums_of(logits, aim)
    return total


class _HeadLoss(torch.autograd.Function):
    """`head_loss` of hidden (N, D), weight (V, D) and targets (N,), with the product's type."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, compiled: bool
    ) -> Tensor:
        to_gradient = _compiled_to_gradient() if compiled else _to_gradient
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        share = (targets != IGNORED_TARGET).sum().float().reciprocal()  # of a position in the mean
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight: Tensor | None = None
        total = torch.zeros((), device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            V, D = weight.shape
            low = weight.new_zeros(-(-V // MULTIPLE) * MULTIPLE, D, dtype=dtype)
            low[:V] = weight
            for start in range(0, len(hidden), PRODUCT_ROWS):
                part = slice(start, start + PRODUCT_ROWS)
                rows = hidden[part].to(dtype)
                logits = rows @ low.t()  # (n, V), padded with 0, which is also the gradient there
                total += to_gradient(logits[:, :V], targets[part], share)
                if d_hidden is not None:
                    d_hidden[part] = logits @ low
                if wants_weight:
                    d_weight = _accumulated(d_weight, logits, rows)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype, ctx.vocab_size = weight.dtype, V
        return total * share

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        factor = grad.view(1)  # of one dimension, so that a product with bf16 is fp32
        if d_hidden is not None:
            d_hidden = (d_hidden * factor).to(d_hidden.dtype)
        if d_weight is not None:
            d_weight = (d_weight[: ctx.vocab_size] * factor).to(ctx.weight_dtype)
        return d_hidden, d_weight, None, None, None


def _accumulated(total: Tensor | None, gradient: Tensor, rows: Tensor) -> Tensor:
    """Add the weight's gradient (V, D) of some rows to `total`; more than one part add up in fp32."""
    if total is None:
        return gradient.t() @ rows
    if total.dtype == gradient.dtype == torch.float32:
        return total.addmm_(gradient.t(), rows)
    return total.float().add_(gradient.t() @ rows)


def _to_gradient(logits: Tensor, targets: Tensor, share: Tensor) -> Tensor:
    """Turn logits (N, V) in place into the gradient of the mean loss; returns the sum of losses in fp32."""
    total = torch.zeros((), device=logits.device)
    for part, aims in _in_parts(_softmax_rows(logits), logits, targets):
        counted = aims != IGNORED_TARGET  # (n,)
        at_aim = torch.arange(len(aims), device=aims.device), aims.clamp(min=0)
        x = part.float()  # (n, V); fp32 logits are changed in place
        highest = x.amax(-1, keepdim=True)
        aimed = x[at_aim]
        x.sub_(highest).exp_()
        normaliser = x.sum(-1, keepdim=True)
        losses = (highest + normaliser.log()).squeeze(-1) - aimed  # (n,)
        total += losses.masked_fill(~counted, 0).sum()
        weights = share * counted  # 0 for ignored targets
        x.mul_(weights[:, None] / normaliser)
        x[at_aim] -= weights
        part.copy_(x)
    return total


@cache
def _compiled_to_gradient() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`to_gradient_at_once`, compiled."""
    return torch.compile(to_gradient_at_once)


def to_gradient_at_once(logits: Tensor, targets: Tensor, share: Tensor) -> Tensor:
    """`_to_gradient` of all rows together, without writing to single places: for a compiler to join."""
    counted = targets != IGNORED_TARGET  # (N,)
    aims = targets.clamp(min=0)[:, None]  # (N, 1)
    x = logits.float()  # (N, V)
    normaliser = x.logsumexp(-1, keepdim=True)  # (N, 1)
    losses = (normaliser - x.gather(-1, aims)).squeeze(-1)  # (N,)
    at_aim = torch.arange(x.shape[-1], device=x.device) == aims  # (N, V)
    logits.copy_(((x - normaliser).exp() - at_aim.float()) * (share * counted)[:, None])
    return losses.masked_fill(~counted, 0).sum()


def _in_parts(rows: int, left: Tensor, right: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(torch.split(left, rows), torch.split(right, rows), strict=True)


def _softmax_rows(logits: Tensor) -> int:
    return SOFTMAX_ROWS if logits.device.type == "cpu" else SOFTMAX_ROWS_ELSEWHERE


def _product_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
