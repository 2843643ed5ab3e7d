"""Instructions with answers as batches for training, validation and tests."""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

from gptpl.data.corpora import Corpus
from gptpl.data.instructions.entries import Columns, Entry, read_entries
from gptpl.data.instructions.examples import InstructionExamples
from gptpl.data.instructions.packing import pack_rows
from gptpl.data.instructions.report import instruction_report
from gptpl.data.instructions.rows import Rows, TooLong, make_rows
from gptpl.data.instructions.split import SPLITS, Duplicates, InstructionSplits, split_entries
from gptpl.data.instructions.split_files import write_split_files
from gptpl.data.instructions.template import PromptTemplate
from gptpl.data.tokenizers import Tokenizer
from gptpl.data.training_data import Split, TrainingData
from gptpl.errors import InputError


class InstructionDataModule(TrainingData):
    """Instructions with answers, split, put into prompts, and collated into `InstructionBatch`es.

    Args:
        corpus: the one file, JSON or JSON Lines; see `gptpl.data.instructions.entries.read_entries`.
        tokenizer: one without a vocabulary takes it from the training examples.
        max_length: tokens of the longest row.
        template: "alpaca", "phi3", a file, or a Jinja text; see `PromptTemplate.named`.
        response_marker: what stands between prompt and answer; None: the template's own.
        instruction_column: key of the instruction in the file.
        input_column: key of the input; None: there is none.
        output_column: key of the answer.
        train_share: of the entries, see `split_entries`.
        test_share: the same.
        shuffle: whether the entries are shuffled by `split_seed` before they are split.
        split_seed: see there; not `seed`, so that runs with several seeds have the same test.
        duplicates: what becomes of a question that stands in two splits, see `split_entries`.
        mask_instruction: whether only the answers are learned.
        too_long: what becomes of an example longer than `max_length`, see `make_rows`.
        packing: whether short examples share a row; they are packed once, and the rows are shuffled.
        batch_size: as in `TrainingData`, like the six below.
        seed: decides the order.
        num_workers: processes that prepare batches.
        pin_memory: page-locked memory.
        persistent_workers: workers that stay.
        eval_train_batches: training batches of an evaluation.
        eval_val_batches: validation batches of an evaluation.

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
        seed: int = 123,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        persistent_workers: bool = True,
        eval_train_batches: int | None = 5,
        eval_val_batches: int | None = 5,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            seed=seed,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=persistent_workers,
            eval_train_batches=eval_train_batches,
            eval_val_batches=eval_val_batches,
        )
        if max_length < 2:
            raise InputError(
                f"data.max_length={max_length} has no room for prompt and answer: give 2 or more"
            )
        self.corpus = corpus
        self.max_length = max_length
        self.template = PromptTemplate.named(template, response_marker)
        self.columns = Columns(instruction=instruction_column, input=input_column, output=output_column)
        self.train_share = train_share
        self.test_share = test_share
        self.shuffle = shuffle
        self.split_seed = split_seed
        self.duplicates = duplicates
        self.mask_instruction = mask_instruction
        self.too_long = too_long
        self.packing = packing
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
        return split_entries(
            read_entries(path, self.columns),
            train_share=self.train_share,
            test_share=self.test_share,
            shuffle_seed=self.split_seed if self.shuffle else None,
            duplicates=self.duplicates,
        )

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The given one, with the vocabulary of the training examples where it had none."""
        return self._given_tokenizer.fitted_to(self.template.whole(entry) for entry in self.splits.train)

    def write_record(self, run_dir: Path) -> None:
        """Leaves `data/train.json`, `validation.json` and `test.json` there, as the book keeps them."""
        write_split_files(run_dir, self.splits)

    # --- the examples ---------------------------------------------------------------------------------

    def rows(self, split: Split) -> Rows:
        """Every example of a split as a row of its own, and what became of those too long."""
        if split not in self._rows:
            self._rows[split] = self._made(self.splits.of(split))
        return self._rows[split]

    def _made(self, entries: list[Entry]) -> Rows:
        return make_rows(
            entries,
            self.tokenizer,
            self.template,
            max_length=self.max_length,
            mask_instruction=self.mask_instruction,
            too_long=self.too_long,
        )

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

    @property
    def units(self) -> str:
        """Examples, or rows of them."""
        return "rows" if self.packing else "examples"

    @property
    def too_few_remedy(self) -> str:
        """What helps where the training rows do not fill a batch."""
        unpacked = "set data.packing=false, " if self.packing else ""
        return f"{unpacked}lower data.batch_size, or give more entries"

    def report(self, *, parameters: int, world_size: int) -> list[str]:
        """Entries, tokens and rows of every split, and what was cut, left out, or stood in two splits."""
        del parameters
        splits = [split for split in SPLITS if self.splits.of(split)]
        return instruction_report(
            self.splits,
            {split: self.rows(split) for split in splits},
            {split: self.examples(split).rows for split in splits},
            name=f"{self.name}, template {self.template.name}, {self.tokenizer.name} tokenizer",
            max_length=self.max_length,
            batch_size=self.batch_size * world_size,
            packing=self.packing,
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
