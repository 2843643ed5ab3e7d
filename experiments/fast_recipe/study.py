"""How long `experiment=fast_recipe` takes to the validation loss that nanoGPT's recipe reaches in 15 minutes.

    python experiments/fast_recipe/study.py [--steps 1680] [--seeds 123]

Trains with nanoGPT's recipe, then with gptpl's, one after the other: the same model, tokenizer, text and
order of sequences. Nothing else should run meanwhile. Writes result.json and curves.png next to this file, or
into --output, and the runs into runs/ there; a finished run is not trained again.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

HERE = Path(__file__).parent
NANOGPT, FAST = "nanoGPT's recipe", "experiment=fast_recipe"
BOTH = ("eval_train_batches=1", "callbacks=[throughput,learning_rate,checkpoint_last,progress_bar]")
RECIPES = {
    NANOGPT: (
        "data=python_stdlib", "model=gpt_18m", "model.drop_rate=0", "data.batch_size=4",
        "optimizer=adamw", "optimizer.lr=6e-4", "optimizer.betas=[0.9,0.95]", "optimizer.weight_decay=0.1",
        "scheduler=cosine", "scheduler.warmup_steps=100", "scheduler.min_lr=6e-5",
        "trainer.gradient_clip_val=1.0", "trainer.max_epochs=null",
        "eval_every_n_steps=115", "eval_val_batches=40",  # of 4 sequences: the same as 20 of 8
    ),
    FAST: ("experiment=fast_recipe",),
}  # fmt: skip
Curve = list[tuple[float, int, float]]
"""Minutes since the first step began, evaluations included; tokens; validation loss."""


def main() -> None:
    """Trains, compares, writes the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1680, help="of nanoGPT's recipe (default 1680)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[123], help="a pair of runs for each")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the record (default: here)")
    options = parser.parse_args()
    lengths = {NANOGPT: (f"trainer.max_steps={options.steps}",), FAST: ()}
    curves: dict[str, list[Curve]] = {name: [] for name in RECIPES}
    for seed in options.seeds:
        for name, overrides in RECIPES.items():
            run = options.output / "runs" / f"{'fast' if name == FAST else 'nanogpt'}_seed_{seed}"
            train(run, *overrides, *lengths[name], f"seed={seed}")
            curves[name].append(curve(run))
    result = {
        "torch": torch.__version__,
        "hardware": json.loads((run / "run.json").read_text(encoding="utf-8"))["hardware"],
        "date": time.strftime("%Y-%m-%d"),
        "seeds": options.seeds,
        "curves": curves,
        "minutes_to_the_same_loss": [
            minutes_to(fast, slow[-1][2]) for slow, fast in zip(curves[NANOGPT], curves[FAST], strict=True)
        ],
    }
    (options.output / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(curves).savefig(options.output / "curves.png", dpi=150)
    print(table(result))


def train(run: Path, *overrides: str) -> None:
    """`gptpl train` into that folder, unless a finished run lies there."""
    record = run / "run.json"
    if record.exists() and "finished" in json.loads(record.read_text(encoding="utf-8")):
        return
    subprocess.run([sys.executable, "-m", "gptpl", "train", *BOTH, *overrides, f"run_dir={run}"], check=True)


def curve(run: Path) -> Curve:
    """Of a run's TensorBoard file, which has the time of every number."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    began = events.Scalars("val/loss")[0].wall_time  # the evaluation before the first step
    tokens = {point.step: point.value for point in events.Scalars("train/tokens_seen")} | {0: 0}
    return [
        ((point.wall_time - began) / 60, int(tokens[point.step]), point.value)
        for point in events.Scalars("val/loss")
    ]


def minutes_to(points: Curve, loss: float) -> float | None:
    """When the curve is at `loss` for the first time, in a straight line between evaluations; None: never."""
    for (before, _, above), (after, _, below) in itertools.pairwise(points):
        if below <= loss:
            return before + (after - before) * (above - loss) / (above - below)
    return None


def table(result: dict[str, Any]) -> str:
    """A row for each pair of runs."""
    lines = [
        "| seed | nanoGPT's recipe: minutes, tokens, validation loss | fast_recipe at that loss after |"
        " speed-up | fast_recipe at its end |",
        "|---|---|---|---|---|",
    ]
    curves = result["curves"]
    rows = zip(
        result["seeds"], curves[NANOGPT], curves[FAST], result["minutes_to_the_same_loss"], strict=True
    )
    for seed, slow, fast, minutes in rows:
        (end, tokens, loss), (last, fast_tokens, fast_loss) = slow[-1], fast[-1]
        reached = ("never", "-") if minutes is None else (f"{minutes:.1f} min", f"{end / minutes:.2f}")
        lines.append(
            f"| {seed} | {end:.1f} min, {tokens / 1e6:.2f}M, {loss:.3f} | {reached[0]} | {reached[1]} |"
            f" {last:.1f} min, {fast_tokens / 1e6:.2f}M, {fast_loss:.3f} |"
        )
    return "\n".join(lines)


def plot(curves: dict[str, list[Curve]]) -> Figure:
    """Validation loss against minutes and against tokens."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for name, colour in ((NANOGPT, "tab:gray"), (FAST, "tab:blue")):
        for number, points in enumerate(curves[name]):
            minutes, tokens, losses = zip(*points, strict=True)
            label = name if number == 0 else None
            panels[0].plot(minutes, losses, color=colour, marker=".", label=label)
            panels[1].plot([count / 1e6 for count in tokens], losses, color=colour, marker=".")
        panels[0].axhline(curves[NANOGPT][0][-1][2], color="tab:gray", linewidth=0.8, linestyle="--")
    panels[0].set(xlabel="minutes, evaluations included", ylabel="validation loss (nats per token)")
    panels[1].set(xlabel="million tokens")
    panels[0].set_ylim(top=4.5)
    panels[0].legend()
    return figure


if __name__ == "__main__":
    main()
