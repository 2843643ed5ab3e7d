"""`gptpl evaluate` of a classifier: accuracy, F1, confusion and calibration, on its own texts or a file."""

# C classes

import logging
from collections.abc import Iterator, Sequence
from typing import cast

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from tqdm import tqdm

from gptpl.cli.batch import whole_batch_size
from gptpl.cli.classifier_input import loaded_classifier, run_folder_of
from gptpl.cli.configs import default_choices
from gptpl.cli.hydra_app import instantiate
from gptpl.cli.schema_data import LabelledBatchesConf
from gptpl.cli.text_table import table
from gptpl.data.labelled.corpora import LabelledCorpus
from gptpl.data.labelled.encoded import LabelledBatch, LabelledTexts, class_numbers, encode_texts, truncated
from gptpl.data.labelled.examples import SPLITS, Example
from gptpl.data.labelled.splits_file import read_split
from gptpl.data.training_data import Split
from gptpl.errors import InputError
from gptpl.training import classifier_evaluation
from gptpl.training.classifier_checkpoint import LoadedClassifier
from gptpl.training.classifier_evaluation import ClassifierEvaluation

log = logging.getLogger(__name__)

WHOLE = "all"


def evaluate_classifier(cfg: DictConfig) -> None:
    """Prints the scores to standard output."""
    own = HydraConfig.get().runtime.choices["data"] == default_choices("evaluate")["data"]
    _check(cfg, own=own)
    loaded = loaded_classifier(cfg)
    if own:
        name, examples = f"split {cfg.split}", _own_examples(cfg, loaded)
    else:
        corpus = cast(LabelledCorpus, instantiate(cfg.data.corpus))
        name = corpus.name
        examples = [example for found in corpus.examples().values() for example in found]
    _check_labels(examples, loaded)
    texts, size = _encoded(examples, loaded), whole_batch_size(cfg.data.batch_size)
    total = -(-len(texts) // size)
    bar = tqdm(_batches(texts, size), total=total, unit="batch", desc="evaluating", disable=None)
    found = classifier_evaluation.evaluate_classifier(loaded.net, bar)
    for line in report(found, loaded.labels, name):
        print(line)


def _check(cfg: DictConfig, *, own: bool) -> None:
    if own and cfg.split not in SPLITS:
        raise InputError(
            f"split={cfg.split} is none of a classifier's: choose {', '.join(SPLITS)}, or give data=labelled"
            " data.path=FILE split=all"
        )
    if not own and cfg.data._target_ != LabelledBatchesConf._target_:
        raise InputError(
            f"checkpoint={cfg.checkpoint} is a classifier, and these data have no labels: give data=labelled"
            " data.path=FILE, or leave data= out for the run's own texts"
        )
    if cfg.data.max_length is not None:
        raise InputError(
            f"data.max_length={cfg.data.max_length}: a classifier reads of a text what it read in training,"
            " leave it out"
        )
    if not own and cfg.split != WHOLE:
        raise InputError(f"split={cfg.split}: a file that is given is taken whole, give split=all")


def _own_examples(cfg: DictConfig, loaded: LoadedClassifier) -> list[Example]:
    run_dir = run_folder_of(loaded)
    if run_dir is None:
        raise InputError(
            f"checkpoint={cfg.checkpoint} lies in no run folder, where its texts would be: give data=labelled"
            " data.path=FILE split=all"
        )
    return read_split(run_dir, cast(Split, cfg.split))


def _check_labels(examples: Sequence[Example], loaded: LoadedClassifier) -> None:
    for example in examples:
        if example.label not in loaded.labels:
            known = ", ".join(loaded.labels[:8])
            raise InputError(
                f"line {example.line} has the label {example.label!r}, which the classifier does not know"
                f" (it has {known}): rename or remove it"
            )


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


def _batches(texts: LabelledTexts, size: int) -> Iterator[LabelledBatch]:
    """By length, for little padding."""
    order = sorted(range(len(texts)), key=lambda i: texts.lengths[i])
    for start in range(0, len(order), size):
        yield texts.__getitems__(order[start : start + size])


def report(found: ClassifierEvaluation, labels: Sequence[str], name: str) -> Iterator[str]:
    """The scores in lines, with a table of the classes and one of what was taken for what."""
    yield f"data               {name}, {found.texts:,} texts of {len(labels)} classes"
    yield f"loss               {found.loss:.4f} nats per text"
    yield f"accuracy           {found.scores.accuracy:.2%}"
    yield f"F1, mean           {found.scores.macro_f1:.4f}"
    yield f"calibration error  {found.scores.calibration_error:.4f}"
    yield ""
    rows = [["true \\ predicted", *labels, "F1"]]
    for label, counts, f1 in zip(labels, found.confusion, found.scores.f1, strict=True):
        rows.append([label, *(f"{count:,.0f}" for count in counts), f"{f1:.4f}"])
    yield from table(rows)
