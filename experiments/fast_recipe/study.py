"""How long `experiment=fast_recipe` takes to the validation loss that nanoGPT's recipe reaches in 15 minutes.

    python experiments/fast_recipe/study.py [--seeds 1 2 3] [--recipes nanogpt fast ...]

Trains with nanoGPT's recipe, then with gptpl's, one after the other: the same model, tokenizer, text and
order of sequences. Other recipes: `random`, gptpl's without counted embeddings, `modern`, gptpl's with
`model=gpt_modern`, and `nanogpt_small`, nanoGPT's with the learning rate and beta2 of its configuration for a
small model. Nothing else should run meanwhile. Runs go to runs/ next to this file, or in --output, where a
finished one is not trained again; result.json and curves.png are made of all that lie there.
"""

import argparse
import itertools
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

HERE = Path(__file__).parent
ALL = ("eval_train_batches=1", "callbacks=[throughput,learning_rate,checkpoint_last,progress_bar]")
NANOGPT, FAST = "nanogpt", "fast"


def nanogpt(*, lr: float = 6e-4, beta2: float = 0.95) -> tuple[str, ...]:
    """Settings of nanoGPT's recipe, with this learning rate and beta2; without steps and evaluations."""
    return (
        "data=python_stdlib", "model=gpt_18m", "model.drop_rate=0", "data.batch_size=4",
        "optimizer=adamw", f"optimizer.lr={lr:g}", f"optimizer.betas=[0.9,{beta2}]",
        "optimizer.weight_decay=0.1",
        "scheduler=cosine", "scheduler.warmup_steps=100", f"scheduler.min_lr={lr / 10:g}",
        "trainer.gradient_clip_val=1.0", "trainer.max_epochs=null",
    )  # fmt: skip


# 15 minutes. Evaluated about once a minute, on 160 sequences: 40 batches of 4, or 20 of 8.
NANOGPT_LENGTH = ("trainer.max_steps=1680", "eval_every_n_steps=115", "eval_val_batches=40")
RECIPES = {
    NANOGPT: (*nanogpt(), *NANOGPT_LENGTH),
    "nanogpt_small": (*nanogpt(lr=1e-3, beta2=0.99), *NANOGPT_LENGTH),
    FAST: ("experiment=fast_recipe",),
    "random": ("experiment=fast_recipe", "init=random"),
    "modern": ("experiment=fast_recipe", "model=gpt_modern"),
}
NAMES = {
    NANOGPT: "nanoGPT's recipe",
    "nanogpt_small": "the same, its rates for a small model",
    FAST: "experiment=fast_recipe",
    "random": "experiment=fast_recipe init=random",
    "modern": "experiment=fast_recipe model=gpt_modern",
}
COLOURS = {
    NANOGPT: "tab:gray",
    "nanogpt_small": "black",
    FAST: "tab:blue",
    "random": "tab:cyan",
    "modern": "tab:orange",
}
Curve = list[tuple[float, int, float]]
"""Minutes of counting for `init=cooccurrence`, steps and evaluations; tokens; validation loss."""


def main() -> None:
    """Trains, compares, writes the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3], help="(default 1 2 3)")
    parser.add_argument(
        "--recipes", nargs="*", choices=tuple(RECIPES), default=(NANOGPT, FAST), help="(default: the pair)"
    )
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the record (default: here)")
    options = parser.parse_args()
    for seed, name in itertools.product(options.seeds, options.recipes):
        train(folder_of(options.output, name, seed), *RECIPES[name], f"seed={seed}")
    runs = finished_runs(options.output)
    if NANOGPT not in runs:
        parser.error("nothing to compare with: no run of nanogpt has finished")
    result = record(runs)
    (options.output / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(result["curves"]).savefig(options.output / "curves.png", dpi=150)
    print(table(result))


def folder_of(output: Path, name: str, seed: int) -> Path:
    """The folder of a run."""
    return output / "runs" / f"{name}_seed_{seed}"


def finished_runs(output: Path) -> dict[str, dict[int, Path]]:
    """The folders of the finished runs of each recipe, by seed."""
    found: dict[str, dict[int, Path]] = {}
    for name in RECIPES:
        for path in sorted((output / "runs").glob(f"{name}_seed_*")):
            if "finished" in run_record(path):
                found.setdefault(name, {})[int(path.name.rpartition("_")[2])] = path
    return found


def train(run: Path, *overrides: str) -> None:
    """`gptpl train` into that folder, unless a finished run lies there."""
    if "finished" not in run_record(run):
        command = [sys.executable, "-m", "gptpl", "train", *ALL, *overrides, f"run_dir={run}"]
        subprocess.run(command, check=True)


def run_record(run: Path) -> dict[str, Any]:
    """The run's run.json; empty where there is none."""
    path = run / "run.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def record(runs: dict[str, dict[int, Path]]) -> dict[str, Any]:
    """Curves of all runs, and when each is at the loss with which nanoGPT's recipe ends with that seed."""
    curves = {name: {seed: curve(run) for seed, run in of_seed.items()} for name, of_seed in runs.items()}
    ends = {seed: points[-1] for seed, points in curves[NANOGPT].items()}
    speed_ups: dict[str, dict[int, float | None]] = {}
    for name in set(curves) - {NANOGPT}:
        minutes = {seed: minutes_to(curves[name][seed], ends[seed][2]) for seed in ends.keys() & curves[name]}
        speed_ups[name] = {seed: at and ends[seed][0] / at for seed, at in sorted(minutes.items())}
    one = run_record(next(iter(runs[NANOGPT].values())))
    return {
        "torch": torch.__version__,
        "hardware": one["hardware"],
        "date": time.strftime("%Y-%m-%d"),
        "precision": {
            name: sorted({run_record(run)["performance"]["precision"] for run in of_seed.values()})
            for name, of_seed in runs.items()
        },
        "curves": curves,
        "speed_ups": speed_ups,
    }


def curve(run: Path) -> Curve:
    """Of a run's TensorBoard file, which has the time of every number."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    counted = re.search(r"init=cooccurrence: .* ([\d.]+) s$", (run / "train.log").read_text("utf-8"), re.M)
    if counted is None and run_record(run)["start"]["init"] == "cooccurrence":
        raise SystemExit(f"{run}/train.log does not say how long counting took")
    before = 0.0 if counted is None else float(counted[1])
    began = events.Scalars("val/loss")[0].wall_time - before  # that evaluation is before the first step
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
    """A row for each run, and the median of each recipe's speed-ups."""
    lines = [
        "| recipe | seed | minutes | tokens trained on | validation loss | speed-up |",
        "|---|---|---|---|---|---|",
    ]
    for name, of_seed in result["curves"].items():
        ratios = result["speed_ups"].get(name, {})
        for seed, points in of_seed.items():
            minutes, tokens, loss = points[-1]
            ratio = ratios.get(seed)
            reached = "" if name == NANOGPT else "never" if ratio is None else f"{ratio:.2f}"
            lines.append(
                f"| {NAMES[name]} | {seed} | {minutes:.1f} | {tokens / 1e6:.2f}M | {loss:.3f} | {reached} |"
            )
        if len(ratios) > 2:
            median = statistics.median(ratio or 0.0 for ratio in ratios.values())
            lines.append(f"| {NAMES[name]}, median | | | | | {f'**{median:.2f}**' if median else 'never'} |")
    return "\n".join(lines)


def plot(curves: dict[str, dict[int, Curve]]) -> Figure:
    """Validation loss against minutes and against tokens."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for name, of_seed in curves.items():
        for number, points in enumerate(of_seed.values()):
            minutes, tokens, losses = zip(*points, strict=True)
            label = NAMES[name] if number == 0 else None
            panels[0].plot(minutes, losses, color=COLOURS[name], marker=".", label=label)
            panels[1].plot([count / 1e6 for count in tokens], losses, color=COLOURS[name], marker=".")
    for points in curves[NANOGPT].values():
        panels[0].axhline(points[-1][2], color=COLOURS[NANOGPT], linewidth=0.8, linestyle="--")
    panels[0].set(xlabel="minutes, with counting and evaluations", ylabel="validation loss (nats per token)")
    panels[1].set(xlabel="million tokens trained on")
    panels[0].set_ylim(top=4.5)
    panels[0].legend()
    return figure


if __name__ == "__main__":
    main()
