"""The parts of a run, each made from its settings: model, tokenizer, optimizer, schedule, data, batches."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.optim import Optimizer

from gptpl.checkpoints.format import CLASSIFY, read_header
from gptpl.checkpoints.loading import RunWeights, check_vocabulary
from gptpl.config.compose import Config, as_config, plain
from gptpl.config.groups import Folder, choices, said_by
from gptpl.config.instantiate import instantiate, partial_of
from gptpl.config.overrides import is_path
from gptpl.config.signatures import locate
from gptpl.config.slots import settings_of
from gptpl.data.pretraining.datamodule import SequenceData
from gptpl.data.pretraining.encoding import vocabulary_sha256
from gptpl.data.sources import Corpus, LabelledCorpus
from gptpl.data.stock_data import StockData
from gptpl.data.training_data import TrainingData
from gptpl.errors import InputError
from gptpl.files.run_record import is_run, read_config
from gptpl.model import ClassifierConfig, GPTBackbone, GPTClassifier, GPTConfig, GPTModel
from gptpl.model.parameters import Tuning
from gptpl.runs.claims import process_run_dir
from gptpl.runs.listing import find_run
from gptpl.runs.resume import Resumption, settle_lengths
from gptpl.tokenizers import FileTokenizer, TiktokenTokenizer, Tokenizer, tokenizer_from_state
from gptpl.training.costs import (
    Prepare,
    accumulation,
    free_memory,
    largest_batch_size,
    optimizer_state_bytes,
)
from gptpl.training.optimizers import optimizer_of, peak_lr
from gptpl.training.performance import AUTO, FastPath, device_type, product_dtype
from gptpl.training.processes import processes
from gptpl.training.schedules import takes_optimizer
from gptpl.weights.starting import FileWeights, PublishedWeights, StartingWeights

log = logging.getLogger(__name__)

RUN_SETTINGS = ("seed", "eval_train_batches", "eval_val_batches")
"""Settings of the run that its data take, too."""


def class_of(cfg: Config, key: str) -> Any:
    """The class, or the function, of a node such as `task`."""
    return locate(str(cfg[key]._target_), f"{key}._target_")


def recorded(cfg: Config) -> dict[str, Any]:
    """Every setting as plain data, with absolute paths."""

    def absolute(value: Any, key: str) -> Any:
        if isinstance(value, dict):
            return {name: absolute(each, name) for name, each in value.items()}
        if isinstance(value, str) and is_path(key) and value and "://" not in value:
            return str(Path(value).expanduser().absolute())
        return value

    settings = plain(cfg)
    return settings | {name: absolute(settings[name], name) for name in ("data", "init")}


# --- model and task -------------------------------------------------------------------------------------


def is_gpt(cfg: Config) -> bool:
    """Whether the model is gptpl's own, not a class of the user's."""
    return "_target_" not in cfg.model


def check_gpt(cfg: Config, need: str) -> None:
    """Raises InputError, which begins with `need`, for a model of the user's own class."""
    if not is_gpt(cfg):
        raise InputError(f"{need}, this model is a {cfg.model._target_}")


def model_config(cfg: Config, vocab_size: int | None = None) -> GPTConfig:
    """The model's configuration, with this vocabulary where the settings give none."""
    fields = {str(name): value for name, value in cfg.model.items()}
    return GPTConfig(**{**fields, "vocab_size": fields.get("vocab_size") or vocab_size or 1})


def is_language_model(cfg: Config) -> bool:
    """Whether the loss is over the vocabulary."""
    return getattr(class_of(cfg, "task"), "task", None) != CLASSIFY


def classifier_of(cfg: Config, datamodule: TrainingData | None) -> ClassifierConfig | None:
    """The head of a classifier, with two labels where there are no data yet; None for another task."""
    if is_language_model(cfg):
        return None
    own = {name: cfg.task[name] for name in ("pooling", "head_bias") if name in cfg.task}
    labels = ("", "") if datamodule is None else datamodule.module_settings().get("labels") or cfg.task.labels
    return ClassifierConfig(n_classes=len(labels), **own)


def preparation(cfg: Config, datamodule: TrainingData | None) -> Prepare:
    """A function that makes what trains of a language model: a classifier's head, frozen or added weights."""
    tune: Tuning = instantiate(cfg.tune)
    classifier = classifier_of(cfg, datamodule)

    def prepare(net: GPTModel) -> GPTBackbone:
        made: GPTBackbone = net if classifier is None else GPTClassifier(net.config, classifier)
        tune.apply(made)
        return made

    return prepare


# --- optimizer and schedule -----------------------------------------------------------------------------


def optimizer_factory(cfg: Config) -> Callable[[nn.Module], Optimizer]:
    """A function that makes the optimizer of a model: one of gptpl's, or of any class like torch's."""
    return partial(optimizer_of, partial_of(cfg.optimizer))


def schedule(cfg: Config, total_steps: int) -> Callable[[int], float] | None:
    """The learning rate of a step as a multiple of its peak; None for a scheduler such as torch's."""
    if takes_optimizer(class_of(cfg, "scheduler")):
        return None
    lr_factor = partial(instantiate(cfg.scheduler).factor, peak_lr=base_lr(cfg), total_steps=total_steps)
    lr_factor(0)  # refuses settings that do not fit the run
    return lr_factor


def base_lr(cfg: Config) -> float:
    """The learning rate that a schedule takes as its peak."""
    with torch.random.fork_rng(devices=[]):  # the layer's weights are not drawn from the run's numbers
        return peak_lr(partial_of(cfg.optimizer), nn.Linear(1, 1))


# --- data -----------------------------------------------------------------------------------------------


def build_datamodule(
    cfg: Config, *, resume: Resumption | None = None, weights: StartingWeights | None = None
) -> TrainingData:
    """The data of `cfg.data` under `cfg.tokenizer`, encoded or opened from the cache.

    The tokenizer of classes and instructions is that of the run resumed, or of the one whose `weights` begin.
    A LightningDataModule of the user's comes as `StockData`. Raises InputError for data that the task cannot
    use, and for another text than that of the run that is resumed.
    """
    kind = data_class(cfg)
    if weights is not None and weights.reads_text and not issubclass(kind, SequenceData):
        raise InputError(
            f"init: {type(weights).__name__} reads plain text, which {kind.__name__} does not have: use"
            " init=random, or task=pretrain with data such as text_file"
        )
    settle_lengths(cfg.data, cfg.model)
    context = cfg.model.get("context_length")
    if context is not None and (cfg.data.get("max_length") or 0) > context:
        raise InputError(
            f"data.max_length={cfg.data.max_length} is longer than model.context_length={context}:"
            f" set data.max_length={context} or a larger context"
        )
    datamodule = new_datamodule(cfg, _tokenizer(cfg, kind, resume, weights))
    if resume is not None:
        resume.check_text(datamodule)
    datamodule.load()
    datamodule.setup()
    return datamodule


def new_datamodule(cfg: Config, tokenizer: Tokenizer) -> TrainingData:
    """The data of `cfg.data`, not yet loaded."""
    kind: type = class_of(cfg, "data")
    of_run = {name: cfg[name] for name in RUN_SETTINGS}
    settings = plain(cfg.data) | of_run
    if settings.get("batch_size") == AUTO:
        settings["batch_size"] = 1  # until `settle_batch`
    known = settings_of(kind, "data").parameters.keys() - {"global_batch_size"}
    node = {name: value for name, value in settings.items() if name in known}
    runtime = {"tokenizer": tokenizer} if "tokenizer" in known else {}
    datamodule = instantiate({**node, "_target_": cfg.data._target_}, **runtime)
    if isinstance(datamodule, TrainingData):
        return datamodule
    return StockData(datamodule, tokenizer=tokenizer, **of_run)


def starting_weights(cfg: Config) -> StartingWeights:
    """What `cfg.init` makes; a run that `init=run` names as `find_run` allows becomes its folder in `cfg`.

    The first process decides, as `latest` may be another run for those that start later. Raises InputError
    where no run fits, or several do.
    """
    kind, given = class_of(cfg, "init"), cfg.init.get("checkpoint")
    path = None if given is None else Path(given).expanduser()
    if kind is RunWeights and path is not None and not (path.is_file() or is_run(path)):

        def found() -> str:
            return str(find_run(given, key="init.checkpoint"))

        if (run_dir := process_run_dir()) is not None:
            cfg.init.checkpoint = read_config(run_dir, needs=("init",))["init"]["checkpoint"]
        else:
            cfg.init.checkpoint = found() if (together := processes()) is None else together.from_first(found)
    weights: StartingWeights = instantiate(cfg.init)
    return weights


def encode(*config: Config | str, config_dir: Folder | None = None) -> TrainingData:
    """The data of a config, or of overrides, encoded or opened from the cache as before a training run.

    Raises InputError as `build_datamodule`.
    """
    cfg = config_of_data(config, config_dir)
    datamodule = build_datamodule(cfg, weights=starting_weights(cfg))
    settle_vocabulary(cfg, datamodule)
    return datamodule


def config_of_data(config: Sequence[Config | str], config_dir: Folder | None) -> Config:
    """See `as_config`. Raises InputError for the config of a run that is resumed."""
    cfg = as_config(config, config_dir)
    if cfg.get("resume"):
        raise InputError(f"resume={cfg.resume} is for gptpl train and gptpl.resume: name the data instead")
    return cfg


def data_class(cfg: Config) -> type[TrainingData]:
    """The class of `cfg.data`. Raises InputError where `cfg.task` trains on another kind of data."""
    task = class_of(cfg, "task")
    kind: type[TrainingData] = class_of(cfg, "data")
    wanted = getattr(task, "data_class", L.LightningDataModule)
    if issubclass(kind, wanted) or not issubclass(kind, TrainingData):
        return kind  # of a class of the user's the task sees only batches

    def fitting(group: str, fits: Callable[[Any], bool]) -> str:
        classes = {
            name: locate(said_by(group, name, bases=True)["_target_"], group) for name in choices(group)
        }
        return " or ".join(f"{group}={name}" for name, each in classes.items() if fits(each))

    raise InputError(
        f"task={getattr(task, 'task', task.__name__)} cannot train on these data ({kind.__name__}): choose"
        f" {fitting('data', lambda each: issubclass(each, wanted))}, or"
        f" {fitting('task', lambda each: issubclass(kind, getattr(each, 'data_class', object)))}"
    )


def check_data(cfg: Config) -> None:
    """Refuse data of another task, and a path that is not set or not there, before anything slow."""
    data_class(cfg)
    corpus = cfg.data.get("corpus")
    target = corpus.get("_target_") if isinstance(corpus, Config) else None
    kind = None if target is None else locate(str(target), "data.corpus._target_")
    if isinstance(kind, type) and issubclass(kind, Corpus | LabelledCorpus):
        instantiate(corpus).check_path()


def build_tokenizer(node: Config) -> Tokenizer:
    """The tokenizer; a `vocab_size` in its settings, which the model takes, must be the tokenizer's."""
    tokenizer: Tokenizer = instantiate({key: value for key, value in node.items() if key != "vocab_size"})
    known = node.get("vocab_size")
    if known is not None and known != tokenizer.vocab_size:
        raise InputError(
            f"tokenizer.vocab_size must be {tokenizer.vocab_size}, as the {tokenizer.name} tokenizer has it,"
            f" got {known}: leave it out"
        )
    return tokenizer


def _tokenizer(
    cfg: Config, kind: type, resume: Resumption | None, weights: StartingWeights | None
) -> Tokenizer:
    """The tokenizer; instead of a vocabulary made from examples, that of the run resumed or started from."""
    own = class_of(cfg, "tokenizer")
    if resume is not None and issubclass(own, FileTokenizer | TiktokenTokenizer):
        return tokenizer_from_state(resume.header["tokenizer"])  # the file may be gone
    tokenizer = build_tokenizer(cfg.tokenizer)
    if vocabulary_sha256(tokenizer) is not None or issubclass(kind, SequenceData):
        return tokenizer
    if resume is not None:
        state = resume.header["tokenizer"]
    elif isinstance(weights, RunWeights):
        state = read_header(weights.file)["tokenizer"]
    else:
        return tokenizer
    return tokenizer_from_state(state) if state["name"] == tokenizer.name else tokenizer


def settle_vocabulary(cfg: Config, datamodule: TrainingData) -> None:
    """Give the model the tokenizer's vocabulary, unless the settings have one that is not smaller."""
    tokenizer = datamodule.tokenizer
    if "vocab_size" not in cfg.model and not is_gpt(cfg):
        return  # a class of the user's that needs none
    if cfg.model.get("vocab_size") is None:
        cfg.model.vocab_size = tokenizer.vocab_size
    if cfg.model.vocab_size < tokenizer.vocab_size:
        raise InputError(
            f"model.vocab_size={cfg.model.vocab_size} is smaller than the {tokenizer.name} tokenizer's"
            f" {tokenizer.vocab_size} tokens: leave it out, or give {tokenizer.vocab_size} or more"
        )


def check_weights(cfg: Config, weights: StartingWeights) -> None:
    """Refuse weights of another model or tokenizer, if the vocabulary is known before the data are read."""
    if is_gpt(cfg) and (size := cfg.tokenizer.get("vocab_size")) is not None:
        tokenizer = build_tokenizer(cfg.tokenizer)
        weights.check(model_config(cfg, size), tokenizer.state())
        if isinstance(weights, FileWeights | PublishedWeights) and weights.path and tokenizer.name == "gpt2":
            check_vocabulary(Path(weights.path).expanduser())


# --- batches --------------------------------------------------------------------------------------------


def settle_batch(cfg: Config, trainer: L.Trainer, datamodule: TrainingData, path: FastPath) -> None:
    """Put the numbers that follow from `data.global_batch_size` into config, trainer and datamodule.

    Raises InputError where they contradict each other, and for `auto` where nothing fits into memory.
    """
    sequences, size = cfg.data.get("global_batch_size"), cfg.data.get("batch_size")
    if sequences is None:
        if size == AUTO:
            raise InputError(
                "data.batch_size=auto needs data.global_batch_size=N, the sequences of an optimizer step"
            )
        return
    if isinstance(datamodule, StockData):
        raise InputError(
            f"data.global_batch_size={sequences} needs data that gptpl batches, {datamodule.name} makes its"
            " own batches: give trainer.accumulate_grad_batches"
        )
    if size == AUTO:
        size = cfg.data.batch_size = _largest(cfg, trainer, datamodule, path)
    datamodule.batch_size = size
    times = accumulation(global_batch=sequences, batch_size=size, world_size=trainer.world_size)
    given = cfg.trainer.accumulate_grad_batches
    if given not in (1, times):
        raise InputError(
            f"data.global_batch_size={sequences} and data.batch_size={size} make"
            f" trainer.accumulate_grad_batches={times}, not {given}: leave it out"
        )
    cfg.trainer.accumulate_grad_batches = trainer.accumulate_grad_batches = times
    log.info(
        "batch: %d sequences a step: %d at a time, on %d x %s, %d times",
        sequences, size, trainer.world_size, device_type(cfg.trainer.accelerator), times,
    )  # fmt: skip


def share_batch(trainer: L.Trainer, datamodule: TrainingData, batch_size: int, micro_batches: int) -> None:
    """Have a resumed run read its global batches by other processes than those that it had.

    Each is `micro_batches` batches of every process: the Trainer accumulates so many times more. Raises
    InputError where it counts batches itself.
    """
    limits = (trainer.limit_train_batches, trainer.limit_val_batches)
    if micro_batches > 1 and limits != (1.0, 1.0):
        raise InputError(
            f"limits of batches (trainer.limit_train_batches, limit_val_batches, overfit_batches or"
            f" fast_dev_run) cannot be kept where {micro_batches} batches are one: use as many processes as"
            " before"
        )
    datamodule.batch_size, datamodule.micro_batches = batch_size, micro_batches
    trainer.accumulate_grad_batches *= micro_batches


def _largest(cfg: Config, trainer: L.Trainer, datamodule: TrainingData, path: FastPath) -> int:
    check_gpt(cfg, "data.batch_size=auto estimates the memory of a GPTModel")
    sequences, devices = cfg.data.global_batch_size, trainer.world_size
    if sequences < 1 or sequences % devices:
        raise InputError(
            f"data.global_batch_size must be a positive multiple of {devices} devices, got {sequences}"
        )
    kind = device_type(cfg.trainer.accelerator)
    sharing = 1 if kind == "cuda" else trainer.num_devices  # processes that share the machine's memory
    return largest_batch_size(
        model_config(cfg),
        path,
        sequences=sequences // devices,
        free=free_memory(kind) // sharing,
        accumulates=True,  # also where one batch is the whole step, which then needs less
        **memory_settings(cfg, datamodule, path.precision.precision),
    )


def memory_settings(cfg: Config, datamodule: TrainingData, precision: str) -> dict[str, Any]:
    """What `gptpl.training.costs.step_memory` needs to know of a run besides its batch size."""
    return step_settings(
        precision,
        optimizer_factory(cfg),
        config=model_config(cfg),
        prepare=preparation(cfg, datamodule),
        max_length=datamodule.max_length,
    )


def step_settings(
    precision: str,
    make_optimizer: Callable[[nn.Module], Optimizer] | None,
    *,
    config: GPTConfig,
    prepare: Prepare,
    max_length: int,
) -> dict[str, Any]:
    """The same before there are data; without an optimizer, for one that keeps nothing between steps."""
    weight_bytes = 2 if precision in ("bf16-true", "16-true") else 4
    return {
        "max_length": max_length,
        "low": product_dtype(precision) == torch.bfloat16,
        "optimizer_bytes": 0
        if make_optimizer is None
        else optimizer_state_bytes(config, make_optimizer, weight_bytes=weight_bytes, prepare=prepare),
        "weight_bytes": weight_bytes,
        "prepare": prepare,
    }
