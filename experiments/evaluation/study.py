"""Which tasks a small model learns, and when: suites over the checkpoints of a run, with two baselines.

    python experiments/evaluation/study.py RUN [--limit 300]

The baselines are the same model with random weights, and counts of pairs of tokens of the training text. The
scores of every question are kept in RUN/evaluations: interrupted and started again, it continues.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from gptpl.checkpoints.loading import LoadedCheckpoint, load_model
from gptpl.evaluation.memorisation import training_corpus
from gptpl.evaluation.suite import ModelFacts, SuiteResult
from gptpl.model import GPTModel
from gptpl.runs.suites import suite_of

HERE = Path(__file__).parent
SUITES = ("core", "bits_per_byte", "bias")
SHOWN = 8  # checkpoints, at most
RANDOM, PAIRS = "random weights", "pairs of tokens"


class TokenPairs(nn.Module):
    """Next-token probabilities from counts of pairs, mixed with those of single tokens."""

    def __init__(self, tokens: np.ndarray, vocab_size: int, context_length: int) -> None:
        super().__init__()
        self.vocab_size, self.context_length = vocab_size, context_length
        first, second = (
            torch.from_numpy(tokens[:-1].astype(np.int64)),
            torch.from_numpy(tokens[1:].astype(np.int64)),
        )
        pairs = (
            torch.bincount(first * vocab_size + second, minlength=vocab_size**2).view(vocab_size, -1).float()
        )
        alone = (torch.bincount(first, minlength=vocab_size) + 1.0) / (len(first) + vocab_size)
        mass = 10.0  # pairs that the single tokens count as
        mixed = (pairs + mass * alone) / (pairs.sum(-1, keepdim=True) + mass)
        self.log_p = nn.Parameter(mixed.log(), requires_grad=False)  # (V, V)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.log_p[tokens]  # (B, T, V)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--limit", type=int, default=300, help="questions of each task")
    arguments = parser.parse_args()
    models = checkpoints(arguments.run)
    record: dict[str, Any] = {"limit": arguments.limit, "suites": {}}
    for name in SUITES:
        suite = suite_of(name, limit=arguments.limit)
        found: dict[str, SuiteResult] = {}
        for label, loaded in models.items():
            facts = ModelFacts.of(label, loaded.net, loaded.tokenizer, loaded.step)
            found[label] = suite.of_model(loaded).run(
                loaded.net,
                loaded.tokenizer,
                model=facts,
                name=name,
                folder=arguments.run / "evaluations/study" / facts.sha256[:16],
                progress=lambda each, total, desc, label=label: tqdm(
                    each, total=total, desc=f"{label}: {desc}"
                ),
            )
        record["suites"][name] = {label: figures(result) for label, result in found.items()}
    (HERE / "result.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(record["suites"])


def checkpoints(run: Path) -> dict[str, LoadedCheckpoint]:
    """Random weights, pairs of tokens, and checkpoints of a run by their step, which double about."""
    files = sorted((run / "checkpoints").glob("step-*.ckpt"))
    if not files:
        raise SystemExit(f"{run} holds no checkpoints/step-*.ckpt: give a run that kept them")
    wanted = {round((len(files) - 1) * (2**at - 1) / (2 ** (SHOWN - 1) - 1)) for at in range(SHOWN)}
    loaded = [load_model(files[at]) for at in sorted(wanted)]
    last = loaded[-1]
    torch.manual_seed(0)
    config = last.net.config
    blank = dataclasses.replace(last, net=GPTModel(config).eval(), step=0)
    corpus = training_corpus(last)
    counted = TokenPairs(np.asarray(corpus.train), config.vocab_size, config.context_length)
    pairs = dataclasses.replace(last, net=counted, step=0)
    return {RANDOM: blank, PAIRS: pairs} | {f"step {each.step:,}": each for each in loaded}


def figures(result: SuiteResult) -> dict[str, Any]:
    tasks = {}
    for name, task in result.tasks.items():
        metrics = {
            key: [metric.value, metric.low, metric.high, metric.chance]
            for key, metric in task.metrics.items()
        }
        tasks[name] = {
            "primary": task.primary,
            "questions": task.questions,
            "beginning_cut": task.shortened,
            "not_asked": task.left_out,
            "seconds": round(task.seconds, 1),
            "metrics": rounded(metrics),
            "groups": rounded({group: [n, m.value, m.low, m.high] for group, (n, m) in task.groups.items()}),
        }
    return {"step": result.model.step, "centred": result.centred, "tasks": tasks}


def rounded(rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    return {
        key: [None if value is None or math.isnan(value) else round(value, 4) for value in row]
        for key, row in rows.items()
    }


def draw(suites: Mapping[str, Any]) -> None:
    core, bits = suites["core"], suites["bits_per_byte"]
    names = [name for name in next(iter(core.values()))["tasks"] if name != "lambada"]
    figure, axes = plt.subplots(3, 4, figsize=(13, 8.5), sharex=True)
    labels = [label for label in core if label != PAIRS]
    steps = [core[label]["step"] for label in labels]
    places = axes.flat
    for axis, name in zip(places, names, strict=False):
        rows = [core[label]["tasks"][name] for label in labels]
        values = np.array([row["metrics"][row["primary"]] for row in rows], dtype=float) * 100
        axis.fill_between(steps, values[:, 1], values[:, 2], alpha=0.25, linewidth=0)
        axis.plot(steps, values[:, 0], marker="o", markersize=3, label="the run")
        axis.axhline(values[0, 3], color="#a3341f", linewidth=1, label="chance")
        pairs = core[PAIRS]["tasks"][name]
        axis.axhline(
            100 * pairs["metrics"][pairs["primary"]][0], color="#8c8c90", linestyle="--", label=PAIRS
        )
        axis.set_title(f"{name}, {rows[0]['primary']} (%)", fontsize=9)
    for axis, (title, source, metric) in zip(
        axes.flat[len(names) :],
        [
            ("right answers, bits per byte", core, "bits_per_byte"),
            ("free answers, bits per byte", bits, "bits_per_byte"),
        ],
        strict=False,
    ):
        for name in next(iter(source.values()))["tasks"]:
            values = [source[label]["tasks"][name]["metrics"][metric][0] for label in labels]
            axis.plot(steps, values, marker=".", label=name, linewidth=1)
        axis.set_title(title, fontsize=9)
        axis.legend(fontsize=6, ncols=2)
    axes.flat[0].legend(fontsize=7)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(HERE / "evaluation.png", dpi=110)


if __name__ == "__main__":
    main()
