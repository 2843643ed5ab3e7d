"""What saving the default run (124M parameters with their optimizer) costs in time and memory.

python experiments/exact_resume/save_cost.py

Trains the default run for a few steps and saves after every fourth of them, in turns as `asynchronous=false`
and `true` do: training waits for the file, or for a copy that is written during the next steps.
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
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO

from gptpl.callbacks import checkpoints
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


Interval = tuple[float, float]


@dataclass
class Found:
    """Begin and end of everything, with the bytes that saves took (by whether training waits) and made."""

    steps: list[Interval] = field(default_factory=list)
    waiting: list[Interval] = field(default_factory=list)
    copying: list[Interval] = field(default_factory=list)
    writing: list[Interval] = field(default_factory=list)  # in the background
    extra: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})
    file: int = 0


def measured(steps: int, settings: list[str], *, in_turns: bool) -> Found:
    """Of a short training with further `settings`; unless `in_turns`, it waits for every file."""
    found = Found()
    save, start, end, write = (
        LastCheckpoint.save,
        LanguageModelingModule.on_train_batch_start,
        LanguageModelingModule.on_train_batch_end,
        checkpoints.write_checkpoint,
    )
    began = 0.0

    def timed_save(self: LastCheckpoint, *arguments: Any, wait: bool = True) -> bool:
        wait = wait or not in_turns or len(found.waiting) < len(found.copying)
        before = time.perf_counter()
        with peak() as most:
            saved = save(self, *arguments, wait=wait)
        if saved:
            (found.waiting if wait else found.copying).append((before, time.perf_counter()))
            found.extra[wait] = max(found.extra[wait], most[0])
            if wait:
                found.file = self.folder.path(self.saved_step).stat().st_size
        return saved

    def timed_write(checkpoint: Any, path: Path) -> None:
        before = time.perf_counter()
        write(checkpoint, path)
        if threading.current_thread() is not threading.main_thread():
            found.writing.append((before, time.perf_counter()))

    def timed_start(self: Any, *arguments: Any) -> None:
        nonlocal began
        began = time.perf_counter()
        start(self, *arguments)

    def timed_end(self: Any, *arguments: Any) -> None:
        end(self, *arguments)
        found.steps.append((began, time.perf_counter()))

    LastCheckpoint.save = timed_save  # type: ignore[method-assign]
    LanguageModelingModule.on_train_batch_start = timed_start  # type: ignore[method-assign]
    LanguageModelingModule.on_train_batch_end = timed_end  # type: ignore[method-assign]
    checkpoints.write_checkpoint = timed_write
    with tempfile.TemporaryDirectory() as folder:
        status = gptpl(
            [
                *(
                    "train",
                    f"run_dir={folder}/run",
                    f"trainer.stop_at_step={steps}",
                    "callbacks=[checkpoint_last]",
                ),
                *("callbacks.checkpoint_last.every_n_steps=4", "eval_val_batches=1", "eval_train_batches=1"),
                "eval_every_n_steps=1000",
                *settings,
            ]
        )
    if status:
        sys.exit(status)
    return found


def seconds(intervals: list[Interval]) -> dict[str, float]:
    """Of how many, and how long they took."""
    took = [end - begin for begin, end in intervals]
    about = {"median": statistics.median(took), "least": min(took), "most": max(took)}
    return {name: round(value, 3) for name, value in about.items()} | {"of": len(took)}


def report(found: Found) -> dict[str, Any]:
    """What a save costs in time and memory."""

    def meets(step: Interval, write: Interval) -> bool:
        return step[0] < write[1] and write[0] < step[1]

    steps = found.steps[1:]
    quiet = [step for step in steps if not any(meets(step, write) for write in found.writing)]
    slowed = [step for step in steps if step not in quiet]
    step = statistics.median(end - begin for begin, end in quiet)
    result: dict[str, Any] = {
        "seconds a step": seconds(quiet),
        "seconds that training waits for a file": seconds(found.waiting),
    }
    cost = {"waiting": statistics.median(end - begin for begin, end in found.waiting)}
    if found.copying:
        longer = [
            sum(end - begin - step for begin, end in slowed if meets((begin, end), write))
            for write in found.writing
        ]
        cost["asynchronous"] = seconds(found.copying)["median"] + statistics.median(longer)
        result |= {
            "seconds that training waits for a copy": seconds(found.copying),
            "seconds of writing in the background": seconds(found.writing),
            "seconds a step during a write": seconds(slowed),
            "seconds that the steps during a write take longer, together": {
                "median": round(statistics.median(longer), 3),
                "least": round(min(longer), 3),
                "most": round(max(longer), 3),
            },
        }
    return result | {
        f"share of a run that saves every {EVERY_N_STEPS} steps": {
            name: round(value / (EVERY_N_STEPS * step), 4) for name, value in cost.items()
        },
        "file, MB": round(found.file / 1e6),
        "memory beyond the state while saving, MB": {
            name: round(found.extra[wait] / 1e6)
            for name, wait in (("waiting", True), ("asynchronous", False))
            if name in cost
        },
        "versions": {name: version(name) for name in ("torch", "lightning")}
        | {"python": platform.python_version()},
        "hardware": f"{os.cpu_count()} CPU cores, {platform.platform()}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=42)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--lightnings-own", action="store_true", help="save as Lightning does, to compare")
    parser.add_argument("settings", nargs="*", help="of gptpl train, such as data.max_length=64")
    options = parser.parse_args()
    if options.lightnings_own:
        DurableCheckpointIO.save_checkpoint = TorchCheckpointIO.save_checkpoint  # type: ignore[assignment]
    result = report(measured(options.steps, options.settings, in_turns=not options.lightnings_own))
    print(json.dumps(result, indent=2))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
