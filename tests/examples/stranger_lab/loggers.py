"""A logger that knows Lightning alone."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger


class LinesLogger(Logger):
    """Each row of metrics as a line of JSON in `lines.jsonl`.

    Args:
        save_dir: the folder of the file.
        digits: of every number.
    """

    def __init__(self, *, save_dir: str, digits: int = 6) -> None:
        super().__init__()
        self.path = Path(save_dir) / "lines.jsonl"
        self.digits = digits

    @property
    def name(self) -> str:
        return "lines"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        rounded = {name: round(float(value), self.digits) for name, value in metrics.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **rounded}) + "\n")

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass
