"""The parts of a run that its settings name: what trains of which model, and the Trainer."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import nn
from torch.optim import Optimizer

from gptpl.callbacks.checkpoints import LastCheckpoint
from gptpl.callbacks.exact_resume import ExactResume
from gptpl.callbacks.record_file import RecordEvaluations
from gptpl.callbacks.stopping import StopAtBoundary
from gptpl.config.compose import Config
from gptpl.config.instantiate import instantiate, locate, partial_of
from gptpl.data.tokenizers import Tokenizer
from gptpl.errors import InputError
from gptpl.model import ClassifierConfig, GPTBackbone, GPTClassifier, GPTConfig, GPTModel
from gptpl.training.checkpoint_files import DurableCheckpointIO
from gptpl.training.memory import Prepare
from gptpl.training.optimizers import optimizer_of
from gptpl.training.performance import PrecisionChoice, choose_precision, device_type
from gptpl.training.sharding import FullyShardedStrategy
from gptpl.training.tuning import Tuning


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
    precision: str,
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
        "precision": precision,
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
