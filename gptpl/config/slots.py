"""The nodes of a config: the classes they take, what a run adds to them, what a resume may change."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from gptpl.config.roots import settings_of_root
from gptpl.config.signatures import Signature, locate, signature_of
from gptpl.settings import COUNT_OR_NULL, FREE, INEXACT, NEVER, NEXT_STEP, POSITIVE, Resume

HYDRA_KEYS = ("_target_", "_partial_", "_convert_", "_recursive_", "_args_")


@dataclass(kw_only=True)
class TrainerSettings:
    """Settings of the node `trainer` that are gptpl's own, or that have limits of its own."""

    precision: str
    max_epochs: Annotated[int | None, POSITIVE]
    max_steps: Annotated[int | None, POSITIVE]
    accumulate_grad_batches: Annotated[int, POSITIVE]
    gradient_clip_val: Annotated[float | None, POSITIVE]
    log_every_n_steps: Annotated[int | None, POSITIVE]
    num_nodes: Annotated[int, POSITIVE]
    stop_at_step: Annotated[int | None, COUNT_OR_NULL]
    timeout: str
    compile: Literal["auto", "on", "off"]
    attention: Literal["auto", "blocked", "sdpa", "explicit"]
    head: Literal["auto", "fused", "plain"]
    recompute_activations: bool
    keep_freed_memory: bool | None
    sharded_checkpoints: bool


@dataclass(kw_only=True)
class _DataExtras:
    batch_size: Annotated[int | Literal["auto"], INEXACT]
    global_batch_size: int | None
    max_length: int | None


@dataclass(kw_only=True)
class _ModelExtras:
    vocab_size: int | None


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A node of the config.

    Attributes:
        kinds: the classes that its class may be or extend; none: anything.
        of_strangers: the same in the settings of another person's run, where fewer are allowed.
        implicit: the class of a node that names none.
        several: whether its members are the objects, each with a name.
        optional: whether a command can do without it, whatever its default is.
        extras: a dataclass of settings that belong to no class.
        at_runtime: arguments that a run passes when it makes the object.
        by_position: whether it passes them by position, so that any function will do.
        lenient: whether the run passes more than that, or the class reports what is missing.
        resume: which changes a resume allows of a setting that does not say so itself.
    """

    kinds: Sequence[str] = ()
    of_strangers: Sequence[str] = ()
    implicit: str | None = None
    several: bool = False
    optional: bool = False
    extras: type | None = None
    at_runtime: Sequence[str] = ()
    by_position: bool = False
    lenient: bool = False
    resume: Resume = NEVER


SLOTS: Mapping[str, Slot] = {
    "model": Slot(
        kinds=("torch.nn.Module", "gptpl.model.GPTConfig"),
        implicit="gptpl.model.GPTConfig",
        extras=_ModelExtras,
        lenient=True,
    ),
    "tokenizer": Slot(kinds=("gptpl.tokenizers.Tokenizer",), extras=_ModelExtras),
    "init": Slot(kinds=("gptpl.weights.starting.StartingWeights",), optional=True),
    "data": Slot(
        kinds=("lightning.LightningDataModule",),
        # An example module of Lightning's downloads to wherever its settings say.
        of_strangers=("gptpl.data.training_data.TrainingData",),
        extras=_DataExtras,
        at_runtime=("tokenizer", "seed", "eval_train_batches", "eval_val_batches"),
    ),
    "task": Slot(
        kinds=("lightning.LightningModule",),
        of_strangers=("gptpl.training.module.TrainingModule",),
        lenient=True,
    ),
    "tune": Slot(kinds=("gptpl.model.parameters.Tuning",)),
    "optimizer": Slot(
        kinds=("torch.optim.Optimizer",), at_runtime=("net", "params"), by_position=True, resume=NEXT_STEP
    ),
    "scheduler": Slot(
        kinds=("torch.optim.lr_scheduler.LRScheduler", "gptpl.training.schedules.Schedule"),
        at_runtime=("optimizer",),
        by_position=True,
        resume=NEXT_STEP,
    ),
    "trainer": Slot(kinds=("lightning.Trainer",), implicit="lightning.Trainer", extras=TrainerSettings),
    "callbacks": Slot(kinds=("lightning.Callback",), several=True, optional=True, resume=FREE),
    "logger": Slot(kinds=("lightning.pytorch.loggers.Logger",), several=True, optional=True, resume=FREE),
    "sampling": Slot(
        kinds=("gptpl.generation.SamplingRules",), implicit="gptpl.generation.SamplingRules", optional=True
    ),
    "filter": Slot(kinds=("gptpl.filters.Filter",), optional=True),
    "judge": Slot(kinds=("gptpl.judging.JudgeModel", "gptpl.judging.NoJudge")),
    "suite": Slot(kinds=("gptpl.evaluation.suite.Suite",), optional=True),
    "hydra.launcher": Slot(at_runtime=("folder",)),
}
_RESUME_OF_TRAINER: Mapping[Resume, Sequence[str]] = {
    NEXT_STEP: ("max_epochs", "max_steps", "gradient_clip_val", "gradient_clip_algorithm"),
    INEXACT: ("accelerator", "devices", "num_nodes", "strategy", "precision", "compile", "attention", "head"),
    FREE: (
        *("max_time", "timeout", "stop_at_step", "log_every_n_steps", "recompute_activations"),
        *("keep_freed_memory", "sharded_checkpoints", "profiler", "detect_anomaly"),
        *("num_sanity_val_steps", "enable_model_summary", "inference_mode", "limit_val_batches"),
        *("limit_test_batches", "limit_predict_batches"),
    ),
}
"""For `lightning.Trainer`, whose signature does not say it."""


def slot_of(key: str) -> Slot:
    """The slot of a node, by its dotted key: `callbacks` for `callbacks.mine`, `data.corpus` for itself."""
    first, _, rest = key.partition(".")
    place = SLOTS.get(first, Slot())
    return place if place.several and "." not in rest else SLOTS.get(key, Slot())


def settings_of(target: Any, key: str) -> Signature:
    """The settings that a node may have: those of its class and of its slot."""
    return with_extras(signature_of(target), key)


def with_extras(found: Signature, key: str) -> Signature:
    """The settings of a node's class, and those of its slot."""
    extras = slot_of(key).extras
    added = dict(signature_of(extras).parameters) if extras else {}
    if key == "data":  # the class decides which of them are required
        own = {name: each.required for name, each in found.parameters.items()}
        own.setdefault("global_batch_size", False)
        added = {name: replace(each, required=own[name]) for name, each in added.items() if name in own}
    return Signature(parameters={**found.parameters, **added}, open=found.open)


def resume_of(key: str, settings: Mapping[str, Any]) -> Resume:
    """Whether a setting may change on resume, by its dotted key in the settings of a run.

    Its class says so, else its slot.
    """
    first, _, rest = key.partition(".")
    place = SLOTS.get(first, Slot())
    if first == "choices":
        return FREE
    if not rest:
        of_root = signature_of(settings_of_root("train")).parameters.get(first)
        return (of_root and of_root.resume) or place.resume
    if place.several:
        return place.resume
    if first == "trainer":
        name = rest.partition(".")[0]
        return next((kind for kind, names in _RESUME_OF_TRAINER.items() if name in names), NEVER)
    if first == "tokenizer" or rest.endswith(HYDRA_KEYS):
        return NEXT_STEP if first == "scheduler" else NEVER
    parent, _, name = key.rpartition(".")
    holder: Any = settings
    for part in parent.split("."):
        holder = holder.get(part) if isinstance(holder, Mapping) else None
    if not isinstance(holder, Mapping):
        return place.resume
    of_source = "gptpl.data.sources.TextFiles" if parent.startswith("data.sources.") else None
    target = holder.get("_target_") or slot_of(parent).implicit or of_source
    parameters = settings_of(locate(str(target), parent), parent).parameters if target else {}
    if name in parameters:
        return parameters[name].resume or slot_of(parent).resume
    # The short name of a nested setting.
    inner = [child for child, value in holder.items() if isinstance(value, Mapping) and "_target_" in value]
    kinds = {resume_of(f"{parent}.{child}.{name}", settings) for child in inner if name in holder[child]}
    return kinds.pop() if len(kinds) == 1 else place.resume
