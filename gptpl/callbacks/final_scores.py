"""The scores of a finished classifier: the test texts, looked at once, with the best weights."""

import logging
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np

from gptpl.callbacks.after_step import of_every_rank, sum_of_ranks
from gptpl.callbacks.checkpoints import BestCheckpoint
from gptpl.checkpoints.format import read_checkpoint
from gptpl.data.classification.datamodule import LabelledDataModule
from gptpl.data.sampler import rank_share
from gptpl.evaluation.classifier import accuracy_text, evaluate_classifier
from gptpl.training.classification import ClassificationModule, named_scores
from gptpl.training.sharding import FullyShardedStrategy

log = logging.getLogger(__name__)


class FinalScores(L.Callback):
    """Scores the whole training, validation and test splits when training has ended, for the run's record.

    The weights are those of `best.ckpt`, if the run keeps that, else the last; afterwards the module has its
    own again. Each rank scores a part of the texts. `final_metrics` are then `test/loss`, `test/accuracy`,
    `test/f1`, `test/f1_<label>`, `test/calibration_error`, `best_train/accuracy` and `best_val/accuracy`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.final_metrics: dict[str, float] = {}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Score the splits that the data have."""
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(pl_module, ClassificationModule) or not isinstance(datamodule, LabelledDataModule):
            return
        if isinstance(trainer.strategy, FullyShardedStrategy):
            log.info("the test texts are not scored here (the model is sharded): use gptpl evaluate")
            return
        kept = (
            callback.best_model_path
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, BestCheckpoint) and callback.best_model_path
        )
        best = next(kept, None)
        if not all(of_every_rank(trainer, best is not None and Path(best).is_file())):
            if best is not None:
                log.warning("the last weights are scored: not every process can read %s", best)
            best = None
        before = None
        if best is not None:
            before = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}
            pl_module.load_state_dict(read_checkpoint(Path(best), verified=True)["state_dict"])
        for split, texts in datamodule.load().items():
            B, ranks = datamodule.batch_size, {"rank": trainer.global_rank, "world_size": trainer.world_size}
            numbers = rank_share(np.arange(len(texts)), batch_size=B, **ranks).tolist()
            with pl_module.uncompiled():
                found = evaluate_classifier(
                    pl_module.net,
                    (texts.__getitems__(numbers[start : start + B]) for start in range(0, len(numbers), B)),
                    of_all_ranks=partial(sum_of_ranks, trainer),
                )
            if split == "test":
                scores = named_scores(found.scores, pl_module.labels, "test/")
                self.final_metrics |= {"test/loss": found.loss} | scores
            else:
                self.final_metrics[f"best_{split}/accuracy"] = found.scores.accuracy
            if trainer.is_global_zero:
                log.info(
                    "%s, %s weights: %s, F1 %.3f, calibration error %.3f, loss %.4f, %s texts",
                    split, "best" if best else "last", accuracy_text(found.confusion, pl_module.labels),
                    found.scores.macro_f1, found.scores.calibration_error, found.loss, f"{found.texts:,}",
                )  # fmt: skip
        if before is not None:
            pl_module.load_state_dict(before)
