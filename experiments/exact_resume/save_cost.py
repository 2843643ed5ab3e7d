"""What saving the default run (124M parameters with their optimizer) costs in time and memory.

python experiments/exact_resume/save_cost.py

Trains the default run for a few steps, saves after every second of them, and times steps and saves in turns.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO

from gptpl.callbacks.checkpoints import DurableCheckpointIO, LastCheckpoint
from gptpl.cli.main import main as gptpl
from gptpl.training.language_model import LanguageModelingModule

EVERY_N_STEPS = 50
"""The interval for which the share is given."""
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    """Memory of this process, without pages of the file cache."""
    fields = Path("/proc/self/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * _PAGE_BYTES


@contextmanager
def peak() -> Iterator[list[int]]:
    """The most memory seen within the block, looked at every few milliseconds, beyond that at its start."""
    before, most, done = resident_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            most[0] = max(most[0], resident_bytes() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield most
    finally:
        done.set()
        watcher.join()


def measured(steps: int) -> dict[str, list[float]]:
    """Seconds of every step and every save, extra bytes of every save, size of the file."""
    found: dict[str, list[float]] = {"step": [], "save": [], "extra": [], "file": []}
    save, start, end = (
        LastCheckpoint.save,
        LanguageModelingModule.on_train_batch_start,
        LanguageModelingModule.on_train_batch_end,
    )
    began = 0.0

    def timed_save(self: LastCheckpoint, *arguments: Any) -> bool:
        before = time.perf_counter()
        with peak() as most:
            saved = save(self, *arguments)
        if saved:
            found["save"].append(time.perf_counter() - before)
            found["extra"].append(most[0])
            found["file"].append(self.folder.path(self.saved_step).stat().st_size)
        return saved

    def timed_start(self: Any, *arguments: Any) -> None:
        nonlocal began
        began = time.perf_counter()
        start(self, *arguments)

    def timed_end(self: Any, *arguments: Any) -> None:
        end(self, *arguments)
        found["step"].append(time.perf_counter() - began)

    LastCheckpoint.save = timed_save  # type: ignore[method-assign]
    LanguageModelingModule.on_train_batch_start = timed_start  # type: ignore[method-assign]
    LanguageModelingModule.on_train_batch_end = timed_end  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        status = gptpl(
            [
                *(
                    "train",
                    f"run_dir={folder}/run",
                    f"trainer.stop_at_step={steps}",
                    "callbacks=[checkpoint_last]",
                ),
                *("callbacks.checkpoint_last.every_n_steps=2", "eval_val_batches=1", "eval_train_batches=1"),
                "eval_every_n_steps=1000",
            ]
        )
    if status:
        sys.exit(status)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--lightnings-own", action="store_true", help="save as Lightning does, to compare")
    options = parser.parse_args()
    if options.lightnings_own:
        DurableCheckpointIO.save_checkpoint = TorchCheckpointIO.save_checkpoint  # type: ignore[assignment]
    found = measured(options.steps)
    step, save = statistics.median(found["step"][1:]), statistics.median(found["save"])
    result = {
        "seconds a step": {"median": round(step, 3), "of": len(found["step"]) - 1},
        "seconds a save": {
            "median": round(save, 3),
            "least": round(min(found["save"]), 3),
            "most": round(max(found["save"]), 3),
            "of": len(found["save"]),
        },
        f"share of a run that saves every {EVERY_N_STEPS} steps": round(save / (EVERY_N_STEPS * step), 4),
        "file, MB": round(max(found["file"]) / 1e6),
        "memory beyond the state while saving, MB": round(max(found["extra"]) / 1e6),
        "versions": {name: version(name) for name in ("torch", "lightning")}
        | {"python": platform.python_version()},
        "hardware": f"{os.cpu_count()} CPU cores, {platform.platform()}",
    }
    print(json.dumps(result, indent=2))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
