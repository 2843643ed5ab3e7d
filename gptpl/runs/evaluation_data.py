"""What a model is evaluated on: its own data, a file, a corpus or a datamodule, as batches with a name."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import lightning as L
import numpy as np

from gptpl.data.corpora import Corpus, TextFiles
from gptpl.data.datamodule import TextDataModule
from gptpl.data.instructions.datamodule import InstructionDataModule
from gptpl.data.instructions.entries import Entry, read_entries
from gptpl.data.instructions.examples import InstructionExamples
from gptpl.data.instructions.report import length_lines
from gptpl.data.instructions.rows import make_rows
from gptpl.data.instructions.split_files import split_file
from gptpl.data.instructions.template import PromptTemplate
from gptpl.data.labelled.corpora import LabelledCorpus, LabelledFiles
from gptpl.data.labelled.datamodule import LabelledDataModule
from gptpl.data.labelled.encoded import LabelledBatch, LabelledTexts, class_numbers, encode_texts, truncated
from gptpl.data.labelled.examples import SPLITS, Example
from gptpl.data.labelled.splits_file import read_split
from gptpl.data.training_data import Split, TrainingData
from gptpl.errors import InputError
from gptpl.model.protocol import context_length
from gptpl.runs.own_data import REMEDY, own_data
from gptpl.training.classifier_checkpoint import LoadedClassifier

if TYPE_CHECKING:
    from gptpl.runs.models import Classifier, LanguageModel

log = logging.getLogger(__name__)

TextSplit = Literal["train", "val", "all"]
DEFAULT_BATCH_SIZE = 8
TextData = str | Path | Corpus | L.LightningDataModule | None
"""What a language model is evaluated on; a path is a file, folder or glob, None the run's own data."""
LabelledData = str | Path | LabelledCorpus | LabelledDataModule | None


@dataclass(frozen=True, kw_only=True)
class EvaluationData:
    """Batches, what reports call them, and in words from which context each token is predicted."""

    name: str
    context: str
    batches: Iterable[Any]


def language_data(
    model: "LanguageModel",
    data: TextData,
    *,
    split: str | None = None,
    max_length: int | None = None,
    batch_size: int | None = None,
) -> EvaluationData:
    """The batches that a language model is evaluated on; see `LanguageModel.evaluate`."""
    if (
        isinstance(data, str | Path)
        and model.template is not None
        and Path(data).suffix in (".json", ".jsonl")
    ):
        return _entries(model, Path(data).expanduser(), split, max_length, _batch_size(batch_size))
    whole = isinstance(data, str | Path | Corpus)
    datamodule = datamodule_of(model, data, max_length=max_length, batch_size=batch_size)
    split = split or ("all" if whole else "val")
    T = getattr(datamodule, "max_length", 0)
    _check_length(T, context_length(model.net))
    splits = get_args(TextSplit if isinstance(datamodule, TextDataModule) else Split)
    if split not in splits:
        raise InputError(f"split={split} is unknown for these data: choose one of {', '.join(splits)}")
    _check_tokenizer(model, datamodule)
    if isinstance(datamodule, TextDataModule):
        return EvaluationData(
            name=f"{data if isinstance(data, str | Path) else datamodule.name}, split {split}",
            context=_end_to_end(T),
            batches=datamodule.evaluation_dataloader(cast(TextSplit, split)),
        )
    split = cast(Split, split)
    if isinstance(datamodule, InstructionDataModule):
        return _instructions(model, datamodule, split)
    if isinstance(datamodule, TrainingData):
        return EvaluationData(
            name=f"{datamodule.name}, split {split}",
            context="in its example",
            batches=datamodule.split_dataloader(split),
        )
    if split != "val":
        raise InputError(f"{type(datamodule).__name__} has only a validation split: leave split={split} out")
    datamodule.setup("validate")
    return EvaluationData(
        name=f"{type(datamodule).__name__}, split val",
        context="in its example",
        batches=datamodule.val_dataloader(),
    )


def datamodule_of(
    model: "LanguageModel", data: TextData, *, max_length: int | None = None, batch_size: int | None = None
) -> L.LightningDataModule:
    """The data as a datamodule."""
    context = context_length(model.net)
    if data is None:
        return own_datamodule(model, max_length=max_length, batch_size=batch_size)
    if isinstance(data, str | Path | Corpus):
        _check_length(max_length or context, context)
        return TextDataModule(
            corpus=data if isinstance(data, Corpus) else TextFiles(data),
            tokenizer=model.tokenizer,
            max_length=context if max_length is None else max_length,
            stride=context if max_length is None else max_length,
            batch_size=_batch_size(batch_size),
        )
    if max_length is not None or batch_size is not None:
        raise InputError(
            f"max_length and batch_size are settings of the {type(data).__name__}: set them there"
        )
    if isinstance(data, LabelledDataModule):
        raise InputError(
            "a language model is evaluated on text or instructions: choose data=text_file data.path=FILE, or"
            " another text"
        )
    return data


def own_datamodule(
    model: "LanguageModel", *, max_length: int | None = None, batch_size: int | None = None
) -> L.LightningDataModule:
    """The data of the model's own run. Raises InputError where the model lies in none, and as `own_data`."""
    if model.run_dir is None:
        raise InputError(
            f"{model.path} lies in no run folder, which would say what it was trained on: {REMEDY}"
        )
    return own_data(
        model.run_dir,
        tokenizer=model.tokenizer,
        sha256=str(model.lineage.get("data", {}).get("sha256", "")),
        template=model.task.get("template"),
        max_length=max_length,
        batch_size=_batch_size(batch_size),
        trust=model.trust,
    )


def training_tokens(model: "LanguageModel", data: TextData) -> np.ndarray[Any, Any]:
    """The tokens of a text: of the own data and of a datamodule the training part, else the whole."""
    datamodule = datamodule_of(model, data)
    if not isinstance(datamodule, TextDataModule):
        raise InputError(f"memorisation needs a training text, and {type(datamodule).__name__} has none")
    _check_tokenizer(model, datamodule)
    encoded = datamodule.encoded
    whole = isinstance(data, str | Path | Corpus)
    return np.concatenate([encoded.train, encoded.val]) if whole else np.asarray(encoded.train)


def _batch_size(given: int | None) -> int:
    return DEFAULT_BATCH_SIZE if given is None else given


def _end_to_end(T: int) -> str:
    return (
        f"every token once, in sequences of {T:,} tokens laid end to end: the first of each have little"
        " context (gptpl inspect gives every token more)"
    )


def _check_tokenizer(model: "LanguageModel", datamodule: L.LightningDataModule) -> None:
    if isinstance(datamodule, TrainingData) and datamodule.tokenizer.state() != model.tokenizer.state():
        raise InputError(
            f"the data have the tokens of a {datamodule.tokenizer.name} tokenizer, which is not the model's:"
            " make them with tokenizer=model.tokenizer"
        )


def _check_length(length: int, context_length: int) -> None:
    if length > context_length:
        raise InputError(
            f"data.max_length={length} is longer than the model's context of {context_length} tokens:"
            f" leave it out, or give at most {context_length}"
        )


# --- instructions ---------------------------------------------------------------------------------------


def _instructions(model: "LanguageModel", datamodule: InstructionDataModule, split: Split) -> EvaluationData:
    own, used = model.template, datamodule.template
    if own is not None and own.state() != used.state():
        log.warning("the model was tuned with template=%s, not %s", own.name, used.name)
    for line in length_lines({split: datamodule.rows(split)}, datamodule.max_length):
        log.warning(line.strip())
    if split != "train" and model.run_dir is not None:
        _warn_of_known(datamodule.splits.of(split), split_file(model.run_dir, "train"))
    return _of_examples(
        f"{datamodule.name}, split {split}",
        used,
        datamodule.mask_instruction,
        datamodule.split_dataloader(split),
    )


def _of_examples(name: str, template: PromptTemplate, masked: bool, batches: Iterable[Any]) -> EvaluationData:
    learned = "answers" if masked else "prompts and answers"
    return EvaluationData(
        name=f"{name}, template {template.name}",
        context=f"every token of the {learned}, each from all of its example before it",
        batches=batches,
    )


def _entries(
    model: "LanguageModel", path: Path, split: str | None, max_length: int | None, batch_size: int
) -> EvaluationData:
    """All entries of a file, scored as in the model's training."""
    if split not in (None, "all"):
        raise InputError(f"split={split}: a file is evaluated as a whole, leave split out")
    assert model.template is not None
    T = context_length(model.net) if max_length is None else max_length
    _check_length(T, context_length(model.net))
    settings = model.loaded.run_config.get("data", {})
    masked = bool(settings.get("mask_instruction", False))
    rows = make_rows(
        read_entries(path), model.tokenizer, model.template,
        max_length=T, mask_instruction=masked, too_long="truncate",
    )  # fmt: skip
    for line in length_lines({"test": rows}, T):
        log.warning(line.strip())
    examples = InstructionExamples(rows.rows, eot_id=model.tokenizer.eot_id)
    batches = [
        examples.__getitems__(range(i, min(i + batch_size, len(examples))))
        for i in range(0, len(examples), batch_size)
    ]
    return _of_examples(str(path), model.template, masked, batches)


def _warn_of_known(entries: Sequence[Entry], trained_on: Path) -> None:
    """Warns where the run learned what it is tested on: its file was split by other settings."""
    if not trained_on.is_file():
        return
    learned = {entry.question for entry in read_entries(trained_on)}
    known = sum(entry.question in learned for entry in entries)
    if known:
        log.warning(
            "%d of %d entries are in %s, which the model was trained on: give the run's own data.shuffle,"
            " data.split_seed, data.train_share and data.test_share",
            *(known, len(entries), trained_on),
        )


# --- labelled texts -------------------------------------------------------------------------------------


def labelled_data(model: "Classifier", data: LabelledData, *, split: str, batch_size: int) -> EvaluationData:
    """The batches that a classifier is evaluated on; see `Classifier.evaluate`."""
    name, examples = _examples(model, data, split)
    for example in examples:
        if example.label not in model.labels:
            known = ", ".join(model.labels[:8])
            raise InputError(
                f"line {example.line} has the label {example.label!r}, which the classifier does not know"
                f" (it has {known}): rename or remove it"
            )
    texts = _encoded(examples, model.loaded)
    return EvaluationData(name=name, context="", batches=_Batches(texts, batch_size))


def _examples(model: "Classifier", data: LabelledData, split: str) -> tuple[str, Sequence[Example]]:
    if isinstance(data, str | Path):
        data = LabelledFiles(path=str(data), name=str(data))
    if isinstance(data, LabelledCorpus):
        return data.name, [example for found in data.examples().values() for example in found]
    if split not in SPLITS:
        raise InputError(
            f"split={split} is none of a classifier's: choose {', '.join(SPLITS)}, or give a file, which is"
            " taken whole"
        )
    if data is not None:
        return f"{data.name}, split {split}", data.prepared.splits[cast(Split, split)]
    if model.run_dir is None:
        raise InputError(f"{model.path} lies in no run folder, where its texts would be: {REMEDY}")
    return f"split {split}", read_split(model.run_dir, cast(Split, split))


def _encoded(examples: Sequence[Example], loaded: LoadedClassifier) -> LabelledTexts:
    encoded = encode_texts([example.text for example in examples], loaded.tokenizer)
    kept, cut = truncated(encoded, loaded.max_length)
    if cut.texts:
        log.warning(
            "%s of %s texts are longer than %s tokens: %s tokens at their ends were not read",
            f"{cut.texts:,}", f"{len(examples):,}", f"{loaded.max_length:,}", f"{cut.tokens:,}",
        )  # fmt: skip
    numbers = class_numbers(examples, loaded.labels)
    return LabelledTexts(kept, numbers, pad_id=loaded.pad_id, padded_to=loaded.padded_to)


@dataclass(frozen=True)
class _Batches:
    """Texts by length, for little padding."""

    texts: LabelledTexts
    size: int

    def __len__(self) -> int:
        return -(-len(self.texts) // self.size)

    def __iter__(self) -> Iterator[LabelledBatch]:
        order = sorted(range(len(self.texts)), key=lambda i: self.texts.lengths[i])
        for start in range(0, len(order), self.size):
            yield self.texts.__getitems__(order[start : start + self.size])
