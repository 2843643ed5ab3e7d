"""What content filters find and cost: a trained classifier, a word list and patterns against SMS spam.

    python experiments/content_filter/study.py [--sms SMSSpamCollection]

Trains a small classifier from random weights on the SMS Spam Collection, at its natural rate of spam; makes a
word list and chooses patterns by the same training messages; and lets all of them filter the test messages:
precision, recall and F1 by threshold or length of the list, time per message and token, and the time that
models take to write a token. Writes result.json and filters.png next to this file, or into --output, and the
run into runs/ there; a finished run is not trained again. `--quick` takes seconds.
"""

import argparse
import csv
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from experiments.sms_spam.study import quick_plan
from experiments.training_runs import Overrides, run_record, settings_of, table, train_all, write_result
from gptpl.filters import AllOf, Filter, Patterns, PersonalData, WordList
from gptpl.generation import SamplingRules, complete
from gptpl.model import GPTConfig, GPTModel
from gptpl.runs.classifier_rule import ClassifierRule
from gptpl.runs.loaded import load_classifier
from gptpl.tokenizers import Tokenizer

HERE = Path(__file__).parent
COMMON: Overrides = (
    "task=classify", "data=sms_spam", "data.balance=none", "data.stratified=true", "data.batch_size=16",
    "model=gpt_18m", "model.emb_dim=128", "model.n_layers=4", "model.drop_rate=0.3", "tune=all",
    "optimizer.lr=1e-3", "scheduler.warmup_steps=20", "trainer.max_epochs=3", "eval_every_n_steps=122",
    "~callbacks.early_stopping",
)  # fmt: skip
THRESHOLDS = (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99)
WORDS = (5, 10, 20, 50, 100, 200)
PATTERNS = {
    "money": r"[$\u00a3\u20ac]\s?\d",
    "long number": r"\b\d{5,}\b",
    "pence": r"\b\d+p\b",
    "web address": r"(?i)\bwww\.|\bhttps?:|\.com\b|\.co\.uk\b",
    "code": r"\b(?=[A-Z]*\d)(?=\d*[A-Z])[A-Z\d]{4,}\b",
    "capitals": r"\b[A-Z]{4,}\b",
    "exclamation": r"!",
    "date": r"\b\d{1,2}/\d{1,2}/\d{2,4}\b",
}
"""Read off training messages; those are used whose precision there is `PRECISION` or more."""
PRECISION = 0.95
"""The least fraction of the training messages with a word or pattern that are spam."""
WRITERS = {
    "7M, as the classifier": {"emb_dim": 128, "n_layers": 4, "n_heads": 4, "context_length": 256},
    "18M": {"emb_dim": 256, "n_layers": 6, "n_heads": 4, "context_length": 256},
    "124M": {"emb_dim": 768, "n_layers": 12, "n_heads": 12, "context_length": 256},
}
"""Shapes of models that write; their weights do not matter for the time."""

Texts = list[tuple[str, bool]]
"""Texts, each with whether a filter should find something."""


def main(arguments: list[str] | None = None) -> None:
    """Trains, filters, writes the record, prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sms", type=Path, help="a copy of the file, if there is no network")
    parser.add_argument("--quick", action="store_true", help="seconds: shows that the study runs")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the record (default: here)")
    options = parser.parse_args(arguments)
    data = () if options.sms is None else (f"data.path={options.sms.resolve()}",)
    settings, label, writers = (*COMMON, *data, "seed=1"), "spam", WRITERS
    if options.quick:
        settings, label = (*quick_plan(options.output).common, "seed=1"), "code"
        writers = dict(list(WRITERS.items())[:1])
    runs = train_all({"seed 1": settings}, options.output / "runs")
    run = runs["seed 1"]
    training, test = split(run, "train", label), split(run, "test", label)
    classifier = load_classifier(run, device="cpu")
    chosen = chosen_patterns(training)
    lists = {count: WordList(words=telling_words(training, count)) for count in WORDS}
    plain: dict[str, Filter] = {f"{count} words": each for count, each in lists.items()}
    plain["patterns"] = Patterns(patterns=chosen)
    plain["50 words and patterns"] = AllOf(filters={"words": lists[50], "patterns": plain["patterns"]})
    plain["phone numbers"] = PersonalData(kinds=["phone number"])
    rows = [
        {"filter": name} | scores([bool(each.verdict(text).findings) for text, _ in test], test)
        for name, each in plain.items()
    ]
    number = classifier.labels.index(label)
    chances = [each.probabilities[number] for each in classifier.predictions(text for text, _ in test)]
    rows += [
        {"filter": f"classifier, {threshold:g}"} | scores([each >= threshold for each in chances], test)
        for threshold in THRESHOLDS
    ]
    rule = ClassifierRule(checkpoint=classifier, labels=[label])
    by_filter = [bool(rule.verdict(text).findings) for text, _ in test]
    differing = sum(found != (each >= rule.threshold) for found, each in zip(by_filter, chances, strict=True))
    timed = {"classifier": rule, **{name: plain[name] for name in ("50 words", "200 words", "patterns")}}
    timed |= {"personal data": PersonalData()}
    few = [text for text, _ in test][: 20 if options.quick else 200]
    costs = [{"filter": name} | cost(each, few, classifier.tokenizer) for name, each in timed.items()]
    written = {
        name: writing_time(shape, classifier.tokenizer, tokens=8 if options.quick else 64)
        for name, shape in writers.items()
    }
    write_result(
        options.output, runs, settings=settings_of(settings), threads=torch.get_num_threads(),
        texts={"train": count_of(training), "test": count_of(test)},
        words=telling_words(training, 20), patterns=chosen, rows=rows, costs=costs,
        verdicts_unlike_predictions=differing,
        milliseconds_per_written_token=written,
        seconds_of_training=round(run_record(run)["seconds"]),
    )  # fmt: skip
    figure(rows).savefig(options.output / "filters.png", dpi=80)
    print(table([shown(each) for each in rows]), "", table(costs), "", sep="\n")
    print(table([{"model": name, "ms per token written": each} for name, each in written.items()]))


def split(run: Path, name: str, label: str) -> Texts:
    """A split that the run keeps; the texts with this label are to be found."""
    with (run / f"data/{name}.csv").open(newline="", encoding="utf-8") as file:
        return [(row["text"], row["label"] == label) for row in csv.DictReader(file)]


def count_of(texts: Texts) -> dict[str, int]:
    """Number of texts, and of those to find."""
    return {"texts": len(texts), "to find": sum(wanted for _, wanted in texts)}


# --- rules made from training texts ---------------------------------------------------------------------


def telling_words(training: Texts, count: int) -> list[str]:
    """The most frequent words in texts to find, of those words that are in five or more and in few others."""
    inside, outside = Counter[str](), Counter[str]()
    for text, wanted in training:
        (inside if wanted else outside).update(set(re.findall(r"[^\W\d_]{3,}", text.lower())))
    several = [word for word in inside if inside[word] >= 5]
    telling = [word for word in several if inside[word] >= PRECISION * (inside[word] + outside[word])]
    return sorted(telling or several, key=lambda word: (-inside[word], word))[:count]


def chosen_patterns(training: Texts) -> dict[str, str]:
    """The patterns that find little else in the training texts; the best one if all do."""

    def precision(name: str) -> float:
        found = [wanted for text, wanted in training if re.search(PATTERNS[name], text)]
        return sum(found) / max(1, len(found))

    names = [name for name in PATTERNS if precision(name) >= PRECISION] or [max(PATTERNS, key=precision)]
    return {name: PATTERNS[name] for name in names}


# --- scores and times -----------------------------------------------------------------------------------


def scores(found: Sequence[bool], texts: Texts) -> dict[str, float]:
    """Precision, recall and F1 of a filter."""
    wanted = [each for _, each in texts]
    hits = sum(one and other for one, other in zip(found, wanted, strict=True))
    precision, recall = hits / max(1, sum(found)), hits / max(1, sum(wanted))
    f1 = 2 * hits / max(1, sum(found) + sum(wanted))
    return {"precision": round(precision, 4), "recall": round(recall, 4), "f1": round(f1, 4)}


def cost(filter: Filter, texts: Sequence[str], tokenizer: Tokenizer) -> dict[str, Any]:
    """Time of the filter on texts that come token by token: the least of three passes."""
    streams = [[tokenizer.decode([int(token)]) for token in tokenizer.encode(text)] for text in texts]

    def judge() -> None:
        for pieces in streams:
            stream = filter.stream()
            for piece in pieces:
                stream.feed(piece)
            stream.finish()

    seconds = least_time(judge)
    tokens = sum(map(len, streams))
    return {
        "ms per text": round(1e3 * seconds / len(texts), 3),
        "ms per token": round(1e3 * seconds / tokens, 4),
        "tokens per text": round(tokens / len(texts), 1),
    }


def writing_time(shape: Mapping[str, int], tokenizer: Tokenizer, *, tokens: int) -> float:
    """Milliseconds per token that a model of this shape takes to continue a short prompt."""
    torch.manual_seed(1)
    net = GPTModel(GPTConfig(vocab_size=tokenizer.vocab_size, drop_rate=0.0, qkv_bias=False, **shape)).eval()
    rules = SamplingRules(banned_tokens=(tokenizer.eot_id,))
    settings = {"rules": rules, "max_new_tokens": tokens}
    seconds = least_time(lambda: complete(net, tokenizer, ["Every effort moves you"], **settings))
    return round(1e3 * seconds / tokens, 2)


def least_time(action: Callable[[], object]) -> float:
    """The shortest of three runs, in seconds."""

    def times() -> Iterator[float]:
        for _ in range(3):
            start = time.perf_counter()
            action()
            yield time.perf_counter() - start

    return min(times())


# --- for people -----------------------------------------------------------------------------------------


def shown(row: Mapping[str, Any]) -> dict[str, str]:
    """A row for people."""
    return {
        "filter": row["filter"],
        "precision": f"{100 * row['precision']:.1f} %",
        "recall": f"{100 * row['recall']:.1f} %",
        "F1": f"{row['f1']:.3f}",
    }


def figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Precision against recall."""
    drawn = Figure(figsize=(7, 4.5), layout="constrained")
    axes = drawn.subplots()
    curves = {
        "classifier, by threshold": [each for each in rows if each["filter"].startswith("classifier")],
        "word list, by length": [each for each in rows if each["filter"].endswith(" words")],
    }
    for name, curve in curves.items():
        recall, precision = ([100 * each[score] for each in curve] for score in ("recall", "precision"))
        axes.plot(recall, precision, "o-", label=name)
        for each in (curve[0], curve[-1]):
            number = re.sub(r"[^\d.]", "", each["filter"])
            axes.annotate(number, (100 * each["recall"], 100 * each["precision"]), fontsize=8)
    for each in rows:
        if not any(each in curve for curve in curves.values()):
            axes.plot(100 * each["recall"], 100 * each["precision"], "s", label=each["filter"])
    axes.set_xlabel("recall in percent")
    axes.set_ylabel("precision in percent")
    axes.grid(alpha=0.3)
    axes.legend()
    return drawn


if __name__ == "__main__":
    main()
