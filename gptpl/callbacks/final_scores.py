"""What a finished classifier is worth: the test texts, looked at once, with the best weights."""

import logging
from pathlib import Path

import lightning as L

from gptpl.callbacks.checkpoints import BestCheckpoint
from gptpl.checkpoints.format import read_checkpoint
from gptpl.data.classification.datamodule import LabelledDataModule
from gptpl.data.splits import Split
from gptpl.evaluation.losses import ClassifierEvaluation, accuracy_text, evaluate_classifier
from gptpl.training.classification import ClassificationModule, named_scores
from gptpl.training.sharding import FullyShardedStrategy

log = logging.getLogger(__name__)


class FinalScores(L.Callback):
    """Scores the whole training, validation and test splits when training has ended, for the run's record.

    With the weights of `best.ckpt`, where the run keeps that, else with the last; the module has its own
    weights back afterwards. The first process does it alone. `final_metrics` are then `test/loss`,
    `test/accuracy`, `test/f1`, `test/f1_<label>`, `test/calibration_error`, and `best_train/accuracy` and
    `best_val/accuracy`, of all texts of those splits with the same weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self.final_metrics: dict[str, float] = {}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Score what there is; the test only where the data have one."""
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(pl_module, ClassificationModule) or not isinstance(datamodule, LabelledDataModule):
            return
        if not trainer.is_global_zero:
            return
        if isinstance(trainer.strategy, FullyShardedStrategy):
            log.info("the test texts are not scored here (trainer.strategy=fsdp): use gptpl evaluate")
            return
        before = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}
        kept = (
            callback.best_model_path
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, BestCheckpoint) and callback.best_model_path
        )
        best = next(kept, None)
        if best is not None:
            pl_module.load_state_dict(read_checkpoint(Path(best))["state_dict"])
        for split in datamodule.load():
            found = _scored(pl_module, datamodule, split)
            if split == "test":
                scores = named_scores(found.scores, pl_module.labels, "test/")
                self.final_metrics |= {"test/loss": found.loss} | scores
            else:
                self.final_metrics[f"best_{split}/accuracy"] = found.scores.accuracy
            log.info(
                "%s, %s weights: %s, F1 %.3f, calibration error %.3f, loss %.4f, %s texts",
                split, "best" if best else "last", accuracy_text(found.confusion, pl_module.labels),
                found.scores.macro_f1, found.scores.calibration_error, found.loss, f"{found.texts:,}",
            )  # fmt: skip
        pl_module.load_state_dict(before)


def _scored(
    module: ClassificationModule, datamodule: LabelledDataModule, split: Split
) -> ClassifierEvaluation:
    examples, size = datamodule.examples(split), datamodule.batch_size
    starts = range(0, len(examples), size)
    batches = (examples.__getitems__(range(len(examples))[start : start + size]) for start in starts)
    return evaluate_classifier(module.net, batches)
