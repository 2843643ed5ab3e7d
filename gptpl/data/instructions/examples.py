"""The examples of one split, as batches by their numbers."""

from collections.abc import Sequence

from torch.utils.data import Dataset

from gptpl.data.instructions.rows import InstructionBatch, Row, collate
from gptpl.data.scored_windows import PADDING


class InstructionExamples(Dataset[InstructionBatch]):
    """Rows by number; the number PADDING is a row without a target.

    Args:
        rows: of the split, packed or not.
        eot_id: what fills up shorter rows.
        packed: whether a row may hold several texts, which the batches then say.
    """

    def __init__(self, rows: Sequence[Row], *, eot_id: int, packed: bool = False) -> None:
        self.rows = rows
        self._eot_id = eot_id
        self._packed = packed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> InstructionBatch:
        """A batch of one row."""
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> InstructionBatch:
        """A batch of these rows; torch's DataLoader finds this by its name."""
        chosen = [None if index == PADDING else self.rows[index] for index in indices]
        return collate(chosen, eot_id=self._eot_id, packed=self._packed)
