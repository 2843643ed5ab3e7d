"""`gptpl train`, as `make train` calls it, compared with the book's loop doing the same steps in fp32.

    python experiments/benchmarks/default_run.py [OVERRIDES of gptpl train]

The whole command is timed, from its start to its end: imports, choosing, evaluations, samples, saving. The
book's `train_model_simple` (chapter 5) trains its own model on the same text in batches of the same size,
evaluates and samples as printed. It is timed for three of the ten epochs, the last after the command; each of
the rest counts as the median of all but the first.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib import resources
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from contestants import STARTED, say
from torch.utils.data import DataLoader

EPOCHS, WARM = 10, 2
"""Epochs of the default run; of the book those before the command, the first of which warms up."""
BOOK = {
    "vocab_size": 50257, "context_length": 256, "emb_dim": 768, "n_heads": 12, "n_layers": 12,
    "drop_rate": 0.1, "qkv_bias": False,
}  # fmt: skip


def main() -> None:
    print(json.dumps(measure(*sys.argv[1:]), indent=1))


def measure(*overrides: str) -> dict[str, Any]:
    """Seconds of both; the ratio counts the book's start and evaluations, too."""
    book = subprocess.Popen(
        [sys.executable, "-W", "ignore", __file__, "--book"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"BENCHMARK_STARTED": str(time.perf_counter())},
    )
    assert book.stdin is not None
    assert book.stdout is not None
    start = json.loads(book.stdout.readline())["start_seconds"]

    def epoch() -> dict[str, float]:
        print(file=book.stdin, flush=True)
        found: dict[str, float] = json.loads(book.stdout.readline())  # type: ignore[union-attr]
        return found

    epochs = [epoch() for _ in range(WARM)]
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        command = [sys.executable, "-m", "gptpl", "train", f"run_dir={folder}/run", *overrides]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        own = time.perf_counter() - began
        about = json.loads(Path(folder, "run/run.json").read_text(encoding="utf-8"))
    epochs.append(epoch())
    book.communicate()
    whole = start + epochs[0]["seconds"] + (EPOCHS - 1) * median(one["seconds"] for one in epochs[1:])
    alone = start + EPOCHS * epochs[0]["steps"] * median(one["step_seconds"] for one in epochs[1:])
    return {
        "seconds": own,
        "steps": about["steps"],
        "book_start_seconds": start,
        "book_epochs": epochs,
        "book_seconds": whole,
        "book_seconds_steps_alone": alone,
        "ratio": own / whole,
        "ratio_steps_alone": own / alone,
    }


def book() -> None:
    """The book's loop, an epoch for every line on standard input."""
    from llms_from_scratch.ch02 import GPTDatasetV1
    from llms_from_scratch.ch04 import GPTModel
    from llms_from_scratch.ch05 import train_model_simple

    from gptpl.tokenizers import GPT2Tokenizer

    class Tokenizer(GPT2Tokenizer):
        """With the argument that the book gives tiktoken's."""

        def encode(self, text: str, **allowed: Any) -> list[int]:  # type: ignore[override]
            return list(map(int, super().encode(text)))

    class Timed:
        """A loader that notes when its batches are asked for in training."""

        def __init__(self, loader: Any) -> None:
            self.loader, self.times = loader, []  # type: ignore[var-annotated]

        def __len__(self) -> int:
            return len(self.loader)

        def __iter__(self) -> Any:
            for batch in self.loader:
                if model.training:
                    self.times.append(time.perf_counter())
                yield batch

    torch.manual_seed(123)
    text = (resources.files("gptpl.data") / "texts/tale.txt").read_text(encoding="utf-8")
    cut = int(0.9 * len(text))
    tokenizer = Tokenizer()
    train, val = (
        DataLoader(
            GPTDatasetV1(part, tokenizer, 256, 256), batch_size=2, drop_last=training, shuffle=training
        )
        for part, training in ((text[:cut], True), (text[cut:], False))
    )
    model = GPTModel(BOOK)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0004, weight_decay=0.1)
    say({"start_seconds": time.perf_counter() - STARTED})
    while sys.stdin.readline():
        timed, began = Timed(train), time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):
            train_model_simple(
                model, timed, val, optimizer, "cpu", num_epochs=1, eval_freq=5, eval_iter=5,
                start_context="Every effort moves you", tokenizer=tokenizer,
            )  # fmt: skip
        seconds = time.perf_counter() - began
        steps = [
            b - a for a, b in pairwise(timed.times[1:6])
        ]  # those between the evaluations at steps 0 and 5
        say({"seconds": seconds, "steps": len(train), "step_seconds": median(steps)})


if __name__ == "__main__":
    if "--book" in sys.argv:
        book()
    else:
        main()
