"""The run's configuration beside the best that it reached, as TensorBoard's HPARAMS tab shows it."""

from collections.abc import Mapping
from typing import Any

import lightning as L
import numpy as np

from gptpl.callbacks.after_step import language_module, metric
from gptpl.files.run_record import LOSS
from gptpl.files.run_settings import flat_settings
from gptpl.training.loggers import log_hyperparameters


class Hyperparameters(L.Callback):
    """Sends the configuration to the loggers once, and at every evaluation the best values so far.

    They are called `best_val/loss` and, for each metric that the module says is to be high
    (`metrics: Mapping[str, "min" | "max"]`), `best_<metric>`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._best: dict[str, float] = {}
        self._logged = False

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Updates the best values and shows them."""
        if trainer.state.fn != "fit":
            return
        for name, best_of in _shown(pl_module).items():
            value = metric(trainer, name)
            if value is not None:
                # A loss that is not a number must not pass for the best.
                self._best[f"best_{name}"] = float(best_of(value, self._best.get(f"best_{name}", value)))
        settings = {} if self._logged else flat_settings(language_module(pl_module).run_config)
        log_hyperparameters(trainer.loggers, settings, self._best, trainer.global_step)
        self._logged = True

    def state_dict(self) -> dict[str, Any]:
        """The best values so far."""
        return {"best": dict(self._best)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from the best values of the run that is resumed."""
        earlier = {"hp/val_loss": f"best_{LOSS}"}  # the name in checkpoints of gptpl 0.1.0
        lowest = state_dict.get("lowest", {})
        self._best = {new: lowest[old] for old, new in earlier.items() if old in lowest}
        self._best |= state_dict.get("best", {})


def _shown(module: L.LightningModule) -> dict[str, Any]:
    """Metrics with the function that takes the better of two values, and the number where one is none."""
    declared: Mapping[str, str] = getattr(module, "metrics", {})
    return {LOSS: np.fmin} | {name: np.fmax for name, mode in declared.items() if mode == "max"}
