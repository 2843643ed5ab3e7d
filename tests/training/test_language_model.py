"""A Lightning run against a bare PyTorch loop on the same batches, and what is logged where."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gptpl.data.pretraining.datamodule import TextDataModule
from gptpl.model import GPTModel

Batch = tuple[Tensor, Tensor]
STEPS = 20


@dataclass
class Step:
    """What one optimizer step of the bare loop saw."""

    loss: float
    lr: float
    grad_norm: float
    tokens_seen: int


def steps_of(data: TextDataModule, accumulate: int) -> Iterator[list[Batch]]:
    """The micro-batches of each optimizer step, epoch after epoch; an epoch's last step may have fewer."""
    loader, epoch = data.train_dataloader(), 0
    while True:
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        batches = list(loader)
        yield from (batches[i : i + accumulate] for i in range(0, len(batches), accumulate))
        epoch += 1


def cosine_rate(step: int, *, peak: float, warmup: int, floor: float) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    angle = math.pi * (step - warmup) / (STEPS - 1 - warmup)
    return floor + (peak - floor) * (1 + math.cos(angle)) / 2


def bare_loop(
    net: GPTModel,
    data: TextDataModule,
    *,
    peak: float,
    warmup: int,
    floor: float,
    accumulate: int = 1,
    clip: float = 1.0,
) -> list[Step]:
    """Plain PyTorch: AdamW with decay on matrices, unfused, warm-up and cosine written out, clipping."""
    decayed = [p for name, p in net.named_parameters() if name.endswith("weight") and "norm" not in name]
    spared = [p for name, p in net.named_parameters() if name.endswith("bias") or "norm" in name]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.999), eps=1e-8, foreach=False)
    record: list[Step] = []
    tokens_seen = 0
    for step, micro_batches in zip(range(STEPS), steps_of(data, accumulate), strict=False):
        rate = cosine_rate(step, peak=peak, warmup=warmup, floor=floor)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        losses = [F.cross_entropy(net(x).transpose(1, 2), y) for x, y in micro_batches]
        loss = sum(losses, torch.zeros(())) / len(losses)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        tokens_seen += sum(x.numel() for x, _ in micro_batches)
        record.append(Step(loss=loss.item(), lr=rate, grad_norm=norm.item(), tokens_seen=tokens_seen))
    return record


@pytest.fixture
def bare(pretraining):
    """Runs the bare loop on the weights and batches of `pretraining`, in training mode, without dropout."""

    def run(net: GPTModel | None = None, **options: Any) -> list[Step]:
        net = pretraining.net() if net is None else net
        return bare_loop(net, pretraining.data(), peak=pretraining.lr, warmup=3, floor=1e-4, **options)

    return run


def close(rows: dict[int, float], expected: list[float], tolerance: float) -> bool:
    """Whether the rows are those of steps 1, 2, ... and hold the expected values."""
    assert list(rows) == list(range(1, len(expected) + 1))
    return list(rows.values()) == pytest.approx(expected, abs=tolerance)


# --- training -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_a_run_equals_a_bare_loop(pretraining, bare, accumulate):
    """In every loss, and in the weights at the end; 15 batches an epoch leave a short step at its end."""
    module = pretraining.module()
    pretraining.fit(module=module, accumulate_grad_batches=accumulate)
    net = pretraining.net()
    record = bare(net, accumulate=accumulate)
    assert record[0].loss - record[-1].loss > 1  # the two agree about a model that learns
    assert close(pretraining.column("train/loss"), [step.loss for step in record], 1e-5)
    for ours, theirs in zip(module.net.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_is_logged_at_every_step(pretraining, bare, accumulate):
    pretraining.fit(accumulate_grad_batches=accumulate)
    record = bare(accumulate=accumulate)
    assert max(step.grad_norm for step in record) > 1  # or clipping would go unseen
    assert close(pretraining.column("train/grad_norm"), [step.grad_norm for step in record], 1e-4)
    assert close(pretraining.column("train/tokens_seen"), [step.tokens_seen for step in record], 0)
    perplexities = [math.exp(step.loss) for step in record]
    assert close(pretraining.column("train/perplexity"), perplexities, 2e-3)


def test_without_clipping_the_norm_is_measured_and_the_gradient_left_alone(pretraining, bare):
    pretraining.fit(gradient_clip_val=None)
    record = bare(clip=math.inf)
    assert close(pretraining.column("train/loss"), [step.loss for step in record], 1e-5)
    assert close(pretraining.column("train/grad_norm"), [step.grad_norm for step in record], 1e-4)


def test_fp16_clips_the_gradient_and_not_its_scaled_copy(pretraining, bare):
    """Fused AdamW undoes the loss scale in its step, after clipping: a norm of 3 must not look like 3,000."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    pretraining.fit(plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    record = bare()
    norms = pretraining.column("train/grad_norm")
    assert norms[1] == pytest.approx(record[0].grad_norm, rel=0.02)
    assert close(pretraining.column("train/loss"), [step.loss for step in record], 0.05)


# --- evaluation -----------------------------------------------------------------------------------------


def mean_loss(net: GPTModel, batches: Any) -> float:
    """Over all targets of all batches, which differ in size, in double precision."""
    net.eval().double()
    with torch.no_grad():
        losses = [F.cross_entropy(net(x).transpose(1, 2), y, reduction="none").flatten() for x, y in batches]
    return torch.cat(losses).mean().item()


def test_evaluations_stand_at_their_steps_with_the_exact_means(pretraining):
    """Before the first step, every 3 steps, and after the last; over batches of unequal size."""
    module = pretraining.module()
    pretraining.fit(module=module)
    evaluated = [0, 3, 6, 9, 12, 15, 18, 20]
    for name in ("val/loss", "val/perplexity", "eval/train_loss"):
        assert list(pretraining.column(name)) == evaluated
    train_batches, val_batches = (list(loader) for loader in pretraining.data().val_dataloader())
    assert len({len(x) for x, _ in val_batches}) == 2
    for step, net in ((0, pretraining.net()), (STEPS, module.net)):
        loss = mean_loss(net, val_batches)
        assert pretraining.column("val/loss")[step] == pytest.approx(loss, abs=1e-5)
        assert pretraining.column("val/perplexity")[step] == pytest.approx(math.exp(loss), rel=1e-5)
        targets = torch.cat([y.flatten() for _, y in val_batches])
        size = len(pretraining.data().tokenizer.decode(targets.tolist()).encode())
        bits = loss * len(targets) / math.log(2) / size
        assert pretraining.column("val/bits_per_byte")[step] == pytest.approx(bits, rel=1e-5)
        train_loss = mean_loss(net, train_batches)
        assert pretraining.column("eval/train_loss")[step] == pytest.approx(train_loss, abs=1e-5)


def test_ignored_targets_count_in_no_mean(pretraining):
    module = pretraining.module()
    trainer = pretraining.trainer(logger=False)
    inputs, targets = next(iter(pretraining.data().val_dataloader()[1]))
    masked = targets.clone()
    masked[:, 3:] = -100
    batches = [[(inputs, targets)], [(inputs, targets), (inputs, masked)]]
    loaders: list[DataLoader[Any]] = [DataLoader(loader, batch_size=None) for loader in batches]  # type: ignore[arg-type]
    trainer.validate(module, loaders, verbose=False)
    logits = module.net.eval()(inputs).detach()
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    expected = torch.cat([losses.flatten(), losses[:, :3].flatten()]).mean()
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx(expected.item(), abs=1e-5)
    assert trainer.callback_metrics["eval/train_loss"].item() == pytest.approx(losses.mean().item(), abs=1e-5)


def test_evaluation_changes_no_bit_of_training(pretraining):
    """With dropout: neither the random numbers nor the order of the batches feel it."""

    def losses(**options: Any) -> tuple[dict[int, float], list[Tensor]]:
        (pretraining.folder / "metrics.csv").unlink(missing_ok=True)
        module = pretraining.module(pretraining.net(drop_rate=0.1))
        pretraining.fit(module=module, **options)
        return pretraining.column("train/loss"), [p.detach() for p in module.net.parameters()]

    with_losses, with_weights = losses(val_check_interval=3)
    without_losses, without_weights = losses(limit_val_batches=0, num_sanity_val_steps=0)
    assert with_losses == without_losses
    assert all(a.equal(b) for a, b in zip(with_weights, without_weights, strict=True))


def test_training_draws_dropout_and_evaluation_does_not(pretraining):
    module = pretraining.module(pretraining.net(drop_rate=0.5))
    pretraining.fit(module=module)
    first = next(steps_of(pretraining.data(), 1))
    undropped = mean_loss(pretraining.net(), first)
    assert abs(pretraining.column("train/loss")[1] - undropped) > 1e-3
    val_batches = list(pretraining.data().val_dataloader()[1])
    assert pretraining.column("val/loss")[0] == pytest.approx(
        mean_loss(pretraining.net(), val_batches), abs=1e-5
    )


def test_the_run_ends_at_the_planned_step_and_evaluates_it(pretraining):
    """Even where the Trainer itself knows no such limit and the step is off the interval."""
    trainer = pretraining.fit(module=pretraining.module(total_steps=7), max_steps=-1, max_epochs=5)
    assert trainer.global_step == 7
    assert list(pretraining.column("val/loss")) == [0, 3, 6, 7]
