"""Types of data; the other schemas are in `gptpl.cli.schema`."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass(kw_only=True)
class CorpusConf:
    """A corpus class without settings."""

    _target_: str = MISSING


@dataclass(kw_only=True)
class DownloadedCorpusConf(CorpusConf):
    """One text file at a public address."""

    _target_: str = "gptpl.data.corpora.Downloaded"
    name: str = MISSING
    url: str = MISSING
    sha256: str = MISSING
    filename: str = MISSING


@dataclass(kw_only=True)
class TextFilesCorpusConf(CorpusConf):
    """The user's own files."""

    _target_: str = "gptpl.data.corpora.TextFiles"
    path: str | None = "${data.path}"
    pattern: str = "${data.pattern}"


@dataclass(kw_only=True)
class BatchesConf:
    """Batches and loaders, the same for all data; `_target_` is a `gptpl.data.training_data.TrainingData`."""

    _target_: str = MISSING
    max_length: int | None = "${model.context_length}"  # type: ignore[assignment]
    batch_size: Any = 2
    global_batch_size: int | None = None
    num_workers: int = 0
    pin_memory: bool | None = None
    persistent_workers: bool = True


@dataclass(kw_only=True)
class DataConf(BatchesConf):
    """`gptpl.data.datamodule.TextDataModule`, with any corpus."""

    _target_: str = "gptpl.data.datamodule.TextDataModule"
    corpus: CorpusConf = MISSING
    train_ratio: float = 0.9
    stride: int | None = "${data.max_length}"  # type: ignore[assignment]


@dataclass(kw_only=True)
class DownloadedDataConf(DataConf):
    """Data from one downloaded file."""

    corpus: DownloadedCorpusConf = field(default_factory=DownloadedCorpusConf)


@dataclass(kw_only=True)
class TextFilesDataConf(DataConf):
    """Data from the user's own files."""

    path: str | None = MISSING
    pattern: str = MISSING
    corpus: TextFilesCorpusConf = field(default_factory=TextFilesCorpusConf)


@dataclass(kw_only=True)
class LabelledCorpusConf:
    """`gptpl.data.labelled.corpora.LabelledFiles`."""

    _target_: str = "gptpl.data.labelled.corpora.LabelledFiles"
    path: str | None = "${data.path}"
    train_path: str | None = "${data.train_path}"
    val_path: str | None = "${data.val_path}"
    test_path: str | None = "${data.test_path}"
    text_column: str = "${data.text_column}"
    label_column: str = "${data.label_column}"
    format: str | None = "${data.format}"
    columns: list[str] | None = "${data.columns}"  # type: ignore[assignment]


@dataclass(kw_only=True)
class LabelledBatchesConf(BatchesConf):
    """`gptpl.data.labelled.datamodule.LabelledDataModule`, with any corpus."""

    _target_: str = "gptpl.data.labelled.datamodule.LabelledDataModule"
    train_share: float = 0.7
    val_share: float = 0.1
    split_seed: int = 123
    stratified: bool = False
    balance: str = "none"
    duplicates: str = "group"
    truncate: bool = True
    padding: str = "batch"
    batch_size: Any = 8


@dataclass(kw_only=True)
class LabelledDataConf(LabelledBatchesConf):
    """Labelled texts from the user's own files."""

    path: str | None = MISSING
    train_path: str | None = MISSING
    val_path: str | None = MISSING
    test_path: str | None = MISSING
    text_column: str = MISSING
    label_column: str = MISSING
    format: str | None = MISSING
    columns: list[str] | None = MISSING
    corpus: LabelledCorpusConf = field(default_factory=LabelledCorpusConf)


@dataclass(kw_only=True)
class SmsSpamCorpusConf:
    """`gptpl.data.labelled.corpora.SmsSpam`."""

    _target_: str = "gptpl.data.labelled.corpora.SmsSpam"
    path: str | None = "${data.path}"
    url: str = MISSING
    member: str = MISSING
    sha256: str = MISSING


@dataclass(kw_only=True)
class SmsSpamDataConf(LabelledBatchesConf):
    """The SMS Spam Collection."""

    path: str | None = MISSING
    corpus: SmsSpamCorpusConf = field(default_factory=SmsSpamCorpusConf)
