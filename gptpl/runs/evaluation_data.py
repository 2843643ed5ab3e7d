"""Data that a model is evaluated on: its own, a file, a corpus or a datamodule, as batches with a name."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader

from gptpl.config.instantiate import check_paths_inside, check_trusted, instantiate
from gptpl.config.signatures import locate
from gptpl.config.slots import settings_of
from gptpl.data.classification.datamodule import (
    LabelledDataModule,
    LabelledTexts,
    encode_texts,
    truncated,
)
from gptpl.data.classification.splits import read_split
from gptpl.data.instructions.datamodule import (
    InstructionDataModule,
    InstructionExamples,
    encode_instructions,
    length_lines,
)
from gptpl.data.instructions.records import Instruction, PromptTemplate, read_instructions
from gptpl.data.pretraining.datamodule import SequenceData, TextDataModule
from gptpl.data.sources import Corpus, LabelledCorpus, LabelledFiles, TextFiles
from gptpl.data.splits import SPLITS, Split, check_choice, split_file
from gptpl.data.stock_data import StockData
from gptpl.data.training_data import TrainingData
from gptpl.errors import InputError
from gptpl.files.run_record import CONFIG_FILE, read_config, recorded_rows
from gptpl.model.protocol import context_length

if TYPE_CHECKING:
    from gptpl.runs.models import Classifier, LanguageModel

log = logging.getLogger(__name__)

TextSplit = Literal["train", "val", "all"]
DEFAULT_BATCH_SIZE = 8
REMEDY = "give the data to evaluate on, data=..."
TextData = str | Path | Corpus | L.LightningDataModule | None
"""Data for a language model; a path is a file, folder or glob, None the run's own data."""
LabelledData = str | Path | LabelledCorpus | LabelledDataModule | None


@dataclass(frozen=True, kw_only=True)
class EvaluationData:
    """Batches, their name in reports, and in words the context that each token is predicted from.

    `is_text`: every token of a text is scored, so that its bytes can be counted.
    """

    name: str
    batches: Iterable[Any]
    context: str = "in its example"
    is_text: bool = False


def language_data(
    model: "LanguageModel",
    data: TextData,
    *,
    split: str | None = None,
    max_length: int | None = None,
    batch_size: int | None = None,
) -> EvaluationData:
    """The batches that a language model is evaluated on; see `LanguageModel.evaluate`."""
    size = DEFAULT_BATCH_SIZE if batch_size is None else batch_size
    if isinstance(data, str | Path) and model.template and Path(data).suffix in (".json", ".jsonl"):
        return _entries(model, Path(data).expanduser(), split, max_length, size)
    datamodule = _datamodule_of(model, data, max_length, size)
    if datamodule is data and (max_length, batch_size) != (None, None):
        raise InputError(
            f"max_length and batch_size are settings of the {type(data).__name__}: set them there"
        )
    split = split or ("all" if isinstance(data, str | Path | Corpus) else "val")
    check_choice("split", split, TextSplit if isinstance(datamodule, SequenceData) else Split)
    T = _checked_length(model, getattr(datamodule, "max_length", 0))
    name = str(data) if isinstance(data, str | Path) else getattr(datamodule, "name", None)
    name = f"{name or type(datamodule).__name__}, split {split}"
    if isinstance(datamodule, SequenceData):
        return EvaluationData(
            name=name,
            context=f"every token once, in sequences of {T:,} tokens laid end to end: the first of each have"
            " little context (gptpl inspect gives every token more)",
            batches=datamodule.evaluation_dataloader(cast(TextSplit, split)),
            is_text=True,
        )
    if isinstance(datamodule, InstructionDataModule):
        return _instructions(model, datamodule, cast(Split, split))
    if isinstance(datamodule, TrainingData):
        return EvaluationData(name=name, batches=datamodule.split_dataloader(cast(Split, split)))
    if split != "val":
        raise InputError(f"{type(datamodule).__name__} has only a validation split: leave split={split} out")
    datamodule.setup("validate")
    return EvaluationData(name=name, batches=datamodule.val_dataloader())


def _datamodule_of(
    model: "LanguageModel", data: TextData, max_length: int | None, batch_size: int
) -> L.LightningDataModule:
    """The data as a datamodule with the model's tokenizer."""
    if data is None:
        return _own_data(model, max_length, batch_size)
    if isinstance(data, str | Path | Corpus):
        T = _checked_length(model, max_length)
        return TextDataModule(
            corpus=data if isinstance(data, Corpus) else TextFiles(data),
            tokenizer=model.tokenizer, max_length=T, stride=T, batch_size=batch_size,
        )  # fmt: skip
    if isinstance(data, LabelledDataModule):
        raise InputError(
            "a language model is evaluated on text or instructions: choose data=text_file data.path=FILE, or"
            " another text"
        )
    if isinstance(data, TrainingData) and data.tokenizer.state() != model.tokenizer.state():
        raise InputError(
            f"the data have the tokens of a {data.tokenizer.name} tokenizer, which is not the model's:"
            " make them with tokenizer=model.tokenizer"
        )
    return data


def _checked_length(model: "LanguageModel", max_length: int | None) -> int:
    """The length of sequences; None: the model's context. Raises InputError for a longer one."""
    longest = context_length(model.net)
    if max_length is not None and max_length > longest:
        raise InputError(
            f"data.max_length={max_length} is longer than the model's context of {longest} tokens:"
            f" leave it out, or give at most {longest}"
        )
    return longest if max_length is None else max_length


def training_tokens(model: "LanguageModel", data: TextData) -> np.ndarray[Any, Any]:
    """The tokens of a text: of a path or corpus all, else the training part."""
    datamodule = _datamodule_of(model, data, None, DEFAULT_BATCH_SIZE)
    if not isinstance(datamodule, SequenceData):
        raise InputError(f"memorisation needs a training text, and {type(datamodule).__name__} has none")
    encoded = datamodule.encoded
    whole = isinstance(data, str | Path | Corpus)
    tokens = np.asarray(encoded.train)
    return np.concatenate([tokens, encoded.val]) if whole else tokens


def _in_batches(examples: Any, order: Sequence[int], batch_size: int) -> Iterable[Any]:
    """Batches of examples that make batches of themselves (`__getitems__`), in an order."""
    return DataLoader(
        examples,
        batch_size=batch_size,
        sampler=order,
        collate_fn=lambda batch: batch,
        generator=torch.Generator(),  # the global one is left alone
    )


# --- the data of the model's own run --------------------------------------------------------------------


def _own_data(model: "LanguageModel", max_length: int | None, batch_size: int) -> L.LightningDataModule:
    """The data of the run's `config.yaml`.

    Raises InputError where the model is not in a run's folder, and for data that are missing, have changed,
    or are read by a class that is not trusted.
    """
    run_dir = model.run_dir
    if run_dir is None:
        raise InputError(f"{model.path} is not in a run's folder, which would name its data: {REMEDY}")
    where, config = run_dir / CONFIG_FILE, read_config(run_dir, needs=["data"])
    node = config["data"]
    check_trusted({"data": node}, str(where), frozenset(model.trust))
    check_paths_inside({"data": node}, run_dir, source=str(where))
    if max_length is not None:
        node = {**node, "max_length": max_length}
    state = model.task.get("template")
    template = None if state is None else PromptTemplate.from_state(state)
    datamodule = make_datamodule(model, node, template=template, batch_size=batch_size)
    if not isinstance(datamodule, TrainingData):
        datamodule = StockData(datamodule, tokenizer=model.tokenizer, seed=int(config.get("seed", 0)))
        datamodule.load()
        datamodule.setup()
    wanted = str(model.lineage.get("data", {}).get("sha256", ""))
    if wanted and (difference := datamodule.difference(wanted, recorded_rows(run_dir))):
        raise InputError(
            f"the data of {run_dir} are not what its model was trained on ({difference}): restore them, or"
            f" {REMEDY}"
        )
    return datamodule


def with_corpora(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of data with their corpora made."""
    nodes = {key: settings.get(key) for key in ("corpus", "sources")}
    made = {key: instantiate(node) for key, node in nodes.items() if isinstance(node, Mapping)}
    return {**settings, **made}


def make_datamodule(
    model: "LanguageModel", settings: Mapping[str, Any], *, template: PromptTemplate | None, batch_size: int
) -> L.LightningDataModule:
    """A datamodule for evaluation from the settings of a run's data; those that the class lacks are left out.

    `template` None is the settings'. Raises InputError for settings that do not fit the class.
    """
    kind: type[L.LightningDataModule] = locate(str(settings.get("_target_")), "data._target_")
    given = {**with_corpora(settings), "tokenizer": model.tokenizer, "batch_size": batch_size}
    if issubclass(kind, SequenceData):
        given["stride"] = given.get("max_length")
    if issubclass(kind, InstructionDataModule):
        given["packing"] = False
        if template is not None:  # nothing is read for it, should the settings name a file
            given |= {"template": template.source, "response_marker": template.response_marker}
    known = settings_of(kind, "data").parameters.keys() - {"_target_", "global_batch_size"}
    try:
        datamodule = kind(**{name: value for name, value in given.items() if name in known})
    except TypeError as error:
        raise InputError(
            f"the settings of the data do not fit {kind.__name__} ({error}): {REMEDY}"
        ) from error
    if isinstance(datamodule, InstructionDataModule) and template is not None:
        datamodule.template = template
    return datamodule


# --- instructions ---------------------------------------------------------------------------------------


def _instructions(model: "LanguageModel", datamodule: InstructionDataModule, split: Split) -> EvaluationData:
    own, used = model.template, datamodule.template
    if own is not None and own.state() != used.state():
        log.warning("the model was tuned with template=%s, not %s", own.name, used.name)
    for line in length_lines({split: datamodule.encoded(split)}, datamodule.max_length):
        log.warning(line)
    if split != "train" and model.run_dir is not None:
        _warn_of_known(datamodule.splits.of(split), split_file(model.run_dir, "train", ".json"))
    batches, name = datamodule.split_dataloader(split), f"{datamodule.name}, split {split}"
    return _of_examples(name, used, datamodule.mask_instruction, batches)


def _entries(
    model: "LanguageModel", path: Path, split: str | None, max_length: int | None, batch_size: int
) -> EvaluationData:
    """All entries of a file, scored as in the model's training."""
    if split not in (None, "all"):
        raise InputError(f"split={split}: a file is evaluated as a whole, leave split out")
    assert model.template is not None
    T = _checked_length(model, max_length)
    masked = bool(model.run_config.get("data", {}).get("mask_instruction", False))
    rows = encode_instructions(
        read_instructions(path), model.tokenizer, model.template,
        max_length=T, mask_instruction=masked, too_long="truncate",
    )  # fmt: skip
    for line in length_lines({"test": rows}, T):
        log.warning(line)
    examples = InstructionExamples(rows.rows, eot_id=model.tokenizer.eot_id)
    batches = _in_batches(examples, range(len(examples)), batch_size)
    return _of_examples(str(path), model.template, masked, batches)


def _of_examples(name: str, template: PromptTemplate, masked: bool, batches: Iterable[Any]) -> EvaluationData:
    learned = "answers" if masked else "prompts and answers"
    return EvaluationData(
        name=f"{name}, template {template.name}",
        context=f"every token of the {learned}, each from all of its example before it",
        batches=batches,
    )


def _warn_of_known(entries: Sequence[Instruction], trained_on: Path) -> None:
    """Warn of entries that the run was trained on: its file was split by other settings."""
    learned = {entry.question for entry in read_instructions(trained_on)} if trained_on.is_file() else set()
    known = sum(entry.question in learned for entry in entries)
    if known:
        log.warning(
            "%d of %d entries are in %s, which the model was trained on: give the run's own data.shuffle,"
            " data.split_seed, data.train_ratio and data.test_ratio",
            *(known, len(entries), trained_on),
        )


# --- labelled texts -------------------------------------------------------------------------------------


def labelled_data(model: "Classifier", data: LabelledData, *, split: str, batch_size: int) -> EvaluationData:
    """The batches that a classifier is evaluated on; see `Classifier.evaluate`."""
    if isinstance(data, str | Path):
        data = LabelledFiles(path=str(data), name=str(data))
    if isinstance(data, LabelledCorpus):
        name, examples = data.name, [each for found in data.examples().values() for each in found]
    elif split not in SPLITS:
        raise InputError(f"split must be one of {', '.join(SPLITS)}, got {split}; a file is taken whole")
    elif data is not None:
        name, examples = f"{data.name}, split {split}", list(data.prepared.splits[cast(Split, split)])
    elif model.run_dir is None:
        raise InputError(f"{model.path} is not in a run's folder, where its texts would be: {REMEDY}")
    else:
        name, examples = f"split {split}", list(read_split(model.run_dir, cast(Split, split)))
    for example in examples:
        if example.label not in model.labels:
            raise InputError(
                f"line {example.line} has the label {example.label!r}, which the classifier does not know"
                f" (it has {', '.join(model.labels[:8])}): rename or remove it"
            )
    encoded = encode_texts([example.text for example in examples], model.tokenizer)
    kept, lost = truncated(encoded, model.max_length)
    if lost:
        log.warning(
            "%s of %s texts are longer than %s tokens: %s tokens at their ends were not read",
            f"{len(lost):,}", f"{len(examples):,}", f"{model.max_length:,}", f"{sum(lost):,}",
        )  # fmt: skip
    numbers = [model.labels.index(example.label) for example in examples]
    texts = LabelledTexts(kept, numbers, pad_id=model.pad_id, padded_to=model.padded_to)
    by_length = sorted(range(len(texts)), key=lambda i: texts.lengths[i])  # for little padding
    return EvaluationData(name=name, batches=_in_batches(texts, by_length, batch_size))
