"""Classify texts with a trained classifier.

examples:
  gptpl classify checkpoint=RUN text='You have won a prize'        # each class with its probability
  gptpl classify checkpoint=RUN file=messages.csv output=labels.csv  # a whole file, of any size
  gptpl classify checkpoint=RUN file=messages.txt --json           # a text on each line, JSON lines
  echo 'See you at six' | gptpl classify checkpoint=RUN            # a piped text

flags:
  --json    print a JSON object for each text

RUN is a run of task=classify; its best weights are used. The model reads the beginning of a long text.
"""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from gptpl.cli.arguments import Arguments, configured
from gptpl.cli.model_input import given_model, given_text, only_one, settings_of
from gptpl.data.sources.records import TextTable
from gptpl.errors import InputError
from gptpl.text import shortened

if TYPE_CHECKING:
    from gptpl.evaluation.classifier import Prediction


@configured("classify", flags=["--json"])
def run(given: Arguments) -> None:
    """Prints a line for each text, or writes `output`."""
    from gptpl.evaluation.classifier import check_prediction_file, prediction_file
    from gptpl.runs.loaded import load_classifier

    cfg = settings_of(given)
    output = None if cfg["output"] is None else Path(cfg["output"]).expanduser()
    only_one({"text": cfg["text"], "file": cfg["file"]})
    if output is not None and given.flags:
        raise InputError(f"--json and output={output} are both set: give one of them")
    if output is not None:
        check_prediction_file(output)
    alone = cfg["file"] is None
    if alone:
        text = given_text(cfg["text"], key="text")
        if not text or text.isspace():
            wrong = "is not set" if text is None else "is empty"
            raise InputError(f"text {wrong}: give text='...', or file=FILE, or pipe a text in")
        texts = iter([text])
    else:
        path = Path(cfg["file"]).expanduser()
        table = TextTable(path=path, format=cfg["format"], columns=cfg["columns"], keys="")
        texts = (row.text for row in table.rows(cfg["text_column"]))  # read as they are asked for
    model = load_classifier(**given_model(cfg))
    predictions = model.predictions(texts, batch_size=cfg["batch_size"])
    bar = partial(tqdm, unit="text", desc="classifying", disable=alone or None)
    if output is not None:
        with prediction_file(output, model.labels) as write:
            for prediction in bar(predictions):
                write(prediction)
        print(cfg["output"])
        return
    for prediction in bar(predictions):
        record = prediction.record() if given.flags else None
        tqdm.write(json.dumps(record, ensure_ascii=False) if record else _shown(prediction, alone=alone))


def _shown(prediction: "Prediction", *, alone: bool) -> str:
    """Every class with its probability, the most likely first; of many texts the first line of each."""
    width = max(map(len, prediction.labels))
    pairs = zip(prediction.labels, prediction.probabilities, strict=True)
    ranked = sorted(pairs, key=lambda pair: -pair[1])
    lines = [f"{label:<{width}}  {probability:.4f}" for label, probability in ranked]
    return "\n".join(lines) if alone else f"{lines[0]}  {shortened(prediction.text, 80)}"
