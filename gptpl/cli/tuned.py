"""What the settings make of a language model before it trains, for commands that have no training module."""

from hydra.utils import get_class
from omegaconf import DictConfig

from gptpl.cli.hydra_app import instantiate
from gptpl.model import ClassifierConfig, GPTBackbone, GPTClassifier, GPTModel
from gptpl.training.step_memory import Prepare
from gptpl.training.tuning import Tuning


def preparation(cfg: DictConfig) -> Prepare:
    """Makes a classifier where the task is one (of two classes, few as any), and applies `cfg.tune`."""
    tune: Tuning = instantiate(cfg.tune)
    classifies = getattr(get_class(cfg.task._target_), "task", None) == "classify"

    def prepare(net: GPTModel) -> GPTBackbone:
        tuned: GPTBackbone = GPTClassifier(net.config, ClassifierConfig(n_classes=2)) if classifies else net
        tune.apply(tuned)
        return tuned

    return prepare
