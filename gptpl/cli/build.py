"""From a composed config to everything a training run is made of."""

import logging
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from gptpl.callbacks.sample_text import SampleText
from gptpl.cli.hydra_app import instantiate
from gptpl.cli.resume import resumed_config
from gptpl.cli.run_folder import check_new_run_dir, fresh_run_dir
from gptpl.cli.trainer import build_trainer, check_seed, choose, device_type, planned_steps, stop_after
from gptpl.data.datamodule import TextDataModule
from gptpl.data.report import data_report
from gptpl.data.tokenizers import Tokenizer
from gptpl.errors import InputError
from gptpl.model import GPTConfig, GPTModel, count_parameters
from gptpl.training.checkpoint import HEADER_KEY, check_same_model, read_checkpoint
from gptpl.training.compilation import compile_for_training
from gptpl.training.language_model import LanguageModelingModule

log = logging.getLogger(__name__)

PROCESS_RUN_DIR = "GPTPL_RUN_DIR"
"""Tells the processes that Lightning starts for other devices which folder the first one chose."""
MONITORED = ("val/loss", "val/perplexity", "eval/train_loss")
"""The metrics of an evaluation: what a callback may wait for."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything a training run is made of, built and checked before anything is written."""

    config: dict[str, Any]
    run_dir: Path
    datamodule: TextDataModule
    module: LanguageModelingModule
    trainer: L.Trainer
    resume_from: Path | None
    start_step: int


def is_worker_process() -> bool:
    """Whether Lightning started this process for a further device of a run that is already under way."""
    return PROCESS_RUN_DIR in os.environ


def build_run(cfg: DictConfig) -> Run:
    """Checks every setting by building what it is for; nothing is written but the cache of encoded text.

    What is cheap to build comes first: a wrong number need not wait for a large text.
    """
    cfg, resume_from = resumed_config(cfg) if cfg.resume else (cfg, None)
    run_dir = _settle_run_dir(cfg)
    if resume_from is None and not is_worker_process():
        check_new_run_dir(run_dir)
    _check_numbers(cfg)
    trainer = _trainer(cfg, run_dir)
    datamodule = build_datamodule(cfg)
    config = _model_config(cfg, datamodule)
    cfg.model.vocab_size = config.vocab_size
    settings = _plain(cfg)
    steps_per_epoch = datamodule.steps_per_epoch(
        world_size=trainer.world_size, accumulate=cfg.trainer.accumulate_grad_batches
    )
    total_steps = planned_steps(cfg.trainer, steps_per_epoch)
    stop_after(trainer, total_steps)
    module = _module(cfg, config, datamodule, settings, total_steps)
    _check_samples(trainer, module)
    start_step = 0 if resume_from is None else _checked_step(resume_from, config, datamodule.tokenizer)
    device = device_type(cfg.trainer.accelerator)
    compile_for_training(module.net, wanted=cfg.trainer.compile, device_type=device, total_steps=total_steps)
    _report(cfg, config, datamodule, trainer, total_steps)
    if resume_from is not None:
        log.info("resuming at step %d: %s", start_step, " ".join(HydraConfig.get().overrides.task))
    return Run(
        config=settings,
        run_dir=run_dir,
        datamodule=datamodule,
        module=module,
        trainer=trainer,
        resume_from=resume_from,
        start_step=start_step,
    )


def _settle_run_dir(cfg: DictConfig) -> Path:
    """Decides the run's folder and puts its absolute path into the config."""
    hydra = HydraConfig.get()
    if cfg.name is None:
        cfg.name = hydra.runtime.choices.get("experiment") or hydra.runtime.choices["data"]
    if is_worker_process():
        run_dir = Path(os.environ[PROCESS_RUN_DIR])
    elif cfg.run_dir is not None:
        run_dir = Path(cfg.run_dir).expanduser()
    elif hydra.mode == RunMode.MULTIRUN:
        run_dir = Path(hydra.runtime.output_dir)
    else:
        run_dir = fresh_run_dir(cfg.name)
    cfg.run_dir = str(run_dir.absolute())
    return Path(cfg.run_dir)


def _check_numbers(cfg: DictConfig) -> None:
    """The numbers that need no data to be judged."""
    check_seed(cfg.seed)
    GPTConfig(**{**cfg.model, "vocab_size": cfg.model.vocab_size or 1})


def _trainer(cfg: DictConfig, run_dir: Path) -> L.Trainer:
    callbacks = [instantiate(node) for node in cfg.callbacks.values() if node is not None]
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if monitor is not None and monitor not in MONITORED:
            raise InputError(f"monitor={monitor} is no metric of an evaluation: give {', '.join(MONITORED)}")
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


def _plain(cfg: DictConfig) -> dict[str, Any]:
    plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def build_datamodule(cfg: DictConfig) -> TextDataModule:
    """The data of `cfg.data` under `cfg.tokenizer`, encoded or opened from the cache."""
    if cfg.data.max_length is None:
        cfg.data.max_length = cfg.model.context_length
    if cfg.data.stride is None:
        cfg.data.stride = cfg.data.max_length
    if cfg.data.max_length > cfg.model.context_length:
        raise InputError(
            f"data.max_length={cfg.data.max_length} is longer than model.context_length="
            f"{cfg.model.context_length}: set data.max_length={cfg.model.context_length} or a larger context"
        )
    datamodule = TextDataModule(
        corpus=instantiate(cfg.data.corpus),
        tokenizer=_tokenizer(cfg.tokenizer),
        max_length=cfg.data.max_length,
        stride=cfg.data.stride,
        batch_size=cfg.data.batch_size,
        train_ratio=cfg.data.train_ratio,
        seed=cfg.seed,
        num_workers=cfg.data.num_workers,
        pin_memory=cfg.data.pin_memory,
        persistent_workers=cfg.data.persistent_workers,
        eval_train_batches=cfg.eval_train_batches,
        eval_val_batches=cfg.eval_val_batches,
    )
    datamodule.load()
    datamodule.setup()
    return datamodule


def _tokenizer(node: DictConfig) -> Tokenizer:
    """The tokenizer; `vocab_size` in its YAML is there for the model's, and checked here."""
    target = {key: value for key, value in node.items() if key != "vocab_size"}
    tokenizer: Tokenizer = instantiate(target)
    if node.vocab_size is not None and node.vocab_size != tokenizer.vocab_size:
        raise InputError(
            f"tokenizer.vocab_size={node.vocab_size}, but the {tokenizer.name} tokenizer has"
            f" {tokenizer.vocab_size} tokens: leave tokenizer.vocab_size as it is"
        )
    return tokenizer


def _model_config(cfg: DictConfig, datamodule: TextDataModule) -> GPTConfig:
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


def _module(
    cfg: DictConfig,
    config: GPTConfig,
    datamodule: TextDataModule,
    settings: dict[str, Any],
    total_steps: int,
) -> LanguageModelingModule:
    schedule = instantiate(cfg.scheduler)
    lr_factor = partial(schedule.factor, total_steps=total_steps, peak_lr=cfg.optimizer.lr)
    # The seed is set right before the weights are drawn, so that they depend on nothing else.
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    net = GPTModel(config)
    make_optimizer = instantiate(cfg.optimizer)
    # Made here only to be refused here, not in the middle of the set-up, if a number is wrong.
    make_optimizer(net)
    lr_factor(0)
    module: LanguageModelingModule = instantiate(cfg.task)(
        net,
        tokenizer=datamodule.tokenizer,
        make_optimizer=make_optimizer,
        lr_factor=lr_factor,
        total_steps=total_steps,
        run_config=settings,
    )
    return module


def _check_samples(trainer: L.Trainer, module: LanguageModelingModule) -> None:
    """Refuses prompts and strategies that this model cannot sample, before the run has a folder."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SampleText):
            callback.check_against(module)


def _checked_step(resume_from: Path, config: GPTConfig, tokenizer: Tokenizer) -> int:
    """The optimizer steps that the checkpoint has behind it, once it is known to fit."""
    checkpoint = read_checkpoint(resume_from)
    check_same_model(checkpoint[HEADER_KEY], config, tokenizer)
    return int(checkpoint["global_step"])


def _report(
    cfg: DictConfig, config: GPTConfig, datamodule: TextDataModule, trainer: L.Trainer, total_steps: int
) -> None:
    count = count_parameters(config)
    head = "tied" if config.tie_weights else "untied"
    log.info(
        "model: %s parameters with its %s head (tied %s, untied %s), %.1f MB in fp32",
        f"{count.total:,}", head, f"{count.tied:,}", f"{count.untied:,}", count.fp32_bytes / 1e6,
    )  # fmt: skip
    lines = data_report(
        datamodule.encoded,
        name=datamodule.corpus.name,
        max_length=datamodule.max_length,
        stride=datamodule.stride,
        batch_size=datamodule.batch_size * trainer.world_size,
        parameters=count.total,
    )
    for line in lines:
        log.info("%s", line)
    device, chosen = device_type(cfg.trainer.accelerator), choose(cfg.trainer)
    log.info(
        "device: %d x %s, precision %s (%s)", trainer.world_size, device, chosen.precision, chosen.reason
    )
    log.info("plan: %d optimizer steps", total_steps)
