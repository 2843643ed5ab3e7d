"""Types of instructions as data; the other schemas are in `gptpl.cli.schema`."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from gptpl.cli.schema_data import BatchesConf, CorpusConf, DownloadedCorpusConf


@dataclass(kw_only=True)
class InstructionFileCorpusConf(CorpusConf):
    """The user's own file of instructions."""

    _target_: str = "gptpl.data.corpora.InstructionFile"
    path: str | None = "${data.path}"


@dataclass(kw_only=True)
class InstructionDataConf(BatchesConf):
    """`gptpl.data.instructions.datamodule.InstructionDataModule`."""

    _target_: str = "gptpl.data.instructions.datamodule.InstructionDataModule"
    corpus: CorpusConf = MISSING
    batch_size: Any = 8
    template: str = "alpaca"
    response_marker: str | None = None
    instruction_column: str = "instruction"
    input_column: str | None = "input"
    output_column: str = "output"
    train_share: float = 0.85
    test_share: float = 0.1
    shuffle: bool = False
    split_seed: int = 123
    duplicates: str = "remove"
    mask_instruction: bool = False
    too_long: str = "truncate"
    packing: bool = False


@dataclass(kw_only=True)
class DownloadedInstructionsConf(InstructionDataConf):
    """Instructions from one downloaded file."""

    corpus: DownloadedCorpusConf = field(default_factory=DownloadedCorpusConf)


@dataclass(kw_only=True)
class InstructionFileConf(InstructionDataConf):
    """The user's own instructions."""

    path: str | None = MISSING
    corpus: InstructionFileCorpusConf = field(default_factory=InstructionFileCorpusConf)
