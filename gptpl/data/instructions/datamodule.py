"""Instructions with answers as batches for training, validation and tests."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Unpack

from gptpl.data.instructions.entries import (
    Duplicates,
    InstructionSplits,
    read_entries,
    split_entries,
    write_entries,
)
from gptpl.data.instructions.rows import InstructionExamples, Row, Rows, TooLong, make_rows, pack_rows
from gptpl.data.instructions.template import PromptTemplate
from gptpl.data.sources import Corpus
from gptpl.data.splits import SPLITS, Split, split_table
from gptpl.data.training_data import IGNORED, Loading, TrainingData
from gptpl.errors import InputError
from gptpl.text import count_text
from gptpl.tokenizers import Tokenizer


class InstructionDataModule(TrainingData):
    """Instructions with answers, split, put into prompts, and collated into `InstructionBatch`es.

    Args:
        corpus: the one file, JSON or JSON Lines; see `gptpl.data.instructions.entries.read_entries`.
        tokenizer: one without a vocabulary takes it from the training examples.
        max_length: tokens of the longest row.
        template: "alpaca", "phi3", a file, or a Jinja text; see `PromptTemplate.named`.
        response_marker: what stands between prompt and answer; None: the template's own.
        instruction_column, input_column, output_column: keys in the file; of the input None: there is none.
        train_share, test_share, duplicates: see `split_entries`.
        shuffle: whether the entries are shuffled by `split_seed` before they are split.
        split_seed: not `seed`, so that runs with several seeds have the same test.
        mask_instruction, too_long: see `make_rows`.
        packing: whether short examples share a row; they are packed once, and the rows are shuffled.
        batch_size: B, rows in a batch of one rank.
        loading: as in `TrainingData`.

    Raises InputError as `TrainingData`, `PromptTemplate`, `read_entries`, `split_entries` and `make_rows`.
    """

    def __init__(
        self,
        *,
        corpus: Corpus,
        tokenizer: Tokenizer,
        max_length: int,
        template: str = "alpaca",
        response_marker: str | None = None,
        instruction_column: str = "instruction",
        input_column: str | None = "input",
        output_column: str = "output",
        train_share: float = 0.85,
        test_share: float = 0.1,
        shuffle: bool = False,
        split_seed: int = 123,
        duplicates: Duplicates = "remove",
        mask_instruction: bool = False,
        too_long: TooLong = "truncate",
        packing: bool = False,
        batch_size: int = 8,
        **loading: Unpack[Loading],
    ) -> None:
        super().__init__(batch_size=batch_size, **loading)
        if max_length < 2:
            raise InputError(
                f"data.max_length={max_length} has no room for prompt and answer: give 2 or more"
            )
        self.corpus = corpus
        self.max_length = max_length
        self.template = PromptTemplate.named(template, response_marker)
        self.duplicates = duplicates
        self.mask_instruction = mask_instruction
        self.too_long = too_long
        self.packing = packing
        self.units = "rows" if packing else "examples"
        unpacked = "set data.packing=false, " if packing else ""
        self.too_few_remedy = f"{unpacked}lower data.batch_size, or give more entries"
        self._read = partial(
            read_entries, instruction=instruction_column, input=input_column, output=output_column
        )
        self._split = partial(
            split_entries,
            train_share=train_share,
            test_share=test_share,
            shuffle_seed=split_seed if shuffle else None,
            duplicates=duplicates,
        )
        self._given_tokenizer = tokenizer
        self._rows: dict[Split, Rows] = {}
        self._examples: dict[Split, InstructionExamples] = {}

    # --- the entries ----------------------------------------------------------------------------------

    @property
    def name(self) -> str:  # type: ignore[override]  # Lightning's is None
        """The file's."""
        return self.corpus.name

    def content_sha256(self) -> str:
        """Hash of the file and of the template, which decide the examples."""
        template = json.dumps(self.template.state(), sort_keys=True)
        return hashlib.sha256(f"{self.corpus.content_sha256()}{template}".encode()).hexdigest()

    def load(self) -> InstructionSplits:
        """The entries of every split; later calls return the same."""
        return self.splits

    @cached_property
    def splits(self) -> InstructionSplits:
        """The entries of every split, read when first asked for."""
        [path] = self.corpus.files()
        return self._split(self._read(path))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The given one, with the vocabulary of the training examples where it had none."""
        return self._given_tokenizer.fitted_to(self.template.whole(entry) for entry in self.splits.train)

    def write_record(self, run_dir: Path) -> None:
        """Leaves `data/train.json`, `validation.json` and `test.json` there, as the book keeps them."""
        write_entries(run_dir, self.splits)

    # --- the examples ---------------------------------------------------------------------------------

    def rows(self, split: Split) -> Rows:
        """Every example of a split as a row of its own, and what became of those too long."""
        if split not in self._rows:
            self._rows[split] = make_rows(
                self.splits.of(split),
                self.tokenizer,
                self.template,
                max_length=self.max_length,
                mask_instruction=self.mask_instruction,
                too_long=self.too_long,
            )
        return self._rows[split]

    def examples(self, split: Split) -> InstructionExamples:
        """Rows of the split, packed where that is wanted. Raises InputError where there are none."""
        if split not in self._examples:
            rows = self.rows(split).rows
            if not rows:
                raise InputError(
                    f"the {split} split has no example to learn from within data.max_length={self.max_length}"
                    " tokens: raise that or its share of the entries, or give more of them"
                )
            if self.packing:
                rows = pack_rows(rows, max_length=self.max_length)
            self._examples[split] = InstructionExamples(
                rows, eot_id=self.tokenizer.eot_id, packed=self.packing
            )
        return self._examples[split]

    @property
    def train_tokens(self) -> int:
        """Tokens of the training examples, as long as their rows are."""
        return sum(map(len, self.rows("train").rows))

    def report(self, *, parameters: int, world_size: int) -> list[str]:
        """Entries, tokens and rows of every split, and what was cut, left out, or stood in two splits."""
        rows = {split: self.rows(split) for split in SPLITS if self.splits.of(split)}
        packed = {split: self.examples(split).rows for split in rows}
        learned = [sum(int((row.targets != IGNORED).sum()) for row in each.rows) for each in rows.values()]
        numbers = [
            ("entries", [len(self.splits.of(split)) for split in rows]),
            ("tokens", [sum(map(len, each.rows)) for each in rows.values()]),
            ("tokens learned (targets)", learned),
        ]
        if self.packing:
            numbers.append(("rows of packed examples", [len(each) for each in packed.values()]))
        lines = [*split_table(rows, numbers), *length_lines(rows, self.max_length)]
        if self.splits.shared:
            meaning = {
                "remove": "removed there (data.duplicates=remove)",
                "group": "moved there (data.duplicates=group)",
                "keep": "kept, so that validation and test are a little too easy (data.duplicates=keep)",
            }[self.duplicates]
            shared = count_text(self.splits.shared, "example")
            lines.append(f"{shared} of later splits ask what an earlier one asks, too: {meaning}")
        if self.packing:
            lines.append(
                self._packing_line(rows["train"].rows, packed["train"], self.batch_size * world_size)
            )
        title = f"data: {self.name}, template {self.template.name}, {self.tokenizer.name} tokenizer"
        return [title, *(f"  {line}" for line in lines)]

    def _packing_line(self, rows: Sequence[Row], packed: Sequence[Row], batch_size: int) -> str:
        tokens, each = sum(map(len, rows)), len(rows) / len(packed)
        used = tokens / (len(packed) * self.max_length)
        unpacked = tokens / (len(rows) * max(map(len, rows)))
        return (
            f"packed once, for all epochs: {used:.1%} of the row's places are used (padded to the longest of"
            f" all: {unpacked:.1%}); {each:.1f} examples a row, {each * batch_size:,.0f} in {batch_size} rows"
        )

    @property
    def caveat(self) -> str:
        """Where most examples lose their end: the model hardly sees where an answer ends."""
        rows = self.rows("train")
        cut, all_of = rows.truncated, len(rows.rows)
        if 2 * cut <= all_of:
            return ""
        which = "All" if cut == all_of else f"{cut:,} of"
        return (
            f"{which} {all_of:,} training examples lost their end, so that the model cannot learn to end an"
            f" answer: raise data.max_length={self.max_length}."
        )

    def module_settings(self) -> dict[str, Any]:
        """The template, which a checkpoint keeps."""
        return {"template": self.template}


def length_lines(rows: Mapping[Split, Rows], max_length: int) -> list[str]:
    """What was cut or left out of these splits for its length, in lines; none where nothing was."""
    truncated = sum(each.truncated for each in rows.values())
    unanswered = sum(each.unanswered for each in rows.values())
    dropped = sum(each.dropped for each in rows.values()) - unanswered
    lines = []
    if truncated:
        lines.append(
            f"{count_text(truncated, 'example')} longer than data.max_length={max_length} lost the end, with"
            " the end-of-text; data.too_long=drop leaves such out"
        )
    if unanswered:
        lines.append(
            f"{count_text(unanswered, 'example')} left out: within data.max_length={max_length} nothing of"
            " the answer is left to learn"
        )
    if dropped:
        lines.append(
            f"{count_text(dropped, 'example')} longer than data.max_length={max_length} left out"
            " (data.too_long=drop)"
        )
    return lines
