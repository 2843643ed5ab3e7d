"""Batches of labelled texts for a classifier."""

# B texts in a batch, T tokens in the longest of them

import logging
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from gptpl.data.labelled.balancing import inverse_frequency_weights
from gptpl.data.labelled.corpora import LabelledCorpus
from gptpl.data.labelled.encoded import Cut, LabelledTexts, class_numbers, encode_texts, truncated
from gptpl.data.labelled.examples import SPLITS, label_counts
from gptpl.data.labelled.prepare import Balance, Preparation, Prepared, Repeats, prepare
from gptpl.data.labelled.report import labelled_report
from gptpl.data.labelled.splits_file import write_splits
from gptpl.data.labelled.splitting import Shares
from gptpl.data.tokenizers import TokenIds, Tokenizer
from gptpl.data.training_data import Split, TrainingData, check_at_least
from gptpl.errors import InputError

log = logging.getLogger(__name__)

Padding = Literal["batch", "longest"]


class LabelledDataModule(TrainingData):
    """Labelled texts as batches of `LabelledBatch`: tokens (B, T), lengths (B,), labels (B,), all int64.

    The labels are numbers of `classes`, which are in alphabetical order. Texts are padded behind their end,
    with the end-of-text token.

    Args:
        corpus: the texts and their labels.
        tokenizer: what turns texts into tokens; one without a vocabulary takes it from the training texts.
        max_length: tokens that are read of a text at most.
        train_share: part of the examples to train on, of a corpus that is one table.
        val_share: part to validate on; the rest is for the test.
        stratified: see `Preparation`.
        balance: see `Preparation`; "class_weights" leaves the examples and weights the loss.
        duplicates: see `Preparation`.
        truncate: whether a longer text loses its end; else it is refused.
        padding: "batch" fills up to the longest text of the batch; "longest", as the book does, to the
            longest of the training split, which the other splits' texts are cut to.
        split_seed: decides which examples are drawn, and the splits: not `seed`, so that runs with several
            seeds have the same test.
        batch_size: as in `TrainingData`, like the six below.
        seed: decides the order.
        num_workers: processes that prepare batches.
        pin_memory: page-locked memory.
        persistent_workers: workers that stay.
        eval_train_batches: training batches of an evaluation.
        eval_val_batches: validation batches of an evaluation.

    Raises InputError for a setting that cannot be, when made, and for texts that cannot be used, when loaded.
    """

    def __init__(
        self,
        *,
        corpus: LabelledCorpus,
        tokenizer: Tokenizer,
        max_length: int,
        train_share: float = 0.7,
        val_share: float = 0.1,
        stratified: bool = False,
        balance: Balance = "none",
        duplicates: Repeats = "group",
        truncate: bool = True,
        padding: Padding = "batch",
        split_seed: int = 123,
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
        if padding not in get_args(Padding):
            raise InputError(f"data.padding={padding} is unknown: choose batch or longest")
        check_at_least(0, "data.split_seed", split_seed)
        if max_length < 1:
            raise InputError(f"data.max_length={max_length} reads nothing of a text: give 1 or more")
        self.corpus = corpus
        self.max_length = max_length
        self.balance = balance
        self.truncate = truncate
        self.padding = padding
        self._how = Preparation(
            shares=Shares(train=train_share, val=val_share),
            stratified=stratified,
            balance=balance,
            duplicates=duplicates,
            seed=split_seed,
        )
        self._given_tokenizer = tokenizer
        self._examples: dict[Split, LabelledTexts] = {}

    # --- the texts ------------------------------------------------------------------------------------

    @cached_property
    def prepared(self) -> Prepared:
        """The splits; read and divided when first asked for."""
        return prepare(self.corpus.examples(), self._how)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their numbers."""
        return self.prepared.classes

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the tokens, with its vocabulary."""
        return self._given_tokenizer.fitted_to(example.text for example in self.prepared.splits["train"])

    @property
    def name(self) -> str:  # type: ignore[override]
        """The corpus's."""
        return self.corpus.name

    def content_sha256(self) -> str:
        """Hash of the texts and labels of all splits."""
        return self.prepared.sha256

    def load(self) -> Mapping[Split, LabelledTexts]:
        """Read, divide and encode the texts; later calls return the same."""
        if not self._examples:
            encoded = {
                split: encode_texts([example.text for example in examples], self.tokenizer)
                for split, examples in self.prepared.splits.items()
            }
            for warning in self.prepared.warnings:
                log.warning("%s", warning)
            kept, self.cut = self._cut(encoded)
            for split, examples in self.prepared.splits.items():
                self._examples[split] = LabelledTexts(
                    kept[split],
                    class_numbers(examples, self.classes),
                    pad_id=self.tokenizer.eot_id,
                    padded_to=max(map(len, kept["train"])) if self.padding == "longest" else None,
                )
        return self._examples

    def _cut(
        self, encoded: Mapping[Split, list[TokenIds]]
    ) -> tuple[dict[Split, list[TokenIds]], dict[Split, Cut]]:
        """The texts without what is beyond the length, by split, and what that was."""
        limit = self.max_length
        if self.padding == "longest":
            limit = min(limit, max(map(len, encoded["train"])))
        pairs = {split: truncated(texts, limit) for split, texts in encoded.items()}
        if not self.truncate and (longer := sum(cut.texts for _, cut in pairs.values())):
            longest = max(len(tokens) for texts in encoded.values() for tokens in texts)
            raise InputError(
                f"{longer:,} texts are longer than {limit:,} tokens, the longest has {longest:,}: raise"
                " data.max_length and model.context_length, or set data.truncate=true to cut their ends off"
            )
        return {split: pair[0] for split, pair in pairs.items()}, {s: pair[1] for s, pair in pairs.items()}

    @property
    def train_tokens(self) -> int:
        """Of the training texts, without padding."""
        return sum(self.load()["train"].lengths)

    def examples(self, split: Split) -> LabelledTexts:
        """The texts of a split. Raises InputError where the corpus has none for it."""
        if split not in self.load():
            raise InputError(f"there are no {SPLITS[split]} examples: give data.{split}_path=FILE")
        return self._examples[split]

    # --- what others need to know ---------------------------------------------------------------------

    def module_settings(self) -> dict[str, Any]:
        """The classes, their weights in the loss, and how texts are cut and padded."""
        weights = None
        if self.balance == "class_weights":
            weights = inverse_frequency_weights(list(label_counts(self.prepared.splits["train"]).values()))
        examples = self.load()["train"]
        return {
            "labels": self.classes,
            "class_weights": weights,
            "max_length": examples.padded_to or self.max_length,
            "padded_to": examples.padded_to,
        }

    def report(self, *, parameters: int, world_size: int) -> list[str]:
        """See `labelled_report`."""
        del parameters
        return labelled_report(
            self.prepared,
            {split: examples.lengths for split, examples in self.load().items()},
            self.cut,
            name=self.name,
            tokenizer=self.tokenizer,
            batch_size=self.batch_size * world_size,
        )

    def write_record(self, run_dir: Path) -> None:
        """The splits, as CSV files in the run's folder."""
        write_splits(run_dir, self.prepared.splits)

    @property
    def units(self) -> str:
        """How messages call several examples."""
        return "texts"
