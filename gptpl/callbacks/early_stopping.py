"""Ends a training that no longer gets better."""

from typing import Any

from lightning.pytorch.callbacks import EarlyStopping as LightningEarlyStopping


class EarlyStopping(LightningEarlyStopping):
    """Lightning's, except that a resumed run goes by the `patience` of its own configuration.

    Lightning's takes it from the checkpoint, and a `patience` given to the resumed run would be ignored.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the best score so far and the evaluations since."""
        super().load_state_dict(state_dict | {"patience": self.patience})
