"""What the instructions are, in a few lines for the person who is about to train on them."""

from collections.abc import Mapping, Sequence

from gptpl.data.instructions.rows import Row, Rows
from gptpl.data.instructions.split import InstructionSplits
from gptpl.data.scored_windows import IGNORED
from gptpl.data.training_data import Split

_WORDS: dict[Split, str] = {"train": "training", "val": "validation", "test": "test"}


def instruction_report(
    splits: InstructionSplits,
    rows: Mapping[Split, Rows],
    packed: Mapping[Split, Sequence[Row]],
    *,
    name: str,
    max_length: int,
    batch_size: int,
    packing: bool,
) -> list[str]:
    """Return the lines: a table of the splits, then what happened to the examples.

    `rows` are those of one example each, `packed` what training gets: the same unless `packing`.
    `batch_size` counts rows, over all devices.
    """
    columns = [_column(splits, split, rows[split], packed[split]) for split in rows]
    return [
        f"data: {name}",
        *_table([_WORDS[split] for split in rows], columns, packing=packing),
        *length_lines(rows, max_length),
        *_duplicate_lines(splits),
        *(_packing_lines(rows["train"], packed["train"], max_length, batch_size) if packing else []),
    ]


def _column(splits: InstructionSplits, split: Split, rows: Rows, packed: Sequence[Row]) -> list[int]:
    learned = sum(int((row.targets != IGNORED).sum()) for row in rows.rows)
    return [len(splits.of(split)), sum(map(len, rows.rows)), learned, len(packed)]


def _table(heads: Sequence[str], columns: Sequence[Sequence[int]], *, packing: bool) -> list[str]:
    labels = ["entries", "tokens", "tokens learned (targets)", "rows of packed examples"]
    cells = [["", *heads]]
    cells += [
        [label, *(f"{column[place]:,}" for column in columns)]
        for place, label in enumerate(labels)
        if packing or place < 3
    ]
    first, *others = (max(map(len, column)) for column in zip(*cells, strict=True))
    return [
        f"  {label:<{first}}" + "".join(f"  {value:>{w}}" for value, w in zip(values, others, strict=True))
        for label, *values in cells
    ]


def length_lines(rows: Mapping[Split, Rows], max_length: int) -> list[str]:
    """What was cut or left out of these splits for its length, in lines; none where nothing was."""
    truncated = sum(each.truncated for each in rows.values())
    dropped = sum(each.dropped for each in rows.values())
    unanswered = sum(each.unanswered for each in rows.values())
    lines = []
    if truncated:
        lines.append(
            f"  {_examples(truncated)} longer than data.max_length={max_length} lost the end, with the"
            " end-of-text; data.too_long=drop leaves such out"
        )
    if unanswered:
        lines.append(
            f"  {_examples(unanswered)} left out: within data.max_length={max_length} nothing of the answer"
            " is left to learn"
        )
    if dropped > unanswered:
        lines.append(
            f"  {_examples(dropped - unanswered)} longer than data.max_length={max_length} left out"
            " (data.too_long=drop)"
        )
    return lines


def _duplicate_lines(splits: InstructionSplits) -> list[str]:
    if not splits.shared:
        return []
    found = f"  {_examples(splits.shared)} of later splits ask what an earlier one asks, too: "
    meaning = {
        "remove": "removed there (data.duplicates=remove)",
        "group": "moved there (data.duplicates=group)",
        "keep": "kept, so that validation and test are a little too easy (data.duplicates=keep)",
    }
    return [found + meaning[splits.duplicates]]


def _packing_lines(rows: Rows, packed: Sequence[Row], max_length: int, batch_size: int) -> list[str]:
    used = sum(map(len, packed)) / (len(packed) * max_length)
    unpacked = sum(map(len, rows.rows)) / (len(rows.rows) * max(map(len, rows.rows)))
    each = len(rows.rows) / len(packed)
    return [
        f"  packed once, for all epochs: {used:.1%} of the row's places are used (padded to the longest of"
        f" all: {unpacked:.1%}); {each:.1f} examples a row, {each * batch_size:,.0f} in {batch_size} rows"
    ]


def _examples(number: int) -> str:
    return f"{number:,} example" if number == 1 else f"{number:,} examples"
