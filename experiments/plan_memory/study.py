"""The memory that `gptpl plan` predicts, compared with the memory that the run then needs.

    python experiments/plan_memory/study.py [--cases NAME ...] [--output FOLDER]

Each case is `gptpl plan`, then `gptpl train` of 3 steps, each in a process of its own; the peak is the
process's peak resident memory as the system reports it. Writes result.json next to this file, or into
--output, adding to what is there, and prints the table of the README.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

HERE = Path(__file__).parent
GPT_18M = ("model=gpt_18m", "data.batch_size=8")
GPT2_SMALL = ("model=gpt2_small", "data.train_ratio=0.6")  # of a text that has 1,024 tokens left then
RECOMPUTED = "trainer.recompute_activations=true"
FP32 = "trainer.precision=32-true"
CASES = {
    "quick, 8 x 64, fp32": ("experiment=quick",),
    "quick, Muon": ("experiment=quick", "optimizer=muon"),
    "18M, 8 x 256, bf16": GPT_18M,
    "18M, 8 x 256, bf16, Muon": (*GPT_18M, "optimizer=muon"),
    "18M, 8 x 256, fp32": (*GPT_18M, FP32),
    "18M, 8 x 256, bf16, activations recomputed": (*GPT_18M, RECOMPUTED),
    "124M, 2 x 256, bf16": (),
    "124M, 2 x 256, fp32": (FP32,),
    "124M, 2 x 256, bf16, Muon": ("optimizer=muon",),
    "124M, 8 x 256, bf16": ("data.batch_size=8",),
    "124M, 8 x 256, bf16, activations recomputed": ("data.batch_size=8", RECOMPUTED),
    "GPT-2 small, 2 x 1024, bf16": (*GPT2_SMALL, "data.batch_size=2"),
    "GPT-2 small, 4 x 1024, bf16": ("model=gpt2_small", "data=python_stdlib", "data.batch_size=4"),
}
RUN = ("trainer.max_steps=3", "scheduler.warmup_steps=1")


def main() -> None:
    """Plans and trains the cases, writes the record, prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES), metavar="NAME")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of result.json (default: here)")
    options = parser.parse_args()
    path = options.output / "result.json"
    known = json.loads(path.read_text(encoding="utf-8"))["cases"] if path.is_file() else {}
    options.output.mkdir(parents=True, exist_ok=True)
    with tqdm(options.cases, unit="case") as bar:
        for name in bar:
            bar.set_description(name)
            known[name] = both(CASES[name])
            result = {
                "torch": torch.__version__,
                "date": time.strftime("%Y-%m-%d"),
                "cases": {case: known[case] for case in CASES if case in known},
            }
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(known))


def both(overrides: tuple[str, ...]) -> dict[str, Any]:
    """What was planned and what was measured, in bytes."""
    planned = plan(overrides)
    return {"overrides": list(overrides), "planned": planned, "measured": trained(overrides)}


def plan(overrides: tuple[str, ...]) -> dict[str, int]:
    """The parts that `gptpl plan` gives, and their total."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "gptpl", "plan", *overrides, *RUN, "plan.timed_steps=0", "--json"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    memory: dict[str, int] = json.loads(done.stdout)["memory_bytes"]
    return memory


def trained(overrides: tuple[str, ...]) -> int:
    """The largest resident memory of `gptpl train`."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "gptpl", "train", *overrides, *RUN, "run_dir=run"]
        with (Path(folder) / "log").open("w+", encoding="utf-8") as log:
            process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                log.seek(0)
                raise SystemExit(f"gptpl train {' '.join(overrides)} failed:\n{log.read()}")
    return usage.ru_maxrss * 1024


def table(cases: dict[str, Any]) -> str:
    """The README's rows."""
    lines = ["| run | planned, GB | measured, GB | planned / measured |", "|---|---|---|---|"]
    for name in CASES:
        if name in cases:
            planned, measured = cases[name]["planned"]["total"], cases[name]["measured"]
            lines.append(
                f"| {name} | {planned / 1e9:.2f} | {measured / 1e9:.2f} | {planned / measured:.2f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
