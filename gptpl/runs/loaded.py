"""`gptpl.load`: the model of a run, checkpoint, adapter, or another program's files."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gptpl.checkpoints.adapter import adapter_checkpoint
from gptpl.checkpoints.files import checkpoint_file
from gptpl.checkpoints.format import CLASSIFY, read_header, task_of
from gptpl.checkpoints.loading import (
    RunWeights,
    classifier_of,
    load_foreign,
    load_foreign_classifier,
    load_model,
    load_published,
    model_of,
)
from gptpl.checkpoints.loading import load_classifier as load_classifier_file
from gptpl.config.instantiate import check_trusted, instantiate
from gptpl.data.instructions.records import PromptTemplate
from gptpl.errors import InputError
from gptpl.files.run_record import BEST, CHECKPOINT_FOLDER
from gptpl.model import GPTConfig, Int8GPT
from gptpl.model.protocol import gpt_model
from gptpl.runs.listing import find_run
from gptpl.runs.models import Classifier, InstructionModel, LanguageModel
from gptpl.tokenizers import Tokenizer
from gptpl.training.performance import device_type
from gptpl.weights.adapter import is_adapter
from gptpl.weights.formats import is_foreign, open_model
from gptpl.weights.hugging_face import is_classifier
from gptpl.weights.model_files import read_record
from gptpl.weights.starting import FileWeights, PublishedWeights, RandomWeights, StartingWeights

log = logging.getLogger(__name__)

INT8 = "int8"
PRECISIONS = {"32-true": torch.float32, "bf16-true": torch.bfloat16, INT8: torch.float32}
"""The types that a language model's weights are read in."""
Source = str | Path | StartingWeights


def load(
    source: Source,
    *,
    base: Source | None = None,
    device: str = "auto",
    precision: str = "32-true",
    trust: Sequence[str] = (),
) -> Any:
    """The model of a run, checkpoint or exported folder: a LanguageModel, InstructionModel or Classifier.

    `gptpl.load("runs/tale/2026-11-26_10-00-00").generate("Every effort moves you", temperature=0.8)`

    `load_language_model` and `load_classifier` are the same for one kind only, with its type.

    Args:
        source: a run folder (of a classifier its best weights, else the last), a `.ckpt` file, an adapter
            folder, a folder or file of another program's format, or starting weights such as
            `PublishedWeights(source="hf", size="124M")`.
        base: the weights that an adapter belongs to; None: where they were when it was trained.
        device: auto, cpu, cuda or mps.
        precision: 32-true; bf16-true for half the memory; int8 for a quarter, on a CPU, where it generates
            single texts fastest. Language models only.
        trust: packages of yours whose classes the run may use.

    Raises InputError for files that are missing or damaged, and for a device that does not exist.
    """
    if names_classifier(source):
        if precision != "32-true":
            raise InputError(f"precision={precision}: a classifier is read in 32-true, leave it out")
        return load_classifier(source, base=base, device=device, trust=trust)
    return load_language_model(source, base=base, device=device, precision=precision, trust=trust)


def load_language_model(
    source: Source,
    *,
    base: Source | None = None,
    device: str = "auto",
    precision: str = "32-true",
    trust: Sequence[str] = (),
    config: GPTConfig | None = None,
    tokenizer: Tokenizer | None = None,
) -> LanguageModel:
    """A language model; an `InstructionModel` where it was tuned to follow instructions. See `load`.

    `config` and `tokenizer` are for files of other programs that contain neither.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision={precision} is unknown: choose one of {', '.join(PRECISIONS)}")
    place, dtype = device_type(device, key="device"), PRECISIONS[precision]
    if precision == INT8 and place != "cpu":
        raise InputError(f"precision=int8 is for CPUs, the device is {place}: give device=cpu or bf16-true")
    if isinstance(source, str | Path):
        path: Path | None = find_run(source, key="checkpoint")
    else:
        _check_whole(source)
        path = source.file if isinstance(source, RunWeights) else None
    own_base = _base(base, path)
    foreign = partial(load_foreign, config=config, tokenizer=tokenizer, device=place, dtype=dtype)
    if isinstance(source, PublishedWeights):
        loaded = load_published(source, device=place, dtype=dtype)
    elif isinstance(source, FileWeights):
        loaded = foreign(source.open())
    elif path is None:
        raise InputError(f"{type(source).__name__} holds no whole model: give a run folder, or a file")
    elif is_foreign(path):
        loaded = foreign(open_model(path))
    else:
        if config is not None or tokenizer is not None:
            raise InputError(f"checkpoint={path} describes its model: leave model= and tokenizer= out")
        if is_adapter(path):
            loaded = model_of(adapter_checkpoint(path, base=own_base), path, device=place)
        else:
            loaded = load_model(path, device=place, build=partial(_build, path, trust))
        loaded.net.to(dtype)
    if precision == INT8:
        loaded = replace(loaded, net=Int8GPT(gpt_model(loaded.net, "precision=int8 is for GPTModel alone")))
    log.info("checkpoint: %s, step %d", loaded.path, loaded.step)
    if "template" not in loaded.task:
        return LanguageModel(**vars(loaded), trust=tuple(trust))
    template = PromptTemplate.from_state(loaded.task["template"])
    return InstructionModel(**vars(loaded), trust=tuple(trust), template=template)


def load_classifier(
    source: Source, *, base: Source | None = None, device: str = "auto", trust: Sequence[str] = ()
) -> Classifier:
    """A classifier. See `load`."""
    place = device_type(device, key="device")
    if isinstance(source, StartingWeights):
        raise InputError("the weights of a language model are not a classifier: give a run of task=classify")
    path = find_run(source, key="checkpoint")
    own_base = _base(base, path)
    if is_adapter(path):
        loaded = classifier_of(adapter_checkpoint(path, base=own_base), path, device=place)
    elif is_foreign(path):
        if not is_classifier(path):
            raise InputError(
                f"checkpoint={path} is a language model, not a classifier: train one with gptpl train"
                f" task=classify init=state_dict init.path={path}"
            )
        loaded = load_foreign_classifier(path, device=place)
    else:
        best = path / CHECKPOINT_FOLDER / BEST
        loaded = load_classifier_file(best if best.is_file() else checkpoint_file(str(path)), device=place)
    log.info("checkpoint: %s, step %d", loaded.path, loaded.step)
    return Classifier(**vars(loaded), trust=tuple(trust))


def names_classifier(source: Source) -> bool:
    """Whether a source is a classifier; False also for a file that cannot be read, as loading it will say."""
    if isinstance(source, StartingWeights):
        return False
    try:
        path = find_run(source, key="checkpoint")
        if is_adapter(path):
            return bool(read_record(path).get("task", {}).get("name") == CLASSIFY)
        if is_foreign(path):
            return is_classifier(path)
        return bool(task_of(read_header(checkpoint_file(str(path))))["name"] == CLASSIFY)
    except InputError:
        return False


def _build(path: Path, trust: Sequence[str], node: Mapping[str, Any]) -> nn.Module:
    """Make a model of another class, if the user trusts it."""
    check_trusted({"model": node}, f"checkpoint={path}", frozenset(trust))
    net: nn.Module = instantiate(node)
    return net


def _base(base: Source | None, path: Path | None) -> StartingWeights | None:
    """The weights to add an adapter to. Raises InputError where there is none at `path`."""
    if base is not None and (path is None or not is_adapter(path)):
        raise InputError("base is for an adapter, and the model given has all its weights: leave it out")
    if isinstance(base, str | Path):
        path = Path(base).expanduser()
        return FileWeights(path=str(path)) if is_foreign(path) else RunWeights(checkpoint=str(path))
    if isinstance(base, RandomWeights):
        _check_whole(base)
    return base


def _check_whole(weights: StartingWeights) -> None:
    """Raises InputError for weights that are no use before training."""
    if isinstance(weights, RandomWeights):
        raise InputError(
            f"init={weights.name} is not trained yet: give checkpoint=RUN_FOLDER or init=gpt2_hf"
        )
    for option in ("crop_context", "crop_vocabulary"):
        if getattr(weights, option, False):
            raise InputError(f"init.{option}=true is for training: leave it out here")
