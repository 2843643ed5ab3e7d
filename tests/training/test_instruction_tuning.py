"""Instruction tuning against a plain PyTorch loop, masked targets, packing, several ranks, and a resume."""

# B rows of a batch, T time

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptpl.callbacks.checkpoints import LastCheckpoint
from gptpl.callbacks.samples import SampleResponses
from gptpl.callbacks.stopping import RunStopped, StopAtBoundary
from gptpl.checkpoints.format import read_checkpoint
from gptpl.checkpoints.loading import load_model
from gptpl.checkpoints.resume_state import state_digest
from gptpl.data.instructions.datamodule import InstructionDataModule
from gptpl.data.sampler import EpochSampler
from gptpl.data.sources import InstructionFile
from gptpl.model import GPTModel
from gptpl.model.loss import IGNORED_TARGET
from gptpl.tokenizers import BytesTokenizer
from gptpl.training.instruction_tuning import InstructionModule

EOT = 256


def plain_adamw(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=5e-3, weight_decay=0.1)


class Tuning:
    """Runs on 40 entries of which 34 are trained on, in batches of 4: 8 an epoch."""

    def __init__(self, pretraining: Any, folder: Path) -> None:
        self.pretraining = pretraining
        draw = random.Random(2)
        self.entries = [
            {"instruction": f"Add {n} to it.", "input": "", "output": "y" * draw.randrange(1, 12)}
            for n in range(40)
        ]
        self.path = folder / "entries.json"
        self.path.write_text(json.dumps(self.entries))

    def net(self, **changes: Any) -> GPTModel:
        net: GPTModel = self.pretraining.net(context_length=96, **changes)
        return net

    def data(self, **changes: Any) -> InstructionDataModule:
        settings: dict[str, Any] = {
            "corpus": InstructionFile(self.path),
            "tokenizer": BytesTokenizer(),
            "template": "{{ instruction }}",
            "response_marker": "\n> ",
            "max_length": 32,
            "batch_size": 4,
            "eval_train_batches": None,
            "eval_val_batches": None,
        }
        return InstructionDataModule(**(settings | changes))

    def module(self, net: GPTModel | None = None, **changes: Any) -> InstructionModule:
        settings: dict[str, Any] = {
            "tokenizer": BytesTokenizer(),
            "make_optimizer": plain_adamw,
            "lr_factor": lambda step: 1.0,
            "total_steps": 20,
            "run_config": {},
            "eval_every_n_steps": 10,
            **self.data().module_settings(),
        }
        net = self.net() if net is None else net
        return InstructionModule(net, **(settings | changes))


@pytest.fixture
def tuning(pretraining, tmp_path: Path) -> Tuning:
    return Tuning(pretraining, tmp_path)


def books_batch(entries: list[dict[str, str]], *, masked: bool) -> tuple[Tensor, Tensor]:
    """Inputs and targets as the book collates them; `masked`: without the targets of the prompts."""
    texts = [list(f"{entry['instruction']}\n> {entry['output']}".encode()) for entry in entries]
    longest = max(len(text) + 1 for text in texts)
    inputs, targets = [], []
    for entry, text in zip(entries, texts, strict=True):
        padded = torch.tensor(text + [EOT] * (longest - len(text)))
        aims = padded[1:].clone()
        aims[len(text) :] = -100
        if masked:
            aims[: len(entry["instruction"]) + 2] = -100
        inputs.append(padded[:-1])
        targets.append(aims)
    return torch.stack(inputs), torch.stack(targets)


def plain_losses(tuning: Tuning, net: GPTModel, *, masked: bool) -> list[float]:
    optimizer = plain_adamw(net)
    sampler = EpochSampler(34, batch_size=4, seed=123)
    losses: list[float] = []
    epoch = 0
    while True:
        sampler.set_epoch(epoch)
        order = list(sampler)
        for start in range(0, len(order), 4):
            if len(losses) == 20:
                return losses
            inputs, targets = books_batch(
                [tuning.entries[number] for number in order[start : start + 4]], masked=masked
            )
            loss = F.cross_entropy(net(inputs).flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        epoch += 1


@pytest.mark.parametrize(("head", "masked"), [("plain", False), ("fused", True)])
def test_twenty_steps_equal_a_plain_loop(tuning, head, masked):
    module = tuning.module(head=head)
    tuning.pretraining.fit(module=module, data=tuning.data(mask_instruction=masked), gradient_clip_val=None)
    ours = tuning.pretraining.column("train/loss")
    plain = tuning.net()
    expected = plain_losses(tuning, plain, masked=masked)
    assert [ours[step] for step in range(1, 21)] == pytest.approx(expected, rel=2e-4)
    assert expected[-1] < expected[0] / 2


@pytest.mark.parametrize("head", ["plain", "fused"])
def test_a_step_is_the_same_however_it_is_divided(tuning, head):
    """Into micro-batches with different numbers of targets, in the 8 steps of the first epoch."""
    weights, losses = [], []
    for size in (4, 1):
        module = tuning.module(head=head, total_steps=8)
        tuning.pretraining.fit(
            module=module,
            data=tuning.data(mask_instruction=True, batch_size=size),
            accumulate_grad_batches=4 // size,
            gradient_clip_val=1.0,
        )
        weights.append([parameter.detach().clone() for parameter in module.net.parameters()])
        losses.append(tuning.pretraining.column("train/loss"))
    for other, found in zip(weights[1:], losses[1:], strict=True):
        for ours, theirs in zip(weights[0], other, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
        assert found == pytest.approx(losses[0], abs=1e-4)


def test_masked_targets_carry_no_gradient(tuning):
    """Whatever the target at a masked place would be: no number of any gradient changes."""
    data = tuning.data(mask_instruction=True)
    batch = next(iter(data.train_dataloader()))
    gradients = []
    for changed in (False, True):
        module = tuning.module()
        hidden = module.net.hidden(batch.inputs)
        hidden.retain_grad()
        loss = F.cross_entropy(
            module.net.out_head(hidden).flatten(0, 1), batch.targets.flatten(), reduction="sum"
        )
        loss.backward()
        masked = batch.targets == -100
        assert (hidden.grad[masked] == 0).all()
        assert (hidden.grad[~masked] != 0).any(-1).all()
        inputs = batch.inputs.clone()
        if changed:
            inputs[inputs == EOT] = 7  # padding, all of it: no entry holds the token itself
        module = tuning.module()
        module.batch_loss(batch._replace(inputs=inputs)).backward()
        gradients.append([p.grad.clone() for p in module.net.parameters() if p.grad is not None])
    for before, after in zip(*gradients, strict=True):
        # The embedding of the other padding token is looked up, and its gradient is zero.
        torch.testing.assert_close(before, after, rtol=0, atol=1e-8)


@pytest.mark.parametrize("head", ["plain", "fused"])
def test_packed_loss_is_the_mean_over_all_tokens(tuning, head):
    rows = tuning.data().encoded("train").rows
    data = tuning.data(packing=True, max_length=96, batch_size=1)
    module = tuning.module(head=head)
    packed = list(data.train_dataloader())
    assert len(packed) < len(rows)
    sums = torch.zeros(2, dtype=torch.float64)
    for batch in packed:
        count = int((batch.targets != -100).sum())
        sums += torch.tensor([module.batch_loss(batch).item() * count, count])
    apart = torch.zeros(2, dtype=torch.float64)
    for row in rows:
        logits = module.net(torch.from_numpy(row.inputs)[None])[0]
        total = F.cross_entropy(logits, torch.from_numpy(row.targets), reduction="sum")
        apart += torch.tensor([total.item(), len(row)])
    assert sums[1] == apart[1] == data.train_tokens
    assert (sums[0] / sums[1]).item() == pytest.approx((apart[0] / apart[1]).item(), rel=1e-6)
    assert sum(module.tokens_in(batch) for batch in packed) == data.train_tokens


def by_hand(tuning: Tuning, net: GPTModel, entries: list[dict[str, str]]) -> tuple[float, float]:
    """Mean loss and share of best guesses over the answers of the entries, one by one."""
    total = correct = count = 0.0
    for entry in entries:
        inputs, targets = books_batch([entry], masked=True)
        logits = net(inputs)[0]
        kept = targets[0] != -100
        total += F.cross_entropy(logits[kept], targets[0][kept], reduction="sum").item()
        correct += (logits[kept].argmax(-1) == targets[0][kept]).sum().item()
        count += kept.sum().item()
    return total / count, correct / count


@pytest.mark.parametrize("packing", [False, True])
def test_metrics_are_means_over_the_targets(tuning, packing):
    module = tuning.module(total_steps=10)
    data = tuning.data(mask_instruction=True, packing=packing, max_length=96, batch_size=2)
    tuning.pretraining.fit(module=module, data=data)
    logged = {name: tuning.pretraining.column(name)[10] for name in METRICS}
    # The last share of the file is for validation, the one before it for tests.
    loss, accuracy = by_hand(tuning, module.net.eval(), tuning.entries[38:])
    assert logged["val/loss"] == pytest.approx(loss, rel=1e-5)
    assert logged["val/token_accuracy"] == pytest.approx(accuracy)
    assert logged["val/perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    if not packing:
        assert logged["eval/train_loss"] == pytest.approx(
            by_hand(tuning, module.net, tuning.entries[:34])[0], rel=1e-5
        )


METRICS = ("eval/train_loss", "val/loss", "val/perplexity", "val/token_accuracy")


def test_padding_rows_of_other_ranks_change_no_metric(tuning):
    module = tuning.module()
    module.net.eval()

    def metrics(world_size: int) -> dict[str, float]:
        sums: dict[str, Any] = {}
        for rank in range(world_size):
            data = tuning.data()
            data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)
            for batch in data.val_dataloader()[1]:
                found = module.evaluation_sums(batch)["loss"]
                sums["loss"] = sums["loss"] + found if sums else found
        return module.evaluation_metrics({"val": sums})

    assert metrics(3) == pytest.approx(metrics(1), rel=1e-6)  # 2 entries, the third rank has padding alone


def test_tokens_and_loss_of_a_step_are_those_of_both_ranks(tuning, monkeypatch):
    """Their batches differ: the other rank's has 7 tokens and 3 targets more, and a loss 1 higher."""
    module = tuning.module()
    batch = next(iter(tuning.data().train_dataloader()))
    module._trainer = SimpleNamespace(world_size=2, accumulate_grad_batches=1)
    targets = int((batch.targets != IGNORED_TARGET).sum())

    def all_reduce(sums: Tensor) -> None:
        loss = sums[1] / targets
        assert sums[0] == targets
        sums += torch.stack([sums[0] + 3, (loss + 1) * (targets + 3), sums[2] + 7])

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    loss = module.training_step(batch, 0) * 1024 / targets
    module.on_before_optimizer_step(module.optimizers)
    assert module.tokens_seen == 2 * batch.tokens + 7
    expected = (loss * targets + (loss + 1) * (targets + 3)) / (2 * targets + 3)
    torch.testing.assert_close(module._step_loss, expected.detach())


def test_the_checkpoint_keeps_the_template(tuning, tmp_path):
    tuning.pretraining.fit(
        LastCheckpoint(dirpath=str(tmp_path / "checkpoints")),
        module=tuning.module(total_steps=2),
        data=tuning.data(),
    )
    loaded = load_model(tmp_path / "checkpoints/last.ckpt")
    assert loaded.task == {
        "name": "instruct",
        "template": {"name": "own", "source": "{{ instruction }}", "response_marker": "\n> "},
    }


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_run_ends_with_the_same_bits(tuning, tmp_path):
    """Packed and with dropout, 4 steps an epoch: stopped in the first epoch, between two, in the second."""

    def run(name: str, *, stop: int | None = None, resume: bool = False) -> dict[str, Any]:
        folder = tmp_path / name
        torch.manual_seed(1 if not resume else 99)
        module = tuning.module(tuning.net(drop_rate=0.2), total_steps=9, eval_every_n_steps=3)
        callbacks = [
            LastCheckpoint(dirpath=str(folder / "checkpoints"), keep=99),
            StopAtBoundary(stop_at_step=stop),
            SampleResponses(path=folder / "samples.jsonl", entries=2, max_new_tokens=4, every_n_steps=4),
        ]
        last = folder / "checkpoints/last.ckpt"
        try:
            tuning.pretraining.fit(
                *callbacks,
                module=module,
                data=tuning.data(packing=True, max_length=96, batch_size=2),
                resume=last.resolve() if resume else None,
            )
        except RunStopped:
            assert stop
        samples = folder / "samples.jsonl"
        return {
            "state": state_digest(read_checkpoint(last.resolve())),
            "samples": samples.read_text() if samples.exists() else "",
            "csv": (tuning.pretraining.folder / "metrics.csv").read_text(),
        }

    straight = run("straight")
    assert straight["samples"].count("\n") == 2 * 3  # after both epochs and at the end
    (tuning.pretraining.folder / "metrics.csv").unlink()
    for stop in (2, 4, 6):
        run("broken", stop=stop, resume=stop > 2)
        with (tmp_path / "broken/samples.jsonl").open("a") as file:  # as of a run that went further
            file.write(json.dumps({"step": 99, "prompt": "x"}) + "\n")
    assert run("broken", resume=True) == straight
