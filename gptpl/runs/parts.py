"""The parts of a run that its settings name, for whoever needs one without the whole run."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gptpl.config.compose import Config
from gptpl.config.instantiate import instantiate, locate, partial_of
from gptpl.data.tokenizers import Tokenizer
from gptpl.errors import InputError
from gptpl.model import ClassifierConfig, GPTBackbone, GPTClassifier, GPTConfig, GPTModel
from gptpl.training.memory import Prepare
from gptpl.training.optimizers import optimizer_of
from gptpl.training.tuning import ALL, Tuning


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


def trained_part(cfg: Config, config: GPTConfig) -> str | None:
    """What of the model trains, in a line; None: all of it."""
    tune = tuning_of(cfg)
    if tune.state() == ALL:
        return None
    with torch.device("meta"):
        return tune.report(preparation(cfg)(GPTModel(config)))


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
