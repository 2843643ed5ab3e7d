"""The entries of each split, kept in a run's folder: what the run was trained, validated and tested on."""

import json
from pathlib import Path

from gptpl.data.instructions.split import InstructionSplits, SplitName
from gptpl.files.durable import write_atomically

FOLDER = "data"
FILES: dict[SplitName, str] = {"train": "train.json", "val": "validation.json", "test": "test.json"}


def write_split_files(run_dir: Path, splits: InstructionSplits) -> None:
    """Writes `data/train.json`, `data/validation.json` and, where there is one, `data/test.json`.

    Each is a list of objects with `instruction`, `input` and `output`.
    """
    folder = run_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for split, name in FILES.items():
        if entries := splits.of(split):
            records = [entry.record() for entry in entries]
            write_atomically(folder / name, json.dumps(records, ensure_ascii=False, indent=2) + "\n")


def split_file(run_dir: Path, split: SplitName) -> Path:
    """Where a run keeps a split; it may not be there."""
    return run_dir / FOLDER / FILES[split]
