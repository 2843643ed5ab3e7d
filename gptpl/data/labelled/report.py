"""What labelled texts are, in a few lines for the person who is about to train on them."""

from collections.abc import Mapping, Sequence

from gptpl.data.labelled.encoded import Cut
from gptpl.data.labelled.examples import SPLITS, label_counts
from gptpl.data.labelled.prepare import Prepared
from gptpl.data.tokenizers import Tokenizer
from gptpl.data.training_data import Split

MOST_CLASSES = 12
"""So many classes have a line of their own."""


def labelled_report(
    prepared: Prepared,
    lengths: Mapping[Split, Sequence[int]],
    cut: Mapping[Split, Cut],
    *,
    name: str,
    tokenizer: Tokenizer,
    batch_size: int,
) -> list[str]:
    """Return a table of the splits, by class, then what was done to the texts.

    `lengths` are tokens of each text as it is used; `batch_size` the texts of a training batch, over all
    devices.
    """
    total = sum(map(len, prepared.splits.values()))
    title = (
        f"data: {name}, {total:,} texts of {len(prepared.classes)} classes, {tokenizer.name} tokenizer"
        f" ({tokenizer.vocab_size:,} tokens)"
    )
    counts = {split: label_counts(examples) for split, examples in prepared.splits.items()}
    rows = [("", *(SPLITS[split] for split in counts))]
    for label in prepared.classes[:MOST_CLASSES]:
        rows.append((label, *(f"{found.get(label, 0):,}" for found in counts.values())))
    if more := prepared.classes[MOST_CLASSES:]:
        left = [f"{sum(found.get(label, 0) for label in more):,}" for found in counts.values()]
        rows.append((f"{len(more)} more classes", *left))
    rows.append(("tokens of the longest text", *(f"{max(found):,}" for found in lengths.values())))
    batches = [
        # training drops the last short batch
        len(found) // batch_size if split == "train" else -(-len(found) // batch_size)
        for split, found in lengths.items()
    ]
    rows.append((f"batches of {batch_size:,} texts", *(f"{number:,}" for number in batches)))
    return [title, *_table(rows), *(f"  {remark}" for remark in (*_cut_remarks(cut), *prepared.remarks))]


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(["", row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]


def _cut_remarks(cut: Mapping[Split, Cut]) -> list[str]:
    texts, tokens = sum(each.texts for each in cut.values()), sum(each.tokens for each in cut.values())
    if not texts:
        return []
    which = "1 text is" if texts == 1 else f"{texts:,} texts are"
    return [f"{which} too long and cut: {tokens:,} tokens at the end are not read"]
