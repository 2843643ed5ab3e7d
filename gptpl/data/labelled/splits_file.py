"""The splits of a run as CSV files in its folder, to look at and to evaluate on."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from gptpl.data.labelled.examples import Example, Splits
from gptpl.data.labelled.table import Table
from gptpl.data.training_data import Split
from gptpl.errors import InputError
from gptpl.files.durable import write_atomically

FOLDER = "data"
FILES: Mapping[Split, str] = {"train": "train.csv", "val": "validation.csv", "test": "test.csv"}
_COLUMNS = ("text", "label")


def write_splits(run_dir: Path, splits: Splits) -> None:
    """`data/train.csv`, `validation.csv` and `test.csv`, with the columns text and label."""
    folder = run_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name, examples in splits.items():
        lines = io.StringIO(newline="")
        # Every field in quotes: else csv leaves some texts that it does not read back as they were.
        writer = csv.writer(lines, quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writerow(_COLUMNS)
        writer.writerows((example.text, example.label) for example in examples)
        write_atomically(folder / FILES[name], lines.getvalue())


def read_split(run_dir: Path, name: Split) -> list[Example]:
    """The examples of a split that was written. Raises InputError where it was not, or cannot be read."""
    path = run_dir / FOLDER / FILES[name]
    if not path.is_file():
        raise InputError(f"{path} does not exist: give a file with labelled texts as data.path=FILE")
    rows = Table(path=path).rows(*_COLUMNS)
    return [Example(text=row.text, label=str(row.label)) for row in rows]
