"""The published training log of the book's run and a run of `experiment=the_verdict`: table and picture.

    python experiments/the_verdict/compare.py RUN_FOLDER [--output experiments/the_verdict/loss.png]

The published log evaluates after every fifth step counted from 0, so its "step 5" has made 6 updates; ours
evaluates after 5, 10, ... updates. Both are shown by the number of updates made.
"""

import argparse
import csv
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# (step, train loss, validation loss): the training log in the book's repository, chapter 5.
PUBLISHED = [
    (0, 9.781, 9.933), (5, 8.111, 8.339), (10, 6.661, 7.048), (15, 5.961, 6.616), (20, 5.726, 6.600),
    (25, 5.201, 6.348), (30, 4.417, 6.278), (35, 4.069, 6.226), (40, 3.732, 6.160), (45, 2.850, 6.179),
    (50, 2.427, 6.141), (55, 2.104, 6.134), (60, 1.882, 6.234), (65, 1.320, 6.238), (70, 0.985, 6.242),
    (75, 0.717, 6.293), (80, 0.541, 6.393), (85, 0.391, 6.452),
]  # fmt: skip
Point = tuple[int, float, float]


def measured(run: Path) -> list[Point]:
    """(updates, train loss, validation loss) of every evaluation in the run's metrics.csv."""
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [
            (int(row["step"]), float(row["eval/train_loss"]), float(row["val/loss"]))
            for row in csv.DictReader(file)
            if row["val/loss"]
        ]


def table(published: list[Point], ours: list[Point]) -> str:
    """Markdown: a row for each published evaluation and ours of one update less."""
    by_updates = {updates: (train, val) for updates, train, val in ours}
    lines = [
        "| updates | published train | published val | updates | gptpl train | gptpl val |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for step, train, val in published:
        own = by_updates.get(step)
        cells = f"{step} | {own[0]:.3f} | {own[1]:.3f}" if own else " | | "
        lines.append(f"| {step + 1} | {train:.3f} | {val:.3f} | {cells} |")
    last = max(by_updates)
    lines.append(f"| | | | {last} | {by_updates[last][0]:.3f} | {by_updates[last][1]:.3f} |")
    return "\n".join(lines)


def draw(published: list[Point], ours: list[Point], path: Path) -> None:
    """Both runs' losses against updates made."""
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    updates = [step + 1 for step, _, _ in published]
    axes.plot(updates, [p[1] for p in published], "o", color="C0", mfc="none", label="train, published")
    axes.plot(updates, [p[2] for p in published], "s", color="C1", mfc="none", label="validation, published")
    axes.plot([p[0] for p in ours], [p[1] for p in ours], "-", color="C0", label="train, gptpl")
    axes.plot([p[0] for p in ours], [p[2] for p in ours], "-", color="C1", label="validation, gptpl")
    axes.set_xlabel("optimizer updates (9 an epoch)")
    axes.set_ylabel("loss, nats per token, evaluation mode")
    axes.set_title("The Verdict: 124M parameters, 10 epochs")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    FigureCanvasAgg(figure).print_png(str(path))


def main() -> None:
    """Prints the table, writes the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("loss.png"))
    options = parser.parse_args()
    ours = measured(options.run)
    print(table(PUBLISHED, ours))
    draw(PUBLISHED, ours, options.output)


if __name__ == "__main__":
    main()
