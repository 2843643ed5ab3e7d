"""What happens inside the model while it trains: gradients, updates, activations and attention, by layer."""

# B batch, T time, P positions looked at, H heads, K head width, W inner width of the feed-forward network

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gptpl.callbacks.after_step import language_module, show_picture
from gptpl.callbacks.records import RecordFile
from gptpl.checkpoints.resume_state import random_state, set_random_state
from gptpl.errors import InputError
from gptpl.files.figures import GREY, new_figure
from gptpl.inspection.measures import NEAR_ZERO, dead_units
from gptpl.model.gpt import (
    GPTBackbone,
    MultiHeadAttention,
    Rope,
    TransformerBlock,
    attention_weights,
    rotate,
    segment_mask,
    segment_positions,
)
from gptpl.model.loss import IGNORED_TARGET
from gptpl.model.protocol import blocks_of, eval_mode
from gptpl.training.module import TrainingModule
from gptpl.training.sharding import FullyShardedStrategy

if TYPE_CHECKING:  # matplotlib takes long to import
    from matplotlib.figure import Figure

SEQUENCES = 4
"""Of a batch, whose activations are looked at."""
POSITIONS = 128
"""Of the first sequence, whose attention is looked at: the scores of a layer are H x 128 x 128 numbers."""
PLACES = (-1.0, -0.5, 0.0, 0.5, 1.0)
"""Where along a step the loss is measured, in steps from the weights after it: -1 is before the step."""
MOST_LABELS = 40


class Diagnostics(L.Callback):
    """Logs what happens in each layer, at the first step and every `every_n_steps` steps.

    All names begin with `diagnostics/`. A layer is `embeddings`, `block_03.attention` and
    `block_03.feed_forward`, each with the norm before it, `final_norm` or `head` (part of the embeddings
    where it is tied); of a model of another class, its `blocks`, if it has any, and its children by name.

    - `gradient_norm/LAYER`: of the step's gradient, before clipping: `train/grad_norm` by layer.
    - `update_ratio/LAYER`: RMS of what the optimizer changed the layer's matrices by, over their own RMS
      before. About 1e-3 is usual for AdamW; far more is unstable, far less learns slowly.
    - `activation_rms/BLOCK`: of the block's output.
    - `near_zero/BLOCK`, `dead_units/BLOCK`: of the W inner units after GELU (or SwiGLU's product), the
      fraction of activations below 0.01, and the fraction of units that are so at every position.
    - `attention_entropy/BLOCK`: in nats, the mean over heads and positions; `attention_evenness/BLOCK`: over
      that of even attention, log(t + 1) at position t, so that 1 is even and 0 looks at one token.
    - with `sharpness`, `loss_at/A`: the loss at w + A * u, for the weights w after the step and its update u;
      `curvature`: its second difference along u over the squared length of u.

    Activations and attention are a `GPTBackbone`'s. They are those of a forward pass of its own, before the
    step, in evaluation mode, without the head, on up to 4 sequences of the step's first micro-batch, of
    attention on the first 128 positions of the first sequence: compiled blocks see no hook and are not
    compiled again, and recomputed ones fire none twice. Losses are in evaluation mode, too, on the last
    micro-batch of the step, without mixed precision; of weights in bf16 they say little, as most of a step is
    lost in rounding.

    The training does not change by a bit. The steps looked at need room for a copy of the weights that
    train, with `sharpness` for two, and their time counts in `train/tokens_per_second`. `model=gpt_18m` with
    8 x 256 tokens in fp32 on a CPU took 11 % longer for such a step, so that every tenth costs 1 %, and with
    `sharpness` three times as long, 21 %. With several processes the first one looks, at its own part of the
    batch. The values are in JSON Lines beside `path`, too, from which the picture is drawn when training
    ends: also that of a resumed run is whole.

    Args:
        path: the picture, a PNG file; the values' file has the ending .jsonl.
        every_n_steps: steps between those looked at.
        sharpness: measure the loss along the step, which costs five forward passes.

    Raises InputError for `every_n_steps` below 1, and when `fit` starts for a strategy that shards the model.
    """

    def __init__(self, *, path: str | Path, every_n_steps: int = 10, sharpness: bool = False) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise InputError(f"callbacks.diagnostics.every_n_steps must be positive, got {every_n_steps}")
        self.path = Path(path)
        self.every_n_steps = every_n_steps
        self.sharpness = sharpness
        self._file = RecordFile(self.path.with_suffix(".jsonl"))
        self._active = False
        self._step = 0  # looked at last
        self._values: dict[str, Tensor] = {}
        self._layers: dict[str, list[nn.Parameter]] = {}
        self._before: dict[str, list[Tensor]] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a strategy that divides weights and gradients among the processes."""
        if isinstance(trainer.strategy, FullyShardedStrategy):
            raise InputError(
                "callbacks.diagnostics needs the whole model in one process, which trainer.strategy=fsdp"
                " divides: use trainer=ddp, or leave it out with '~callbacks.diagnostics'"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Cut the file back to the step that training starts from."""
        self._step = 0
        self._active = trainer.is_global_zero
        self._forget()
        if self._active:
            self._file.start(step=trainer.global_step)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Look at activations and attention, if the batch begins a step to look at."""
        step = trainer.global_step + 1
        if not self._active or step == self._step or (step > 1 and step % self.every_n_steps):
            return
        self._step = step
        module = language_module(pl_module)
        if isinstance(module.net, GPTBackbone):
            tokens, segments = module.inputs_of(batch)[:SEQUENCES], getattr(batch, "segments", None)
            if segments is not None:
                segments = segments[:SEQUENCES]
            with _aside(trainer, module):
                self._values = forward_statistics(module.net, tokens, segments, length=_length(batch, tokens))

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Note the gradient's norms, up to a factor, and the weights."""
        if not self._active or trainer.global_step + 1 != self._step:
            return
        self._layers = layers_of(language_module(pl_module).net)
        for layer, parameters in self._layers.items():
            gradients = (parameter.grad for parameter in parameters if parameter.grad is not None)
            self._values[f"gradient_norm/{layer}"] = _norm(gradients)
            self._before[layer] = [parameter.detach().clone() for parameter in parameters]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the step, if the batch completed one to look at: before its boundary, so that it is kept."""
        if not self._layers or trainer.global_step != self._step:
            return
        module = language_module(pl_module)
        for layer, parameters in self._layers.items():
            pairs = zip(parameters, self._before[layer], strict=True)
            if matrices := [pair for pair in pairs if pair[0].dim() > 1]:
                change = _norm(after.detach() - before for after, before in matrices)
                self._values[f"update_ratio/{layer}"] = change / _norm(before for _, before in matrices)
        values = dict(
            zip(self._values, torch.stack([v.float() for v in self._values.values()]).tolist(), strict=True)
        )
        # Noted before the module made the gradient the mean over micro-batches and undid fp16's loss scale.
        noted = math.hypot(*(value for name, value in values.items() if name.startswith("gradient_norm/")))
        if noted and module.grad_norm is not None:
            factor = float(module.grad_norm) / noted
            values |= {n: factor * v for n, v in values.items() if n.startswith("gradient_norm/")}
        if self.sharpness:
            weights = [parameter for parameters in self._layers.values() for parameter in parameters]
            old = [tensor for tensors in self._before.values() for tensor in tensors]
            # bf16 would round most of a step away: its last bit is 1 / 256 of a weight.
            with _aside(trainer, module), torch.autocast(module.device.type, enabled=False):
                losses, values["curvature"] = losses_along_step(
                    lambda: module.batch_loss(batch), weights, old
                )
            values |= {f"loss_at/{place:g}": loss for place, loss in losses.items()}
        self._forget()
        for logger in trainer.loggers:
            logger.log_metrics({f"diagnostics/{name}": value for name, value in values.items()}, self._step)
        self._file.append([{"step": self._step, "metrics": values}])

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the finished run."""
        self._draw(trainer)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Draw what there is."""
        self._draw(trainer)

    def _draw(self, trainer: L.Trainer) -> None:
        self._forget()
        if not self._active:
            return
        self._active = False
        lines = self._file.path.read_text(encoding="utf-8") if self._file.path.exists() else ""
        if records := [json.loads(line) for line in lines.splitlines()]:
            show_picture(trainer, "diagnostics", diagnostics_figure(records), self.path)

    def _forget(self) -> None:
        self._values, self._layers, self._before = {}, {}, {}


# --- by layer -------------------------------------------------------------------------------------------

_NAMES = {"tok_emb": "embeddings", "pos_emb": "embeddings", "out_head": "head"}


def layers_of(net: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters that have a gradient, by the names of layers that `Diagnostics` has, in model order."""
    blocks, layers = blocks_of(net), dict[str, list[nn.Parameter]]()
    for path, parameter in net.named_parameters():
        if parameter.grad is None:
            continue
        child, *inner = path.split(".")
        layer = _NAMES.get(child, child) if isinstance(net, GPTBackbone) else child
        if child == "blocks" and blocks:
            layer = _block_name(int(inner[0]))
            if isinstance(blocks[int(inner[0])], TransformerBlock):
                layer += ".attention" if inner[1] in ("norm1", "attn") else ".feed_forward"
        layers.setdefault(layer, []).append(parameter)
    return layers


def _block_name(index: int) -> str:
    return f"block_{index:02d}"


def _norm(tensors: Iterable[Tensor]) -> Tensor:
    """The norm of all numbers of the tensors, in float32 or their own wider type."""
    norms = [
        torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
        for tensor in tensors
    ]
    return torch.linalg.vector_norm(torch.stack(norms))


# --- the forward pass -----------------------------------------------------------------------------------


@contextmanager
def _aside(trainer: L.Trainer, module: TrainingModule) -> Iterator[None]:
    """Evaluation mode in the run's precision, without gradients and compiled code; draws nothing."""
    random = random_state()
    try:
        with (
            torch.no_grad(),
            eval_mode(module.net),
            module.uncompiled(),
            trainer.precision_plugin.val_step_context(),
        ):
            yield
    finally:
        set_random_state(random)


def _length(batch: Any, tokens: Tensor) -> int:
    """Tokens of the first sequence, without the padding at its end."""
    if (lengths := getattr(batch, "lengths", None)) is not None:
        return int(lengths[0])
    if (targets := getattr(batch, "targets", None)) is not None:
        aimed = (targets[0] != IGNORED_TARGET).nonzero()
        return int(aimed.max()) + 1 if len(aimed) else tokens.shape[1]
    return tokens.shape[1]


@torch.no_grad()
def forward_statistics(
    net: GPTBackbone, tokens: Tensor, segments: Tensor | None = None, *, length: int | None = None
) -> dict[str, Tensor]:
    """Activations and attention of each block, by the names that `Diagnostics` has, in a pass of its own.

    Tokens and `segments` (B, T) as for `GPTBackbone.hidden`. Attention is that of the first sequence's first
    `length` tokens, up to `POSITIONS`. The model is in the mode that it is in.
    """
    P = min(POSITIONS, tokens.shape[1] if length is None else length)
    positions, mask = torch.arange(P, device=tokens.device), None
    if segments is not None:
        positions, mask = segment_positions(segments[:1, :P]), segment_mask(segments[:1, :P])
    rope = net.rope(positions)
    found: dict[str, Tensor] = {}

    def note_output(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        found[f"activation_rms/{name}"] = output.float().square().mean().sqrt()

    def note_units(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        [units] = args  # (B, T, W)
        found[f"near_zero/{name}"] = (units.abs() < NEAR_ZERO).float().mean()
        found[f"dead_units/{name}"] = dead_units(units).float().mean()

    def note_attention(name: str, n_heads: int, module: nn.Module, args: Any, output: Tensor) -> None:
        entropy, evenness = attention_entropy(output[:1, :P], n_heads, rope=rope, mask=mask)
        found[f"attention_entropy/{name}"] = entropy
        found[f"attention_evenness/{name}"] = evenness

    with ExitStack() as hooks:
        for index, block in enumerate(net.blocks):
            name = _block_name(index)
            hooks.enter_context(block.register_forward_hook(partial(note_output, name)))
            if isinstance(block, TransformerBlock):
                down, attn = block.ff.down_proj, block.attn
                hooks.enter_context(down.register_forward_pre_hook(partial(note_units, name)))
                assert isinstance(attn, MultiHeadAttention)
                hook = partial(note_attention, name, attn.n_heads)
                hooks.enter_context(attn.qkv.register_forward_hook(hook))
        net.hidden(tokens, segments)
    return found


def attention_entropy(
    qkv: Tensor, n_heads: int, *, rope: Rope | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean entropy of the attention weights in nats, and of its ratio to that of even attention.

    `qkv` (B, P, 3 D) as for `causal_attention`, before the rotation by `rope`; `mask` (B, 1, P, P) bool,
    query by key, None: causal. Positions that see only themselves count in the entropy, which is 0 there, not
    in the ratio, which is nan if there are no others.
    """
    B, P, width = qkv.shape
    qkv = qkv.float()
    if rope is not None:
        qkv = rotate(qkv, rope, n_heads)
    q, k, _ = qkv.view(B, P, 3, n_heads, width // 3 // n_heads).permute(2, 0, 3, 1, 4)  # each (B, H, P, K)
    if mask is None:
        mask = torch.ones(1, 1, P, P, dtype=torch.bool, device=qkv.device).tril()
    entropy = torch.special.entr(attention_weights(q, k, mask)).sum(-1).mean(1)  # (B, P)
    even = mask.sum(-1).squeeze(1).float().log().expand(B, P)
    return entropy.mean(), (entropy[even > 0] / even[even > 0]).mean()


# --- the loss along a step ------------------------------------------------------------------------------


@torch.no_grad()
def losses_along_step(
    loss: Callable[[], Tensor], weights: Sequence[Tensor], before: Sequence[Tensor]
) -> tuple[dict[float, float], float]:
    """The loss at each of `PLACES` along the step from `before` to `weights`, and its curvature there.

    That is the second difference over a step, divided by the square of the step's length; nan without a step.
    The weights are changed in place, and at the end are what they were, bit for bit.
    """
    after = [weight.detach().clone() for weight in weights]
    losses: dict[float, float] = {}
    try:
        for place in PLACES:
            for weight, old, new in zip(weights, before, after, strict=True):
                weight.copy_(torch.lerp(old, new, 1 + place))
            losses[place] = float(loss())
    finally:
        for weight, new in zip(weights, after, strict=True):
            weight.copy_(new)
    length = float(_norm(new - old for new, old in zip(after, before, strict=True)))
    bend = losses[-1.0] - 2 * losses[0.0] + losses[1.0]
    return losses, bend / length**2 if length else math.nan


# --- the picture ----------------------------------------------------------------------------------------


def diagnostics_figure(records: Sequence[Mapping[str, Any]]) -> "Figure":
    """Draw gradient norms and update ratios, layers by steps; what is not a positive number is grey.

    Each record has its `step` and `metrics`, named as `Diagnostics` does, without "diagnostics/".
    """
    from matplotlib.colors import LogNorm

    figure = new_figure()
    figure.set_size_inches(12, 6)
    steps = [record["step"] for record in records]
    panels = (("gradient_norm", "Gradient norm, before clipping"), ("update_ratio", "Update / weight, RMS"))
    for axes, (kind, title) in zip(figure.subplots(1, 2), panels, strict=True):
        names = [name for record in records for name in record["metrics"] if name.startswith(f"{kind}/")]
        layers = list(dict.fromkeys(names))
        numbers = np.array([[r["metrics"].get(layer, math.nan) for r in records] for layer in layers])
        numbers = np.ma.masked_where(~(np.isfinite(numbers) & (numbers > 0)), numbers)
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("Step")
        axes.set_facecolor(GREY)
        if numbers.count() == 0:
            continue
        low, high = float(numbers.min()), float(numbers.max())
        norm = LogNorm(vmin=low, vmax=max(high, 1.01 * low))
        image = axes.imshow(numbers, aspect="auto", interpolation="nearest", norm=norm, cmap="viridis")
        figure.colorbar(image, ax=axes)
        every = math.ceil(len(layers) / MOST_LABELS)
        labels = [layer.partition("/")[2] for layer in layers][::every]
        axes.set_yticks(range(0, len(layers), every), labels, fontsize="x-small")
        ticks = sorted({round(place) for place in np.linspace(0, len(steps) - 1, 6)})
        axes.set_xticks(ticks, [f"{steps[tick]:,}" for tick in ticks])
    figure.suptitle("Inside the model during training", fontweight="bold")
    return figure
