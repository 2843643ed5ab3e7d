"""How the validation loss falls with the model's size and the tokens seen, and the law that fits it.

    python experiments/scaling/study.py

Trains 20 tiny models on Python's standard library, byte by byte, each with a schedule of its own, and one of
them with two more seeds. Writes result.json and scaling.png next to this file, or into --output, and the runs
into runs/ there; a finished run is not trained again. `--quick` trains smaller models for a few steps.
"""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

from experiments.scaling.power_law import Law, Numbers, bootstrap, fit, straight_slope
from experiments.training_runs import (
    Overrides,
    evaluations,
    run_record,
    table,
    train_all,
    write_result,
)

HERE = Path(__file__).parent
VOCABULARY, CONTEXT, WINDOWS = 257, 64, 16
TOKENS_A_STEP = CONTEXT * WINDOWS


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which models see how many tokens."""

    corpus: str
    shapes: tuple[tuple[int, int], ...]  # width, layers
    steps: tuple[int, ...]
    repeated: tuple[tuple[int, int], int]  # a shape and its steps, trained with more seeds
    seeds: tuple[int, ...]
    eval_batches: int
    bootstraps: int


FULL = Plan(
    corpus="python_stdlib",
    shapes=((32, 2), (48, 2), (64, 3), (96, 3), (128, 4)),
    steps=(200, 400, 800, 1600),
    repeated=((64, 3), 200),
    seeds=(1, 2),
    eval_batches=40,
    bootstraps=500,
)
QUICK = Plan(
    corpus="tale",
    shapes=((8, 1), (16, 1), (32, 1)),
    steps=(8, 16),
    repeated=((8, 1), 8),
    seeds=(1,),
    eval_batches=2,
    bootstraps=3,
)


def main(arguments: list[str] | None = None) -> None:
    """Trains, fits, writes the record, prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="seconds: shows that the study runs")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the record (default: here)")
    options = parser.parse_args(arguments)
    plan = QUICK if options.quick else FULL
    grid = {run_name(shape, steps): (shape, steps) for shape in plan.shapes for steps in plan.steps}
    repeats = {f"{run_name(*plan.repeated)}, seed {seed}": seed for seed in plan.seeds}
    overrides = {name: settings(plan, *each, seed=123) for name, each in grid.items()}
    again = {name: settings(plan, *plan.repeated, seed=seed) for name, seed in repeats.items()}
    runs = train_all(overrides | again, options.output / "runs")
    rows = [row(shape, steps, runs[name]) for name, (shape, steps) in grid.items()]
    same = [final_loss(runs[name]) for name in (run_name(*plan.repeated), *repeats)]
    fitted = fits(rows, times=plan.bootstraps)
    write_result(
        options.output, runs, rows=rows, same_run_other_seeds=[round(loss, 4) for loss in same], **fitted
    )  # fmt: skip
    figure(rows, Law(**fitted["law"])).savefig(options.output / "scaling.png", dpi=120)
    print(loss_table(rows, plan))
    print(fitted, "\nthe same run with other seeds:", same)


def run_name(shape: tuple[int, int], steps: int) -> str:
    """Of the run's folder."""
    return f"width {shape[0]}, {shape[1]} layers, {steps} steps"


def settings(plan: Plan, shape: tuple[int, int], steps: int, *, seed: int) -> Overrides:
    """A run's overrides. The rate and the share of warm-up are the same for all."""
    width, layers = shape
    return (
        f"data={plan.corpus}", "tokenizer=bytes", "model=tiny", f"model.context_length={CONTEXT}",
        f"model.emb_dim={width}", f"model.n_layers={layers}", "model.n_heads=4", "model.drop_rate=0",
        f"data.batch_size={WINDOWS}", "trainer=cpu", "trainer.precision=32-true",
        f"trainer.max_steps={steps}", "trainer.max_epochs=null",
        "optimizer.lr=4e-3", "scheduler=cosine", "scheduler.min_lr=0",
        f"scheduler.warmup_steps={steps // 10}", f"eval_every_n_steps={steps}", "eval_train_batches=1",
        f"eval_val_batches={plan.eval_batches}", "callbacks=none", f"seed={seed}",
    )  # fmt: skip


def row(shape: tuple[int, int], steps: int, run: Path) -> dict[str, Any]:
    """One point: non-embedding parameters, tokens, loss."""
    width, layers = shape
    return {
        "width": width,
        "layers": layers,
        "parameters": run_record(run)["parameters"] - (VOCABULARY + CONTEXT) * width,
        "tokens": steps * TOKENS_A_STEP,
        "loss": round(final_loss(run), 4),
    }


def final_loss(run: Path) -> float:
    """Validation loss after the last step."""
    return evaluations(run)[-1].val_loss


def columns(rows: list[dict[str, Any]]) -> tuple[Numbers, Numbers, Numbers]:
    """Parameters, tokens and losses."""
    parameters, tokens, losses = (
        np.array([row[name] for row in rows], float) for name in ("parameters", "tokens", "loss")
    )
    return parameters, tokens, losses


def fits(rows: list[dict[str, Any]], *, times: int) -> dict[str, Any]:
    """The law with its uncertainty, straight slopes, and the largest run as the smaller ones foretell it."""
    parameters, tokens, losses = columns(rows)
    law = fit(parameters, tokens, losses)
    residuals = losses - law.loss(parameters, tokens)
    most_tokens, largest = tokens == tokens.max(), parameters == parameters.max()
    inside = ~most_tokens & ~largest
    without = fit(parameters[inside], tokens[inside], losses[inside])
    with tqdm(total=1, unit="bootstrap") as bar:
        interval = bootstrap(parameters, tokens, losses, times=times)
        bar.update()
    return {
        "law": asdict(law),
        "90 % interval": interval,
        "root mean square residual": round(float(np.sqrt((residuals**2).mean())), 4),
        "straight slope in N at the most tokens": straight_slope(
            parameters[most_tokens], losses[most_tokens]
        ),
        "straight slope in D of the largest model": straight_slope(tokens[largest], losses[largest]),
        "law without the largest model and the most tokens": asdict(without),
        "it foretells for both": float(without.loss(parameters.max(), tokens.max())),
        "measured for both": float(losses[most_tokens & largest][0]),
    }


def loss_table(rows: list[dict[str, Any]], plan: Plan) -> str:
    """A line for each model, a column for each count of tokens."""
    lines = []
    for width, layers in plan.shapes:
        own = [each for each in rows if (each["width"], each["layers"]) == (width, layers)]
        losses = {f"{each['tokens']:,} tokens": f"{each['loss']:.3f}" for each in own}
        lines.append(
            {"width x layers": f"{width} x {layers}", "parameters": f"{own[0]['parameters']:,}", **losses}
        )
    return table(lines)


def figure(rows: list[dict[str, Any]], law: Law) -> Figure:
    """Loss against parameters and against tokens, with the law, and what it leaves."""
    drawn = Figure(figsize=(12, 4), layout="constrained")
    left, middle, right = drawn.subplots(1, 3)
    middle.sharey(left)
    draw_lines(left, rows, law, along="parameters", each="tokens")
    draw_lines(middle, rows, law, along="tokens", each="parameters")
    parameters, tokens, losses = columns(rows)
    residuals = losses - law.loss(parameters, tokens)
    for place, count in enumerate(sorted(set(tokens))):
        chosen = tokens == count
        right.semilogx(
            parameters[chosen], residuals[chosen], "o", color=f"C{place}", label=f"{short(count)} tokens"
        )
    right.axhline(0, color="tab:gray", linewidth=0.8)
    right.set(xlabel="parameters outside the embeddings", ylabel="measured less fitted (nats)")
    left.set(xlabel="parameters outside the embeddings", ylabel="validation loss (nats per byte)")
    middle.set(xlabel="tokens seen")
    left.set_title("Points: runs; lines: the law", loc="left", fontsize=10)
    right.set_title("What the law leaves", loc="left", fontsize=10)
    for axes, values in ((left, parameters), (middle, tokens), (right, parameters)):
        ticks = sorted(set(values.tolist()))
        axes.set_xticks(ticks, [short(value) for value in ticks])
        axes.set_xticks([], minor=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    return drawn


def short(number: float) -> str:
    """25,280 as 25k."""
    return f"{number / 1e6:.2f}M" if number >= 999_500 else f"{number / 1e3:.0f}k"


def draw_lines(axes: Axes, rows: list[dict[str, Any]], law: Law, *, along: str, each: str) -> None:
    """A line for each value of one quantity along the other."""
    x = np.geomspace(min(row[along] for row in rows), max(row[along] for row in rows), 50)
    for place, value in enumerate(sorted({row[each] for row in rows})):
        own = [row for row in rows if row[each] == value]
        axes.semilogx([row[along] for row in own], [row["loss"] for row in own], "o", color=f"C{place}")
        held = np.full_like(x, value)
        fitted = law.loss(x, held) if along == "parameters" else law.loss(held, x)
        axes.semilogx(x, fitted, color=f"C{place}", label=f"{short(value)} {each}")


if __name__ == "__main__":
    main()
