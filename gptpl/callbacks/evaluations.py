"""`evaluations.jsonl`: what every evaluation of a run measured, whatever loggers it has."""

from pathlib import Path

import lightning as L

from gptpl.callbacks.readings import language_module
from gptpl.callbacks.record_file import RecordFile
from gptpl.files.run_record import EVALUATIONS_FILE


class RecordEvaluations(L.Callback):
    """One JSON object an evaluation: `step`, `tokens_seen`, `metrics`.

    The metrics are all that the evaluation logged whose names begin with "val" or "eval". Sweeps and reports
    read them. A resumed run drops the evaluations from the step it resumes from on, which it makes again.
    Every run has this callback; the file lies in the Trainer's `default_root_dir`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._file: RecordFile | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin a file that is not cut back yet."""
        self._file = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Cut the file back to the step that a resumed run starts from."""
        if trainer.is_global_zero:
            self._opened(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the evaluation that has just been measured; it is on disk when this returns."""
        if trainer.state.fn != "fit" or not trainer.is_global_zero:
            return
        # What training has logged is there, too, but not in a run that was resumed just now.
        metrics = trainer.callback_metrics.items()
        measured = {name: float(value) for name, value in metrics if name.startswith(("val", "eval"))}
        record = {"step": trainer.global_step, "tokens_seen": language_module(pl_module).tokens_seen}
        self._opened(trainer).append([record | {"metrics": measured}])

    def _opened(self, trainer: L.Trainer) -> RecordFile:
        """The file, cut back if this is the first time; a new run evaluates before it starts to train."""
        if self._file is None:
            self._file = RecordFile(Path(trainer.default_root_dir) / EVALUATIONS_FILE)
            self._file.start(step=trainer.global_step - 1)
        return self._file
