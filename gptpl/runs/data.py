"""From a composed config to the data: examples, their batches, and the vocabulary that the model takes."""

import logging
from typing import Any

import lightning as L
import torch

from gptpl.config.check import settings_of
from gptpl.config.compose import Config, plain, said_by
from gptpl.config.groups import choices
from gptpl.config.instantiate import instantiate, locate
from gptpl.data.datamodule import TextDataModule
from gptpl.data.stock_data import StockData
from gptpl.data.tokenizers import Tokenizer, tokenizer_from_state
from gptpl.data.training_data import TrainingData
from gptpl.errors import InputError
from gptpl.runs.parts import (
    build_tokenizer,
    check_gpt,
    choose,
    is_gpt,
    model_config,
    optimizer_factory,
    preparation,
    task_class,
)
from gptpl.runs.resume import Resumption
from gptpl.training.checkpoint import HEADER_KEY, read_checkpoint
from gptpl.training.memory import accumulation, free_memory, largest_batch_size, optimizer_state_bytes
from gptpl.training.performance import FastPath, device_type, product_dtype
from gptpl.training.starting_run import RunWeights

log = logging.getLogger(__name__)

AUTO = "auto"
OF_THE_RUN = ("seed", "eval_train_batches", "eval_val_batches")
"""Settings of the run that its data take, too."""


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
        resume.check_text(datamodule.content_sha256())
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
            header = read_checkpoint(weights.file)[HEADER_KEY]
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
