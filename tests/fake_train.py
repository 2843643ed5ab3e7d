"""Stands in for `gptpl train` where a test is about sweeps: a run's folder within a tenth of a second.

    fake_train.py name=WHAT seed=LOSS run_dir=DIR [resume=DIR] [record=own]

name=fail: refuses its settings; kill: dies of SIGKILL, the first time; slow: runs until SIGTERM, then saves;
deaf: runs on whatever comes;
nan, none: no loss that is a number, no evaluation; wait: runs until a file `go` is beside its folder;
`1:fail_4:kill` does so where the seed is 1 and 4. record=own: no metrics.csv, but
evaluations.jsonl. The validation loss goes from 9 to what `seed` says in four evaluations.
Every start is a line of `starts.txt`.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

CONFIG = "name: {x}\nseed: {seed}\nmodel: {{n_layers: 2}}\n"
MARKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


def main() -> int:
    """Does what `name` says."""
    given = dict(argument.partition("=")[::2] for argument in sys.argv[1:])
    resumed = "resume" in given
    run_dir = Path(given["resume"] if resumed else given["run_dir"])
    with (run_dir.parent / "starts.txt").open("a") as file:
        seen = {name: os.environ[name] for name in MARKS if name in os.environ}
        file.write(
            json.dumps({"folder": run_dir.name, "arguments": sys.argv[1:], "environment": seen}) + "\n"
        )
    if resumed:
        given |= json.loads((run_dir / "given.json").read_text())
    x = behaviour(given.get("name", "ok"), given.get("seed", "1"))
    if x == "fail":
        print("some words\ngptpl: error: name=fail is refused", file=sys.stderr)
        return 2
    run_dir.mkdir(exist_ok=True)
    (run_dir / "given.json").write_text(json.dumps(given))
    (run_dir / "config.yaml").write_text(CONFIG.format(x=x, seed=given.get("seed", 1)))
    return train(run_dir, x, float(given.get("seed", 1)), resumed=resumed)


def behaviour(name: str, seed: str) -> str:
    """What a trial with this seed is to do."""
    if ":" not in name:
        return name
    return dict(part.split(":") for part in name.split("_")).get(seed, "ok")


def train(run_dir: Path, x: str, loss: float, *, resumed: bool) -> int:
    """Writes metrics, or dies over it."""
    stopped: list[int] = []
    listen = (lambda number, frame: None) if x == "deaf" else (lambda number, frame: stopped.append(number))
    signal.signal(signal.SIGTERM, listen)
    rows = [] if x == "none" else [(step, 9 + (loss - 9) * step / 40) for step in (0, 10, 20, 30, 40)]
    if x == "nan":
        rows = [(step, float("nan")) for step, _ in rows]
    if x in ("slow", "deaf", "kill") and not resumed:
        write_metrics(run_dir, rows[:3])
        if x == "kill":
            save(run_dir)
            os.kill(os.getpid(), signal.SIGKILL)
    patience_ends = time.monotonic() + 60
    while not resumed and not stopped and waiting(run_dir, x) and time.monotonic() < patience_ends:
        time.sleep(0.02)
    if stopped:
        save(run_dir)
        return 128 + stopped[0]
    write_metrics(run_dir, rows)
    (run_dir / "run.json").write_text(json.dumps({"finished": "now", "seconds": 1.0}))
    return 0


def waiting(run_dir: Path, x: str) -> bool:
    """Whether there is still something to wait for."""
    return x in ("slow", "deaf") or (x == "wait" and not (run_dir.parent / "go").exists())


def write_metrics(run_dir: Path, rows: list[tuple[int, float]]) -> None:
    """As gptpl writes them: in one move."""
    if json.loads((run_dir / "given.json").read_text()).get("record") == "own":
        lines = [
            {"step": step, "tokens_seen": step, "metrics": {"val/loss": loss, "val/f1": 1 - loss / 10}}
            for step, loss in rows
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run_dir / "evaluations.tmp").write_text(text)
        (run_dir / "evaluations.tmp").replace(run_dir / "evaluations.jsonl")
        return
    text = "step,val/loss,train/loss\n" + "".join(f"{step},{loss},1\n" for step, loss in rows)
    (run_dir / "metrics.tmp").write_text(text)
    (run_dir / "metrics.tmp").replace(run_dir / "metrics.csv")


def save(run_dir: Path) -> None:
    """Something to resume from."""
    (run_dir / "checkpoints").mkdir(exist_ok=True)
    (run_dir / "checkpoints/last.ckpt").write_text("weights")


sys.exit(main())
