"""Gradients, updates, activations, attention, the loss along a step: against autograd and plain sums."""

# B batch, T time, D model, H heads, K head width, W inner width

import csv
import json
import math
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptpl.callbacks import diagnostics
from gptpl.callbacks.checkpoints import LastCheckpoint
from gptpl.callbacks.diagnostics import (
    Diagnostics,
    attention_entropy,
    diagnostics_figure,
    forward_statistics,
    losses_along_step,
)
from gptpl.callbacks.stopping import RunStopped, StopAtBoundary
from gptpl.checkpoints.format import read_checkpoint
from gptpl.checkpoints.resume_state import state_digest
from gptpl.data.classification.datamodule import LabelledDataModule
from gptpl.data.instructions.datamodule import InstructionDataModule
from gptpl.data.packing import PackedBatch
from gptpl.data.sources import InstructionFile, LabelledFiles
from gptpl.errors import InputError
from gptpl.model.gpt import TransformerBlock
from gptpl.tokenizers import BytesTokenizer
from gptpl.training.classification import ClassificationModule
from gptpl.training.instruction_tuning import InstructionModule
from gptpl.training.language_model import LanguageModelingModule

SGD = partial(torch.optim.SGD, lr=0.1)
LAYERS = {
    "embeddings": ("tok_emb", "pos_emb"),
    "block_00.attention": ("blocks.0.norm1", "blocks.0.attn"),
    "block_00.feed_forward": ("blocks.0.norm2", "blocks.0.ff"),
    "block_01.attention": ("blocks.1.norm1", "blocks.1.attn"),
    "block_01.feed_forward": ("blocks.1.norm2", "blocks.1.ff"),
    "final_norm": ("final_norm",),
    "head": ("out_head",),
}


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return SGD(net.parameters())


def records(folder: Path) -> dict[int, dict[str, float]]:
    lines = (folder / "diagnostics.jsonl").read_text().splitlines()
    return {record["step"]: record["metrics"] for record in map(json.loads, lines)}


def cross_entropy(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(net(batch[0]).flatten(0, 1), batch[1].flatten())


def gradients(net: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*net.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def norm_of(tensors: dict[str, Tensor], parts: tuple[str, ...], *, matrices: bool = False) -> float:
    inside = [
        tensor.double().flatten()
        for name, tensor in tensors.items()
        if name.startswith(tuple(f"{part}." for part in parts)) and (tensor.dim() == 2 or not matrices)
    ]
    return float(torch.cat(inside).norm()) if inside else math.nan


@pytest.fixture
def look(tmp_path: Path) -> Callable[..., Diagnostics]:
    """`look(**settings)`: a callback that looks at every step, and writes into the test's folder."""
    return lambda **settings: Diagnostics(
        path=tmp_path / "diagnostics.png", **{"every_n_steps": 1} | settings
    )


def first_batches(pretraining: Any, count: int) -> list[tuple[Tensor, Tensor]]:
    loader = pretraining.data().train_dataloader()
    return [batch for _, batch in zip(range(count), loader, strict=False)]


# --- gradients and updates ------------------------------------------------------------------------------


def test_norms_are_autograds_before_clipping_and_ratios_those_of_plain_sgd(pretraining, look, tmp_path):
    """Clipped to a hundredth: the norms do not show it, the updates do."""
    net = pretraining.net()
    pretraining.fit(
        look(), module=pretraining.module(total_steps=4, make_optimizer=sgd), gradient_clip_val=1e-2
    )
    found = records(tmp_path)[1]
    [batch] = first_batches(pretraining, 1)
    by_hand = gradients(net, cross_entropy(net, batch))
    total = math.sqrt(sum(float(g.double().square().sum()) for g in by_hand.values()))
    assert total > 0.1
    lr = 0.1 * pretraining.schedule.factor(0, total_steps=4, peak_lr=pretraining.lr)
    weights = {name: weight.detach() for name, weight in net.named_parameters()}
    for layer, parts in LAYERS.items():
        assert found[f"gradient_norm/{layer}"] == pytest.approx(norm_of(by_hand, parts), rel=1e-4), layer
        expected = lr * 1e-2 / total * norm_of(by_hand, parts, matrices=True)
        expected /= norm_of(weights, parts, matrices=True)
        if layer == "final_norm":
            assert f"update_ratio/{layer}" not in found
        else:
            assert found[f"update_ratio/{layer}"] == pytest.approx(expected, rel=1e-2), layer
    norms = [name for name in found if name.startswith("gradient_norm/")]
    assert norms == [f"gradient_norm/{layer}" for layer in LAYERS]


def test_of_accumulated_batches_the_norm_is_that_of_their_mean(pretraining, look, tmp_path):
    """Also in an epoch's short last accumulation: step 8 has one batch of two."""
    net = pretraining.net()
    module = pretraining.module(total_steps=8, make_optimizer=sgd)
    pretraining.fit(look(), module=module, accumulate_grad_batches=2)
    found = records(tmp_path)
    losses = [cross_entropy(net, batch) for batch in first_batches(pretraining, 2)]
    by_hand = gradients(net, torch.stack(losses).mean())
    for layer, parts in LAYERS.items():
        assert found[1][f"gradient_norm/{layer}"] == pytest.approx(norm_of(by_hand, parts), rel=1e-4), layer
    logged = pretraining.column("train/grad_norm")
    assert list(found) == list(logged) == list(range(1, 9))
    for step, values in found.items():
        norms = [value for name, value in values.items() if name.startswith("gradient_norm/")]
        assert math.hypot(*norms) == pytest.approx(logged[step], rel=1e-5), step


class WithoutShortcuts(TransformerBlock):
    def forward(self, x: Tensor, mask: Any = None, extend: Any = None, rope: Any = None) -> Tensor:
        return self.ff(self.norm2(self.attn(self.norm1(x), mask, extend, rope)))


def test_without_shortcuts_the_gradients_of_early_layers_vanish(pretraining, look, tmp_path):
    def first_over_last(block: type[TransformerBlock]) -> float:
        net = pretraining.net(n_layers=12, init="gpt2")
        for own in net.blocks:
            own.__class__ = block
        pretraining.fit(look(), module=pretraining.module(net, total_steps=4))
        found = records(tmp_path)[1]
        (tmp_path / "diagnostics.jsonl").unlink()
        return found["gradient_norm/block_00.attention"] / found["gradient_norm/block_11.attention"]

    assert first_over_last(TransformerBlock) > 0.1
    assert first_over_last(WithoutShortcuts) < 1e-3


def test_a_step_that_is_skipped_updates_nothing(pretraining, look, tmp_path):
    pretraining.fit(look(), module=pretraining.module(total_steps=4, skip_steps=[1]))
    first, second, *_ = records(tmp_path).values()
    assert first["gradient_norm/head"] > 0
    assert first["update_ratio/head"] == 0
    assert second["update_ratio/head"] > 0


def test_frozen_layers_are_left_out(pretraining, look, tmp_path):
    net = pretraining.net()
    net.requires_grad_(False)
    net.blocks[1].requires_grad_(True)
    pretraining.fit(look(), module=pretraining.module(net, total_steps=4))
    layers = {name.partition("/")[2] for name in records(tmp_path)[1] if name.startswith("gradient_norm")}
    assert layers == {"block_01.attention", "block_01.feed_forward"}


# --- activations and attention --------------------------------------------------------------------------


def test_of_zero_queries_attention_is_even():
    qkv = torch.randn(2, 5, 3 * 8)
    qkv[..., :8] = 0
    entropy, evenness = attention_entropy(qkv, 2)
    assert float(entropy) == pytest.approx(sum(math.log(t + 1) for t in range(5)) / 5, rel=1e-6)
    assert float(evenness) == pytest.approx(1, rel=1e-6)


def test_of_huge_scores_attention_looks_at_one_token():
    qkv = torch.zeros(1, 6, 3 * 4)
    qkv[..., :4] = 100
    qkv[:, 2, 4:8] = 100  # from the third position on, its key
    entropy, evenness = attention_entropy(qkv, 1)
    assert float(entropy) == pytest.approx(math.log(2) / 6, rel=1e-5)  # positions 0 and 1 see it not yet
    assert float(evenness) == pytest.approx(1 / 5, rel=1e-5)


SEGMENTS = torch.tensor([[1] * 5 + [2] * 4 + [0] * 3])


@pytest.mark.parametrize("segments", [None, SEGMENTS])
@pytest.mark.parametrize(
    "changes", [{}, {"position": "rope", "norm": "rmsnorm", "feed_forward": "swiglu", "linear_bias": False}]
)
def test_the_entropy_is_that_of_the_weights_that_torch_used(pretraining, monkeypatch, changes, segments):
    """With the identity for values, torch's attention returns the weights."""
    net = pretraining.net(**changes).eval()
    for block in net.blocks:
        nn.init.normal_(block.attn.qkv.weight, std=0.3)
    seen: list[tuple[Tensor, ...]] = []
    sdpa = F.scaled_dot_product_attention

    def noting(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, attn_mask: Any, **given: Any) -> Tensor:
        values = torch.eye(k.shape[2]).expand(*k.shape[:2], -1, -1)
        seen.append((sdpa(q, k, values, attn_mask=attn_mask, is_causal=is_causal),))
        return sdpa(q, k, v, attn_mask=attn_mask, is_causal=is_causal, **given)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noting)
    tokens, P = torch.randint(0, 257, (1, 12)), 9
    found = forward_statistics(net, tokens, segments, length=P)
    assert len(seen) == 2
    for index, (weights,) in enumerate(seen):
        p = weights[0, :, :P, :P].double()  # (H, P, P)
        entropy = -(p * p.clamp(min=1e-30).log()).sum(-1)  # (H, P)
        starts = [0, 5] if segments is not None else [0]
        visible = [t - max(s for s in starts if s <= t) + 1 for t in range(P)]
        ratio = torch.stack([entropy[:, t] / math.log(n) for t, n in enumerate(visible) if n > 1])
        name = f"block_{index:02d}"
        assert float(found[f"attention_entropy/{name}"]) == pytest.approx(float(entropy.mean()), rel=1e-4)
        assert float(found[f"attention_evenness/{name}"]) == pytest.approx(float(ratio.mean()), rel=1e-4)
        assert 0.2 < float(ratio.mean()) < 0.98


def test_activations_are_those_of_the_blocks_by_hand(pretraining):
    net = pretraining.net().eval()
    feed_forward = net.blocks[1].ff
    with torch.no_grad():
        feed_forward.up_proj.bias[:16] = -100  # a quarter of the 64 units
    tokens = torch.randint(0, 257, (3, 12))
    found = forward_statistics(net, tokens)
    net.requires_grad_(False)
    x = net.tok_emb(tokens) + net.pos_emb(torch.arange(12))
    for index, block in enumerate(net.blocks):
        middle = x + block.attn(block.norm1(x))
        units = F.gelu(block.ff.up_proj(block.norm2(middle)), approximate="tanh")  # (B, T, W)
        x = middle + block.ff.down_proj(units)
        name = f"block_{index:02d}"
        assert float(found[f"activation_rms/{name}"]) == pytest.approx(math.sqrt((x**2).mean()), rel=1e-5)
        near = units.abs() < 0.01
        assert float(found[f"near_zero/{name}"]) == pytest.approx(float(near.double().mean()), rel=1e-5)
        dead = sum(bool(near[..., unit].all()) for unit in range(64)) / 64
        assert float(found[f"dead_units/{name}"]) == pytest.approx(dead)
    assert dead >= 0.25
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_hooks_go_also_where_the_pass_fails(pretraining):
    net = pretraining.net()
    net.blocks[1].register_forward_pre_hook(partial(_fail))
    with pytest.raises(ZeroDivisionError):
        forward_statistics(net, torch.zeros(1, 4, dtype=torch.int64))
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in net.modules()]
    assert sum(hooks) == 1


def _fail(*_: Any) -> None:
    raise ZeroDivisionError


# --- the loss along a step ------------------------------------------------------------------------------


def test_the_curvature_of_a_quadratic_loss_is_its_own_and_the_weights_come_back():
    torch.manual_seed(0)
    root = torch.randn(6, 6, dtype=torch.float64)
    matrix, slope = root @ root.T, torch.randn(6, dtype=torch.float64)
    weights = torch.randn(6, dtype=torch.float64)
    before = weights + 0.3 * torch.randn(6, dtype=torch.float64)
    special = torch.tensor([-0.0, math.nan, math.inf, 1e-45])
    kept, own = special.clone(), weights.clone()
    u = weights - before

    def at(w: Tensor) -> float:
        return float(0.5 * w @ matrix @ w + slope @ w)

    losses, curvature = losses_along_step(
        lambda: 0.5 * weights @ matrix @ weights + slope @ weights, [weights], [before]
    )
    assert losses == pytest.approx({a: at(own + a * u) for a in (-1.0, -0.5, 0.0, 0.5, 1.0)})
    assert losses[-1.0] == at(before)
    assert losses[0.0] == at(own)
    assert curvature == pytest.approx(float(u @ matrix @ u / (u @ u)), rel=1e-6)
    assert weights.equal(own)
    losses_along_step(lambda: torch.zeros(()), [special], [torch.ones(4)])
    assert special.view(torch.int32).equal(kept.view(torch.int32))
    with pytest.raises(ZeroDivisionError):
        losses_along_step(_fail, [weights], [before])  # type: ignore[arg-type]
    assert weights.equal(own)
    assert math.isnan(losses_along_step(lambda: torch.zeros(()), [weights], [weights.clone()])[1])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_loss_along_the_step_is_that_of_its_batch_without_dropout(pretraining, look, tmp_path, precision):
    """In float32 also where the training has bf16."""
    net = pretraining.net(drop_rate=0.5)
    start = pretraining.net(drop_rate=0.5).eval()
    module = pretraining.module(net, total_steps=4, make_optimizer=sgd)
    [batch] = first_batches(pretraining, 1)
    pretraining.fit(look(sharpness=True), module=module, max_steps=1, precision=precision)
    found = records(tmp_path)[1]
    old = {name: value.clone() for name, value in start.state_dict().items()}
    for a in (-1, -0.5, 0, 0.5, 1):
        with torch.no_grad():
            moved = {n: w + a * (w - old[n]) for n, w in module.net.state_dict().items()}
            start.load_state_dict(moved)
            assert found[f"loss_at/{a}"] == pytest.approx(float(cross_entropy(start, batch)), rel=1e-5), a
    assert found["loss_at/0"] < found["loss_at/-0.5"] < found["loss_at/-1"]


def test_the_curvature_of_a_run_whose_loss_is_quadratic(pretraining, look, tmp_path):
    class Quadratic(LanguageModelingModule):
        def batch_loss(self, batch: Any) -> Tensor:
            return 1.5 * torch.stack([p.square().sum() for p in self.net.parameters()]).sum()

    module = pretraining.module(total_steps=4, make_optimizer=sgd)
    module.__class__ = Quadratic
    pretraining.fit(look(sharpness=True), module=module, gradient_clip_val=None)
    assert [record["curvature"] for record in records(tmp_path).values()] == pytest.approx([3] * 4, rel=1e-2)


# --- training does not notice ---------------------------------------------------------------------------


def outcome(pretraining: Any, module: Any) -> tuple[dict[int, float], dict[str, Tensor], Tensor]:
    losses = pretraining.column("train/loss") | {-1: pretraining.column("val/loss")[6]}
    return losses, module.net.state_dict(), torch.get_rng_state()


@pytest.mark.parametrize("kernel", ["sdpa", "blocked"])
def test_training_does_not_notice(pretraining, look, kernel):
    """With dropout, accumulation and recomputed blocks; afterwards also the random numbers are the same."""
    found = []
    for callbacks in ([], [look(sharpness=True)]):
        net = pretraining.net(drop_rate=0.2)
        net.recompute_blocks = True
        for block in net.blocks:
            block.attn.kernel = kernel
        module = pretraining.module(net, total_steps=6)
        pretraining.fit(*callbacks, module=module, accumulate_grad_batches=2)
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())
        assert all(part.training for part in net.modules())
        found.append(outcome(pretraining, module))
        (pretraining.folder / "metrics.csv").unlink()
    (losses, weights, random_state), (their_losses, their_weights, their_state) = found
    assert losses == their_losses
    assert [n for n, w in weights.items() if not w.equal(their_weights[n])] == []
    assert random_state.equal(their_state)


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_resumed_run_ends_with_the_same_bits_and_values(pretraining, tmp_path, stop):
    """Stopped before, at and after steps that are looked at."""

    def run(name: str, *, stop: int | None = None, resume: bool = False) -> Path:
        folder = tmp_path / name
        pretraining.folder = folder
        torch.manual_seed(99 if resume else 3)
        look = Diagnostics(path=folder / "diagnostics.png", every_n_steps=3, sharpness=True)
        last = LastCheckpoint(dirpath=str(folder))
        module = pretraining.module(pretraining.net(drop_rate=0.2), total_steps=7)
        path = (folder / "last.ckpt").resolve() if resume else None
        if not resume:
            torch.manual_seed(3)
        pretraining.fit(last, StopAtBoundary(stop_at_step=stop), look, module=module, resume=path)
        return folder

    whole = run("whole")
    with pytest.raises(RunStopped):
        run("parts", stop=stop)
    with (tmp_path / "parts/diagnostics.jsonl").open("a") as file:  # of steps after the last checkpoint
        file.write(json.dumps({"step": 6, "metrics": {"gradient_norm/head": -1.0}}) + "\n")
    parts = run("parts", resume=True)
    digests = [state_digest(read_checkpoint((each / "last.ckpt").resolve())) for each in (whole, parts)]
    assert digests[0] == digests[1]
    assert (whole / "diagnostics.jsonl").read_text() == (parts / "diagnostics.jsonl").read_text()
    assert list(records(parts)) == [1, 3, 6]
    assert (whole / "metrics.csv").read_text() == (parts / "metrics.csv").read_text()
    callbacks = read_checkpoint((parts / "last.ckpt").resolve())["callbacks"]
    assert not any("Diagnostics" in name for name in callbacks)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_values_reach_the_loggers_at_the_steps_looked_at(pretraining, look, tmp_path, accumulate):
    module = pretraining.module(total_steps=9)
    pretraining.fit(look(every_n_steps=4), module=module, accumulate_grad_batches=accumulate)
    found = records(tmp_path)
    assert (tmp_path / "diagnostics.jsonl").read_text().count("\n") == 3
    assert list(found) == [1, 4, 8]
    with (pretraining.folder / "metrics.csv").open(newline="") as file:
        rows = {int(row["step"]): row for row in csv.DictReader(file)}
    for step, values in found.items():
        assert rows[step]["train/loss"]
        logged = {
            name.removeprefix("diagnostics/"): float(value)
            for name, value in rows[step].items()
            if name.startswith("diagnostics/")
        }
        assert logged == values
    assert rows[5]["diagnostics/gradient_norm/head"] == ""
    assert not [name for name in rows[1] if name.startswith("diagnostics/loss_at")]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's compiler
def test_compiled_blocks_are_looked_at_as_they_are_and_not_compiled_again(pretraining, look, tmp_path):
    """Compiled by a back end that only counts; the values are those of a model that is not compiled."""
    compiled: list[int] = []

    def count(graph: Any, inputs: Any) -> Any:
        compiled.append(1)
        return graph.forward

    def run(*callbacks: L.Callback, compile: bool) -> dict[str, Tensor]:
        torch.compiler.reset()
        module = pretraining.module(pretraining.net(), total_steps=5, eval_every_n_steps=99)
        if compile:
            module.compiled = True
            for block in module.net.blocks:
                block.compile(backend=count)
        pretraining.fit(*callbacks, module=module)
        return module.net.state_dict()

    alone = run(compile=True)
    times = len(compiled)
    assert times > 0
    looked_at = run(look(every_n_steps=2, sharpness=True), compile=True)
    assert len(compiled) == 2 * times
    assert all(weight.equal(looked_at[name]) for name, weight in alone.items())
    values = records(tmp_path)
    (tmp_path / "diagnostics.jsonl").unlink()
    run(look(every_n_steps=2, sharpness=True), compile=False)
    for step, expected in records(tmp_path).items():
        assert values[step].keys() == expected.keys()
        assert "attention_entropy/block_01" in expected
        for name in expected.keys() - {"curvature"}:
            assert values[step][name] == pytest.approx(expected[name], rel=1e-3), name


# --- other models and tasks -----------------------------------------------------------------------------


class Recurrent(nn.Module):
    """Shares nothing with a GPT."""

    def __init__(self) -> None:
        super().__init__()
        self.vocab_size, self.context_length = 257, 16
        self.table = nn.Embedding(257, 12)
        self.rnn = nn.GRU(12, 12, batch_first=True)
        self.classify = nn.Linear(12, 257)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.rnn(self.table(tokens))
        logits: Tensor = self.classify(states)
        return logits


def test_of_another_class_the_children_are_the_layers(pretraining, look, tmp_path):
    torch.manual_seed(0)
    net: Any = Recurrent()
    [batch] = first_batches(pretraining, 1)
    by_hand = gradients(net, cross_entropy(net, batch))
    pretraining.fit(look(sharpness=True), module=pretraining.module(net, total_steps=4))
    found = records(tmp_path)[1]
    children = ("table", "rnn", "classify")
    assert [name for name in found if "/" in name and not name.startswith("loss_at")] == [
        *(f"gradient_norm/{child}" for child in children),
        *(f"update_ratio/{child}" for child in children),
    ]
    for child in children:
        assert found[f"gradient_norm/{child}"] == pytest.approx(norm_of(by_hand, (child,)), rel=1e-4)


def test_a_classifier(pretraining, look, tmp_path):
    draw = random.Random(0)
    texts = [
        {"text": draw.choice("xyz") * draw.randrange(1, 14) + label, "label": label}
        for label in draw.choices("ab", k=60)
    ]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    data = LabelledDataModule(
        corpus=LabelledFiles(path=str(tmp_path / "texts.jsonl")), tokenizer=BytesTokenizer(), max_length=16,
        batch_size=8,
    )  # fmt: skip
    data.load()
    module: Any = ClassificationModule(
        pretraining.net(), tokenizer=data.tokenizer, run_config={}, total_steps=2, eval_every_n_steps=9,
        make_optimizer=pretraining.optimizer, **data.module_settings(),
    )  # fmt: skip
    pretraining.fit(look(sharpness=True), module=module, data=data)
    found = records(tmp_path)[1]
    assert {f"gradient_norm/{layer}" for layer in LAYERS} <= found.keys()
    assert 0 < found["attention_evenness/block_00"] <= 1
    assert all(math.isfinite(value) for value in found.values())
    assert math.hypot(
        *(value for name, value in found.items() if name.startswith("gradient_norm/"))
    ) == pytest.approx(pretraining.column("train/grad_norm")[1], rel=1e-5)


@pytest.mark.parametrize("packing", [False, True])
def test_instructions(pretraining, look, tmp_path, packing):
    entries = [{"instruction": f"Add {n}.", "input": "", "output": "y" * (n % 9 + 1)} for n in range(40)]
    (tmp_path / "entries.json").write_text(json.dumps(entries))
    data = InstructionDataModule(
        corpus=InstructionFile(tmp_path / "entries.json"), tokenizer=BytesTokenizer(),
        template="{{ instruction }}", response_marker="\n> ", max_length=64, batch_size=4, packing=packing,
    )  # fmt: skip
    net = pretraining.net(context_length=64)
    module: Any = InstructionModule(
        net, tokenizer=data.tokenizer, make_optimizer=pretraining.optimizer, run_config={}, total_steps=2,
        eval_every_n_steps=9, **data.module_settings(),
    )  # fmt: skip
    pretraining.fit(look(sharpness=True), module=module, data=data, accumulate_grad_batches=2)
    for step, values in records(tmp_path).items():
        assert all(math.isfinite(value) for value in values.values())
        norms = [value for name, value in values.items() if name.startswith("gradient_norm/")]
        assert math.hypot(*norms) == pytest.approx(pretraining.column("train/grad_norm")[step], rel=1e-5)


def test_padding_at_the_end_is_no_text():
    tokens = torch.zeros(2, 9, dtype=torch.int64)
    targets = torch.tensor([[-100, 5, 5, -100, -100], [5] * 5])
    assert diagnostics._length(PackedBatch(tokens[:, :5], targets, None, 8), tokens[:, :5]) == 3
    assert diagnostics._length((tokens, tokens), tokens) == 9


# --- the picture, and what is refused -------------------------------------------------------------------


def test_the_picture_shows_layers_by_steps(pretraining, look, tmp_path):
    pretraining.fit(look(every_n_steps=2), module=pretraining.module(total_steps=4))
    assert (tmp_path / "diagnostics.png").is_file()
    found = records(tmp_path)
    figure = diagnostics_figure([{"step": step, "metrics": values} for step, values in found.items()])
    for axes, kind, count in zip(figure.axes, ("gradient_norm", "update_ratio"), (7, 6), strict=False):
        [image] = axes.images
        labels = [label.get_text() for label in axes.get_yticklabels()]
        assert len(labels) == count
        numbers = image.get_array()
        assert numbers is not None
        assert numbers.shape == (count, 3)
        for row, layer in enumerate(labels):
            assert numbers[row].tolist() == [values[f"{kind}/{layer}"] for values in found.values()]
        assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "4"]


@pytest.mark.usefixtures("with_pictures")
@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, 1.0])
def test_numbers_that_have_no_logarithm_are_drawn_too(tmp_path, value):
    metrics = {"gradient_norm/head": value, "gradient_norm/embeddings": 1.0, "update_ratio/head": value}
    figure = diagnostics_figure([{"step": 1, "metrics": metrics}])
    figure.savefig(tmp_path / "a.png", dpi=20)


def test_a_run_that_fails_is_drawn(pretraining, look, tmp_path):
    path = tmp_path / "diagnostics.jsonl"

    class Failing(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            if path.exists() and path.read_text().count("\n") == 2:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pretraining.fit(look(), Failing(), module=pretraining.module(total_steps=9))
    assert (tmp_path / "diagnostics.png").is_file()
    assert list(records(tmp_path)) == [1, 2]


@pytest.mark.parametrize("every", [0, -3])
def test_no_steps_are_refused(look, every):
    with pytest.raises(
        InputError, match=rf"^callbacks\.diagnostics\.every_n_steps must be positive, got {every}$"
    ):
        look(every_n_steps=every)


def test_a_sharded_model_is_refused_before_training(pretraining, look, tmp_path, monkeypatch):
    """The strategy stands for one that shards."""
    strategy = L.pytorch.strategies.SingleDeviceStrategy(device=torch.device("cpu"))
    monkeypatch.setattr(diagnostics, "FullyShardedStrategy", type(strategy))
    with pytest.raises(InputError, match=r"trainer\.strategy=fsdp divides: use trainer=ddp, or leave it out"):
        pretraining.fit(look(), module=pretraining.module(total_steps=4), strategy=strategy)
    assert not (tmp_path / "diagnostics.jsonl").exists()
