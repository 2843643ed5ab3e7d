"""Which of a model's weights are trained."""

from collections.abc import Mapping
from typing import Any

from gptpl.model import GPTBackbone

ALL: Mapping[str, Any] = {"name": "all"}


class TuneAll:
    """All of them."""

    def apply(self, net: GPTBackbone) -> None:
        """Leaves the model as it is."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the choice, as plain data."""
        return dict(ALL)
