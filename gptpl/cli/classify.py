"""`gptpl classify`: the class of a text, or of every text of a file, with the classes' probabilities."""

import csv
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import tee
from pathlib import Path
from typing import Any, TextIO

from omegaconf import DictConfig
from tqdm import tqdm

from gptpl.cli.classifier_input import loaded_classifier
from gptpl.cli.console import RunLog
from gptpl.cli.hydra_app import run_under_hydra
from gptpl.cli.model_input import given_text, piped_text
from gptpl.data.labelled.table import Table
from gptpl.errors import InputError
from gptpl.training.prediction import Prediction, predictions

log = logging.getLogger(__name__)

JSON_FLAG = "--json"
KINDS = (".csv", ".jsonl")
SHOWN_CHARACTERS = 80
"""So much of a text stands beside its class where a person reads it."""

Write = Callable[[str, Prediction], None]


def run(arguments: list[str]) -> int:
    """Prints a line a text to standard output, or writes `output`; returns the exit status."""
    as_json = JSON_FLAG in arguments
    overrides = [argument for argument in arguments if argument != JSON_FLAG]
    run_under_hydra("classify", overrides, lambda cfg: _classify(cfg, as_json=as_json))
    return 0


def _classify(cfg: DictConfig, *, as_json: bool) -> None:
    with RunLog():
        _check(cfg, as_json=as_json)
        given = None if cfg.file is not None else _given(cfg)
        loaded = loaded_classifier(cfg)
        texts = iter([given]) if given is not None else _texts_of(cfg)
        texts, shown = tee(texts)  # what has been read and not answered: one chunk at most
        found = predictions(loaded, texts, batch_size=cfg.batch_size)
        cut_texts = cut_tokens = 0
        with _writer(cfg, loaded.labels, as_json=as_json, alone=given is not None) as write:
            bar = tqdm(shown, unit="text", desc="classifying", disable=None if given is None else True)
            for text, prediction in zip(bar, found, strict=True):
                write(text, prediction)
                cut_texts += prediction.lost_tokens > 0
                cut_tokens += prediction.lost_tokens
        if cut_texts:
            log.warning(
                "%s longer than the %s tokens that the classifier reads: %s tokens at the end were not read",
                "1 text is" if cut_texts == 1 else f"{cut_texts:,} texts are", f"{loaded.max_length:,}",
                f"{cut_tokens:,}",
            )  # fmt: skip
        if cfg.output is not None:
            print(cfg.output)


def _check(cfg: DictConfig, *, as_json: bool) -> None:
    """Refuses settings that do not go together, before a model is read."""
    if cfg.text is not None and cfg.file is not None:
        raise InputError(f"text= and file={cfg.file} are both set: give one of them")
    if cfg.batch_size < 1:
        raise InputError(f"batch_size={cfg.batch_size} takes no text: give 1 or more")
    if cfg.output is None:
        return
    output = Path(cfg.output).expanduser()
    if as_json:
        raise InputError(f"--json and output={cfg.output} are both set: leave --json out, or the file")
    if output.suffix not in KINDS:
        raise InputError(f"output={cfg.output} is no {' or '.join(KINDS)} file: give one")
    if output.exists():
        raise InputError(f"output={cfg.output} is there already: give another file, or remove it")
    if not output.absolute().parent.is_dir():
        raise InputError(f"output={cfg.output} cannot be made: its folder does not exist, make it first")


def _given(cfg: DictConfig) -> str:
    """The one text that is set or piped in."""
    text = given_text(cfg.text, None, key="text")
    text = piped_text("text") if text is None else text
    if text is None:
        raise InputError("text is not set: give text='...', or file=FILE, or pipe a text in")
    if not text or text.isspace():
        raise InputError("text is empty: give a text to classify")
    return text


def _texts_of(cfg: DictConfig) -> Iterator[str]:
    """The texts of the file, read as they are asked for."""
    columns = None if cfg.columns is None else list(cfg.columns)
    table = Table(path=Path(cfg.file).expanduser(), format=cfg.format, columns=columns, keys="")
    return (row.text for row in table.rows(cfg.text_column))


@contextmanager
def _writer(cfg: DictConfig, labels: Sequence[str], *, as_json: bool, alone: bool) -> Iterator[Write]:
    """What takes an answer: prints it, or adds it to a file that appears when all are in it."""
    if cfg.output is None:
        yield _print_json(labels) if as_json else _print_all(labels) if alone else _print_line(labels)
        return
    output = Path(cfg.output).expanduser()
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("x", encoding="utf-8", newline="") as file:
            yield _csv(file, labels) if output.suffix == ".csv" else _jsonl(file, labels)
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)


def _print_all(labels: Sequence[str]) -> Write:
    """For one text: every class with its probability, the most likely first."""
    width = max(map(len, labels))

    def write(text: str, prediction: Prediction) -> None:
        for label, chance in sorted(
            zip(labels, prediction.probabilities, strict=True), key=lambda it: -it[1]
        ):
            print(f"{label:<{width}}  {chance:.4f}", flush=True)

    return write


def _print_line(labels: Sequence[str]) -> Write:
    """For many texts: the class, its probability, and the beginning of the text."""
    width = max(map(len, labels))

    def write(text: str, prediction: Prediction) -> None:
        shown = " ".join(text.split())
        shown = shown if len(shown) <= SHOWN_CHARACTERS else f"{shown[: SHOWN_CHARACTERS - 3]}..."
        chance = prediction.probabilities[prediction.best]
        tqdm.write(f"{labels[prediction.best]:<{width}}  {chance:.4f}  {shown}")

    return write


def _print_json(labels: Sequence[str]) -> Write:
    return lambda text, prediction: tqdm.write(_json(text, prediction, labels))


def _jsonl(file: TextIO, labels: Sequence[str]) -> Write:
    return lambda text, prediction: print(_json(text, prediction, labels), file=file)


def _json(text: str, prediction: Prediction, labels: Sequence[str]) -> str:
    record: dict[str, Any] = {
        "label": labels[prediction.best],
        "probabilities": dict(zip(labels, prediction.probabilities, strict=True)),
        "lost_tokens": prediction.lost_tokens,
        "text": text,
    }
    return json.dumps(record, ensure_ascii=False)


def _csv(file: TextIO, labels: Sequence[str]) -> Write:
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(["label", *(f"probability_{label}" for label in labels), "lost_tokens", "text"])

    def write(text: str, prediction: Prediction) -> None:
        rows.writerow([labels[prediction.best], *prediction.probabilities, prediction.lost_tokens, text])

    return write
