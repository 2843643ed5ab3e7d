"""The training loops that are compared, each in a process of its own that takes a step when it is told to.

    python contestants.py NAME '{"tokens": "tokens.npy", "text": "text.txt", "batch": 2, "context": 256, ...}'

gptpl itself is the command `gptpl train` with one more callback (conf/), see `gptpl_command`.
Every loop trains the same GPT-2 (tied, biases) on text of the same kind with AdamW and gradients clipped to
1, and reads its loss at every step. The process answers every line on its standard input with one JSON
object: the seconds of a step and what is known of its parts.
"""

import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

HERE = Path(__file__).parent
STARTED = float(os.environ.get("BENCHMARK_STARTED", time.perf_counter()))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
V, C = 50257, 1024
LR, DECAY = 6e-4, 0.1
WARMUP = 2
PLANNED_STEPS = 10_000
OUT = os.fdopen(int(os.environ.get("BENCHMARK_OUT", 1)), "w", closefd=False)


@dataclass(frozen=True)
class Size:
    """Width, blocks and heads of a GPT-2, and gptpl's name of it."""

    D: int
    L: int
    H: int
    name: str


SIZES = {
    "tiny": Size(64, 2, 4, "tiny"),
    "124M": Size(768, 12, 12, "gpt2_small"),
    "355M": Size(1024, 24, 16, "gpt2_medium"),
    "774M": Size(1280, 36, 20, "gpt2_large"),
    "1558M": Size(1600, 48, 25, "gpt2_xl"),
}


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every loop trains on: `tokens`, a .npy file, are those of the file `text`."""

    tokens: str
    text: str
    batch: int
    context: int
    dropout: float = 0.0
    size: str = "124M"
    steps_a_turn: int = 1

    @property
    def shape(self) -> Size:
        return SIZES[self.size]

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Sequences from random places, without end, the same ones for everybody."""
        tokens = np.load(self.tokens, mmap_mode="r")
        draw = np.random.default_rng(0)
        while True:
            starts = draw.integers(0, len(tokens) - self.context - 1, self.batch)
            rows = np.stack([tokens[s : s + self.context + 1] for s in starts]).astype(np.int64)
            both = torch.from_numpy(rows).to(DEVICE)
            yield both[:, :-1].contiguous(), both[:, 1:].contiguous()


class Turns:
    """Ends a turn, of one step or several: answers the line that asked for it, and waits for the next one."""

    def __init__(self, steps_a_turn: int = 1) -> None:
        self.steps_a_turn = steps_a_turn
        self.steps = 0
        self._first_seconds = self._began = 0.0

    def done(self, loss: float, parts: dict[str, float] | None = None) -> None:
        """A step has ended; returns when the next may begin."""
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.steps += 1
        if self.steps == 1:
            self._first_seconds = now - STARTED
        timed = self.steps - WARMUP
        if timed < 0 or timed % self.steps_a_turn:
            return
        if timed == 0:
            say({"first_step_seconds": self._first_seconds})
        else:
            seconds = (now - self._began) / self.steps_a_turn
            say({"seconds": seconds, "loss": loss, "peak_gb": peak_gb(), "parts": parts or {}})
        if not sys.stdin.readline():
            os._exit(0)  # at once: a run that is interrupted in order would save a checkpoint
        self._began = time.perf_counter()


def peak_gb() -> float:
    """Most memory of the device that the process has held; on a CPU all that it has held."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_reserved() / 2**30
    # ru_maxrss would begin with the size of the parent process.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def say(answer: dict[str, Any]) -> None:
    """One JSON object to the process that asked."""
    print(json.dumps(answer), file=OUT, flush=True)


# --- gptpl ------------------------------------------------------------------------------------------------


def gptpl_command(work: Work, folder: str) -> list[str]:
    """`gptpl train` that takes turns: all of the command, with its loggers and callbacks."""
    turns = ("callbacks=[default,turns]", f"callbacks.turns.steps_a_turn={work.steps_a_turn}")
    train = [sys.executable, "-W", "ignore", "-m", "gptpl", "train", "--config-dir", str(HERE / "conf")]
    return [*train, *turns, *gptpl_settings(work, folder)]


def gptpl_settings(work: Work, folder: str, planned: int = PLANNED_STEPS) -> list[str]:
    """The overrides of `gptpl train` for this work: all else is as a user starts it."""
    return [
        f"model={work.shape.name}",
        f"model.drop_rate={work.dropout}",
        "data=text_file",
        f"data.path={work.text}",
        f"data.batch_size={work.batch}",
        f"data.max_length={work.context}",
        "trainer.max_epochs=null",
        f"trainer.max_steps={planned}",
        f"eval_every_n_steps={planned}",
        "eval_train_batches=1",
        "eval_val_batches=1",
        "callbacks.checkpoint_last.every_n_minutes=100000",
        "~callbacks.progress_bar",
        "~callbacks.sample_text",
        f"run_dir={folder}/run",
    ]


def gptpl_run(work: Work, *overrides: str, planned: int = PLANNED_STEPS) -> Any:
    """The run that `gptpl train` would train, built with its choices."""
    import gptpl

    with tempfile.TemporaryDirectory() as folder:
        run = gptpl.build(*gptpl_settings(work, folder, planned), *overrides)
        run.close()
    return run


class TakeTurns(L.Callback):
    """Has `gptpl train` take turns; the step has ended when the next batch begins: only then it is logged."""

    def __init__(self, *, steps_a_turn: int = 1) -> None:
        self.turns = Turns(steps_a_turn)
        self.marks: list[float] = []

    def mark(self, *args: Any) -> None:
        """Notes the time of a part's end."""
        self.marks.append(time.perf_counter())

    on_before_backward = on_after_backward = on_train_batch_end = mark

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Ends the step before."""
        self.mark()
        if len(self.marks) == 5:
            names = ("forward", "backward", "optimizer", "logging and next batch")
            parts = dict(zip(names, (b - a for a, b in itertools.pairwise(self.marks)), strict=True))
            self.turns.done(float(trainer.callback_metrics["train/loss"]), parts)
        self.marks = [time.perf_counter()]


def gptpl_bare(work: Work, turns: Turns) -> None:
    """gptpl's model, with the choices of its run, in a bare loop: what Lightning costs is the difference."""
    run = gptpl_run(work)
    net = run.module.net.to(DEVICE).train()
    optimizer = run.module.make_optimizer(net)
    low = "bf16" in run.trainer.precision
    for inputs, targets in work.batches():
        choices = {"head": run.module.head, "low": low, "compiled": run.module.compiled}
        turns.done(gptpl_step(net, optimizer, inputs, targets, **choices))


def gptpl_step(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    targets: Tensor,
    *,
    head: Any,
    low: bool,
    compiled: bool,
) -> float:
    """A step of the bare loop, in bf16 if `low`; returns its loss."""
    from gptpl.model.loss import training_loss

    with torch.autocast(DEVICE, torch.bfloat16, enabled=low):
        loss = training_loss(net, inputs, targets, head=head, compiled=compiled)
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
    model = book(work.shape, work.dropout).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY)
    for inputs, targets in work.batches():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        turns.done(loss.item())


def hugging_face_trainer(work: Work, turns: Turns, *, low: bool, compiled: bool) -> None:
    """transformers' Trainer with fused AdamW, its loss logged at every step."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Sequences(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
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
            weight_decay=DECAY, adam_beta2=0.95, max_grad_norm=1.0, optim="adamw_torch_fused", bf16=low,
            use_cpu=DEVICE == "cpu", torch_compile=compiled, logging_steps=1, report_to=[],
            save_strategy="no", disable_tqdm=True, lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = Trainer(
            model=hugging_face(work.shape, work.dropout),
            args=arguments,
            train_dataset=Sequences(),
            callbacks=[TakeTurns()],
        )
        trainer.train()


def plain(size: Size, dropout: float) -> nn.Module:
    """gptpl's own model without gptpl's kernels: with `loop` this is what nanoGPT does."""
    from gptpl.model import GPTConfig, GPTModel
    from gptpl.model.gpt import MultiHeadAttention

    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=V, context_length=C, emb_dim=size.D, n_heads=size.H, n_layers=size.L,
        drop_rate=dropout, qkv_bias=True, tie_weights=True, init="gpt2",
    )  # fmt: skip
    net = GPTModel(config).train()
    for module in net.modules():
        if isinstance(module, MultiHeadAttention):
            module.kernel = "sdpa"
    return net


MODELS: dict[str, Callable[[Size, float], nn.Module]] = {
    "transformers": hugging_face,
    "litgpt": litgpt,
    "book": book,
    "plain": plain,
}


def run(name: str, work: Work) -> None:
    """Trains as that contestant until standard input ends."""
    turns = Turns(work.steps_a_turn)
    words = name.split()
    variant = {"low": "bf16" in words, "compiled": "compiled" in words}
    if name == "gptpl bare":
        gptpl_bare(work, turns)
    elif name == "book loop fp32":
        book_loop(work, turns)
    elif words[:2] == ["transformers", "Trainer"]:
        hugging_face_trainer(work, turns, **variant)
    else:
        loop(work, turns, MODELS[words[0]](work.shape, work.dropout), **variant)


if __name__ == "__main__":
    run(sys.argv[1], Work(**json.loads(sys.argv[2])))
