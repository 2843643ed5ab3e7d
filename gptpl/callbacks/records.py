"""Records of a run: JSON Lines files, cut back when it resumes; evaluations; every step, to the last bit."""

# B sequences in a batch, T tokens in a sequence

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch

from gptpl.callbacks.after_step import AfterStep, language_module, metric, of_every_rank
from gptpl.evaluation.loss_curves import Divergence
from gptpl.files.durable import append_durably, json_lines, sync_folder, write_atomically
from gptpl.files.run_record import EVALUATIONS_FILE

Record = dict[str, Any]


class RecordFile:
    """A JSON Lines file of records that have a `step`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def start(self, *, step: int) -> None:
        """Drop what was written after `step`, and a last line that an interrupted write left incomplete."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        # Not splitlines(): a text may hold characters, such as U+2028, that it takes for line ends.
        records = [record for record in map(_parsed, text.split("\n")) if record and record["step"] <= step]
        kept = json_lines(records)
        if kept != text:
            write_atomically(self.path, kept, durable=True)

    def append(self, records: Sequence[Record]) -> None:
        """Add the records; they are on disk when this returns, as later checkpoints rely on them."""
        append_durably(self.path, json_lines(records))
        sync_folder(self.path.parent)


def _parsed(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


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


class StepTrace(L.Callback):
    """JSON Lines in `path`: for each step its `batches` (hashes) and `losses` (hexadecimal floats).

    Both lists have an entry for every micro-batch of every rank. A line is written before its step can be
    saved; a resumed run drops the lines after the step it resumes from.
    """

    def __init__(self, *, path: str | Path) -> None:
        super().__init__()
        self._file = RecordFile(Path(path))
        self._batches: list[str] = []
        self._losses: list[str] = []
        self._written_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the file at the step that training starts from."""
        self._written_step = trainer.global_step
        if trainer.is_global_zero:
            self._file.start(step=trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note a micro-batch; write the line of the step that it completes."""
        inputs: torch.Tensor = batch[0]  # (B, T)
        self._batches.append(hashlib.sha256(inputs.cpu().contiguous().numpy().data).hexdigest()[:16])
        self._losses.append(float(outputs["loss"]).hex())
        if trainer.global_step != self._written_step:
            self._written_step = trainer.global_step
            of_all = of_every_rank(trainer, (self._batches, self._losses))
            self._batches, self._losses = [], []
            if trainer.is_global_zero:
                batches = [name for of_rank, _ in of_all for name in of_rank]
                losses = [loss for _, of_rank in of_all for loss in of_rank]
                self._file.append([{"step": trainer.global_step, "batches": batches, "losses": losses}])


class StepTimer(L.Callback):
    """Keeps the seconds of every batch and of the evaluation before the first, None without one.

    A batch is forward, backward and, if it is the last of a step, optimizer; for a GPU it is synchronised.
    """

    def __init__(self) -> None:
        super().__init__()
        self.batch_seconds: list[float] = []
        self.evaluation_seconds: float | None = None
        self._started_seconds = 0.0

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._started_seconds = time.perf_counter()

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the evaluation."""
        self.evaluation_seconds = self._elapsed_seconds(pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock."""
        self._started_seconds = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the batch."""
        self.batch_seconds.append(self._elapsed_seconds(pl_module))

    def _elapsed_seconds(self, pl_module: L.LightningModule) -> float:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        return time.perf_counter() - self._started_seconds


class SeenEnough(Exception):  # noqa: N818 (nothing is wrong)
    """All steps are done, or the loss has diverged."""


class LossOfSteps(AfterStep):
    """Keeps the loss of every optimizer step, in nats per token, before its update.

    Ends the training after `steps`, or when it diverges; `progress` is called after each.
    """

    def __init__(self, steps: int, progress: Callable[[], object]) -> None:
        super().__init__()
        self.losses: list[float] = []
        self._steps = steps
        self._progress = progress
        self._divergence = Divergence()

    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the loss. Raises SeenEnough after the last step."""
        loss = metric(trainer, "train/loss")
        assert loss is not None
        self.losses.append(loss)
        self._progress()
        if self._divergence.after(loss) or len(self.losses) == self._steps:
            raise SeenEnough
