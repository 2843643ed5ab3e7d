"""Which learning rate, for which size, with AdamW and with Muon: sweeps, and their report.

    python experiments/learning_rate/study.py

For two sizes, two searches by Optuna's TPE: AdamW's rate, then Muon's with that rate for the rest of the
model. The best of each is trained again from other seeds. Every trial sees the same sequences of Python's
standard library, none twice. Writes result.json, rates.png and report/ next to this file, or into --output,
and the sweeps into sweeps/ there; the same command continues them. `--quick` takes one size, the shipped
tale, two trials and no other seeds: it shows that the study runs, not which rate is good.
"""

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

import gptpl
from experiments.training_runs import Overrides, table, write_result
from gptpl.files.run_record import RunRecord, find_runs, read_run

HERE = Path(__file__).parent
RATE = {"AdamW": "optimizer.lr", "Muon": "optimizer.muon_lr"}
SPACE = "tag(log, interval(1e-4, 1e-1))"
MUCH_WORSE = 0.5


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of the study is done."""

    models: Mapping[str, Overrides]
    data: Overrides
    steps: int
    eval_every: int
    eval_val_batches: int
    trials: int
    seeds: Sequence[int]

    def common(self, model: str) -> tuple[str, ...]:
        """Overrides of every trial of a model. Nothing is seen twice, so there is nothing to regularise."""
        return (
            *self.models[model], *self.data, "model.drop_rate=0", "tokenizer=bytes", "callbacks=none",
            "data.batch_size=16", f"trainer.max_steps={self.steps}", "trainer.max_epochs=null",
            f"scheduler.warmup_steps={self.steps // 10}", "trainer=cpu", "trainer.precision=32-true",
            f"eval_every_n_steps={self.eval_every}", f"eval_val_batches={self.eval_val_batches}",
            "eval_train_batches=2",
        )  # fmt: skip


SMALL: Overrides = ("model=tiny", "model.context_length=128")
LARGE: Overrides = (*SMALL, "model.n_layers=4", "model.emb_dim=128")
FULL = Size(
    models={"0.12M": SMALL, "0.84M": LARGE},
    data=("data=python_stdlib",),
    steps=200,
    eval_every=50,
    eval_val_batches=20,
    trials=14,
    seeds=(1, 2, 3),
)
QUICK = Size(
    models={"0.12M": SMALL},
    data=("data=tale",),
    steps=10,
    eval_every=10,
    eval_val_batches=1,
    trials=2,
    seeds=(),
)


def main(arguments: list[str] | None = None) -> None:
    """Sweeps, trains the best again, reports, prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="seconds: shows that the study runs")
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the record (default: here)")
    options = parser.parse_args(arguments)
    size = QUICK if options.quick else FULL
    sweeps = options.output / "sweeps"
    searches: dict[tuple[str, str], list[RunRecord]] = {}
    rows = []
    for model in size.models:
        for optimizer in RATE:
            given = [*size.common(model), *settings(optimizer, model, searches)]
            name = f"{optimizer} {model}".replace(" ", "_").lower()
            search = ["sweep=tpe", f"sweep.n_trials={size.trials}", f"{RATE[optimizer]}={SPACE}"]
            searches[optimizer, model] = swept([*given, *search], sweeps / name, options.jobs)
            rate = best_rate(optimizer, searches[optimizer, model])
            again = searches[optimizer, model]
            if size.seeds:
                seeds = ",".join(map(str, size.seeds))
                best = [*given, f"{RATE[optimizer]}={rate!r}", f"seed={seeds}"]
                again = swept(best, sweeps / f"{name}_seeds", options.jobs)
            rows.append(row(optimizer, model, searches[optimizer, model], again))
    runs = {run.name: run.path for found in searches.values() for run in found}
    points = {f"{o}, {m}": points_of(o, found) for (o, m), found in searches.items()}
    write_result(options.output, runs, steps=size.steps, rates=rows, trials=points)
    figure(points).savefig(options.output / "rates.png", dpi=110)
    folders = [sweeps / f"{o} {m}".replace(" ", "_").lower() for o, m in searches]
    gptpl.report(*folders, output=options.output / "report")
    print(f"\n{table(rows)}")


def settings(optimizer: str, model: str, searches: Mapping[tuple[str, str], list[RunRecord]]) -> list[str]:
    """Other settings of an optimizer: Muon leaves embeddings, head and gains to AdamW."""
    if optimizer == "AdamW":
        return []
    return ["optimizer=muon", f"optimizer.lr={best_rate('AdamW', searches['AdamW', model])!r}"]


def swept(arguments: Sequence[str], folder: Path, jobs: int) -> list[RunRecord]:
    """The trials of a sweep. Raises SystemExit where one of them has not finished."""
    result = gptpl.sweep(*arguments, f"hydra.sweep.dir={folder}", f"hydra.launcher.n_jobs={jobs}")
    if result.status():
        raise SystemExit(f"the sweep in {folder} has trials that did not finish: see its results.csv")
    return [read_run(path) for path in find_runs(folder)]


def loss(run: RunRecord) -> float:
    """Its last validation loss: a rate must be good to the end."""
    assert run.last is not None
    return run.last.val_loss


def points_of(optimizer: str, runs: Sequence[RunRecord]) -> list[list[float]]:
    """Rate and loss of each trial, by rate."""
    return sorted([float(run.settings[RATE[optimizer]]), round(loss(run), 4)] for run in runs)


def best_rate(optimizer: str, runs: Sequence[RunRecord]) -> float:
    """Of the trial with the lowest loss, to two digits."""
    best = min(runs, key=loss)
    return float(f"{float(best.settings[RATE[optimizer]]):.1e}")


def row(
    optimizer: str, model: str, search: Sequence[RunRecord], again: Sequence[RunRecord]
) -> dict[str, Any]:
    """What an optimizer came to on a model."""
    near = [
        rate for rate, value in points_of(optimizer, search) if value < loss(min(search, key=loss)) + 0.05
    ]
    losses = sorted(loss(run) for run in again)
    return {
        "parameters": model,
        "optimizer": optimizer,
        "best learning rate": best_rate(optimizer, search),
        "learning rates within 0.05 nats": f"{min(near):.1e} to {max(near):.1e}",
        "validation loss": round(statistics.fmean(losses), 3),
        "of each seed": [round(value, 3) for value in losses],
        "tokens": int(search[0].metric("train/tokens_seen")),
    }


def figure(points: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """Loss against rate, a line for each search."""
    drawn = Figure(figsize=(8, 4.5), layout="constrained")
    axes = drawn.subplots()
    lowest = min(value for each in points.values() for _, value in each)
    for number, (name, each) in enumerate(points.items()):
        rates, losses = zip(*each, strict=True)
        marker = "o" if name.startswith("AdamW") else "s"
        axes.semilogx(rates, losses, color=f"C{number}", marker=marker, markersize=4, label=name)
    axes.set_ylim(lowest - 0.05, lowest + 3 * MUCH_WORSE if math.isfinite(lowest) else None)
    axes.set_xlabel("peak learning rate (Muon: of the blocks' matrices)")
    axes.set_ylabel("last validation loss (nats per byte)")
    axes.grid(visible=True, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return drawn


if __name__ == "__main__":
    main()
