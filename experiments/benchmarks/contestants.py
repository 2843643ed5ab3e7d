"""The training loops that are compared, each in a process of its own that takes a step when it is told to.

    python contestants.py NAME TOKENS.npy BATCH CONTEXT DROPOUT [SIZE]

Every loop trains the same GPT-2 (tied, biases; 124M unless a size is given) on the same random sequences with
AdamW and gradients clipped to 1, and reads its loss at every step. The process answers every line on its
standard input with one JSON object: the seconds of a step and what is known of its parts.
"""

import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

STARTED = time.perf_counter()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
V, C = 50257, 1024
LR, DECAY = 6e-4, 0.1
WARMUP = 3


@dataclass(frozen=True)
class Size:
    """Width, blocks and heads of a GPT-2."""

    D: int
    L: int
    H: int


SIZES = {
    "124M": Size(768, 12, 12),
    "355M": Size(1024, 24, 16),
    "774M": Size(1280, 36, 20),
    "1558M": Size(1600, 48, 25),
}


class Turns:
    """Ends a step: answers the line that asked for it, and waits for the next one."""

    def __init__(self) -> None:
        self.steps = 0
        self.first_seconds = 0.0
        self._began: float | None = None

    def done(self, loss: float, parts: dict[str, float] | None = None) -> None:
        """A step has ended; returns when the next may begin."""
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.steps += 1
        if self.steps == 1:
            self.first_seconds = now - STARTED
        if self.steps == WARMUP:
            say({"ready": True, "first_step_seconds": self.first_seconds})
        elif self.steps > WARMUP:
            assert self._began is not None
            answer = {"seconds": now - self._began, "loss": loss, "peak_mb": peak_mb()}
            say(answer | {"parts": parts or {}})
        if self.steps >= WARMUP and not sys.stdin.readline():
            sys.exit(0)
        self._began = time.perf_counter()


def peak_mb() -> float:
    """Most memory of the device that the process has held; on a CPU all that it has held."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_reserved() / 2**20
    # ru_maxrss would begin with the size of the parent process.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def say(answer: dict[str, Any]) -> None:
    """One JSON object on standard output, where nothing else is written."""
    print(json.dumps(answer), file=OUT, flush=True)


@dataclass(frozen=True)
class Work:
    """What every loop trains on."""

    path: Path
    batch: int
    context: int
    dropout: float
    size: Size = SIZES["124M"]

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Windows at random places, without end, the same ones for everybody."""
        tokens = np.load(self.path, mmap_mode="r")
        draw = np.random.default_rng(0)
        while True:
            starts = draw.integers(0, len(tokens) - self.context - 1, self.batch)
            rows = np.stack([tokens[s : s + self.context + 1] for s in starts]).astype(np.int64)
            both = torch.from_numpy(rows).to(DEVICE)
            yield both[:, :-1].contiguous(), both[:, 1:].contiguous()


# --- gptpl ------------------------------------------------------------------------------------------------


def gptpl(work: Work, turns: Turns) -> None:
    """What `gptpl train` runs: Lightning, loggers and callbacks included."""
    import lightning as L_

    from gptpl import compose
    from gptpl.callbacks.learning_rate import LearningRate
    from gptpl.callbacks.throughput import Throughput
    from gptpl.runs.trainer import build_trainer
    from gptpl.tokenizers import GPT2Tokenizer
    from gptpl.training.language_model import LanguageModelingModule
    from gptpl.training.loggers import MetricsCSVLogger, RunTensorBoardLogger

    class Parts(L_.Callback):
        """Where the time of a step goes. It has ended when the next batch begins: only then it is logged."""

        def __init__(self) -> None:
            self.marks: list[float] = []

        def mark(self, *args: Any) -> None:
            self.marks.append(time.perf_counter())

        on_before_backward = on_after_backward = on_train_batch_end = mark

        def on_train_batch_start(self, trainer: L_.Trainer, *args: Any) -> None:
            self.mark()
            if len(self.marks) == 5:
                names = ("forward", "backward", "optimizer", "logging and next batch")
                spans = (b - a for a, b in itertools.pairwise(self.marks))
                turns.done(
                    float(trainer.callback_metrics["train/loss"]), dict(zip(names, spans, strict=True))
                )
            self.marks = [time.perf_counter()]

    net, path = gptpl_model(work.size, work.dropout)
    with tempfile.TemporaryDirectory() as folder:
        module = LanguageModelingModule(
            net,
            tokenizer=GPT2Tokenizer(),
            make_optimizer=gptpl_optimizer,
            lr_factor=lambda step: 1.0,
            total_steps=10**6,
            run_config={},
            eval_every_n_steps=10**6,
            head=path.head,
        )

        trainer = build_trainer(
            compose(
                "trainer.max_epochs=null", f"trainer.max_steps={10**6}", "trainer.precision=bf16-mixed"
            ).trainer,
            eval_every_n_steps=10**6,
            deterministic=False,
            callbacks=[Throughput(), LearningRate(), Parts()],
            logger=[RunTensorBoardLogger(save_dir=folder), MetricsCSVLogger(save_dir=folder)],
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_progress_bar=False,
            limit_val_batches=0,
        )
        trainer.fit(module, train_dataloaders=Endless(work))


class Endless(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """The batches as what Lightning takes for a loader."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.work.batches()


def gptpl_model(size: Size, dropout: float, **choices: Any) -> tuple[Any, Any]:
    """gptpl's GPT-2 and its fast path: chosen by itself for bf16 products, but for `choices`."""
    from gptpl.model import GPTConfig, GPTModel
    from gptpl.training.performance import choose_fast_path, keep_freed_memory

    path = choose_fast_path(
        device_type=DEVICE, precision="bf16-mixed", drop_rate=dropout, total_steps=10**6, **choices
    )
    if path.keep_freed_memory:
        keep_freed_memory()
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=V, context_length=C, emb_dim=size.D, n_heads=size.H, n_layers=size.L,
        drop_rate=dropout, qkv_bias=True, tie_weights=True, init="gpt2",
    )  # fmt: skip
    net = GPTModel(config).train().to(DEVICE)
    path.apply(net)
    return net, path


def gptpl_optimizer(net: nn.Module) -> torch.optim.Optimizer:
    """gptpl's AdamW."""
    from gptpl.training.optimizers import adamw

    return adamw(net, lr=LR, weight_decay=DECAY, betas=(0.9, 0.95), eps=1e-8, decay="matrices")


def gptpl_bare(work: Work, turns: Turns) -> None:
    """gptpl's model and kernels in a bare loop: what Lightning costs is the difference."""
    net, _ = gptpl_model(work.size, work.dropout)
    optimizer = gptpl_optimizer(net)
    for inputs, targets in work.batches():
        turns.done(gptpl_step(net, optimizer, inputs, targets))


def gptpl_step(net: Any, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor) -> float:
    """A step of the bare loop; returns its loss."""
    from gptpl.model.loss import head_loss

    with torch.autocast(DEVICE, torch.bfloat16):
        loss = head_loss(net.hidden(inputs), net.out_head.weight, targets)
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


# --- peers ------------------------------------------------------------------------------------------------


def loop(work: Work, turns: Turns, model: nn.Module, *, low: bool, compiled: bool) -> None:
    """The loop that people write: autocast, fused AdamW, clipping; model and loss compiled together."""

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        logits = model(inputs)
        logits = getattr(logits, "logits", logits)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    model.to(DEVICE)
    compute = torch.compile(loss_of) if compiled else loss_of
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=DECAY, fused=True
    )
    for inputs, targets in work.batches():
        with torch.autocast(DEVICE, torch.bfloat16, enabled=low):
            loss = compute(inputs, targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        turns.done(loss.item())


def hugging_face(size: Size, dropout: float) -> nn.Module:
    """GPT-2 of transformers, with its fused attention."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=size.D,
        n_layer=size.L,
        n_head=size.H,
        attn_pdrop=dropout,
        embd_pdrop=dropout,
        resid_pdrop=dropout,
        use_cache=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    return GPT2LMHeadModel(config).train()


def litgpt(size: Size, dropout: float) -> nn.Module:
    """litgpt's model in GPT-2's shape, but for the positions: it knows rotary ones only, and no dropout."""
    if dropout:
        raise SystemExit("litgpt's model has no dropout")
    from litgpt import GPT, Config

    torch.manual_seed(0)
    config = Config(
        block_size=C, vocab_size=V, padded_vocab_size=50304, n_layer=size.L, n_head=size.H, n_embd=size.D,
        bias=True, parallel_residual=False, norm_class_name="LayerNorm", mlp_class_name="GptNeoxMLP",
        gelu_approximate="tanh", rotary_percentage=0.25,
    )  # fmt: skip
    model = GPT(config)
    model.lm_head.weight = model.transformer.wte.weight
    nn.init.normal_(model.lm_head.weight, std=0.02)
    return model.train()


def book(size: Size, dropout: float) -> nn.Module:
    """The model of "Build a Large Language Model (From Scratch)": its head is not tied."""
    from llms_from_scratch.ch04 import GPTModel as BookModel

    torch.manual_seed(0)
    shape = {
        "vocab_size": V, "context_length": C, "emb_dim": size.D, "n_heads": size.H, "n_layers": size.L,
        "drop_rate": dropout, "qkv_bias": True,
    }  # fmt: skip
    model: nn.Module = BookModel(shape)
    return model.train()


def book_loop(work: Work, turns: Turns) -> None:
    """The book's own loop, chapter 5: fp32, no clipping, plain AdamW."""
    model = book(work.size, work.dropout).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY)
    for inputs, targets in work.batches():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        turns.done(loss.item())


def hugging_face_trainer(work: Work, turns: Turns, *, compiled: bool) -> None:
    """transformers' Trainer in bf16 with fused AdamW, its loss logged at every step."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Windows(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            for inputs, _ in work.batches():
                for row in inputs:
                    yield {"input_ids": row, "labels": row}

    class TakeTurns(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                turns.done(float(logs["loss"]))

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=work.batch, max_steps=10**6, learning_rate=LR,
            weight_decay=DECAY, adam_beta2=0.95, max_grad_norm=1.0, optim="adamw_torch_fused", bf16=True,
            use_cpu=DEVICE == "cpu", torch_compile=compiled, logging_steps=1, report_to=[],
            save_strategy="no", disable_tqdm=True, lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = Trainer(
            model=hugging_face(work.size, work.dropout),
            args=arguments,
            train_dataset=Windows(),
            callbacks=[TakeTurns()],
        )
        trainer.train()


def plain(size: Size, dropout: float) -> nn.Module:
    """gptpl's own model without gptpl's kernels: with `loop` this is what nanoGPT does."""
    net, _ = gptpl_model(
        size, dropout, compile="off", attention="sdpa", head="plain", keep_freed_memory=False
    )
    model: nn.Module = net
    return model


MODELS: dict[str, Callable[[Size, float], nn.Module]] = {
    "transformers": hugging_face,
    "litgpt": litgpt,
    "book": book,
    "plain": plain,
}


def run(name: str, work: Work) -> None:
    """Trains as that contestant until standard input ends."""
    turns = Turns()
    words = name.split()
    if name == "gptpl":
        gptpl(work, turns)
    elif name == "gptpl bare":
        gptpl_bare(work, turns)
    elif name == "book loop fp32":
        book_loop(work, turns)
    elif words[:2] == ["transformers", "Trainer"]:
        hugging_face_trainer(work, turns, compiled="compiled" in words)
    else:
        model = MODELS[words[0]](work.size, work.dropout)
        loop(work, turns, model, low="bf16" in words, compiled="compiled" in words)


if __name__ == "__main__":
    OUT, sys.stdout = sys.stdout, sys.stderr  # libraries may print: only answers go to standard output
    NAME, TOKENS, BATCH, CONTEXT, DROPOUT, *SIZE = sys.argv[1:]
    run(NAME, Work(Path(TOKENS), int(BATCH), int(CONTEXT), float(DROPOUT), *(SIZES[size] for size in SIZE)))
