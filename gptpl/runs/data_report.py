"""What the text of a run holds, and the first sequences that it will train on."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from gptpl.config.compose import Config
from gptpl.config.groups import Folder
from gptpl.data.pretraining.datamodule import SequenceData
from gptpl.data.sources import Corpus
from gptpl.data.sources.base import Files, Piece, Refused, Section
from gptpl.errors import InputError
from gptpl.evaluation.corpus_report import SAMPLE_BYTES, CorpusReport, corpus_report, readable_pieces
from gptpl.runs.parts import build_datamodule, build_tokenizer, config_of_data, data_class, new_datamodule
from gptpl.runs.resume import settle_lengths


def data_report(
    *config: Config | str,
    sequences: int = 0,
    sample_bytes: int | None = SAMPLE_BYTES,
    config_dir: Folder | None = None,
) -> CorpusReport:
    """What the text of a config, or of overrides, holds; of a large one, of a sample (None: of all).

    With `sequences` the text is encoded as for training, whose first ones the report then has, or why they
    cannot be made. Raises InputError for data that are not plain text, and where there are no files.
    """
    cfg = config_of_data(config, config_dir)
    kind = data_class(cfg)
    if not issubclass(kind, SequenceData):
        raise InputError(
            f"gptpl data show reads plain text, these data are a {kind.__name__}: gptpl data encode describes"
            " them"
        )
    settle_lengths(cfg.data, cfg.model)
    tokenizer = build_tokenizer(cfg.tokenizer)
    datamodule: Any = new_datamodule(cfg, tokenizer)
    first: list[list[int]] = []
    failure = ""
    if sequences:
        try:
            datamodule = build_datamodule(cfg)
            batches = datamodule.train_dataloader()
            rows = (row for batch in batches for row in zip(batch[0], batch[1], strict=True))
            first = [_tokens(*row) for row in itertools.islice(rows, sequences)]
            tokenizer = datamodule.tokenizer
        except InputError as error:  # the report says what else is wrong
            failure = str(error)
    corpora = datamodule.corpora
    report = corpus_report(
        corpora[0] if len(corpora) == 1 else _Together(datamodule.name, corpora),
        tokenizer,
        max_length=datamodule.max_length,
        sample_bytes=sample_bytes,
    )
    return replace(report, sequences=first, no_sequences=failure)


def _tokens(inputs: Tensor, targets: Tensor) -> list[int]:
    """The tokens of a sequence with its last target, without padding."""
    length = int((targets >= 0).sum())
    return [*inputs[:length].tolist(), *targets[length - 1 : length].tolist()]


@dataclass(frozen=True, kw_only=True)
class _PieceOf(Piece):
    corpus: int


class _Together(Corpus):
    """The corpora of a mixture, one after the other."""

    def __init__(self, name: str, corpora: Sequence[Corpus]) -> None:
        self.name = name
        self._corpora = corpora

    def files(self) -> list[Path]:
        return [path for corpus in self._corpora for path in corpus.files()]

    def listing(self) -> Files:
        return [entry for corpus in self._corpora for entry in corpus.listing()]

    def pieces(self) -> list[Piece]:
        return [
            _PieceOf(**vars(piece), corpus=number)
            for number, corpus in enumerate(self._corpora)
            for piece in readable_pieces(corpus)
        ]

    def readable_sections(self, piece: Piece, refused: Refused) -> Iterator[Section]:
        assert isinstance(piece, _PieceOf)
        own = {name: value for name, value in vars(piece).items() if name != "corpus"}
        return self._corpora[piece.corpus].readable_sections(Piece(**own), refused)
