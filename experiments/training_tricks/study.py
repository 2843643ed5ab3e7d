"""Four training techniques, each compared with its absence: schedule, clipping, early stopping, accumulation.

    python experiments/training_tricks/study.py

Trains 25 tiny models, one after the other, on Python's standard library and, for early stopping, on the
shipped tale. Writes result.json and tricks.png next to this file, or into --output, and the runs into runs/
there; a finished run is not trained again. `--quick` takes the tale for all, one seed and few steps: it shows
that the study runs, not what the tricks do.
"""

import argparse
import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.training_runs import (
    Overrides,
    column,
    evaluations,
    lowest,
    run_record,
    table,
    train_all,
    write_result,
)

HERE = Path(__file__).parent
SCHEDULES = ("constant", "constant, warm-up", "cosine, warm-up")
CLIPPING: dict[str, Overrides] = {
    "not clipped": ("trainer.gradient_clip_val=null",),
    "clipped at 1": ("trainer.gradient_clip_val=1.0",),
}
STOPPING: dict[str, Overrides] = {
    "to the end": ("callbacks=[checkpoint_best]",),
    "early stopping": ("callbacks=[checkpoint_best,early_stopping]",),
}
WINDOWS = 16  # of an optimizer step
MICRO_BATCHES = {f"{WINDOWS // micro} x {micro}": micro for micro in (WINDOWS, 4, 1)}
ONE_BATCH = f"1 x {WINDOWS}"
OTHER_SEED = f"{ONE_BATCH}, another seed"
TINY = ("model=tiny", "trainer=cpu", "trainer.precision=32-true", "eval_train_batches=2")
Runs = dict[str, Path]


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of the study is done."""

    corpus: Overrides
    seeds: Sequence[int]
    steps: int
    eval_every: int
    eval_batches: int  # of WINDOWS sequences
    accumulated_steps: int
    epochs: int  # of the tale, for early stopping
    warmup_steps: int

    def common(self, *, steps: int, seed: int, batch_size: int = WINDOWS) -> tuple[str, ...]:
        """Overrides of a run on the corpus, of which nothing is seen twice."""
        return (
            *TINY, *self.corpus, "tokenizer=bytes", "model.drop_rate=0", f"seed={seed}", "callbacks=none",
            f"data.batch_size={batch_size}", f"data.global_batch_size={WINDOWS}",
            f"trainer.max_steps={steps}", "trainer.max_epochs=null",
            f"eval_every_n_steps={self.eval_every}",
            f"eval_val_batches={self.eval_batches * WINDOWS // batch_size}",
        )  # fmt: skip

    def schedule(self, name: str) -> tuple[str, ...]:
        """Overrides of one of the schedules."""
        kind = name.split(",")[0]
        warm_up = (f"scheduler.warmup_steps={self.warmup_steps if 'warm-up' in name else 0}",)
        return (f"scheduler={kind}", *warm_up, *(("scheduler.min_lr=0",) if kind == "cosine" else ()))

    def tale(self, seed: int) -> tuple[str, ...]:
        """Overrides of a run that sees a small text many times, evaluated once an epoch."""
        return (
            *TINY, "data=tale", "tokenizer=words", "data.batch_size=8", "model.drop_rate=0", f"seed={seed}",
            "optimizer.lr=3e-3", "scheduler=constant", f"trainer.max_epochs={self.epochs}",
            "eval_every_n_steps=9", "eval_val_batches=null",
        )  # fmt: skip


FULL = Size(
    corpus=("data=python_stdlib",),
    seeds=(1, 2, 3),
    steps=300,
    eval_every=50,
    eval_batches=20,
    accumulated_steps=60,
    epochs=40,
    warmup_steps=30,
)
QUICK = Size(
    corpus=("data=tale",),
    seeds=(1,),
    steps=20,
    eval_every=10,
    eval_batches=2,
    accumulated_steps=6,
    epochs=20,
    warmup_steps=2,
)


def main(arguments: list[str] | None = None) -> None:
    """Trains, compares, writes the record, prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="seconds: shows that the study runs")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the record (default: here)")
    options = parser.parse_args(arguments)
    size = QUICK if options.quick else FULL
    runs = train_all(overrides_of_runs(size), options.output / "runs")
    result = {
        "schedule": schedule_rows(runs, size),
        "clipping": clipping_rows(runs, size),
        "early_stopping": stopping_rows(runs, size),
        "accumulation": accumulation_rows(runs),
    }
    write_result(options.output, runs, seeds=list(size.seeds), steps=size.steps, **result)
    figure(runs, size).savefig(options.output / "tricks.png", dpi=90)
    for name, rows in result.items():
        print(f"\n{name}\n\n{table(rows)}")


def overrides_of_runs(size: Size) -> dict[str, tuple[str, ...]]:
    """Every run's name and overrides."""
    runs = {}
    for seed in size.seeds:
        common = size.common(steps=size.steps, seed=seed)
        for name in SCHEDULES:
            runs[run_name(name, seed)] = (*common, "optimizer.lr=5e-3", *size.schedule(name))
        for name, changes in CLIPPING.items():
            runs[run_name(name, seed)] = (*common, "scheduler=constant", "optimizer.lr=3e-2", *changes)
        for name, changes in STOPPING.items():
            runs[run_name(name, seed)] = (*size.tale(seed), *changes)
    same = ("scheduler=constant", "optimizer.lr=3e-3")
    for name, micro in MICRO_BATCHES.items():
        common = size.common(steps=size.accumulated_steps, seed=1, batch_size=micro)
        runs[name] = (*common, *same)
    runs[OTHER_SEED] = (*size.common(steps=size.accumulated_steps, seed=2), *same)
    return runs


def run_name(name: str, seed: int) -> str:
    """Of the run's folder."""
    return f"{name}, seed {seed}"


def schedule_rows(runs: Runs, size: Size) -> list[dict[str, Any]]:
    """The last validation loss under each schedule, for each seed."""
    rows = []
    for name in SCHEDULES:
        losses = [evaluations(runs[run_name(name, seed)])[-1].val_loss for seed in size.seeds]
        rows.append({"schedule": name, **spread("last validation loss", losses)})
    return rows


def clipping_rows(runs: Runs, size: Size) -> list[dict[str, Any]]:
    """What clipping does at a rate that is too high."""
    rows = []
    for name in CLIPPING:
        folders = [runs[run_name(name, seed)] for seed in size.seeds]
        norms = [sorted(column(folder, "train/grad_norm").values()) for folder in folders]
        losses = [evaluations(folder)[-1].val_loss for folder in folders]
        rows.append(
            {
                "clipping": name,
                **spread("last validation loss", losses),
                "median gradient norm": round(statistics.median(itertools.chain(*norms)), 3),
                "largest gradient norm": round(max(each[-1] for each in norms), 1),
                "steps with a norm above 1": sum(norm > 1 for each in norms for norm in each),
            }
        )
    return rows


def stopping_rows(runs: Runs, size: Size) -> list[dict[str, Any]]:
    """Where early stopping ends a run, compared with the same run to its end."""
    rows = []
    for seed in size.seeds:
        whole, stopped = (runs[run_name(name, seed)] for name in STOPPING)
        end, best, kept = evaluations(whole)[-1], lowest(evaluations(whole)), lowest(evaluations(stopped))
        steps = run_record(stopped)["steps"]
        rows.append(
            {
                "seed": seed,
                "stops at step": steps,
                "of": end.step,
                "saves": f"{1 - steps / end.step:.0%}",
                "loss it keeps": round(kept.val_loss, 4),
                "at step": kept.step,
                "lowest of the whole run": round(best.val_loss, 4),
                "loss at its end": round(end.val_loss, 4),
            }
        )
    return rows


def accumulation_rows(runs: Runs) -> list[dict[str, Any]]:
    """Differences to one batch of the same sequences, in nats."""
    whole = column(runs[ONE_BATCH], "train/loss")
    end = evaluations(runs[ONE_BATCH])[-1].val_loss
    rows = []
    for name in (*MICRO_BATCHES, OTHER_SEED):
        loss = column(runs[name], "train/loss")
        apart = [abs(loss[step] - whole[step]) for step in whole]
        rows.append(
            {
                "micro-batches x sequences": name,
                "largest difference of a step's loss": f"{max(apart):.1e}",
                "in the first step": f"{apart[0]:.1e}",
                "last validation loss": round(evaluations(runs[name])[-1].val_loss, 6),
                "its difference": f"{abs(evaluations(runs[name])[-1].val_loss - end):.1e}",
            }
        )
    return rows


def spread(name: str, values: Sequence[float]) -> dict[str, Any]:
    """Mean over the seeds, and each of them."""
    return {name: round(statistics.fmean(values), 3), "of each seed": [round(value, 3) for value in values]}


def figure(runs: Runs, size: Size) -> Figure:
    """A panel for each trick."""
    drawn = Figure(figsize=(10, 7), layout="constrained")
    panels = drawn.subplots(2, 2).flat
    for axes, draw in zip(panels, (draw_schedules, draw_clipping, draw_stopping), strict=False):
        draw(axes, runs, size)
    draw_accumulation(drawn.axes[3], runs)
    for axes in drawn.axes:
        axes.set_xlabel("optimizer steps")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    return drawn


def draw_validation(axes: Axes, runs: Runs, size: Size, names: Iterable[str]) -> None:
    """A line for each seed, a colour for each name."""
    for place, name in enumerate(names):
        for seed in size.seeds:
            points = evaluations(runs[run_name(name, seed)])[1:]
            steps, losses = [p.step for p in points], [p.val_loss for p in points]
            axes.plot(steps, losses, color=f"C{place}", label=name if seed == size.seeds[0] else None)
    axes.set_ylabel("validation loss (nats)")


def draw_schedules(axes: Axes, runs: Runs, size: Size) -> None:
    draw_validation(axes, runs, size, SCHEDULES)
    axes.set_title("Schedules at 5e-3; a line a seed", loc="left", fontsize=10)


def draw_clipping(axes: Axes, runs: Runs, size: Size) -> None:
    draw_validation(axes, runs, size, CLIPPING)
    axes.set_title("Clipping, at 3e-2, which is too high; a line a seed", loc="left", fontsize=10)


def draw_stopping(axes: Axes, runs: Runs, size: Size) -> None:
    seed = size.seeds[0]
    whole, stopped = (runs[run_name(name, seed)] for name in STOPPING)
    points = evaluations(whole)
    axes.plot([p.step for p in points], [p.train_loss for p in points], label="training loss")
    axes.plot([p.step for p in points], [p.val_loss for p in points], label="validation loss")
    best = lowest(points)
    axes.plot(best.step, best.val_loss, "o", color="C1", label=f"kept: {best.val_loss:.2f}")
    axes.axvline(run_record(stopped)["steps"], color="tab:gray", linestyle="--", label="early stopping")
    axes.set_ylabel("loss, evaluation mode (nats)")
    axes.set_ylim(bottom=0)
    axes.set_title(f"Early stopping, seed {seed}", loc="left", fontsize=10)


def draw_accumulation(axes: Axes, runs: Runs) -> None:
    whole = column(runs[ONE_BATCH], "train/loss")
    for name in (*MICRO_BATCHES, OTHER_SEED):
        if name != ONE_BATCH:
            loss = column(runs[name], "train/loss")
            apart = [abs(loss[step] - whole[step]) or math.nan for step in whole]  # no logarithm of 0
            axes.semilogy(list(whole), apart, ".", label=name)
    axes.set_ylabel("difference to one batch (nats)")
    axes.set_title(f"Accumulation: {WINDOWS} sequences per step, in parts", loc="left", fontsize=10)


if __name__ == "__main__":
    main()
