"""Instructions with answers as batches for training, validation and tests."""

# B rows in a batch, T tokens in its longest row, n tokens of one example

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Unpack

import numpy as np
import torch
from numpy.typing import NDArray

from gptpl.data.instructions.records import (
    Instruction,
    InstructionSplits,
    Precedence,
    PromptTemplate,
    read_instructions,
    split_instructions,
)
from gptpl.data.packing import PackedBatch, packed_places
from gptpl.data.sampler import PADDING
from gptpl.data.sources import Corpus
from gptpl.data.splits import SPLITS, Duplicates, Split, check_choice, split_table, write_split
from gptpl.data.training_data import IGNORED, Loading, TrainingData, check_at_least
from gptpl.errors import InputError
from gptpl.text import count_text, shortened
from gptpl.tokenizers import TokenIds, Tokenizer

# --- from texts to rows of tokens with targets, and to batches ------------------------------------------

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


# --- the data of a run ----------------------------------------------------------------------------------


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


class InstructionDataModule(TrainingData):
    """Instructions with answers, split, put into prompts, and collated into `PackedBatch`es.

    Args:
        corpus: the one file, JSON or JSON Lines; see `read_instructions`.
        tokenizer: one without a vocabulary takes it from the training examples.
        max_length: tokens of the longest row.
        template: "alpaca", "phi3", a file, or a Jinja text; see `PromptTemplate.named`.
        response_marker: the text between prompt and answer; None: the template's own.
        instruction_column, input_column, output_column: keys in the file; input None: there is no such key.
        train_ratio, test_ratio, duplicates, precedence: see `split_instructions`.
        shuffle: whether the instructions are shuffled by `split_seed` before they are split.
        split_seed: not `seed`, so that runs with several seeds have the same test.
        mask_instruction, too_long: see `encode_instructions`.
        packing: whether short examples share a row; they are packed once, and the rows are shuffled.
        batch_size: B, rows in a batch of one rank.
        loading: as in `TrainingData`.

    Raises InputError as `TrainingData` and the functions named here.
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
        train_ratio: float = 0.85,
        test_ratio: float = 0.1,
        shuffle: bool = False,
        split_seed: int = 123,
        duplicates: Duplicates = "remove",
        precedence: Precedence = "test",
        mask_instruction: bool = False,
        too_long: TooLong = "truncate",
        packing: bool = False,
        batch_size: int = 8,
        **loading: Unpack[Loading],
    ) -> None:
        super().__init__(batch_size=batch_size, **loading)
        check_at_least(2, "data.max_length", max_length)  # of prompt and answer
        self.corpus = corpus
        self.name = corpus.name
        self.max_length = max_length
        self.template = PromptTemplate.named(template, response_marker)
        self.duplicates = duplicates
        self.mask_instruction = mask_instruction
        self.too_long = too_long
        self.packing = packing
        self.units = "rows" if packing else "examples"
        unpacked = "set data.packing=false, " if packing else ""
        self.too_few_remedy = f"{unpacked}lower data.batch_size, or give more instructions"
        self._columns: dict[str, Any] = {
            "instruction": instruction_column,
            "input": input_column,
            "output": output_column,
        }
        self._split: dict[str, Any] = {
            "train_ratio": train_ratio,
            "test_ratio": test_ratio,
            "shuffle_seed": split_seed if shuffle else None,
            "duplicates": duplicates,
            "precedence": precedence,
        }
        self._given_tokenizer = tokenizer
        self._encoded: dict[Split, EncodedInstructions] = {}
        self._examples: dict[Split, InstructionExamples] = {}

    # --- the texts ------------------------------------------------------------------------------------

    def content_sha256(self) -> str:
        """Hash of the file and of the template."""
        template = json.dumps(self.template.state(), sort_keys=True)
        return hashlib.sha256(f"{self.corpus.content_sha256()}{template}".encode()).hexdigest()

    @property
    def row_count(self) -> int:
        """Instructions in the file."""
        return self.splits.read

    def load(self) -> InstructionSplits:
        """The instructions of every split; later calls return the same."""
        return self.splits

    @cached_property
    def splits(self) -> InstructionSplits:
        """The instructions of every split, read when first asked for."""
        [path] = self.corpus.files()
        return split_instructions(read_instructions(path, **self._columns), **self._split)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The given one, with the vocabulary of the training examples where it had none."""
        return self._given_tokenizer.fitted_to(self.template.whole(each) for each in self.splits.train)

    def write_record(self, run_dir: Path) -> None:
        """Keep the splits that are not empty, as JSON files with a list of objects, in the run's folder."""
        for split in SPLITS:
            if records := [asdict(each) for each in self.splits.of(split)]:
                content = json.dumps(records, ensure_ascii=False, indent=2) + "\n"
                write_split(run_dir, split, ".json", content)

    # --- the examples ---------------------------------------------------------------------------------

    def encoded(self, split: Split) -> EncodedInstructions:
        """Every example of a split as a row of its own, and how many were cut or left out."""
        if split not in self._encoded:
            self._encoded[split] = encode_instructions(
                self.splits.of(split),
                self.tokenizer,
                self.template,
                max_length=self.max_length,
                mask_instruction=self.mask_instruction,
                too_long=self.too_long,
            )
        return self._encoded[split]

    def examples(self, split: Split) -> InstructionExamples:
        """Rows of the split, packed if `packing`. Raises InputError where there are none."""
        if split not in self._examples:
            rows = self.encoded(split).rows
            if not rows:
                raise InputError(
                    f"the {split} split has no example to learn from within data.max_length={self.max_length}"
                    " tokens: raise that or its ratio, or give more instructions"
                )
            if self.packing:
                rows = pack_rows(rows, max_length=self.max_length)
            self._examples[split] = InstructionExamples(
                rows, eot_id=self.tokenizer.eot_id, packed=self.packing
            )
        return self._examples[split]

    @property
    def train_tokens(self) -> int:
        """Tokens in the rows of the training examples."""
        return sum(map(len, self.encoded("train").rows))

    def report(self, *, parameters: int | None, world_size: int) -> list[str]:
        """Instructions, tokens and rows of every split, and what was cut, left out or duplicated."""
        encoded = {split: self.encoded(split) for split in SPLITS if self.splits.of(split)}
        packed = {split: self.examples(split).rows for split in encoded}
        targets = [[row.targets for row in each.rows] for each in encoded.values()]
        rows = [
            ("instructions", [len(self.splits.of(split)) for split in encoded]),
            ("tokens", [sum(map(len, each)) for each in targets]),
            ("tokens learned (targets)", [sum(int((t != IGNORED).sum()) for t in each) for each in targets]),
        ]
        if self.packing:
            rows.append(("rows of packed examples", [len(each) for each in packed.values()]))
        lines = [*split_table(encoded, rows), *length_lines(encoded, self.max_length)]
        if self.splits.shared:
            done = {
                "remove": "removed, so that the test stays as it was",
                "group": "moved there",
                "keep": "kept, so that validation and test are a little too easy",
            }[self.duplicates]
            shared = count_text(self.splits.shared, "example")
            lines.append(f"{shared} with the question of another split: {done}")
        if self.packing:
            lines.append(self._packing_line(encoded["train"].rows, packed["train"], world_size))
        title = (
            f"data: {self.name}, {self.row_count:,} instructions, template {self.template.name},"
            f" {self.tokenizer.name} tokenizer"
        )
        return [title, *(f"  {line}" for line in lines)]

    def _packing_line(self, rows: Sequence[TokenRow], packed: Sequence[TokenRow], world_size: int) -> str:
        tokens, each, batch_size = sum(map(len, rows)), len(rows) / len(packed), self.batch_size * world_size
        used = tokens / (len(packed) * self.max_length)
        unpacked = tokens / (len(rows) * max(map(len, rows)))
        return (
            f"packed once, for all epochs: {used:.1%} of the places hold tokens (padded: {unpacked:.1%});"
            f" {each:.1f} examples a row, {each * batch_size:,.0f} in {batch_size} rows"
        )

    @property
    def caveat(self) -> str:
        """Where most examples lose their end: the model hardly sees where an answer ends."""
        encoded = self.encoded("train")
        cut, count = encoded.truncated, len(encoded.rows)
        if 2 * cut <= count:
            return ""
        which = "All" if cut == count else f"{cut:,} of"
        return (
            f"{which} {count:,} training examples lost their end, so that the model cannot learn to end an"
            f" answer: raise data.max_length={self.max_length}."
        )

    def module_settings(self) -> dict[str, Any]:
        """The template, which checkpoints keep."""
        return {"template": self.template}


def length_lines(encoded: Mapping[Split, EncodedInstructions], max_length: int) -> list[str]:
    """What was cut or left out of these splits for its length, in lines; none where nothing was."""
    truncated, dropped, unanswered = (
        sum(getattr(each, name) for each in encoded.values())
        for name in ("truncated", "dropped", "unanswered")
    )
    lines = {
        f"longer than data.max_length={max_length} lost the end, with the end-of-text;"
        " data.too_long=drop leaves such out": truncated,
        f"left out: within data.max_length={max_length} nothing of the answer is left to learn": unanswered,
        f"longer than data.max_length={max_length} left out (data.too_long=drop)": dropped - unanswered,
    }
    return [f"{count_text(count, 'example')} {what}" for what, count in lines.items() if count]
