"""From texts to rows of tokens with targets, optionally with several short ones in a row, and to batches."""

# B rows in a batch, T tokens in its longest row, n tokens of one example

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from gptpl.data.instructions.splits import Instruction
from gptpl.data.instructions.template import PromptTemplate
from gptpl.data.packing import PackedBatch, packed_places
from gptpl.data.sampler import PADDING
from gptpl.data.splits import check_choice
from gptpl.data.training_data import IGNORED
from gptpl.errors import InputError
from gptpl.text import shortened
from gptpl.tokenizers import TokenIds, Tokenizer

TooLong = Literal["truncate", "drop", "refuse"]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class TokenRow:
    """One example, or several packed: three arrays (n,); `segments` number the texts from 1."""

    inputs: Ids
    targets: Ids
    segments: Ids

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True, kw_only=True)
class EncodedInstructions:
    """The rows of one split, one an example, and how many examples were cut or left out for their length.

    `dropped` counts those left out; `unanswered` those of them whose whole answer was cut off.
    """

    rows: list[TokenRow]
    truncated: int
    dropped: int
    unanswered: int


def encode_instructions(
    instructions: Sequence[Instruction],
    tokenizer: Tokenizer,
    template: PromptTemplate,
    *,
    max_length: int,
    mask_instruction: bool = False,
    too_long: TooLong = "truncate",
) -> EncodedInstructions:
    """Encode each instruction with its answer; the targets are one token later, end-of-text the last.

    With `mask_instruction` only the answer is learned: the targets of the prompt are masked. Of examples
    longer than `max_length` tokens, "truncate" cuts the end off, as the book, and leaves out those without a
    target then; "drop" leaves all out; "refuse" raises InputError.
    """
    check_choice("data.too_long", too_long, TooLong)
    texts = tokenizer.encode_many([template.whole(each) for each in instructions])
    prompts: Sequence[TokenIds | None] = [None] * len(texts)
    if mask_instruction:
        prompts = tokenizer.encode_many(
            [template.prompt(each.instruction, each.input) for each in instructions]
        )
    rows, truncated, unanswered = [], 0, 0
    for each, text, prompt in zip(instructions, texts, prompts, strict=True):
        tokens = text.astype(np.int64)
        if len(tokens) > max_length and too_long == "refuse":
            raise InputError(
                f"the example {shortened(each.instruction, 40)!r} has {len(tokens):,} tokens, more than"
                f" data.max_length={max_length}: shorten it, raise data.max_length, or set"
                " data.too_long=truncate or drop"
            )
        if len(tokens) > max_length and too_long == "drop":
            continue
        masked = 0 if prompt is None else _common_length(tokens, prompt)
        targets = np.append(tokens[1:], tokenizer.eot_id)
        targets[: max(0, masked - 1)] = IGNORED
        row = TokenRow(tokens[:max_length], targets[:max_length], np.ones_like(tokens[:max_length]))
        if (row.targets == IGNORED).all():
            unanswered += 1
            continue
        truncated += len(tokens) > max_length
        rows.append(row)
    dropped = len(instructions) - len(rows)
    return EncodedInstructions(rows=rows, truncated=truncated, dropped=dropped, unanswered=unanswered)


def _common_length(tokens: Ids, prompt: TokenIds) -> int:
    """How many of the first tokens are the prompt's; its last ones may be merged with the answer's first."""
    n = min(len(tokens), len(prompt))
    differing = np.flatnonzero(tokens[:n] != prompt[:n])
    return int(differing[0]) if len(differing) else n


def pack_rows(rows: Sequence[TokenRow], *, max_length: int) -> list[TokenRow]:
    """The examples in as few rows of at most `max_length` tokens as best fit finds; see `packed_places`."""
    packed = []
    for places in packed_places([len(row) for row in rows], capacity=max_length):
        parts = [rows[place] for place in places]
        numbers = [np.full(len(part), number, dtype=np.int64) for number, part in enumerate(parts, 1)]
        packed.append(
            TokenRow(
                np.concatenate([part.inputs for part in parts]),
                np.concatenate([part.targets for part in parts]),
                np.concatenate(numbers),
            )
        )
    return packed


def collate(rows: Sequence[TokenRow | None], *, eot_id: int, packed: bool = False) -> PackedBatch:
    """A batch of the rows, as long as the longest of them; None is a row of padding alone.

    Equals the book's `custom_collate_fn`: of the padding only the first end-of-text is a target.
    """
    B, T = len(rows), max([len(row) for row in rows if row is not None], default=1)
    inputs = np.full((B, T), eot_id, dtype=np.int64)
    targets = np.full((B, T), IGNORED, dtype=np.int64)
    segments = np.zeros((B, T), dtype=np.int64)
    for place, row in enumerate(rows):
        if row is not None:
            inputs[place, : len(row)] = row.inputs
            targets[place, : len(row)] = row.targets
            segments[place, : len(row)] = row.segments
    return PackedBatch(
        torch.from_numpy(inputs),
        torch.from_numpy(targets),
        torch.from_numpy(segments) if packed else None,
        int((segments != 0).sum()),
    )


@dataclass(frozen=True)
class InstructionExamples:
    """The rows of a split as batches; the index PADDING is a row without a target.

    `packed`: a row may hold several texts, and batches have segments.
    """

    rows: Sequence[TokenRow]
    eot_id: int
    packed: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: Sequence[int]) -> PackedBatch:
        """A batch of the rows of these indices."""
        chosen = [None if index == PADDING else self.rows[index] for index in indices]
        return collate(chosen, eot_id=self.eot_id, packed=self.packed)
