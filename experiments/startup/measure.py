"""Seconds from Enter to a refusal, to the first step of a tiny model, and to the first generated token.

    python experiments/startup/measure.py                           # this checkout
    python experiments/startup/measure.py --before ../older         # and another one, in turns

Wall-clock time depends on what else the machine does; CPU time (user and system, all threads) hardly does.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PROMPT = "Every effort moves you"
TINY = ("train", "model=tiny", "trainer=cpu")
COMMANDS = {
    "import torch": None,
    "import torch, lightning": None,
    "gptpl --help": ("--help",),
    "misspelt choice: model=tinny": ("train", "model=tinny"),
    "misspelt key: model.wdth=3": ("train", "model.wdth=3"),
    "misspelt key: trainer.max_step=3": ("train", "trainer.max_step=3"),
    "wrong number: optimizer.lr=-1": ("train", "optimizer.lr=-1"),
    "first step of model=tiny": (
        *TINY, "scheduler.warmup_steps=0", "--config-dir", "conf", "callbacks=[default,first_step]",
    ),
    "first token of gptpl generate": ("generate", f"prompt={PROMPT}", "max_new_tokens=20"),
}  # fmt: skip


def timed(name: str, checkout: Path, folder: Path) -> tuple[float, float]:
    """Seconds of wall-clock time until the event, and of CPU time until then or, of a command, in all."""
    given = COMMANDS[name]
    program = [sys.executable, "-c", name] if given is None else [sys.executable, "-m", "gptpl", *given]
    if name.startswith("first"):
        key, value = ("checkpoint", "run") if "generate" in program else ("run_dir", "new")
        program.append(f"{key}={folder / value}")
    start = time.perf_counter()
    process = subprocess.Popen(
        program, cwd=HERE, env=_environment(checkout), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    until = len(PROMPT) + 1 if "generate" in program else 1  # the prompt is printed, too
    seen = b""
    while len(seen) < until and (piece := os.read(process.stdout.fileno(), 4096)):
        seen += piece
    wall = time.perf_counter() - start
    rest = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    subprocess.run(["rm", "-rf", str(folder / "new")], check=True)
    wanted = 2 if "misspelt" in name or "wrong" in name else 0
    if process.returncode != wanted:
        raise RuntimeError(f"{' '.join(program)} in {checkout}: status {process.returncode}")
    if name.startswith("first step"):
        return wall, float((seen + rest).split()[-1])
    return wall, usage.ru_utime + usage.ru_stime


def _environment(checkout: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--before", type=Path, help="another checkout, to compare with")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    checkouts = {"now": HERE.parents[1]}
    if options.before:
        checkouts = {"before": options.before.resolve(), **checkouts}
    taken: dict[str, dict[str, list[tuple[float, float]]]] = {
        name: {which: [] for which in checkouts} for name in COMMANDS
    }
    with tempfile.TemporaryDirectory() as given:
        folder = Path(given)
        small = (*TINY, "trainer.max_steps=20", "callbacks=checkpoint_last", f"run_dir={folder / 'run'}")
        command = [sys.executable, "-m", "gptpl", *small]
        subprocess.run(command, env=_environment(checkouts["now"]), check=True, capture_output=True)
        for _ in range(options.rounds):
            for name, of_name in taken.items():
                for which, checkout in checkouts.items():
                    of_name[which].append(timed(name, checkout, folder))
            report(taken)  # so far


def report(taken: dict[str, dict[str, list[tuple[float, float]]]]) -> None:
    """Print the table, median (min - max), and write `result.json`."""
    record: dict[str, Any] = {
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "lightning", "hydra-core")},
        "seconds": {
            name: {
                which: {"wall": [w for w, _ in each], "cpu": [c for _, c in each]}
                for which, each in of_name.items()
            }
            for name, of_name in taken.items()
        },
    }
    (HERE / "result.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    columns = [f"{which}: {kind}" for which in next(iter(taken.values())) for kind in ("wall", "CPU")]
    print("|".join(["", " ", *(f" {each} " for each in columns), ""]))
    print("|".join(["", *("---" for _ in range(len(columns) + 1)), ""]))
    for name, of_name in taken.items():
        cells = [
            f" {statistics.median(values):.2f} ({min(values):.2f} - {max(values):.2f}) "
            for each in of_name.values()
            for values in zip(*each, strict=True)
        ]
        print("|".join(["", f" {name} ", *cells, ""]))


if __name__ == "__main__":
    main()
