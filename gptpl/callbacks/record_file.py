"""JSON Lines files of a run: appended while it trains, and cut back when it resumes; its evaluations."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L

from gptpl.callbacks.after_step import language_module
from gptpl.files.durable import append_durably, json_lines, sync_folder, write_atomically
from gptpl.files.run_record import EVALUATIONS_FILE

Record = dict[str, Any]


class RecordFile:
    """A JSON Lines file of records that have a `step`; samples also a `prompt` and a `strategy`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._keys: set[str] = set()

    def start(self, *, step: int) -> None:
        """Drop what was written after `step`, and a last line that an interrupted write left incomplete."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        # Not splitlines(): a text may hold characters, such as U+2028, that it takes for line ends.
        records = [record for record in map(_parsed, text.split("\n")) if record and record["step"] <= step]
        self._keys = {_key(record) for record in records}
        kept = json_lines(records)
        if kept != text:
            write_atomically(self.path, kept, durable=True)

    def __contains__(self, record: Record) -> bool:
        """Whether the file has a sample of the same step, prompt and strategy."""
        return _key(record) in self._keys

    def append(self, records: Sequence[Record]) -> None:
        """Add the records; they are on disk when this returns, as later checkpoints rely on them."""
        append_durably(self.path, json_lines(records))
        sync_folder(self.path.parent)
        self._keys.update(map(_key, records))


def _parsed(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _key(record: Record) -> str:
    return json.dumps([record["step"], record.get("prompt"), record.get("strategy")], sort_keys=True)


class RecordEvaluations(L.Callback):
    """`evaluations.jsonl`, whatever loggers a run has: `step`, `tokens_seen`, `metrics` of each evaluation.

    The metrics are all that the evaluation logged whose names begin with "val" or "eval", for sweeps and
    reports. A resumed run drops the evaluations from its first step on, and makes them again. Every run has
    this callback; the file is in the Trainer's `default_root_dir`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._file: RecordFile | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin with a file that is not cut back yet."""
        self._file = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Cut the file back to the step that a resumed run starts from."""
        if trainer.is_global_zero:
            self._opened(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the evaluation; it is on disk when this returns."""
        if trainer.state.fn != "fit" or not trainer.is_global_zero:
            return
        metrics = trainer.callback_metrics.items()
        measured = {name: float(value) for name, value in metrics if name.startswith(("val", "eval"))}
        record = {"step": trainer.global_step, "tokens_seen": language_module(pl_module).tokens_seen}
        self._opened(trainer).append([record | {"metrics": measured}])

    def _opened(self, trainer: L.Trainer) -> RecordFile:
        """The file, cut back the first time: a new run evaluates before training starts."""
        if self._file is None:
            self._file = RecordFile(Path(trainer.default_root_dir) / EVALUATIONS_FILE)
            self._file.start(step=trainer.global_step - 1)
        return self._file
