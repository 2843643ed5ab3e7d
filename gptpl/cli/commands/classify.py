"""Which class texts belong to, by a trained classifier.

examples:
  gptpl classify checkpoint=RUN text='You have won a prize'        # each class with its probability
  gptpl classify checkpoint=RUN file=messages.csv output=labels.csv  # a whole file, of any size
  gptpl classify checkpoint=RUN file=messages.txt --json           # a text on each line, a JSON object a line
  echo 'See you at six' | gptpl classify checkpoint=RUN            # a piped text

flags:
  --json    print a JSON object for each text

RUN is a run of task=classify; its best weights are used. The model reads the beginning of a long text.
"""

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gptpl.cli.console import Console
from gptpl.cli.model_input import composed, given_model, given_text, piped_text
from gptpl.data.labelled.table import Table
from gptpl.errors import InputError
from gptpl.runs.loaded import load_classifier
from gptpl.training.evaluation import Prediction, check_prediction_file, prediction_file

SHOWN_CHARACTERS = 80
"""So much of a text stands beside its class where a person reads it."""


def run(arguments: list[str]) -> int:
    """Prints a line a text to standard output, or writes `output`; returns the exit status."""
    cfg, flags = composed("classify", arguments, flags={"--json": "json"})
    as_json = "json" in flags
    if cfg is None:
        return 0
    with Console():
        output = None if cfg["output"] is None else Path(cfg["output"]).expanduser()
        _check(cfg, output, as_json=as_json)
        alone = cfg["file"] is None
        texts = [_given(cfg)] if alone else _texts_of(cfg)
        model = load_classifier(**given_model(cfg))
        found = model.predictions(texts, batch_size=cfg["batch_size"])
        bar = partial(tqdm, unit="text", desc="classifying", disable=alone or None)
        if output is not None:
            with prediction_file(output, model.labels) as write:
                for prediction in bar(found):
                    write(prediction)
            print(cfg["output"])
            return 0
        show = _print_json if as_json else _print_all if alone else _print_line
        for prediction in bar(found):
            show(prediction)
    return 0


def _check(cfg: dict[str, Any], output: Path | None, *, as_json: bool) -> None:
    """Refuses settings that do not go together, before a model is read."""
    if cfg["text"] is not None and cfg["file"] is not None:
        raise InputError(f"text= and file={cfg['file']} are both set: give one of them")
    if cfg["batch_size"] < 1:
        raise InputError(f"batch_size={cfg['batch_size']} takes no text: give 1 or more")
    if output is not None and as_json:
        raise InputError(f"--json and output={output} are both set: leave --json out, or the file")
    if output is not None:
        check_prediction_file(output)


def _given(cfg: dict[str, Any]) -> str:
    """The one text that is set or piped in."""
    text = given_text(cfg["text"], None, key="text")
    text = piped_text("text") if text is None else text
    if text is None:
        raise InputError("text is not set: give text='...', or file=FILE, or pipe a text in")
    if not text or text.isspace():
        raise InputError("text is empty: give a text to classify")
    return text


def _texts_of(cfg: dict[str, Any]) -> Iterable[str]:
    """The texts of the file, read as they are asked for."""
    path = Path(cfg["file"]).expanduser()
    table = Table(path=path, format=cfg["format"], columns=cfg["columns"], keys="")
    return (row.text for row in table.rows(cfg["text_column"]))


def _print_all(prediction: Prediction) -> None:
    """For one text: every class with its probability, the most likely first."""
    chances = zip(prediction.labels, prediction.probabilities, strict=True)
    width = max(map(len, prediction.labels))
    for label, chance in sorted(chances, key=lambda pair: -pair[1]):
        print(f"{label:<{width}}  {chance:.4f}", flush=True)


def _print_line(prediction: Prediction) -> None:
    """For many texts: the class, its probability, and the beginning of the text."""
    shown = " ".join(prediction.text.split())
    shown = shown if len(shown) <= SHOWN_CHARACTERS else f"{shown[: SHOWN_CHARACTERS - 3]}..."
    width, chance = max(map(len, prediction.labels)), max(prediction.probabilities)
    tqdm.write(f"{prediction.label:<{width}}  {chance:.4f}  {shown}")


def _print_json(prediction: Prediction) -> None:
    tqdm.write(json.dumps(prediction.record(), ensure_ascii=False))
