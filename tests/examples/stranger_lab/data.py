"""A source of text with a setting of its own, and a LightningDataModule that knows nothing of gptpl."""

import csv
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from gptpl.data.sources import Corpus


class CsvColumn(Corpus):
    """The texts of one column of a CSV file, a line each.

    Args:
        path: the file.
        column: which column.
    """

    name = "csv_column"

    def __init__(self, path: str, *, column: str) -> None:
        self.path = Path(path)
        self.column = column

    def files(self) -> list[Path]:
        return [self.path]

    def read(self, path: Path) -> str:
        with path.open(newline="", encoding="utf-8") as file:
            return "\n".join(row[self.column] for row in csv.DictReader(file))


class CountingData(L.LightningDataModule):
    """Rows of bytes that count up, from a start at random, for a task that takes (inputs, targets).

    Args:
        rows: rows to train on, and a quarter of them to validate on.
        length: tokens of a row.
        batch_size: rows of a batch.
        noise: how often a token is another one; drawn anew each time a batch is made.
    """

    def __init__(self, *, rows: int = 64, length: int = 16, batch_size: int = 8, noise: float = 0.0) -> None:
        super().__init__()
        self.rows, self.length, self.batch_size, self.noise = rows, length, batch_size, noise

    def setup(self, stage: str) -> None:
        self.train, self.val = (self._counted(rows) for rows in (self.rows, self.rows // 4))

    def _counted(self, rows: int) -> TensorDataset:
        start = torch.randint(0, 200, (rows, 1))
        return TensorDataset(start + torch.arange(self.length + 1))

    def _batch(self, rows: list[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor]:
        tokens = torch.stack([row for (row,) in rows])
        tokens = torch.where(torch.rand(tokens.shape) < self.noise, torch.randint_like(tokens, 256), tokens)
        return tokens[:, :-1], tokens[:, 1:]

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True, collate_fn=self._batch)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.val, batch_size=self.batch_size, collate_fn=self._batch)
