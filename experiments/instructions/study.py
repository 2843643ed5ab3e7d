"""What a small model learns from 1,100 instructions: the form of an answer, the loss, and its limits.

    python experiments/instructions/study.py --pretrained RUN [--entries instruction-data.json]

Tunes the run RUN (see experiments/sms_spam/README.md) on the book's instructions: all
weights, with the instruction masked, LoRA, and for comparison a model with random weights; lets each answer
the test split, and scores the answers against the references. Writes result.json and losses.png next to this
file, or into --output, and runs and answers into runs/ there; existing ones are kept. `--quick`
takes seconds and needs neither the instructions nor RUN.
"""

import argparse
import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments.training_runs import (
    Overrides,
    column,
    evaluations,
    lowest,
    run_record,
    settings_of,
    table,
    train_all,
    write_result,
)
from gptpl.cli.main import main as gptpl

HERE = Path(__file__).parent
SHAPE = ("model=gpt_18m", "model.emb_dim=128", "model.n_layers=4")
COMMON = (
    "task=instruct", "optimizer.lr=1e-3", "scheduler=cosine", "trainer.max_epochs=3", "eval_every_n_steps=29",
    "eval_val_batches=null",
)  # fmt: skip
PRETRAINED = "pretrained"
METHODS: dict[str, Overrides] = {
    f"{PRETRAINED}, all": ("tune=all",),
    f"{PRETRAINED}, all, instruction masked": ("tune=all", "data.mask_instruction=true"),
    f"{PRETRAINED}, LoRA": ("tune=lora", "optimizer.lr=3e-3"),
    "random, all": ("tune=all",),
}
QUICK = ("model=tiny", "tokenizer=bytes", "trainer.precision=32-true", "scheduler.warmup_steps=2")
SHOWN = 4
"""Answers that the record shows."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which runs are trained."""

    common: Overrides
    methods: Mapping[str, Overrides]
    max_new_tokens: int

    def runs(self) -> dict[str, Overrides]:
        """Every run's overrides by its name."""
        return {name: (*self.common, *overrides) for name, overrides in self.methods.items()}


def main(arguments: list[str] | None = None) -> None:
    """Trains, answers, scores, writes the record, prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrained", type=Path, help="the run to begin with")
    parser.add_argument("--entries", type=Path, help="a copy of the file, if there is no network")
    parser.add_argument("--quick", action="store_true", help="seconds: shows that the study runs")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the record (default: here)")
    options = parser.parse_args(arguments)
    if options.quick:
        plan = quick_plan(options.output)
    elif options.pretrained is None:
        parser.error("--pretrained is not set: give the run to begin with, see the README")
    else:
        plan = full_plan(options.pretrained.resolve(), options.entries)
    runs = train_all(plan.runs(), options.output / "runs")
    scores = {name: scored(run, plan.max_new_tokens) for name, run in runs.items()}
    rows = [row(name, run, scores[name]) for name, run in runs.items()]
    losses = {name: sorted(column(run, "val/loss").items()) for name, run in runs.items()}
    write_result(
        options.output, runs, settings=settings_of(plan.common), rows=rows, losses=losses,
        answers={name: answers(run)[:SHOWN] for name, run in runs.items()},
    )  # fmt: skip
    figure(losses).savefig(options.output / "losses.png", dpi=80)
    print(table(rows))


def full_plan(pretrained: Path, entries: Path | None) -> Plan:
    """The runs of the record."""
    start = ("init=run", f"init.checkpoint={pretrained}")
    path = f"data.path={entries.resolve()}" if entries else ""
    data = ("data=instruction_file", path, "data.shuffle=false") if entries else ()
    methods = {
        name: (*(start if name.startswith(PRETRAINED) else ()), *overrides)
        for name, overrides in METHODS.items()
    }
    return Plan(common=(*COMMON, *SHAPE, *data), methods=methods, max_new_tokens=64)


def quick_plan(folder: Path) -> Plan:
    """Words to be repeated, for a tiny model without weights to begin with."""
    words = ("sea", "wind", "lamp", "stone", "bird", "rope", "gate", "leaf")
    entries = [
        {"instruction": f"Repeat {a}.", "input": "", "output": a if a == b else f"{a} {b}"}
        for a in words
        for b in words[: 1 + words.index(a)]
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "quick.json").write_text(json.dumps(entries), encoding="utf-8")
    common = (
        *COMMON, *QUICK, "data=instruction_file", f"data.path={folder / 'quick.json'}", "data.batch_size=4",
        "data.template='Q: {{ instruction }}\n'", "data.response_marker='\nA: '", "data.duplicates=keep",
        "trainer.max_epochs=1", "eval_every_n_steps=4",
    )  # fmt: skip
    names = (f"{PRETRAINED}, all", f"{PRETRAINED}, LoRA")
    return Plan(common=common, methods={name: METHODS[name] for name in names}, max_new_tokens=8)


def scored(run: Path, max_new_tokens: int) -> dict[str, Any]:
    """What the answers of the run's best weights to its test split are worth, by their references."""
    responses = run / "responses.json"
    if not (run / "scores.json").exists():
        best = run / "checkpoints" / "best.ckpt"
        _gptpl(
            "respond", f"checkpoint={best}", f"file={run / 'data' / 'test.json'}", f"output={responses}",
            f"max_new_tokens={max_new_tokens}",
        )  # fmt: skip
        _gptpl("judge", f"responses={responses}", "judge=none")
    return json.loads((run / "scores.json").read_text(encoding="utf-8"))


def _gptpl(*arguments: str) -> None:
    """Raises SystemExit, with the output of the command, if it fails."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        status = gptpl(list(arguments))
    if status:
        raise SystemExit(f"gptpl {' '.join(arguments)} ended with status {status}:\n{output.getvalue()}")


def row(name: str, run: Path, scores: Mapping[str, Any]) -> dict[str, Any]:
    """What became of one run."""
    points = evaluations(run)
    best, summary = lowest(points), scores["summary"]
    return {
        "method": name,
        "validation loss before": round(points[0].val_loss, 3),
        "lowest": round(best.val_loss, 3),
        "training loss there": round(best.train_loss, 3),
        "well-formed": round(summary["well_formed"]["value"], 3),
        "exact match": round(summary["exact_match"]["value"], 3),
        "token F1": round(summary["token_f1"]["value"], 3),
        "ROUGE-L": round(summary["rouge_l"]["value"], 3),
        "seconds": run_record(run)["seconds"],
    }


def answers(run: Path) -> list[dict[str, str]]:
    """The test split's instructions, references and answers."""
    return json.loads((run / "responses.json").read_text(encoding="utf-8"))


def figure(losses: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """Validation loss of every run."""
    drawn = Figure(figsize=(7, 4), layout="constrained")
    axes = drawn.subplots()
    for name, points in losses.items():
        axes.plot(*zip(*points, strict=True), marker=".", label=name)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("validation loss (nats per target token)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return drawn


if __name__ == "__main__":
    main()
