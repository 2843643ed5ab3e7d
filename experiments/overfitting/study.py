"""What holds back overfitting, and what does not: a run on "The Verdict" with one thing changed at a time.

    python experiments/overfitting/study.py [--text the-verdict.txt] [--model large]

Trains the published experiment's setting on its text: by default with a small model, whose baseline has
two more seeds, to see what chance does; with `--model large` with the published 124M parameters. Writes
result.json and curves.png next to this file (large_result.json and large_curves.png for the large model), or
into --output, and the runs into runs/ there; a finished run is not trained again. `--quick` takes seconds.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.training_runs import (
    Evaluation,
    Overrides,
    evaluations,
    lowest,
    table,
    train_all,
    write_result,
)

HERE = Path(__file__).parent
BASELINE, SEED = "baseline", 123
GPT2_INIT = ("model.init=gpt2",)
CHANGES: dict[str, Overrides] = {
    BASELINE: (),
    "dropout 0": ("model.drop_rate=0",),
    "dropout 0.3": ("model.drop_rate=0.3",),
    "weight decay 0": ("optimizer.weight_decay=0",),
    "weight decay 0.3": ("optimizer.weight_decay=0.3",),
    "half as wide": ("model.emb_dim=32",),
    "two layers": ("model.n_layers=2",),
    "overlapping sequences": ("data.stride=128",),
    "tied head": ("model.tie_weights=true",),
    "GPT-2's initialisation": GPT2_INIT,
    "tied head, GPT-2's init": (*GPT2_INIT, "model.tie_weights=true"),
}
# The published setting; only the arithmetic is the machine's fastest.
PUBLISHED = (
    "experiment=the_verdict", "trainer.precision=auto", "trainer.attention=auto", "trainer.head=auto",
    "eval_train_batches=2", "callbacks=none", "trainer.max_epochs=null",
)  # fmt: skip
SMALL = (
    "model.emb_dim=64", "model.n_heads=4", "model.n_layers=4", "optimizer.lr=3e-3", "trainer.max_steps=144",
    "eval_every_n_steps=9",
)  # fmt: skip
LARGE = ("trainer.max_steps=90", "eval_every_n_steps=5")
QUICK = (
    "experiment=quick", "data.max_length=64", "optimizer.lr=1e-2", "eval_train_batches=1", "callbacks=none",
    "trainer.max_steps=30", "trainer.max_epochs=null", "eval_every_n_steps=10", "eval_val_batches=2",
)  # fmt: skip
Curves = dict[str, list[Evaluation]]
"""The evaluations of each change's run."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which runs are trained."""

    common: Overrides
    changes: tuple[str, ...]
    more_seeds: tuple[int, ...] = ()  # of the baseline, to see what chance does
    prefix: str = ""

    def name(self, change: str, seed: int = SEED) -> str:
        """Of the run's folder."""
        return f"{self.prefix}{change}, seed {seed}"

    def runs(self, text: Overrides) -> dict[str, Overrides]:
        """Every run's name and overrides."""
        pairs = [(BASELINE, seed) for seed in self.more_seeds] + [(each, SEED) for each in self.changes]
        return {
            self.name(change, seed): (*self.common, *text, *CHANGES[change], f"seed={seed}")
            for change, seed in pairs
        }


PLANS = {
    "small": Plan(common=(*PUBLISHED, *SMALL), changes=tuple(CHANGES), more_seeds=(1, 2)),
    "large": Plan(common=(*PUBLISHED, *LARGE), changes=(BASELINE, "dropout 0"), prefix="large_"),
    "quick": Plan(common=QUICK, changes=(BASELINE, "dropout 0"), more_seeds=(1,)),
}


def main(arguments: list[str] | None = None) -> None:
    """Trains, compares, writes the record, prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("small", "large"), default="small")
    parser.add_argument("--text", type=Path, help="your copy of the story, if there is no network")
    parser.add_argument("--quick", action="store_true", help="seconds: shows that the study runs")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the record (default: here)")
    options = parser.parse_args(arguments)
    plan = PLANS["quick" if options.quick else options.model]
    text = () if options.text is None else ("data=text_file", f"data.path={options.text.resolve()}")
    runs = train_all(plan.runs(text), options.output / "runs")
    curves = {change: evaluations(runs[plan.name(change)]) for change in plan.changes}
    again = {seed: evaluations(runs[plan.name(BASELINE, seed)]) for seed in plan.more_seeds}
    rows = [row(change, curve) for change, curve in curves.items()]
    rows += [row(f"{BASELINE}, seed {seed}", curve) for seed, curve in again.items()]
    write_result(
        options.output, runs, name=f"{plan.prefix}result.json", seed=SEED, settings=plan.common, rows=rows,
        curves={change: points(curve) for change, curve in curves.items()},
    )  # fmt: skip
    figure(curves).savefig(options.output / f"{plan.prefix}curves.png", dpi=80)
    print(table(rows))


def row(change: str, run: list[Evaluation]) -> dict[str, Any]:
    """What became of one run."""
    best, last = lowest(run), run[-1]
    return {
        "change": change,
        "lowest validation loss": round(best.val_loss, 3),
        "at step": best.step,
        "training loss there": round(best.train_loss, 3),
        "last training loss": round(last.train_loss, 3),
        "last validation loss": round(last.val_loss, 3),
        "last gap": round(last.val_loss - last.train_loss, 3),
    }


def points(run: list[Evaluation]) -> list[tuple[int, float, float]]:
    """Step, training loss, validation loss."""
    return [(each.step, round(each.train_loss, 4), round(each.val_loss, 4)) for each in run]


def figure(curves: Curves) -> Figure:
    """Each change compared with the baseline."""
    changes = [change for change in curves if change != BASELINE]
    columns = min(5, len(changes))
    lines = -(-len(changes) // columns)
    drawn = Figure(figsize=(3 * columns + 1, 2.8 * lines + 0.4), layout="constrained")
    panels = drawn.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes, change in zip(panels.flat, changes, strict=False):
        draw(axes, curves[BASELINE], color="tab:gray", label=BASELINE)
        draw(axes, curves[change], color="tab:blue", label=change)
        axes.set_title(change, loc="left", fontsize=10)
        axes.grid(alpha=0.3)
        axes.set_ylim(0, 11.5)
    for axes in panels[-1]:
        axes.set_xlabel("optimizer steps")
    for axes in panels[:, 0]:
        axes.set_ylabel("loss (nats)")
    drawn.suptitle(
        "Training (dashed) and validation loss; dots: the lowest validation loss; grey: the baseline",
        fontsize=10,
    )
    return drawn


def draw(axes: Axes, run: list[Evaluation], *, color: str, label: str) -> None:
    """Both losses of a run."""
    steps = [each.step for each in run]
    axes.plot(steps, [each.train_loss for each in run], "--", color=color, linewidth=1)
    axes.plot(steps, [each.val_loss for each in run], color=color, linewidth=1.5, label=label)
    best = lowest(run)
    axes.plot(best.step, best.val_loss, "o", color=color, markersize=5)


if __name__ == "__main__":
    main()
