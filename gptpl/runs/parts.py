"""The parts of a run that its settings name: what trains of which model, the data, the Trainer."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import nn
from torch.optim import Optimizer

from gptpl.callbacks.checkpoints import LastCheckpoint
from gptpl.callbacks.exact_resume import ExactResume
from gptpl.callbacks.record_file import RecordEvaluations
from gptpl.callbacks.stopping import StopAtBoundary
from gptpl.checkpoints.files import DurableCheckpointIO
from gptpl.checkpoints.format import read_header
from gptpl.checkpoints.starting_run import RunWeights
from gptpl.config.compose import Config, plain
from gptpl.config.groups import choices, said_by
from gptpl.config.instantiate import instantiate, partial_of
from gptpl.config.signatures import locate
from gptpl.config.slots import settings_of
from gptpl.data.pretraining.datamodule import TextDataModule
from gptpl.data.stock_data import StockData
from gptpl.data.training_data import TrainingData
from gptpl.errors import InputError
from gptpl.model import ClassifierConfig, GPTBackbone, GPTClassifier, GPTConfig, GPTModel
from gptpl.model.tuning import Tuning
from gptpl.runs.resume import Resumption
from gptpl.tokenizers import Tokenizer, tokenizer_from_state
from gptpl.training.memory import (
    Prepare,
    accumulation,
    free_memory,
    largest_batch_size,
    optimizer_state_bytes,
)
from gptpl.training.optimizers import optimizer_of
from gptpl.training.performance import FastPath, PrecisionChoice, choose_precision, device_type, product_dtype
from gptpl.training.sharding import FullyShardedStrategy

log = logging.getLogger(__name__)

AUTO = "auto"
OF_THE_RUN = ("seed", "eval_train_batches", "eval_val_batches")
"""Settings of the run that its data take, too."""


def optimizer_factory(cfg: Config) -> Callable[[nn.Module], Optimizer]:
    """What makes the optimizer of a model: a function of gptpl's, or any class like torch's."""
    return partial(optimizer_of, partial_of(cfg.optimizer))


def is_gpt(cfg: Config) -> bool:
    """Whether the model is gptpl's own, and not a class of the user's."""
    return "_target_" not in cfg.model


def check_gpt(cfg: Config, need: str) -> None:
    """Raises InputError, which begins with `need`, for a model of another class."""
    if not is_gpt(cfg):
        raise InputError(f"{need}, this model is a {cfg.model._target_}")


def tuning_of(cfg: Config) -> Tuning:
    """What of the model trains."""
    tune: Tuning = instantiate(cfg.tune)
    return tune


def preparation(cfg: Config) -> Prepare:
    """Makes a classifier where the task is one (of two classes, few as any), and applies `cfg.tune`."""
    tune = tuning_of(cfg)
    classifies = getattr(task_class(cfg), "task", None) == "classify"

    def prepare(net: GPTModel) -> GPTBackbone:
        tuned: GPTBackbone = GPTClassifier(net.config, ClassifierConfig(n_classes=2)) if classifies else net
        tune.apply(tuned)
        return tuned

    return prepare


def task_class(cfg: Config) -> Any:
    """The LightningModule class of the task."""
    return locate(str(cfg.task._target_), "task._target_")


def build_tokenizer(node: Config) -> Tokenizer:
    """The tokenizer; `vocab_size` in its YAML is there for the model's, and checked here."""
    tokenizer: Tokenizer = instantiate({key: value for key, value in node.items() if key != "vocab_size"})
    known = node.get("vocab_size")
    if known is not None and known != tokenizer.vocab_size:
        raise InputError(
            f"tokenizer.vocab_size={known}, but the {tokenizer.name} tokenizer has"
            f" {tokenizer.vocab_size} tokens: leave tokenizer.vocab_size as it is"
        )
    return tokenizer


def model_config(cfg: Config, vocab_size: int | None) -> GPTConfig:
    """The model's configuration, with this vocabulary where the settings give none."""
    fields = {str(name): value for name, value in cfg.model.items()}
    return GPTConfig(**{**fields, "vocab_size": fields.get("vocab_size") or vocab_size or 1})


# --- the data -------------------------------------------------------------------------------------------


def build_datamodule(cfg: Config, *, resume: Resumption | None = None) -> TrainingData:
    """The data of `cfg.data` under `cfg.tokenizer`, encoded or opened from the cache.

    Any LightningDataModule that is no `TrainingData` comes as `StockData`. Of a run that is resumed it must
    be the same text. Raises InputError for data that the task cannot use.
    """
    kind = _data_class(cfg)
    _settle_lengths(cfg)
    known = settings_of(kind, "data").parameters
    settings = {
        name: value
        for name, value in plain(cfg.data).items()
        if name in known and name not in ("batch_size", "global_batch_size")
    }
    runtime: dict[str, Any] = {name: cfg[name] for name in OF_THE_RUN if name in known}
    if "batch_size" in known:
        runtime["batch_size"] = 1 if cfg.data.get("batch_size") == AUTO else cfg.data.batch_size
    own = issubclass(kind, TrainingData)
    takes = "tokenizer" in known
    tokenizer = _tokenizer(cfg, kind, resume) if own or takes else build_tokenizer(cfg.tokenizer)
    if takes:
        runtime["tokenizer"] = tokenizer
    datamodule = instantiate({"_target_": cfg.data._target_, **settings}, **runtime)
    if not own:
        datamodule = StockData(datamodule, tokenizer=tokenizer, **{name: cfg[name] for name in OF_THE_RUN})
    if resume is not None:
        resume.check_text(datamodule)
    datamodule.load()
    datamodule.setup()
    return datamodule


def _data_class(cfg: Config) -> type[TrainingData]:
    """The class of `cfg.data`. Raises InputError where `cfg.task` trains on another kind of data."""
    task = task_class(cfg)
    kind: type[TrainingData] = locate(str(cfg.data._target_), "data._target_")
    wanted = getattr(task, "data_class", L.LightningDataModule)
    if issubclass(kind, wanted) or not issubclass(kind, TrainingData):
        return kind  # of the user's own it is the batches that must be right
    offered = [name for name, each in _classes("data") if issubclass(each, wanted)]
    fitting = [
        name for name, each in _classes("task") if issubclass(kind, getattr(each, "data_class", object))
    ]
    raise InputError(
        f"task={getattr(task, 'task', task.__name__)} cannot train on these data ({kind.__name__}): choose"
        f" data={' or data='.join(offered)}, or task={' or task='.join(fitting)}"
    )


def _classes(group: str) -> list[tuple[str, Any]]:
    return [(name, locate(said_by(group, name, bases=True)["_target_"], group)) for name in choices(group)]


def _settle_lengths(cfg: Config) -> None:
    """Decides the numbers of tokens that follow from others. Raises InputError for too long sequences."""
    data, context = cfg.data, cfg.model.get("context_length")
    if "max_length" in data and data.max_length is None:
        data.max_length = context
    if "stride" in data and data.stride is None:
        data.stride = data.max_length
    if context is not None and (data.get("max_length") or 0) > context:
        raise InputError(
            f"data.max_length={data.max_length} is longer than model.context_length={context}:"
            f" set data.max_length={context} or a larger context"
        )


def _tokenizer(cfg: Config, kind: type[TrainingData], resume: Resumption | None) -> Tokenizer:
    """The tokenizer; of a vocabulary made from texts that of the run that is resumed, or begun with.

    A long text has always its own words; few examples could not say what a model's tokens were.
    """
    own = build_tokenizer(cfg.tokenizer)
    if cfg.tokenizer.get("vocab_size") is None and not issubclass(kind, TextDataModule):
        header = None if resume is None else resume.header
        weights = None if resume is not None else instantiate(cfg.init)
        if isinstance(weights, RunWeights):
            header = read_header(weights.file)
        if header is not None and header["tokenizer"]["name"] == own.name:
            return tokenizer_from_state(header["tokenizer"])
    return own


def settle_vocabulary(cfg: Config, datamodule: TrainingData) -> None:
    """Gives the model the tokenizer's vocabulary unless the settings have one, which must not be smaller."""
    tokenizer = datamodule.tokenizer
    if "vocab_size" not in cfg.model and not is_gpt(cfg):
        return  # a class of the user's that needs none
    if cfg.model.get("vocab_size") is None:
        cfg.model.vocab_size = tokenizer.vocab_size
    if cfg.model.vocab_size < tokenizer.vocab_size:
        raise InputError(
            f"model.vocab_size={cfg.model.vocab_size} is smaller than the {tokenizer.name} tokenizer's"
            f" {tokenizer.vocab_size} tokens: leave model.vocab_size out, or set it to"
            f" {tokenizer.vocab_size} or more"
        )


# --- batches --------------------------------------------------------------------------------------------


def settle_batch(cfg: Config, trainer: L.Trainer, datamodule: TrainingData, path: FastPath) -> None:
    """Puts the numbers that follow from `data.global_batch_size` into config, trainer and datamodule.

    Raises InputError where they contradict each other, and for `auto` where nothing fits into memory.
    """
    windows, size = cfg.data.get("global_batch_size"), cfg.data.get("batch_size")
    if windows is not None and isinstance(datamodule, StockData):
        raise InputError(
            f"data.global_batch_size={windows} needs data that gptpl batches, {datamodule.name} makes its own"
            " batches: give trainer.accumulate_grad_batches"
        )
    if windows is None:
        if size == AUTO:
            raise InputError(
                "data.batch_size=auto needs data.global_batch_size=N, the sequences of an optimizer step"
            )
        return
    if size == AUTO:
        cfg.data.batch_size = _largest(cfg, trainer, path)
    datamodule.batch_size = cfg.data.batch_size
    times = accumulation(global_batch=windows, batch_size=cfg.data.batch_size, world_size=trainer.world_size)
    given = cfg.trainer.accumulate_grad_batches
    if given not in (1, times):
        raise InputError(
            f"data.global_batch_size={windows} and data.batch_size={cfg.data.batch_size} make"
            f" trainer.accumulate_grad_batches={times}, not {given}: leave it out"
        )
    cfg.trainer.accumulate_grad_batches = trainer.accumulate_grad_batches = times
    log.info(
        "batch: %d windows a step: %d at a time, on %d x %s, %d times",
        windows, cfg.data.batch_size, trainer.world_size, device_type(cfg.trainer.accelerator), times,
    )  # fmt: skip


def _largest(cfg: Config, trainer: L.Trainer, path: FastPath) -> int:
    check_gpt(cfg, "data.batch_size=auto knows what a GPTModel takes of memory")
    config = model_config(cfg, None)
    windows, devices = cfg.data.global_batch_size, trainer.world_size
    if windows < 1 or windows % devices:
        raise InputError(
            f"data.global_batch_size={windows} is no multiple of {devices} devices: give one that is"
        )
    kind, prepare = device_type(cfg.trainer.accelerator), preparation(cfg)
    here = 1 if kind == "cuda" else trainer.num_devices  # processes that share the machine's memory
    return largest_batch_size(
        config,
        path,
        max_length=cfg.data.max_length,
        windows=windows // devices,
        low=product_dtype(choose(cfg.trainer).precision) == torch.bfloat16,
        free=free_memory(kind) // here,
        optimizer_bytes=optimizer_state_bytes(config, optimizer_factory(cfg), prepare=prepare),
        prepare=prepare,
        accumulates=True,  # unless it takes them all at once, which then fits all the more
    )


# --- the Trainer ----------------------------------------------------------------------------------------

OWN_SETTINGS = (
    *("stop_at_step", "max_time", "compile", "attention", "head", "recompute_activations"),
    *("keep_freed_memory", "precision", "accelerator", "strategy", "max_epochs", "max_steps"),
)
"""Settings of the node that do not go to `lightning.Trainer` as they are."""
SET_BY_GPTPL = {
    "check_val_every_n_epoch": "eval_every_n_steps",
    "callbacks": "callbacks=",
    "logger": "logger=",
    "deterministic": "deterministic",
    "enable_checkpointing": "callbacks=",
    "enable_progress_bar": "~callbacks.progress_bar",
    "use_distributed_sampler": "",
    "val_check_interval": "eval_every_n_steps",
    "reload_dataloaders_every_n_epochs": "",
    "model_registry": "",
}
"""Arguments of `lightning.Trainer` that other settings decide, with the setting to give instead."""


def choose(conf: Mapping[str, Any]) -> PrecisionChoice:
    """The precision asked for, or the best one of the device."""
    if conf["precision"] == "auto":
        return choose_precision(device_type(conf["accelerator"]))
    return PrecisionChoice(str(conf["precision"]), "as asked")


def build_trainer(
    conf: Mapping[str, Any],
    *,
    eval_every_n_steps: int,
    deterministic: bool,
    callbacks: Sequence[L.Callback],
    **fixed: Any,
) -> L.Trainer:
    """A Trainer that evaluates every so many optimizer steps, before the first, and after the last.

    `conf` is the node `trainer`: gptpl's own settings, and any argument of `lightning.Trainer`. To the
    callbacks given it adds what every run has: exact resuming, a record of the evaluations, stopping at a
    boundary. `fixed` are further arguments of `lightning.Trainer`: loggers, folders. Raises InputError
    for numbers out of range, and for what Lightning refuses.
    """
    _check(conf, eval_every_n_steps)
    stopping = StopAtBoundary(max_time=conf["max_time"], stop_at_step=conf["stop_at_step"])
    # After a step: note its state, save it, stop if asked to, and only then whatever else there is.
    saving = [callback for callback in callbacks if isinstance(callback, LastCheckpoint)]
    others = [callback for callback in callbacks if not isinstance(callback, LastCheckpoint)]
    names = [str(key) for key in conf if key not in OWN_SETTINGS and not str(key).startswith("_")]
    given = {name: conf[name] for name in names}
    make = partial_of({"_target_": conf.get("_target_", "lightning.Trainer"), **given})
    decided: dict[str, Any] = {
        "num_sanity_val_steps": given.get("num_sanity_val_steps", -1),  # before the first step, all batches
        "enable_model_summary": given.get("enable_model_summary", False),
        "accelerator": device_type(conf["accelerator"]),
        "strategy": build_strategy(conf["strategy"]),
        "precision": choose(conf).precision,
        "max_epochs": conf["max_epochs"] if conf["max_epochs"] is not None else -1,
        "max_steps": conf["max_steps"] if conf["max_steps"] is not None else -1,
        "check_val_every_n_epoch": None,
        "deterministic": deterministic,
        "use_distributed_sampler": False,  # the datamodule shards by itself
        "callbacks": [ExactResume(), RecordEvaluations(), *saving, stopping, *others],
        "plugins": [DurableCheckpointIO(), *(make.keywords.pop("plugins", None) or ())],
    }
    try:
        trainer: L.Trainer = make(**decided, **fixed)
    except (MisconfigurationException, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"trainer settings that Lightning refuses: {reason}") from error
    return trainer


def build_strategy(name: str | Strategy) -> str | Strategy:
    """FSDP2, and DDP without a second copy of the gradients: they are views of what is sent.

    Not with `static_graph`: where batches are accumulated it ends in an error of torch's, or the gradients
    are not summed any more (pytorch issue 143580, pull request 187732).
    """
    if name == "fsdp":
        return FullyShardedStrategy()
    return DDPStrategy(gradient_as_bucket_view=True) if name == "ddp" else name


def _check(conf: Mapping[str, Any], eval_every_n_steps: int) -> None:
    for name in (name for name in conf if name in SET_BY_GPTPL):
        instead = SET_BY_GPTPL[name]
        raise InputError(
            f"trainer.{name} is set by gptpl: {f'give {instead}' if instead else 'leave it out'}"
        )
    counts = ("max_epochs", "max_steps", "accumulate_grad_batches", "log_every_n_steps", "num_nodes")
    numbers = {f"trainer.{name}": conf[name] for name in (*counts, "gradient_clip_val")}
    for name, value in (numbers | {"eval_every_n_steps": eval_every_n_steps}).items():
        if value is not None and value <= 0:
            raise InputError(f"{name}={value} is out of range: it must be positive")
    if conf["max_epochs"] is None and conf["max_steps"] is None:
        raise InputError(
            "trainer.max_epochs and trainer.max_steps are both null: give one, the schedule needs an end"
        )


def let_module_end(trainer: L.Trainer) -> None:
    """Leaves it to the training module to end the training after its `total_steps`.

    Lightning counts an epoch that `max_steps` broke off as a whole one: resumed with more steps, a run would
    reach `max_epochs` before it has made them. And it would not even start where all steps are done, but not
    yet the evaluation of the last.
    """
    trainer.fit_loop.max_epochs = -1
    trainer.fit_loop.epoch_loop.max_steps = -1
