"""What the settings make of a language model before it trains, for commands that have no training module."""

import torch
from hydra.utils import get_class
from omegaconf import DictConfig

from gptpl.cli.hydra_app import instantiate
from gptpl.model import ClassifierConfig, GPTBackbone, GPTClassifier, GPTConfig, GPTModel
from gptpl.training.step_memory import Prepare
from gptpl.training.tuning import ALL, Tuning


def trained_part(cfg: DictConfig, config: GPTConfig) -> str | None:
    """What of the model trains, in a line; None: all of it."""
    tune: Tuning = instantiate(cfg.tune)
    if tune.state() == ALL:
        return None
    with torch.device("meta"):
        return tune.report(preparation(cfg)(GPTModel(config)))


def preparation(cfg: DictConfig) -> Prepare:
    """Makes a classifier where the task is one (of two classes, few as any), and applies `cfg.tune`."""
    tune: Tuning = instantiate(cfg.tune)
    classifies = getattr(get_class(cfg.task._target_), "task", None) == "classify"

    def prepare(net: GPTModel) -> GPTBackbone:
        tuned: GPTBackbone = GPTClassifier(net.config, ClassifierConfig(n_classes=2)) if classifies else net
        tune.apply(tuned)
        return tuned

    return prepare
