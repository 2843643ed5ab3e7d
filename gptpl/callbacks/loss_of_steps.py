"""The loss of every step of a training, which ends where it diverges."""

from collections.abc import Callable

import lightning as L

from gptpl.callbacks.after_step import AfterStep
from gptpl.callbacks.readings import metric
from gptpl.training.loss_curves import Divergence


class SeenEnough(Exception):  # noqa: N818 (nothing is wrong)
    """All steps are done, or the loss has diverged: more of them show nothing more."""


class LossOfSteps(AfterStep):
    """Keeps the loss of every optimizer step; ends the training after so many, or where it diverges.

    Attributes:
        losses: of the steps so far, in nats per token, each before its update.

    Args:
        steps: to see at most.
        progress: called after every step.
    """

    def __init__(self, steps: int, progress: Callable[[], object]) -> None:
        super().__init__()
        self.losses: list[float] = []
        self._steps = steps
        self._progress = progress
        self._divergence = Divergence()

    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes the loss. Raises SeenEnough after the last step that is wanted."""
        loss = metric(trainer, "train/loss")
        assert loss is not None
        self.losses.append(loss)
        self._progress()
        if self._divergence.after(loss) or len(self.losses) == self._steps:
            raise SeenEnough
