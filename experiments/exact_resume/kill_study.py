"""A run killed by SIGKILL at random moments, many of them within a save, against one that was not killed.

python experiments/exact_resume/kill_study.py --kills 50
"""

import argparse
import csv
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gptpl.checkpoints.files import CheckpointFolder, verify
from gptpl.checkpoints.format import read_checkpoint
from gptpl.checkpoints.resume_state import state_digest
from gptpl.files.durable import record_file

SETTINGS = [
    "experiment=quick",
    "trainer.accumulate_grad_batches=2",
    "trainer.max_epochs=1000",
    "eval_every_n_steps=25",
    "callbacks.sample_text.every_n_steps=40",
    "callbacks.sample_text.max_new_tokens=10",
    "callbacks.checkpoint_last.every_n_steps=1",
    "+callbacks.trace._target_=gptpl.callbacks.records.StepTrace",
]


def start(arguments: list[str], log: Path) -> "subprocess.Popen[bytes]":
    """`gptpl train` in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "gptpl", "train", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=log.open("ab"),
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def kill_at_random(process: "subprocess.Popen[bytes]", run: Path, draw: random.Random) -> str:
    """Kills the whole group; returns where it was hit: "start-up", "step", "save" or "" if it had ended.

    A third of the kills come at any moment since the start, the others once it trains; half of those wait for
    a file that is being written.
    """
    kind = draw.choice(["any", "training", "save"])
    checkpoints = run / "checkpoints"
    earlier = being_written(checkpoints)  # left by the kill before: no sign of where this one hits
    if kind == "any":
        wait(process, draw.uniform(0.1, 9.0))
    else:
        before = CheckpointFolder(checkpoints, keep=1).steps()
        while process.poll() is None and CheckpointFolder(checkpoints, keep=1).steps() == before:
            time.sleep(0.001)
        wait(process, draw.uniform(0.0, 2.0))
        deadline = time.monotonic() + 5
        while kind == "save" and process.poll() is None and time.monotonic() < deadline:
            if being_written(checkpoints) - earlier:
                time.sleep(draw.choice([0, 0.0005, 0.001, 0.002]))
                break
    if process.poll() is not None:
        return ""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if being_written(checkpoints) - earlier:
        return "save"
    return "start-up" if kind == "any" and not trained(run) else "step"


def being_written(checkpoints: Path) -> set[str]:
    """Names of the files that are not in their place yet; each has its process's number in it."""
    return {path.name for path in checkpoints.glob(".*.tmp")}


def wait(process: "subprocess.Popen[bytes]", seconds: float) -> None:
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


def trained(run: Path) -> bool:
    """Whether the session that was just killed had saved anything."""
    files = list((run / "checkpoints").glob("step-*.ckpt"))
    started = (run / "session").stat().st_mtime
    return any(file.stat().st_mtime > started for file in files)


def left_by(run: Path) -> dict[str, Any]:
    """All that a run leaves, but for what the clock decides."""
    clocked = ("per_second", "mfu")
    with (run / "metrics.csv").open(newline="") as file:
        rows = [{k: v for k, v in row.items() if not k.endswith(clocked)} for row in csv.DictReader(file)]
    size = {"scalars": 0, "tensors": 0}
    events = EventAccumulator(str(run / "tensorboard"), size_guidance=size).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.endswith(clocked)]
    return {
        **state_digest(read_checkpoint((run / "checkpoints/last.ckpt").resolve())),
        "batches and losses of every step": (run / "steps.jsonl").read_text(),
        "metrics.csv": rows,
        "samples.jsonl": (run / "samples.jsonl").read_text(),
        "TensorBoard": {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags},
    }


def killed_run(folder: Path, settings: list[str], stop: str, kills: int, seed: int) -> list[dict[str, Any]]:
    """Trains with that many kills, then to the end; what each of them hit."""
    draw = random.Random(seed)
    run, log = folder / "killed", folder / "killed.log"
    record: list[dict[str, Any]] = []
    trace = f"+callbacks.trace.path={run / 'steps.jsonl'}"
    while True:
        good = CheckpointFolder(run / "checkpoints", keep=2).newest_good() if run.exists() else None
        if good is None:
            shutil.rmtree(run, ignore_errors=True)  # killed before the first checkpoint: start anew
            arguments = [*settings, trace, f"run_dir={run}", stop]
        else:
            if good.damaged or not record_file(good.path).exists():
                raise SystemExit(f"a kill has damaged a checkpoint: {good}")
            arguments = [f"resume={run}", stop]
        run.mkdir(exist_ok=True)
        (run / "session").touch()
        process = start(arguments, log)
        if len(record) == kills:
            if process.wait():
                raise SystemExit(f"the last part failed: see {log}")
            return record
        hit = kill_at_random(process, run, draw)
        if not hit:
            raise SystemExit(f"the run ended after {len(record)} kills: give more --steps (see {log})")
        visible = list((run / "checkpoints").glob("*.ckpt"))
        broken = [str(path) for path in visible if verify(path.resolve())]
        left = sorted(being_written(run / "checkpoints"))
        record.append(
            {
                "hit": hit,
                "from": int(good.path.stem.removeprefix("step-")) if good else 0,
                "broken": broken,
                "left": left,
            }
        )
        record[-1]["anew"] = not CheckpointFolder(run / "checkpoints", keep=2).steps()
        print(f"kill {len(record)}/{kills}: {hit}, in a session from step {record[-1]['from']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps of the run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("kill_study.json"))
    options = parser.parse_args()
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="gptpl-kill-"))
    stop = f"trainer.stop_at_step={options.steps}"
    unbroken = folder / "unbroken"
    trace = f"+callbacks.trace.path={unbroken / 'steps.jsonl'}"
    if start([*SETTINGS, trace, f"run_dir={unbroken}", stop], folder / "unbroken.log").wait():
        raise SystemExit(f"the unbroken run failed: see {folder}/unbroken.log")
    print(f"unbroken: {options.steps} steps in {time.monotonic() - began:.0f} s", flush=True)
    record = killed_run(folder, SETTINGS, stop, options.kills, options.seed)
    ours, theirs = left_by(unbroken), left_by(folder / "killed")
    same = {part: ours[part] == theirs[part] for part in ours}
    result = {
        "kills": len(record),
        "hit": dict(Counter(kill["hit"] for kill in record)),
        "started anew, killed before the first checkpoint": sum(kill["anew"] for kill in record),
        "kills that left unfinished files": sum(bool(kill["left"]) for kill in record),
        "checkpoints that did not verify": sum(len(kill["broken"]) for kill in record),
        "steps": options.steps,
        "same as the unbroken run": same,
        "seconds": round(time.monotonic() - began),
        "versions": {name: version(name) for name in ("torch", "lightning")}
        | {"python": platform.python_version()},
        "hardware": f"{os.cpu_count()} CPU cores, {platform.platform()}",
        "resumed from": [kill["from"] for kill in record],
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    shutil.rmtree(folder)
    sys.exit(0 if all(same.values()) else 1)


if __name__ == "__main__":
    main()
