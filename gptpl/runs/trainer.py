"""The Lightning Trainer of a run: what the config says, and what every run has."""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from datetime import timedelta
from typing import Any, get_args

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import are_deterministic_algorithms_enabled

from gptpl.callbacks.checkpoints import DurableCheckpointIO, ExactResume, LastCheckpoint
from gptpl.callbacks.records import RecordEvaluations
from gptpl.callbacks.stopping import StopAtBoundary, duration
from gptpl.config.compose import Config
from gptpl.config.instantiate import instantiate, partial_of
from gptpl.config.slots import TrainerSettings
from gptpl.errors import InputError
from gptpl.files.run_record import RUN_FILE
from gptpl.model import GPTConfig
from gptpl.model.attention_kernels import FAST_KERNELS
from gptpl.model.loss import Head
from gptpl.model.parameters import TuneHead
from gptpl.runs.parts import class_of, is_gpt, is_language_model, model_config
from gptpl.runs.resume import Resumption, settle_lengths
from gptpl.settings import POSITIVE, check_limits
from gptpl.training.autotune import PRECISIONS, Timings, Workload, can_time, machine_name, timings
from gptpl.training.performance import AUTO, REASON, FastPath, choose_fast_path, device_type
from gptpl.training.processes import Launcher, LauncherEnvironment, find_launcher, processes
from gptpl.training.run_log import is_first_process
from gptpl.training.sharding import SHARDED, FullyShardedStrategy
from gptpl.training.task import better, known_metrics

log = logging.getLogger(__name__)

OWN_SETTINGS = (
    *("stop_at_step", "max_time", "timeout", "compile", "attention", "head", "recompute_activations"),
    *("keep_freed_memory", "sharded_checkpoints"),
)
"""Settings of the node `trainer` that are not arguments of `lightning.Trainer`."""
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


def configured_trainer(cfg: Config, path: FastPath) -> L.Trainer:
    """The Trainer with the callbacks and loggers of a config, and the precision of the fast path."""
    callbacks = [instantiate(node) for node in cfg.callbacks.values() if node is not None]
    if known := known_metrics(class_of(cfg, "task"), callbacks):
        for monitor in filter(None, (getattr(callback, "monitor", None) for callback in callbacks)):
            better(monitor, known)  # refuses a metric that nothing logs

    def has(kind: type) -> bool:
        return any(isinstance(callback, kind) for callback in callbacks)

    return build_trainer(
        cfg,
        precision=path.precision.precision,
        callbacks=callbacks,
        logger=[instantiate(node) for node in cfg.logger.values() if node is not None] or False,
        default_root_dir=cfg.run_dir,
        enable_checkpointing=has(L.pytorch.callbacks.Checkpoint),
        enable_progress_bar=has(L.pytorch.callbacks.ProgressBar),
    )


def build_trainer(cfg: Config, *, precision: str, callbacks: Sequence[L.Callback], **fixed: Any) -> L.Trainer:
    """A Trainer of the node `trainer`: gptpl's own settings, and any argument of `lightning.Trainer`.

    `precision` is what the node's, which may be "auto", was decided to be. The Trainer evaluates before the
    first step; then the module decides when. Every run resumes exactly, records its evaluations, and stops at
    the end of a step. `fixed` are further arguments of `lightning.Trainer`. Raises InputError for numbers out
    of range, and for what Lightning refuses.
    """
    conf, deterministic = cfg.trainer, cfg.deterministic
    _check(conf)
    POSITIVE.check("eval_every_n_steps", cfg.eval_every_n_steps)
    stopping = StopAtBoundary(max_time=conf["max_time"], stop_at_step=conf["stop_at_step"])
    # After a step: note its state, save it, stop if asked to, then everything else.
    saving = [callback for callback in callbacks if isinstance(callback, LastCheckpoint)]
    others = [callback for callback in callbacks if not isinstance(callback, LastCheckpoint)]
    given = {str(key): value for key, value in conf.items() if key not in OWN_SETTINGS}
    plugins: list[Any] = [DurableCheckpointIO()]
    if (launcher := find_launcher()) is not None:
        given |= launched(given, launcher)
        plugins.append(LauncherEnvironment(launcher))
    make = partial_of({"_target_": "lightning.Trainer", "num_sanity_val_steps": -1} | given)
    decided: dict[str, Any] = {
        "accelerator": device_type(conf["accelerator"]),
        "strategy": build_strategy(
            make.keywords["strategy"],
            duration(conf["timeout"], "trainer.timeout"),
            sharded_checkpoints=conf["sharded_checkpoints"],
        ),
        "precision": precision,
        "max_epochs": -1 if conf["max_epochs"] is None else conf["max_epochs"],
        "max_steps": -1 if conf["max_steps"] is None else conf["max_steps"],
        "check_val_every_n_epoch": None,
        "enable_model_summary": given.get("enable_model_summary", False),
        # False would make torch import its compiler to tell it so.
        "deterministic": deterministic if deterministic != are_deterministic_algorithms_enabled() else None,
        "use_distributed_sampler": False,  # the datamodule gives every rank its own examples
        "callbacks": [ExactResume(), RecordEvaluations(), *saving, stopping, *others],
        "plugins": [*plugins, *(make.keywords.get("plugins") or ())],
    }
    try:
        trainer: L.Trainer = make(**decided, **fixed)
    except (MisconfigurationException, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"trainer settings that Lightning refuses: {reason}") from error
    return trainer


def launched(conf: Mapping[str, Any], launcher: Launcher) -> dict[str, Any]:
    """The Trainer's settings that follow from its launcher; InputError for others that were given."""
    found = {"devices": launcher.local_world_size, "num_nodes": launcher.nodes}
    for name, value in found.items():
        if conf[name] not in (1, "auto", value):
            remedy = "leave it out, or give auto" if name == "devices" else "leave it out"
            raise InputError(f"trainer.{name}={conf[name]}, but there are {launcher}: {remedy}")
    if (
        not launcher.told_places
        and device_type(conf["accelerator"]) == "cuda"
        and torch.cuda.device_count() > 1
    ):
        raise InputError(
            f"{launcher.name} started one process on each node, which would use one of its"
            f" {torch.cuda.device_count()} GPUs: start them with torchrun, or show each process one GPU"
        )
    alone = launcher.world_size == 1 or conf["strategy"] != "auto"
    return found if alone else found | {"strategy": "ddp"}


def _check(conf: Mapping[str, Any]) -> None:
    for name in (name for name in conf if name in SET_BY_GPTPL):
        instead = SET_BY_GPTPL[name]
        raise InputError(
            f"trainer.{name} is set by gptpl: {f'give {instead}' if instead else 'leave it out'}"
        )
    limited = (field.name for field in fields(TrainerSettings))
    check_limits(TrainerSettings, "trainer.", **{name: conf[name] for name in limited if name in conf})
    if conf["max_epochs"] is None and conf["max_steps"] is None:
        raise InputError("trainer.max_epochs and trainer.max_steps are both null: give one of them")


def check_strategy(cfg: Config) -> None:
    """Raises InputError for what FSDP cannot train."""
    if cfg.trainer.strategy not in SHARDED:
        return
    if class_of(cfg, "tune") is TuneHead and cfg.trainer.head != "plain":
        # The head loss takes the head's weight, and with frozen hidden states FSDP2 sets no hook that would
        # sum its gradient: it would stay as it is (torch 2.13).
        raise InputError(
            f"tune=head with trainer.strategy={cfg.trainer.strategy} needs trainer.head=plain: give it, or"
            " trainer=ddp"
        )


# --- the fast path --------------------------------------------------------------------------------------

PROCESS_FAST_PATH = "GPTPL_FAST_PATH"
"""Tells the processes that Lightning starts for other devices what the first one chose."""
LIGHTNINGS_PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true", "64-true")
UNKNOWN_VOCABULARY = 8192
"""Of a vocabulary made from the text, before the text is read."""


def fast_path_of(
    cfg: Config,
    *,
    timings: Timings | None = None,
    kept: Mapping[str, str | None] | None = None,
    total_steps: int = 0,
    tries_compiling: bool = False,
) -> FastPath:
    """Precision, compilation, attention kernel and loss head, as asked for or as they suit the device."""
    conf = cfg.trainer
    return choose_fast_path(
        device_type=device_type(conf.accelerator),
        precision=conf.precision,
        drop_rate=cfg.model.get("drop_rate", 0.0),
        total_steps=total_steps,
        compile=conf.compile,
        attention=conf.attention,
        head=conf.head,
        recompute=conf.recompute_activations,
        keep_freed_memory=conf.keep_freed_memory,
        timings=timings,
        tries_compiling=tries_compiling,
        kept=kept,
    )


def kept_choices(cfg: Config, resume: Resumption | None) -> dict[str, str | None] | None:
    """The choices that are made already: by the first process, or by the run that is resumed.

    None: to be made now; so also where a resumed run is on another kind of device, or now to choose its
    precision by itself. Of the processes of a launcher, which all call this, the first one measures. There
    are none, and the hardware decides, in a run from before choices were recorded, and in processes that were
    started together but cannot tell each other. Raises InputError for a record that gptpl has not written.
    """
    if not is_first_process() and (given := os.environ.get(PROCESS_FAST_PATH)):
        first: dict[str, str | None] = json.loads(given)
        return first
    together = processes()

    def to_be_made() -> dict[str, str | None] | None:
        if together is not None:
            return together.from_first(lambda: _measured(cfg))
        alone = all(os.environ.get(name, "1") == "1" for name in ("WORLD_SIZE", "SLURM_NTASKS"))
        return None if alone and is_first_process() else {}

    if resume is None:
        return to_be_made()
    stored, kind = resume.performance, device_type(cfg.trainer.accelerator)
    given_before = resume.header["config"]["trainer"].get("precision", AUTO) != AUTO
    if stored.get("device", kind) != kind or (given_before and cfg.trainer.precision == AUTO):
        return to_be_made()
    known = {
        "precision": LIGHTNINGS_PRECISIONS,
        "attention": (*FAST_KERNELS, "explicit"),
        "head": get_args(Head),
        "compile": ("on", "off"),
    }
    for name, values in known.items():
        if (value := stored.get(name)) is not None and value not in values:
            raise InputError(
                f"{resume.run_dir / RUN_FILE} has performance.{name}={value!r}: correct it to one of"
                f" {', '.join(values)}, or to null"
            )
    return {name: stored.get(name) for name in known}


def _measured(cfg: Config) -> dict[str, str | None]:
    """What is fastest on this device; whether to compile follows from the number of steps."""
    found = timings_of(cfg)
    record = fast_path_of(cfg, timings=found).record()
    chosen = {name: record[name] for name in ("precision", "attention", "head")}
    return chosen | {REASON: "as rank 0 " + ("measured" if found else "chose")}


def timings_of(cfg: Config, *, again: bool = False) -> Timings | None:
    """Times of this model and batch on this device, for what is "auto"; None where nothing can be chosen.

    They are taken from the cache unless `again`. In place of a model of another class a block as wide as
    GPT-2 small's is timed, for the precision.
    """
    conf, kind = cfg.trainer, device_type(cfg.trainer.accelerator)
    allowed = {"precision": PRECISIONS, "attention": FAST_KERNELS, "head": get_args(Head)}
    if kind == "cuda":
        allowed["attention"] = ("sdpa",)
    given = {name: (Timings.timed_as(conf[name]),) for name in allowed if conf[name] != AUTO}
    ways = {**allowed, **given}
    if not can_time(kind) or len(given) == len(allowed) or not set(ways["precision"]) <= set(PRECISIONS):
        return None
    settle_lengths(cfg.data, cfg.model)
    vocab_size = cfg.model.get("vocab_size") or cfg.tokenizer.get("vocab_size")
    own, size = is_gpt(cfg), cfg.data.get("batch_size")
    config = model_config(cfg, vocab_size or UNKNOWN_VOCABULARY) if own else STAND_IN
    length = min(cfg.data.get("max_length") or config.context_length, config.context_length)
    if length < 1 or (isinstance(size, int) and size < 1):
        return None  # refused with the data
    if not isinstance(size, int) or vocab_size is None:
        ways["head"] = ("fused",)  # all logits at once may be too large
    here = conf.devices if kind == "cpu" and isinstance(conf.devices, int) else 1
    work = Workload(
        device=kind,
        config=config,
        sequences=size if isinstance(size, int) else 1,
        length=length,
        threads=max(1, torch.get_num_threads() // max(1, here)),
        has_head=own and is_language_model(cfg),
        is_model=own,
    )
    return timings(
        work, precisions=ways["precision"], kernels=ways["attention"], heads=ways["head"], again=again
    )


STAND_IN = GPTConfig(
    vocab_size=1, context_length=1024, emb_dim=768, n_heads=12, n_layers=1, drop_rate=0.0, qkv_bias=True
)


def say_otherwise(cfg: Config, resume: Resumption, path: FastPath) -> None:
    """Log where a resumed run keeps a precision that is not the fastest on the machine it is now on."""
    kind = device_type(cfg.trainer.accelerator)
    if cfg.trainer.precision != AUTO or resume.performance.get("machine") in (None, machine_name(kind)):
        return
    now = timings_of(cfg)
    if now is not None and (best := now.precision()) != path.precision.precision:
        log.warning(
            "this machine would choose trainer.precision=%s (%s); the run keeps %s, with which it began",
            best, now.reason(best), path.precision.precision,
        )  # fmt: skip


def build_strategy(name: str | Strategy, timeout: timedelta, *, sharded_checkpoints: bool) -> str | Strategy:
    """FSDP2, and DDP without a second copy of the gradients: they are views of the buffers that are sent.

    Not with `static_graph`: with accumulated batches torch fails, or does not sum the gradients (pytorch
    issue 143580, pull request 187732). Raises InputError for checkpoints in parts of a model that is whole.
    """
    if name in SHARDED:
        return FullyShardedStrategy(
            per_node=name == "hsdp", sharded_checkpoints=sharded_checkpoints, timeout=timeout
        )
    if sharded_checkpoints:
        raise InputError(
            f"trainer.sharded_checkpoints=true needs trainer.strategy=fsdp or hsdp, got {name}, where every"
            " process has the whole model: give trainer.sharded_checkpoints=false"
        )
    return DDPStrategy(gradient_as_bucket_view=True, timeout=timeout) if name == "ddp" else name
