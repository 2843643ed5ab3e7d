"""From a composed config to everything a training run is made of."""

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class
from omegaconf import DictConfig

from gptpl.callbacks.sample_responses import SampleResponses
from gptpl.callbacks.sample_text import SampleText
from gptpl.cli.batch import settle_batch
from gptpl.cli.build_data import build_datamodule, build_model_config, build_tokenizer
from gptpl.cli.build_module import build_module
from gptpl.cli.hydra_app import instantiate
from gptpl.cli.resume import Resumption, resume_plan
from gptpl.cli.run_folder import check_new_run_dir, fresh_run_dir
from gptpl.cli.schema import MuonConf
from gptpl.cli.trainer import build_trainer, check_seed, choose, device_type, let_module_end, planned_steps
from gptpl.data.training_data import TrainingData
from gptpl.errors import InputError
from gptpl.model import GPTConfig, count_parameters
from gptpl.training.checkpoint import check_same_model
from gptpl.training.classification import ClassificationModule
from gptpl.training.fast_path import FastPath, choose_fast_path, keep_freed_memory
from gptpl.training.foreign_checkpoint import check_vocabulary
from gptpl.training.training_module import TrainingModule
from gptpl.training.tuning import ALL
from gptpl.weights.starting import FileWeights, PublishedWeights, RandomWeights, StartingWeights

log = logging.getLogger(__name__)

PROCESS_RUN_DIR = "GPTPL_RUN_DIR"
"""Tells the processes that Lightning starts for other devices which folder the first one chose."""
MONITORED = ("val/loss", "eval/train_loss")
"""The metrics of every task's evaluation that callbacks may wait for."""
MONITORED_OF_TEXT = ("val/loss", "val/perplexity", "eval/train_loss")
"""The same where tokens are predicted; a classifier has no perplexity."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything a training run is made of, built and checked before anything is written."""

    config: dict[str, Any]
    run_dir: Path
    datamodule: TrainingData
    module: TrainingModule
    trainer: L.Trainer
    resume: Resumption | None

    @property
    def resume_from(self) -> Path | None:
        """The checkpoint to go on from; None: the run is new."""
        return None if self.resume is None else self.resume.checkpoint

    @property
    def start_step(self) -> int:
        """Optimizer steps that are behind the run."""
        return 0 if self.resume is None else self.resume.step


@dataclass(frozen=True, kw_only=True)
class Settled:
    """A run before it has weights: its config with every number decided, and what that is made of."""

    cfg: DictConfig
    run_dir: Path
    trainer: L.Trainer
    datamodule: TrainingData
    config: GPTConfig
    weights: StartingWeights
    fast_path: FastPath
    total_steps: int


def is_worker_process() -> bool:
    """Whether Lightning started this process for a further device of a run that is already under way."""
    return PROCESS_RUN_DIR in os.environ


def build_run(cfg: DictConfig, *, overrides: Sequence[str] | None = None) -> Run:
    """Checks every setting by building what it is for; nothing is written but the cache of encoded text.

    What is cheap to build comes first: a wrong number need not wait for a large text. With `cfg.resume` only
    the `overrides` count (None: those of the command line), see `resume_plan`.
    """
    resume = resume_plan(cfg, overrides=overrides) if cfg.resume else None
    settled = settle(cfg if resume is None else resume.config, resume)
    cfg, trainer, datamodule, config = settled.cfg, settled.trainer, settled.datamodule, settled.config
    total_steps = settled.total_steps
    let_module_end(trainer)
    module = build_module(
        cfg,
        config,
        datamodule,
        total_steps=total_steps,
        world_size=trainer.world_size,
        resume=resume,
        weights=settled.weights,
    )
    _check_samples(trainer, module)
    fast_path = settled.fast_path
    fast_path.apply(module.net)
    module.head = fast_path.head
    _report(cfg, config, datamodule, trainer, module, fast_path)
    if resume is not None:
        resume.report(trainer.world_size, module.lr_factor, module.lr_ceiling, total_steps)
    return Run(
        config=module.run_config,
        run_dir=settled.run_dir,
        datamodule=datamodule,
        module=module,
        trainer=trainer,
        resume=resume,
    )


def settle(cfg: DictConfig, resume: Resumption | None = None) -> Settled:
    """Everything of a run but its weights, which may take more memory than there is; puts numbers into `cfg`.

    Raises InputError for whatever is known to be wrong by then.
    """
    run_dir = _settle_run_dir(cfg)
    if resume is None and not is_worker_process():
        check_new_run_dir(run_dir)
    _check_numbers(cfg)
    fast_path = _fast_path(cfg)
    if fast_path.keep_freed_memory:
        keep_freed_memory()
    weights = _starting_weights(cfg, resume)
    trainer = _trainer(cfg, run_dir)
    if resume is not None:
        resume.check_global_batch(trainer.world_size)
    datamodule = build_datamodule(cfg, resume=resume)
    config = build_model_config(cfg, datamodule)
    cfg.model.vocab_size = config.vocab_size
    settle_batch(cfg, trainer, datamodule, config, fast_path)
    total_steps = _total_steps(cfg, trainer, datamodule)
    if resume is not None:
        check_same_model(resume.header, config, datamodule.tokenizer)
        resume.check_horizon(total_steps)
    else:
        weights.check(config, datamodule.tokenizer.state())
    return Settled(
        cfg=cfg,
        run_dir=run_dir,
        trainer=trainer,
        datamodule=datamodule,
        config=config,
        weights=weights,
        fast_path=_fast_path(cfg, total_steps=total_steps),
        total_steps=total_steps,
    )


def run_name(cfg: DictConfig) -> str:
    """The folder under `runs/` of a run with these settings, which Hydra has just composed."""
    choices = HydraConfig.get().runtime.choices
    return str(cfg.name or choices.get("experiment") or choices["data"])


def _settle_run_dir(cfg: DictConfig) -> Path:
    """Decides the run's folder and puts its absolute path into the config."""
    cfg.name = run_name(cfg)
    if is_worker_process():
        run_dir = Path(os.environ[PROCESS_RUN_DIR])
    elif cfg.run_dir is not None:
        run_dir = Path(cfg.run_dir).expanduser()
    else:
        run_dir = fresh_run_dir(cfg.name)
    cfg.run_dir = str(run_dir.absolute())
    return Path(cfg.run_dir)


def _check_numbers(cfg: DictConfig) -> None:
    """The numbers that need no data to be judged."""
    check_seed(cfg.seed)
    if cfg.trainer.strategy == "fsdp" and cfg.optimizer._target_ == MuonConf._target_:
        raise InputError(
            "optimizer=muon needs whole matrices, which trainer.strategy=fsdp divides:"
            " use optimizer=adamw, or trainer=ddp"
        )
    if cfg.trainer.strategy == "fsdp" and (tune := instantiate(cfg.tune)).state() != ALL:
        raise InputError(
            f"tune={tune.name} freezes weights, which trainer.strategy=fsdp cannot divide apart from the"
            " others: use trainer=ddp, or tune=all"
        )
    GPTConfig(**{**cfg.model, "vocab_size": cfg.model.vocab_size or 1})


def _fast_path(cfg: DictConfig, *, total_steps: int = 0) -> FastPath:
    conf = cfg.trainer
    return choose_fast_path(
        device_type=device_type(conf.accelerator),
        precision=choose(conf).precision,
        drop_rate=cfg.model.drop_rate,
        total_steps=total_steps,
        compile=conf.compile,
        attention=conf.attention,
        head=conf.head,
        recompute=conf.recompute_activations,
        keep_freed_memory=conf.keep_freed_memory,
    )


def _starting_weights(cfg: DictConfig, resume: Resumption | None) -> StartingWeights:
    """What a new run begins with, checked as far as is known without the text."""
    if resume is not None:
        return RandomWeights()  # the checkpoint has them
    weights: StartingWeights = instantiate(cfg.init)
    if cfg.tokenizer.vocab_size is not None:
        config = GPTConfig(**{**cfg.model, "vocab_size": cfg.model.vocab_size or cfg.tokenizer.vocab_size})
        tokenizer = build_tokenizer(cfg.tokenizer)
        weights.check(config, tokenizer.state())
        if isinstance(weights, FileWeights | PublishedWeights) and weights.path and tokenizer.name == "gpt2":
            check_vocabulary(Path(weights.path).expanduser())
    return weights


def _trainer(cfg: DictConfig, run_dir: Path) -> L.Trainer:
    callbacks = [instantiate(node) for node in cfg.callbacks.values() if node is not None]
    allowed = MONITORED if get_class(cfg.task._target_) is ClassificationModule else MONITORED_OF_TEXT
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if monitor is not None and monitor not in allowed:
            raise InputError(f"monitor={monitor} is no metric of this task: give {', '.join(allowed)}")
    return build_trainer(
        cfg.trainer,
        precision=choose(cfg.trainer).precision,
        eval_every_n_steps=cfg.eval_every_n_steps,
        deterministic=cfg.deterministic,
        callbacks=callbacks,
        logger=[instantiate(node) for node in cfg.logger.values() if node is not None] or False,
        default_root_dir=str(run_dir),
        enable_checkpointing=any(
            isinstance(callback, L.pytorch.callbacks.Checkpoint) for callback in callbacks
        ),
        enable_progress_bar=any(
            isinstance(callback, L.pytorch.callbacks.ProgressBar) for callback in callbacks
        ),
    )


def _total_steps(cfg: DictConfig, trainer: L.Trainer, datamodule: TrainingData) -> int:
    accumulate = cfg.trainer.accumulate_grad_batches
    steps_per_epoch = datamodule.steps_per_epoch(world_size=trainer.world_size, accumulate=accumulate)
    return planned_steps(cfg.trainer, steps_per_epoch)


def _check_samples(trainer: L.Trainer, module: TrainingModule) -> None:
    """Refuses prompts and strategies that this model cannot sample, before the run has a folder."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SampleText | SampleResponses):
            callback.check_against(module)


def _report(
    cfg: DictConfig,
    config: GPTConfig,
    datamodule: TrainingData,
    trainer: L.Trainer,
    module: TrainingModule,
    fast_path: FastPath,
) -> None:
    count = count_parameters(config)
    head = "tied" if config.tie_weights else "untied"
    log.info(
        "model: %s parameters with its %s head (tied %s, untied %s), %.1f MB in fp32",
        f"{count.total:,}", head, f"{count.tied:,}", f"{count.untied:,}", count.fp32_bytes / 1e6,
    )  # fmt: skip
    if config.tie_weights and config.init == "torch" and dict(module.start) == {"init": "random"}:
        log.warning(
            "model.init=torch draws the embeddings from N(0, 1), and the tied head takes them over: the first"
            " loss is far above ln(vocab_size) = %.1f; model.init=gpt2 is made for a tied head",
            math.log(config.vocab_size),
        )
    if module.tune != ALL:
        log.info("%s", instantiate(cfg.tune).report(module.net))
    for line in datamodule.report(parameters=count.total, world_size=trainer.world_size):
        log.info("%s", line)
    device, chosen = device_type(cfg.trainer.accelerator), choose(cfg.trainer)
    log.info(
        "device: %d x %s, precision %s (%s), %s",
        trainer.world_size, device, chosen.precision, chosen.reason, fast_path,
    )  # fmt: skip
    log.info("plan: %d optimizer steps", module.total_steps)
