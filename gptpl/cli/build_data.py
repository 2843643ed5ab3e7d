"""From a composed config to the data: tokenizer, examples, and the vocabulary that the model takes."""

import inspect
from collections.abc import Collection
from typing import Any, cast

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from gptpl.cli.batch import AUTO, whole_batch_size
from gptpl.cli.configs import choices, config_folder
from gptpl.cli.hydra_app import instantiate
from gptpl.cli.known_keys import target_of_choice
from gptpl.cli.resume import Resumption
from gptpl.data.datamodule import TextDataModule
from gptpl.data.tokenizers import Tokenizer, tokenizer_from_state
from gptpl.data.training_data import TrainingData
from gptpl.errors import InputError
from gptpl.model import GPTConfig
from gptpl.training.checkpoint import HEADER_KEY, read_checkpoint
from gptpl.training.starting_run import RunWeights
from gptpl.training.training_module import TrainingModule

_NOT_BY_NAME = ("_target_", "tokenizer", "batch_size", "seed", "eval_train_batches", "eval_val_batches")


def build_datamodule(cfg: DictConfig, *, resume: Resumption | None = None) -> TrainingData:
    """The data of `cfg.data` under `cfg.tokenizer`, encoded or opened from the cache.

    Of a run that is resumed it must be the same text. Raises InputError for data that the task cannot use.
    """
    kind = data_class(cfg)
    _settle_lengths(cfg)
    settings = settings_for(kind, cfg.data, without=_NOT_BY_NAME)
    datamodule: TrainingData = instantiate(
        {"_target_": cfg.data._target_, **settings},
        tokenizer=_tokenizer(cfg, kind, resume),
        batch_size=1 if cfg.data.batch_size == AUTO else whole_batch_size(cfg.data.batch_size),
        seed=cfg.seed,
        eval_train_batches=cfg.eval_train_batches,
        eval_val_batches=cfg.eval_val_batches,
    )
    if resume is not None:
        resume.check_text(datamodule.content_sha256())
    datamodule.load()
    datamodule.setup()
    return datamodule


def settings_for(kind: type[TrainingData], node: DictConfig, *, without: Collection[str]) -> dict[str, Any]:
    """Those settings of the data that the class, or one that it hands arguments on to, takes by name."""
    named = {name for each in kind.__mro__ for name in inspect.signature(each).parameters}
    given = OmegaConf.to_container(node, resolve=True)
    assert isinstance(given, dict)
    return {str(key): value for key, value in given.items() if key in named - set(without)}


def data_class(cfg: DictConfig) -> type[TrainingData]:
    """The class of `cfg.data`. Raises InputError where `cfg.task` trains on another kind of data."""
    task = cast(type[TrainingModule], get_class(cfg.task._target_))
    kind = cast(type[TrainingData], get_class(cfg.data._target_))
    if issubclass(kind, task.data_class):
        return kind
    kinds, tasks = _classes("data"), _classes("task")
    offered = [name for name, each in kinds.items() if issubclass(each, task.data_class)]
    fitting = [name for name, each in tasks.items() if issubclass(kind, each.data_class)]
    raise InputError(
        f"task={task.task} cannot train on these data ({kind.__name__}): choose"
        f" data={' or data='.join(offered)}, or task={' or task='.join(fitting)}"
    )


def _classes(group: str) -> dict[str, Any]:
    """The class of every choice of a group."""
    files = {name: config_folder() / group / f"{name}.yaml" for name in choices(group)}
    return {name: get_class(target_of_choice(path, group)) for name, path in files.items()}


def _settle_lengths(cfg: DictConfig) -> None:
    """Decides the numbers of tokens that follow from others."""
    if cfg.data.max_length is None:
        cfg.data.max_length = cfg.model.context_length
    if "stride" in cfg.data and cfg.data.stride is None:
        cfg.data.stride = cfg.data.max_length
    if cfg.data.max_length > cfg.model.context_length:
        raise InputError(
            f"data.max_length={cfg.data.max_length} is longer than model.context_length="
            f"{cfg.model.context_length}: set data.max_length={cfg.model.context_length} or a larger context"
        )


def _tokenizer(cfg: DictConfig, kind: type[TrainingData], resume: Resumption | None) -> Tokenizer:
    """The tokenizer; of a vocabulary made from texts that of the run that is gone on with, or begun with.

    A long text has always its own words; few examples could not say what a model's tokens were.
    """
    if cfg.tokenizer.vocab_size is None and not issubclass(kind, TextDataModule):
        weights = None if resume is not None else instantiate(cfg.init)
        header = resume.header if resume is not None else None
        if isinstance(weights, RunWeights):
            header = read_checkpoint(weights.file)[HEADER_KEY]
        own = build_tokenizer(cfg.tokenizer)
        if header is not None and header["tokenizer"]["name"] == own.name:
            return tokenizer_from_state(header["tokenizer"])
        return own
    return build_tokenizer(cfg.tokenizer)


def build_tokenizer(node: DictConfig) -> Tokenizer:
    """The tokenizer; `vocab_size` in its YAML is there for the model's, and checked here."""
    target = {key: value for key, value in node.items() if key != "vocab_size"}
    tokenizer: Tokenizer = instantiate(target)
    if node.vocab_size is not None and node.vocab_size != tokenizer.vocab_size:
        raise InputError(
            f"tokenizer.vocab_size={node.vocab_size}, but the {tokenizer.name} tokenizer has"
            f" {tokenizer.vocab_size} tokens: leave tokenizer.vocab_size as it is"
        )
    return tokenizer


def build_model_config(cfg: DictConfig, datamodule: TrainingData) -> GPTConfig:
    """The model's configuration, its vocabulary taken from the tokenizer unless the config gives one."""
    tokenizer = datamodule.tokenizer
    known = tokenizer.vocab_size
    fields = {**cfg.model, "vocab_size": known if cfg.model.vocab_size is None else cfg.model.vocab_size}
    config = GPTConfig(**fields)
    if config.vocab_size < known:
        raise InputError(
            f"model.vocab_size={config.vocab_size} is smaller than the {tokenizer.name} tokenizer's"
            f" {known} tokens: leave model.vocab_size out, or set it to {known} or more"
        )
    return config
