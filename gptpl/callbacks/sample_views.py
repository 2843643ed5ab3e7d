"""Generated text as the log and the loggers show it: it may hold any character."""

from collections.abc import Sequence

import lightning as L

from gptpl.callbacks.record_file import Record
from gptpl.training.loggers import log_table


def show_samples(trainer: L.Trainer, name: str, records: Sequence[Record]) -> None:
    """The samples of one step to the loggers, as the table `sample/<name>`."""
    columns = ("prompt", "continuation")
    rows = [[record[column] for column in columns] for record in records]
    log_table(trainer.loggers, f"sample/{name}", columns, rows, records[0]["step"])
