"""What a training step of the default run costs: the book's loop, a bare loop, and gptpl under Lightning.

The three take turns, step by step, in one process, so that a machine whose speed drifts slows all of them:

- `book`: the model and loop of "Build a Large Language Model (From Scratch)", fp32 (llms-from-scratch,
  `pip install --no-deps llms-from-scratch`; left out where it is missing);
- `bare`: gptpl's model in a plain PyTorch loop that does the same work as gptpl: same batches, precision,
  optimizer, clipping, schedule, and the loss read every step;
- `gptpl`: the LightningModule under the Trainer that `gptpl train` builds, with loggers and callbacks.

    python experiments/train_step/benchmark.py [--steps 20] [--compile] [--output result.json]
"""

import argparse
import importlib.util
import itertools
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from gptpl.callbacks.learning_rate import LearningRate
from gptpl.callbacks.throughput import Throughput
from gptpl.cli.schema import TrainerConf
from gptpl.cli.trainer import build_trainer
from gptpl.data.corpora import Tale
from gptpl.data.datamodule import TextDataModule
from gptpl.data.tokenizers import GPT2Tokenizer
from gptpl.model import GPTConfig, GPTModel
from gptpl.training.language_model import LanguageModelingModule
from gptpl.training.loggers import MetricsCSVLogger, RunTensorBoardLogger
from gptpl.training.loss import next_token_loss
from gptpl.training.optimizers import adamw
from gptpl.training.precision import choose_precision
from gptpl.training.schedules import CosineSchedule

BOOK_WIDTH = 768
BOOK = {
    "vocab_size": 50257, "context_length": 256, "emb_dim": BOOK_WIDTH, "n_heads": 12, "n_layers": 12,
    "drop_rate": 0.1, "qkv_bias": False,
}  # fmt: skip
LR, WARMUP_STEPS = 4e-4, 2
Step = Callable[[], None]


def main() -> None:
    """Measures and prints; writes the record where one is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each (default 20)")
    parser.add_argument("--compile", action="store_true", help="compile gptpl's model, in both loops")
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    result = measure(options.steps, compiled=options.compile)
    print(report(result))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


# --- the three loops ------------------------------------------------------------------------------------


def batches(data: TextDataModule) -> Iterator[tuple[Tensor, Tensor]]:
    """The datamodule's training batches without end."""
    return itertools.chain.from_iterable(data.train_dataloader() for _ in itertools.count())


def book_step(data: TextDataModule) -> Step:
    """One step of the book's training loop (chapter 5), in fp32."""
    from llms_from_scratch.ch04 import GPTModel as BookModel

    torch.manual_seed(123)
    model: nn.Module = BookModel(BOOK).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.1)
    stream = batches(data)

    def step() -> None:
        inputs, targets = next(stream)
        optimizer.zero_grad()
        logits = model(inputs)
        nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        optimizer.step()

    return step


def lr_factor(step: int, total_steps: int) -> float:
    """The default run's schedule."""
    return CosineSchedule(warmup_steps=WARMUP_STEPS, min_lr=1e-6).factor(
        step, total_steps=total_steps, peak_lr=LR
    )


def make_optimizer(net: nn.Module) -> torch.optim.Optimizer:
    """The default run's optimizer."""
    return adamw(net, lr=LR, weight_decay=0.1, betas=(0.9, 0.999), eps=1e-8, decay="matrices")


def bare_step(data: TextDataModule, *, precision: str, total_steps: int, compiled: bool) -> Step:
    """One step of gptpl's work without Lightning."""
    torch.manual_seed(123)
    net = GPTModel(GPTConfig(**BOOK)).train()
    if compiled:
        net.compile()
    optimizer = make_optimizer(net)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(lr_factor, total_steps=total_steps))
    stream = batches(data)

    def context() -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else nullcontext()

    def step() -> None:
        inputs, targets = next(stream)
        with context():
            loss = next_token_loss(net(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        loss.item()

    return step


class Turns(L.Callback):
    """Times Lightning's steps, and lets the other loops take theirs after each."""

    def __init__(self, others: dict[str, Step], warmup: int) -> None:
        self.others = others
        self.warmup = warmup
        self.seconds: dict[str, list[float]] = {name: [] for name in ("gptpl", *others)}
        self._left_seconds: float | None = None

    def on_train_batch_end(self, *args: Any) -> None:
        """One Lightning step has ended: from leaving this hook the last time until now."""
        now = time.perf_counter()
        if self._left_seconds is not None:
            self.seconds["gptpl"].append(now - self._left_seconds)
        for name, step in self.others.items():
            started = time.perf_counter()
            step()
            self.seconds[name].append(time.perf_counter() - started)
        self._left_seconds = time.perf_counter()

    def timed(self) -> dict[str, list[float]]:
        """Seconds of every step after the warm-up."""
        return {name: seconds[self.warmup :] for name, seconds in self.seconds.items()}


# --- measuring ------------------------------------------------------------------------------------------


def measure(steps: int, *, compiled: bool, warmup: int = 3) -> dict[str, Any]:
    """Seconds of every timed step of every loop, and what the data loader alone takes a batch."""
    precision = choose_precision("cpu").precision
    data = TextDataModule(
        corpus=Tale(), tokenizer=GPT2Tokenizer(), max_length=256, stride=256, batch_size=2
    )  # fmt: skip
    data.load()
    total_steps = steps + warmup + 2
    others: dict[str, Step] = {
        "bare": bare_step(data, precision=precision, total_steps=total_steps, compiled=compiled)
    }
    if importlib.util.find_spec("llms_from_scratch"):
        others["book"] = book_step(data)
    turns = Turns(others, warmup)
    with tempfile.TemporaryDirectory() as folder:
        train_under_lightning(data, turns, folder, precision=precision, steps=total_steps, compiled=compiled)
    return {
        "torch": torch.__version__,
        "lightning": L.__version__,
        "cpu_threads": torch.get_num_threads(),
        "precision": precision,
        "compiled": compiled,
        "tokens_per_step": 512,
        "seconds": turns.timed(),
        "loader_seconds_per_batch": loader_seconds(data),
        "matrix_product_seconds": {
            "bf16": matrix_product_seconds(torch.bfloat16),
            "fp32": matrix_product_seconds(torch.float32),
        },
    }


def train_under_lightning(
    data: TextDataModule, turns: Turns, folder: str, *, precision: str, steps: int, compiled: bool
) -> None:
    """The default run's training with its loggers and the callbacks that work at every step."""
    torch.manual_seed(123)
    net = GPTModel(GPTConfig(**BOOK))
    if compiled:
        net.compile()
    module = LanguageModelingModule(
        net,
        tokenizer=data.tokenizer,
        make_optimizer=make_optimizer,
        lr_factor=partial(lr_factor, total_steps=steps),
        total_steps=steps,
        run_config={},
        eval_every_n_steps=10 * steps,
    )
    trainer = build_trainer(
        TrainerConf(accelerator="cpu", devices=1, max_epochs=None, max_steps=steps),
        precision=precision,
        eval_every_n_steps=10 * steps,
        deterministic=False,
        callbacks=[Throughput(), LearningRate(), turns],
        logger=[RunTensorBoardLogger(save_dir=folder), MetricsCSVLogger(save_dir=folder)],
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        limit_val_batches=0,
    )
    trainer.fit(module, datamodule=data)


def loader_seconds(data: TextDataModule, epochs: int = 20) -> float:
    """Mean seconds of the training loader for one batch."""
    started, count = time.perf_counter(), 0
    for _ in range(epochs):
        count += sum(1 for _ in data.train_dataloader())
    return (time.perf_counter() - started) / count


def matrix_product_seconds(dtype: torch.dtype) -> float:
    """Seconds that the matrix products of one step take alone: no step can be faster.

    Each linear layer costs three products of the same size: the output, the gradient of its input and the
    gradient of its weight. Attention's own products, a tenth of these, are left out.
    """
    rows, width = 512, BOOK_WIDTH  # 2 x 256 tokens
    layers = {(3 * width, width): 12, (width, width): 12, (4 * width, width): 12, (width, 4 * width): 12}
    total = 0.0
    for (outputs, inputs), count in {**layers, (50257, width): 1}.items():
        x = torch.randn(rows, inputs).to(dtype)
        weight, grad = torch.randn(outputs, inputs).to(dtype), torch.randn(rows, outputs).to(dtype)
        pairs = ((x, weight.t()), (grad, weight), (grad.t(), x))
        total += count * sum(median_seconds(partial(torch.mm, *pair)) for pair in pairs)
    return total


def median_seconds(call: Callable[[], object], repeats: int = 5) -> float:
    """Median time of a call, after two that warm up."""
    seconds = []
    for _ in range(repeats + 2):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:])


def report(result: dict[str, Any]) -> str:
    """The figures as a Markdown table, with the ratios that matter."""
    tokens = result["tokens_per_step"]
    lines = [
        f"torch {result['torch']}, {result['cpu_threads']} threads, {result['precision']}"
        f"{', compiled' if result['compiled'] else ''}; batch 2 x 256, dropout 0.1",
        "",
        "| loop | seconds a step: median (min - max) | tokens/s |",
        "|---|---|---|",
    ]
    for name, seconds in result["seconds"].items():
        middle = statistics.median(seconds)
        lines.append(
            f"| {name} | {middle:.3f} ({min(seconds):.3f} - {max(seconds):.3f}) | {tokens / middle:.0f} |"
        )
    lines.append("")
    own = result["seconds"]["gptpl"]
    for name, seconds in result["seconds"].items():
        if name != "gptpl":
            ratios = [other / mine for mine, other in zip(own, seconds, strict=False)]
            lines.append(f"{name} / gptpl, step by step: median {statistics.median(ratios):.3f}")
    share = result["loader_seconds_per_batch"] / statistics.median(own)
    lines.append(
        f"data loader: {result['loader_seconds_per_batch'] * 1e6:.0f} us a batch, {share:.3%} of a step"
    )
    floor = result["matrix_product_seconds"]
    lines.append(f"matrix products of a step alone: bf16 {floor['bf16']:.2f} s, fp32 {floor['fp32']:.2f} s")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
