"""What pretraining and the choice of the trained weights are worth: SMS messages, spam or ham.

    python experiments/sms_spam/study.py --pretrained RUN [--sms SMSSpamCollection]

Fine-tunes a classifier on the balanced SMS Spam Collection with three seeds each: from random weights, and
from the run RUN (experiments/sms_spam/README.md says how it was made) with all weights, LoRA, the last block
or the head alone; and fits a TF-IDF baseline (scikit-learn) to the same messages. Writes result.json and
scores.png next to this file, or into --output, and the runs into runs/ there; a finished run is not trained
again. `--quick` takes seconds and needs neither the messages nor RUN.
"""

import argparse
import csv
import inspect
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments.training_runs import Overrides, run_record, settings_of, table, train_all, write_result

HERE = Path(__file__).parent
SHAPE = ("model=gpt_18m", "model.emb_dim=128", "model.n_layers=4")
COMMON = (
    "task=classify", "scheduler.warmup_steps=20", "data.batch_size=16", "trainer.max_epochs=5",
    "model.drop_rate=0.3", "eval_every_n_steps=65",
    "~callbacks.early_stopping", "~callbacks.checkpoint_best",  # the last weights are what counts
)  # fmt: skip
PRETRAINED = "pretrained"
METHODS: dict[str, Overrides] = {
    "random, all": ("tune=all", "optimizer.lr=1e-3"),
    f"{PRETRAINED}, all": ("tune=all", "optimizer.lr=1e-3"),
    f"{PRETRAINED}, LoRA": ("tune=lora", "optimizer.lr=3e-3"),
    f"{PRETRAINED}, last block": ("tune=last_block", "optimizer.lr=1e-3"),
    f"{PRETRAINED}, head": ("tune=head", "optimizer.lr=1e-2"),
}
BOOKS_SPLIT = "pretrained, all, the book's split"
SEEDS = (1, 2, 3)
QUICK = ("model=tiny", "tokenizer=bytes", "trainer.precision=32-true", "eval_every_n_steps=10")
SCORES = ("test/accuracy", "test/f1", "test/calibration_error", "val/accuracy")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which runs are trained."""

    common: Overrides
    methods: Mapping[str, Overrides]
    seeds: Sequence[int]

    def runs(self) -> dict[str, Overrides]:
        """Every run's name and overrides; the splits are the same in all of them."""
        return {
            f"{method}, seed {seed}": (*self.common, *overrides, f"seed={seed}")
            for method, overrides in self.methods.items()
            for seed in self.seeds
        }


def main(arguments: list[str] | None = None) -> None:
    """Trains, compares, writes the record, prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrained", type=Path, help="the run to begin with")
    parser.add_argument("--sms", type=Path, help="a copy of the file, if there is no network")
    parser.add_argument("--quick", action="store_true", help="seconds: shows that the study runs")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the record (default: here)")
    options = parser.parse_args(arguments)
    if options.quick:
        plan = quick_plan(options.output)
    elif options.pretrained is None:
        parser.error("--pretrained is not set: give the run to begin with, see the README")
    else:
        plan = full_plan(options.pretrained.resolve(), options.sms)
    runs = train_all(plan.runs(), options.output / "runs")
    records = {name: run_record(run) for name, run in runs.items()}
    rows = [
        row(method, [records[f"{method}, seed {seed}"] for seed in plan.seeds]) for method in plan.methods
    ]
    rows.append(baseline(next(iter(runs.values())) / "data"))
    write_result(
        options.output, runs, settings=settings_of(plan.common), rows=rows,
        each_run={name: measured(record) for name, record in records.items()},
    )  # fmt: skip
    figure(rows).savefig(options.output / "scores.png", dpi=80)
    print(table([shown(each) for each in rows]))


def full_plan(pretrained: Path, sms: Path | None) -> Plan:
    """The runs of the record."""
    start = ("init=run", f"init.checkpoint={pretrained}")
    methods = {
        name: (*(start if name.startswith(PRETRAINED) else ()), *overrides)
        for name, overrides in METHODS.items()
    }
    methods[BOOKS_SPLIT] = (*methods[f"{PRETRAINED}, all"], "data.duplicates=keep")
    data = ("data=sms_spam", *(() if sms is None else (f"data.path={sms.resolve()}",)))
    return Plan(common=(*COMMON, *SHAPE, *data), methods=methods, seeds=SEEDS)


def quick_plan(folder: Path) -> Plan:
    """Sentences of the tale against lines of Python, with a tiny model and no weights to begin with."""
    text = (resources.files("gptpl.data.texts") / "tale.txt").read_text(encoding="utf-8")
    tale = [" ".join(part.split()) for part in text.split(".")]
    code = [line.strip() for line in inspect.getsource(argparse).splitlines()]
    pairs = [("tale", part[:60]) for part in tale if len(part) > 20][:150]
    pairs += [("code", line[:60]) for line in code if len(line) > 20][:150]
    random.Random(1).shuffle(pairs)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "quick.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("label", "text"), *pairs])
    data = ("data=labelled", f"data.path={folder / 'quick.csv'}")
    methods = {"random, all": METHODS["random, all"]}
    return Plan(common=(*COMMON, *QUICK, *data, "trainer.max_epochs=2"), methods=methods, seeds=(1, 2))


def measured(record: Mapping[str, Any]) -> dict[str, float]:
    """Scores and time of one run."""
    return {name: record["metrics"][name] for name in SCORES} | {"seconds": record["seconds"]}


def row(method: str, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and range of what all seeds gave."""
    found = [measured(record) for record in records]
    means = {name: round(statistics.mean(each[name] for each in found), 4) for name in (*SCORES, "seconds")}
    accuracies = [each["test/accuracy"] for each in found]
    return {"method": method, **means, "lowest": min(accuracies), "highest": max(accuracies)}


def baseline(data: Path) -> dict[str, Any]:
    """Logistic regression on TF-IDF of words and pairs of words, of the same training messages."""
    name = "TF-IDF, logistic regression"
    if find_spec("sklearn") is None:
        return {"method": f"{name}: scikit-learn is not installed"}
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score
    from sklearn.pipeline import make_pipeline

    (texts, labels), (test_texts, test_labels) = _read(data / "train.csv"), _read(data / "test.csv")
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10))
    predicted = model.fit(texts, labels).predict(test_texts)
    right = sum(a == b for a, b in zip(predicted, test_labels, strict=True)) / len(test_labels)
    f1 = float(f1_score(test_labels, predicted, average="macro"))
    return {"method": name, "test/accuracy": right, "test/f1": round(f1, 4)}


def _read(path: Path) -> tuple[list[str], list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [row["text"] for row in rows], [row["label"] for row in rows]


def shown(row: Mapping[str, Any]) -> dict[str, str]:
    """A row for people."""

    def share(name: str) -> str:
        return f"{100 * row[name]:.1f} %" if name in row else "-"

    spread = f" ({share('lowest')} to {share('highest')})" if "lowest" in row else ""
    return {
        "": row["method"],
        "test accuracy": share("test/accuracy") + spread,
        "F1": f"{row['test/f1']:.3f}" if "test/f1" in row else "-",
        "calibration error": f"{row['test/calibration_error']:.3f}"
        if "test/calibration_error" in row
        else "-",
        "seconds": f"{row['seconds']:.0f}" if "seconds" in row else "-",
    }


def figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Test accuracy of every method, the seeds' range as a line."""
    drawn = Figure(figsize=(8, 0.5 * len(rows) + 1.2), layout="constrained")
    axes = drawn.subplots()
    scored = [each for each in rows if "test/accuracy" in each]
    for place, each in enumerate(scored):
        axes.plot(100 * each["test/accuracy"], place, "o", color="tab:blue")
        if "lowest" in each:
            axes.plot([100 * each["lowest"], 100 * each["highest"]], [place, place], color="tab:blue")
    axes.set_yticks(range(len(scored)), [each["method"] for each in scored])
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy in percent: mean, and range of the seeds")
    axes.grid(alpha=0.3)
    return drawn


if __name__ == "__main__":
    main()
