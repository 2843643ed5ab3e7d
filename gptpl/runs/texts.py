"""The text of a config before training: what it holds, and a tokenizer made from it."""

import itertools
import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from gptpl.config.compose import Config, as_config, plain
from gptpl.config.groups import Folder
from gptpl.data.pretraining.datamodule import SequenceData
from gptpl.data.pretraining.mixture import sources_of
from gptpl.data.sources import Corpus
from gptpl.data.sources.base import sampled
from gptpl.errors import InputError
from gptpl.evaluation.corpus_report import SAMPLE_BYTES, CorpusReport, corpus_report
from gptpl.files.durable import check_new
from gptpl.runs.evaluation_data import with_corpora
from gptpl.runs.parts import (
    build_datamodule,
    build_tokenizer,
    class_of,
    config_of_data,
    data_class,
    new_datamodule,
)
from gptpl.runs.resume import settle_lengths
from gptpl.text import bytes_text, table
from gptpl.tokenizers import FileTokenizer, GPT2Tokenizer, Tokenizer, train_bpe

log = logging.getLogger(__name__)

# --- what it holds --------------------------------------------------------------------------------------


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
    report = corpus_report(
        datamodule.corpora,
        tokenizer,
        max_length=datamodule.max_length,
        name=datamodule.name,
        sample_bytes=sample_bytes,
    )
    return replace(report, sequences=first, no_sequences=failure)


def _tokens(inputs: Tensor, targets: Tensor) -> list[int]:
    """The tokens of a sequence with its last target, without padding."""
    length = int((targets >= 0).sum())
    return [*inputs[:length].tolist(), *targets[length - 1 : length].tolist()]


# --- a tokenizer of it, and what that is worth on it ----------------------------------------------------

_COMPARED = 1_000_000
"""Bytes of text that the new tokenizer and GPT-2's are compared on."""


@dataclass(frozen=True, kw_only=True)
class TrainedTokenizer:
    """A tokenizer, and a comparison with GPT-2's in lines."""

    tokenizer: FileTokenizer
    lines: list[str]


def train_tokenizer(*config: Config | str, config_dir: Folder | None = None) -> TrainedTokenizer:
    """Make a byte-level tokenizer from the text of a config of `gptpl tokenizer train`, or of overrides.

    Raises InputError for data other than text, a vocabulary that is too small, and as the text's corpus.
    """
    cfg = as_config(config, config_dir, config_name="tokenizer_train")
    settings, corpora = cfg.tokenizer, _corpora(cfg)
    check_new(Path(settings.output).expanduser(), "tokenizer.output")
    sizes = [sum(piece.size for piece in corpus.pieces()) for corpus in corpora]
    total, most = sum(sizes), settings.sample_bytes
    if most is not None and most < total:
        log.info("learning from %s of %s, evenly spread", bytes_text(most), bytes_text(total))
    shares = [None if most is None else round(most * size / max(1, total)) for size in sizes]
    texts = (text for corpus, share in zip(corpora, shares, strict=True) for text in sampled(corpus, share))
    tokenizer = train_bpe(
        _with_progress(texts, min(total, most or total)),
        vocab_size=settings.vocab_size,
        special_tokens=list(settings.special_tokens),
    )
    if tokenizer.vocab_size < settings.vocab_size:
        log.warning(
            "the text gives %s tokens, not tokenizer.vocab_size=%s: no other pair of tokens occurs twice",
            f"{tokenizer.vocab_size:,}",
            f"{settings.vocab_size:,}",
        )
    compared = [text for corpus in corpora for text in sampled(corpus, max(1, _COMPARED // len(corpora)))]
    return TrainedTokenizer(tokenizer=tokenizer, lines=_comparison([tokenizer, GPT2Tokenizer()], compared))


def _corpora(cfg: Config) -> list[Corpus]:
    """The corpora of `cfg.data`, of a mixture all."""
    if not issubclass(class_of(cfg, "data"), SequenceData):
        raise InputError("a tokenizer is made from plain text: choose data=corpus with data.path=FOLDER")
    node = with_corpora(plain(cfg)["data"])
    if isinstance(node.get("corpus"), Corpus):
        return [node["corpus"]]
    return [source.corpus for source in sources_of(node.get("sources")).values()]


def _with_progress(texts: Iterable[str], total: int) -> Iterator[str]:
    with tqdm(total=total, unit="B", unit_scale=True, desc="reading", disable=None) as bar:
        for text in texts:
            yield text
            bar.update(len(text.encode("utf-8", "surrogatepass")))


def _comparison(tokenizers: list[Tokenizer], texts: list[str]) -> list[str]:
    """Tokens, bytes of text in a token and speed of each tokenizer on the texts."""
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    if not size:
        raise InputError("the text is empty: give documents with text in them")
    rows = [["tokenizer", "tokens", "bytes a token", "MB/s"]]
    for name, tokenizer in zip(("new", "gpt2"), tokenizers, strict=True):
        tokenizer.encode("the vocabulary is loaded")
        started = time.perf_counter()
        count = sum(len(tokenizer.encode(text)) for text in texts)
        seconds = time.perf_counter() - started
        rows.append([name, f"{tokenizer.vocab_size:,}", f"{size / count:.2f}", f"{size / seconds / 1e6:.1f}"])
    return table(rows, right=range(1, 4))
