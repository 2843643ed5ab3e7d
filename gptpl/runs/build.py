"""From a composed config to all that a training run is made of: a `Run`, whose parts may still be changed."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

from gptpl.callbacks.sample_responses import SampleResponses
from gptpl.callbacks.sample_text import SampleText
from gptpl.callbacks.stopping import CTRL_C, RunStopped, StopAtBoundary
from gptpl.checkpoints.format import RANDOM, check_same_model
from gptpl.checkpoints.loading import check_vocabulary
from gptpl.checkpoints.resume_state import random_state
from gptpl.config.compose import Config, composed, plain
from gptpl.config.groups import Folder
from gptpl.config.instantiate import OWN_PACKAGES, instantiate, partial_of
from gptpl.config.overrides import is_path
from gptpl.config.signatures import locate
from gptpl.data.stock_data import UNKNOWN
from gptpl.data.training_data import TrainingData
from gptpl.errors import InputError
from gptpl.generation.sampling import check_seed
from gptpl.model import GPTClassifier, GPTConfig, GPTModel, count_parameters, parameters_of
from gptpl.model.protocol import check_language_model
from gptpl.model.tuning import ALL
from gptpl.runs import parts
from gptpl.runs.claims import RunClaim, claim_new_run, is_worker_process, process_run_dir
from gptpl.runs.listing import find_run, runs_folder
from gptpl.runs.resume import Resumption, resume_plan
from gptpl.runs.resume_rules import lr_ceiling
from gptpl.training.module import TrainingModule, planned_steps
from gptpl.training.optimizers import peak_lr
from gptpl.training.performance import FastPath, choose_fast_path, device_type, keep_freed_memory
from gptpl.training.run_log import RunLogFile
from gptpl.training.schedules import takes_optimizer
from gptpl.training.task import better, known_metrics
from gptpl.weights.starting import FileWeights, PublishedWeights, RandomWeights, StartingWeights

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Run:
    """Everything a training run is made of, built and checked before anything is written.

    Attributes:
        config: every setting, as plain data.
        run_dir: the folder that the run is going to leave.
        module, datamodule, trainer: Lightning's; they may be changed before `fit`.
        resume: what the run goes on from; None: it is new.
        trusted: packages of the user's whose classes the run has.
        command: what started it, for its record.
        log_file: writes what is logged to the run's train.log.
        claim: keeps other runs out of the folder; None in the processes of further devices.
        random: the state of the CPU's random generators, from which `fit` goes on whatever came in between.
    """

    config: dict[str, Any]
    run_dir: Path
    datamodule: TrainingData
    module: TrainingModule
    trainer: L.Trainer
    resume: Resumption | None = None
    config_dir: Folder | None = None
    trusted: frozenset[str] = frozenset()
    command: str = ""
    log_file: RunLogFile = field(default_factory=RunLogFile)
    claim: RunClaim | None = None
    random: Mapping[str, Any] = field(default_factory=partial(random_state, accelerators=False))

    @property
    def start_step(self) -> int:
        """Optimizer steps that are behind the run."""
        return 0 if self.resume is None else self.resume.step

    def fit(self) -> dict[str, float]:
        """Trains, and leaves the run's folder complete; returns the final metrics.

        Stopped by Ctrl-C it finishes the step, saves, and raises KeyboardInterrupt; a run that has nothing
        left to do returns at once, with no metrics. Raises NonFiniteError, after writing a report, where loss
        or gradient is no finite number and `on_nonfinite` is not "rollback".
        """
        from gptpl.runs.fit import train  # which needs this module

        try:
            return train(self)
        except RunStopped as stop:
            if stop.reason == CTRL_C:
                raise KeyboardInterrupt from None
            raise

    def stop(self) -> None:
        """Has `fit` finish the step, save and return; from any thread or callback."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, StopAtBoundary):
                callback.stop()

    def close(self) -> None:
        """Gives the folder free of a run that is not to be trained; `fit` does so itself."""
        if self.claim is not None:
            self.claim.release()
            self.claim = None


@dataclass(frozen=True, kw_only=True)
class Settled:
    """A run before it has weights: its config with every number decided, and what that is made of."""

    cfg: Config
    trainer: L.Trainer
    datamodule: TrainingData
    weights: StartingWeights
    fast_path: FastPath
    total_steps: int

    @property
    def config(self) -> GPTConfig:
        """The model's. Raises InputError for a model of the user's own class."""
        parts.check_gpt(self.cfg, "what is planned is known of a GPTModel")
        return parts.model_config(self.cfg, None)


def build(
    *config: Config | str,
    config_dir: Folder | None = None,
    config_name: str = "train",
    log_file: RunLogFile | None = None,
) -> Run:
    """The run of a composed config, or of overrides: `build("experiment=quick", "optimizer.lr=1e-3")`.

    Every setting is checked by building what it is for; nothing is written but the cache of encoded text.
    What is cheap to build comes first: a wrong number need not wait for a large text. With the override
    `resume=RUN` the run is that one, see `resume`. Raises InputError for whatever is wrong.
    """
    if len(config) == 1 and not isinstance(config[0], str):
        if config[0].get("resume"):
            raise InputError("resume=... with a composed config: use gptpl.resume(RUN, *overrides)")
        return _build(config[0].copy(), None, config_dir, log_file)
    overrides, run = resumed_run([str(each) for each in config])
    if run is not None:
        return resume(run, *overrides, config_dir=config_dir, log_file=log_file)
    found = composed(overrides, config_name, config_dir=config_dir)
    return _build(found.cfg, None, config_dir, log_file, trusted=found.trusted)


def resume(
    run: str | Path, *overrides: str, config_dir: Folder | None = None, log_file: RunLogFile | None = None
) -> Run:
    """A run that goes on from its newest good checkpoint, with the overrides from the next step on."""
    plan = resume_plan(find_run(run, key="resume"), overrides, config_dir=config_dir)
    return _build(plan.config, plan, config_dir, log_file, trusted=plan.trusted)


def rolled_back(run: Run, *overrides: str) -> Run:
    """This run from its newest good checkpoint on."""
    plan = resume_plan(run.run_dir, overrides, config_dir=run.config_dir, own=True)
    again = _build(plan.config, plan, run.config_dir, run.log_file, trusted=plan.trusted | run.trusted)
    again.command = run.command
    return again


def resumed_run(overrides: Sequence[str]) -> tuple[list[str], str | None]:
    """The overrides without `resume=RUN`, and the run that it names; None: a new run."""
    pairs = [(text, *text.lstrip("+").partition("=")[::2]) for text in overrides]
    runs = [value.strip("'\"") for _, key, value in pairs if key == "resume" and value not in ("", "null")]
    return [text for text, key, _ in pairs if key != "resume"], runs[-1] if runs else None


def _build(
    cfg: Config,
    plan: Resumption | None,
    config_dir: Folder | None,
    log_file: RunLogFile | None,
    trusted: frozenset[str] = frozenset(),
) -> Run:
    claim = None if is_worker_process() else _claim(cfg, plan)
    try:
        with RunLogFile() if log_file is None else log_file as kept:
            settled = settle(cfg, plan)
            trainer = settled.trainer
            parts.let_module_end(trainer)
            module = build_module(settled, resume=plan, weights=settled.weights)
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, SampleText | SampleResponses):
                    callback.check_against(module)
            _report(settled, module)
            if plan is not None:
                plan.report(trainer.world_size, module.lr_factor, module.lr_ceiling, settled.total_steps)
    except BaseException:
        if claim is not None:
            claim.release()
        raise
    return Run(
        config=module.run_config,
        run_dir=Path(settled.cfg.run_dir),
        datamodule=settled.datamodule,
        module=module,
        trainer=trainer,
        resume=plan,
        config_dir=config_dir,
        trusted=trusted - OWN_PACKAGES,
        log_file=kept,
        claim=claim,
    )


def _claim(cfg: Config, plan: Resumption | None) -> RunClaim:
    """The run's folder for this process alone, before anything slow; its path goes into the config."""
    if plan is not None:
        return RunClaim(plan.run_dir)
    cfg.name = run_name(cfg)
    claim = claim_new_run(None if cfg.run_dir is None else Path(cfg.run_dir), name=cfg.name)
    cfg.run_dir = str(claim.path)
    return claim


def planned_config(overrides: Sequence[str], *, config_dir: Folder | None = None) -> tuple[Config, Config]:
    """What `build` would train with, and Hydra's own settings; nothing is built, and no folder made."""
    kept, run = resumed_run(overrides)
    found = composed(kept, config_dir=config_dir)
    if run is not None:
        return resume_plan(find_run(run, key="resume"), kept, config_dir=config_dir).config, found.hydra
    _settle_run_dir(found.cfg)
    return found.cfg, found.hydra


# --- what a run is before it has weights ----------------------------------------------------------------


def settle(cfg: Config, resume: Resumption | None = None) -> Settled:
    """All of a run but its weights, which may take more memory than there is; puts numbers into `cfg`."""
    if resume is None and cfg.get("resume"):
        raise InputError(
            f"resume={cfg.resume} is for gptpl train and gptpl.resume: here a run is looked at from its start"
        )
    _settle_run_dir(cfg)
    _check_numbers(cfg)
    fast_path = _fast_path(cfg)
    if fast_path.keep_freed_memory:
        keep_freed_memory()
    weights = _starting_weights(cfg, resume)
    trainer = _trainer(cfg)
    if resume is not None:
        resume.check_global_batch(trainer.world_size)
    if cfg.trainer.max_steps is not None:  # a run has no more; how many an epoch has, only the data know
        schedule(cfg, cfg.trainer.max_steps)
    datamodule = parts.build_datamodule(cfg, resume=resume)
    parts.settle_vocabulary(cfg, datamodule)
    parts.settle_batch(cfg, trainer, datamodule, fast_path)
    batches = datamodule.steps_per_epoch(world_size=trainer.world_size)
    if batches == UNKNOWN and trainer.max_steps == -1:
        raise InputError(f"{datamodule.name} does not say how many batches it has: give trainer.max_steps")
    total_steps = planned_steps(trainer, batches)
    if resume is not None:
        resume.check_horizon(total_steps)
    if parts.is_gpt(cfg):
        config, tokenizer = parts.model_config(cfg, None), datamodule.tokenizer.state()
        if resume is not None:
            check_same_model(resume.header, config, tokenizer)
        else:
            weights.check(config, tokenizer)
    return Settled(
        cfg=cfg,
        trainer=trainer,
        datamodule=datamodule,
        weights=weights,
        fast_path=_fast_path(cfg, total_steps=total_steps),
        total_steps=total_steps,
    )


def run_name(cfg: Config) -> str:
    """The folder under `runs/` of a run with these settings."""
    choices = cfg.get("choices") or {}
    return str(cfg.name or choices.get("experiment") or choices.get("data") or "run")


def _settle_run_dir(cfg: Config) -> None:
    cfg.name = run_name(cfg)
    run_dir = process_run_dir()
    if run_dir is None:
        run_dir = Path(cfg.run_dir or runs_folder() / cfg.name / "<date>_<time>").expanduser()
    cfg.run_dir = str(run_dir.absolute())


def _check_numbers(cfg: Config) -> None:
    check_seed(cfg.seed)
    if any(step < 1 for step in cfg.skip_steps):
        raise InputError(f"skip_steps={cfg.skip_steps}: optimizer steps are counted from 1")
    if cfg.trainer.strategy == "fsdp" and str(cfg.optimizer._target_).endswith(".muon"):
        raise InputError(
            "optimizer=muon needs whole matrices, which trainer.strategy=fsdp divides:"
            " use optimizer=adamw, or trainer=ddp"
        )
    if cfg.trainer.strategy == "fsdp" and (tune := parts.tuning_of(cfg)).state() != ALL:
        raise InputError(
            f"tune={tune.name} freezes weights, which trainer.strategy=fsdp cannot divide apart from the"
            " others: use trainer=ddp, or tune=all"
        )
    if parts.is_gpt(cfg):
        parts.model_config(cfg, None)


def _fast_path(cfg: Config, *, total_steps: int = 0) -> FastPath:
    conf = cfg.trainer
    return choose_fast_path(
        device_type=device_type(conf.accelerator),
        precision=parts.choose(conf).precision,
        drop_rate=cfg.model.get("drop_rate", 0.0),
        total_steps=total_steps,
        compile=conf.compile,
        attention=conf.attention,
        head=conf.head,
        recompute=conf.recompute_activations,
        keep_freed_memory=conf.keep_freed_memory,
    )


def _starting_weights(cfg: Config, resume: Resumption | None) -> StartingWeights:
    """What a new run begins with, checked as far as is known without the text."""
    if resume is not None:
        return RandomWeights()  # the checkpoint has them
    weights: StartingWeights = instantiate(cfg.init)
    if not parts.is_gpt(cfg):
        return weights  # what a class of the user's is, only its object says
    if cfg.tokenizer.get("vocab_size") is not None:
        tokenizer = parts.build_tokenizer(cfg.tokenizer)
        weights.check(parts.model_config(cfg, cfg.tokenizer.vocab_size), tokenizer.state())
        if isinstance(weights, FileWeights | PublishedWeights) and weights.path and tokenizer.name == "gpt2":
            check_vocabulary(Path(weights.path).expanduser())
    return weights


def _trainer(cfg: Config) -> L.Trainer:
    callbacks = [instantiate(node) for node in cfg.callbacks.values() if node is not None]
    if known := known_metrics(parts.task_class(cfg), callbacks):
        for monitor in filter(None, (getattr(callback, "monitor", None) for callback in callbacks)):
            better(monitor, known)

    def has(kind: type) -> bool:
        return any(isinstance(callback, kind) for callback in callbacks)

    return parts.build_trainer(
        cfg.trainer,
        eval_every_n_steps=cfg.eval_every_n_steps,
        deterministic=cfg.deterministic,
        callbacks=callbacks,
        logger=[instantiate(node) for node in cfg.logger.values() if node is not None] or False,
        default_root_dir=cfg.run_dir,
        enable_checkpointing=has(L.pytorch.callbacks.Checkpoint),
        enable_progress_bar=has(L.pytorch.callbacks.ProgressBar),
    )


# --- the module -----------------------------------------------------------------------------------------


def build_module(
    settled: Settled, *, weights: StartingWeights, resume: Resumption | None = None
) -> TrainingModule:
    """The module of `cfg.task` with a model of these weights, drawn from `cfg.seed`, as it is to train.

    A run that is resumed has its weights in the checkpoint. Raises InputError for an optimizer or a schedule
    that cannot be, and for weights that cannot be had.
    """
    cfg, datamodule = settled.cfg, settled.datamodule
    # The seed is set right before the weights are drawn, so that they depend on nothing else.
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    net, start = _model(settled, weights, resume)
    make_optimizer, tune = parts.optimizer_factory(cfg), parts.tuning_of(cfg)
    # Made here, and below, only to be refused here, not in the middle of the set-up, if a number is wrong.
    make_optimizer(net)
    given: dict[str, Any] = {
        "tokenizer": datamodule.tokenizer,
        "make_optimizer": make_optimizer,
        "total_steps": settled.total_steps,
        "run_config": _recorded(cfg),
        "eval_every_n_steps": cfg.eval_every_n_steps,
        "skip_steps": tuple(cfg.skip_steps),
        "data_sha256": datamodule.content_sha256(),
        "global_batch": datamodule.batch_size * settled.trainer.world_size,
        "start": start,
        "tune": tune.state(),
        **_schedule(cfg, settled.total_steps, resume),
        **datamodule.module_settings(),
    }
    if not parts.is_gpt(cfg):
        given["model_config"] = plain(cfg.model)
    module: TrainingModule = partial_of(cfg.task)(net, **given)
    tune.apply(module.net)
    make_optimizer(module.net)
    fast_path = settled.fast_path.fitted_to(module.net)
    fast_path.apply(module.net)
    module.head = fast_path.head
    return module


def _model(
    settled: Settled, weights: StartingWeights, resume: Resumption | None
) -> tuple[nn.Module, Mapping[str, Any]]:
    if parts.is_gpt(settled.cfg):
        if resume is None:
            return weights.make_model(settled.config)
        net: nn.Module = GPTModel(settled.config)
    else:
        net, data, model = instantiate(settled.cfg.model), settled.datamodule, plain(settled.cfg.model)
        check_language_model(net, tokens=data.tokenizer.vocab_size, max_length=data.max_length)
        if resume is None:
            return net, weights.fill(net, model, data.tokenizer.state())
        check_same_model(resume.header, model, data.tokenizer.state())
    return net, resume.header.get("start", RANDOM)


def _recorded(cfg: Config) -> dict[str, Any]:
    """Every setting as plain data, with paths that are right from any folder."""
    settings = plain(cfg)

    def absolute(value: Any, key: str) -> Any:
        if isinstance(value, dict):
            return {name: absolute(each, name) for name, each in value.items()}
        if isinstance(value, str) and is_path(key) and value and "://" not in value:
            return str(Path(value).expanduser().absolute())
        return value

    return settings | {name: absolute(settings[name], name) for name in ("data", "init")}


def schedule(cfg: Config, total_steps: int) -> Callable[[int], float] | None:
    """The learning rate's factor of a step; None: a scheduler such as torch's decides it as it goes."""
    if takes_optimizer(locate(str(cfg.scheduler._target_), "scheduler._target_")):
        return None
    lr_factor = partial(instantiate(cfg.scheduler).factor, peak_lr=peak_rate(cfg), total_steps=total_steps)
    lr_factor(0)
    return lr_factor


def peak_rate(cfg: Config) -> float:
    """The learning rate that a schedule takes as its peak."""
    with torch.random.fork_rng(devices=[]):  # which draws nothing of the run's
        return peak_lr(partial_of(cfg.optimizer), nn.Linear(1, 1))


def _schedule(cfg: Config, total_steps: int, resume: Resumption | None) -> dict[str, Any]:
    """What the module is told of the learning rate; a resumed run may be held at or below a ceiling."""
    lr_factor = schedule(cfg, total_steps)
    if lr_factor is None:
        return {"make_scheduler": partial_of(cfg.scheduler)}
    if resume is None:
        return {"lr_factor": lr_factor}
    old_total, ceiling = resume.header["total_steps"], None
    if not resume.rate_asked and (old_factor := schedule(cfg, old_total)):  # both are those of before
        ceiling = lr_ceiling(
            old_factor, step=resume.step, old_total_steps=old_total,
            total_steps=total_steps, ceiling=resume.header["lr_ceiling"],
        )  # fmt: skip
    return {"lr_factor": lr_factor, "lr_ceiling": ceiling}


def _report(settled: Settled, module: TrainingModule) -> None:
    cfg, trainer, datamodule = settled.cfg, settled.trainer, settled.datamodule
    parameters = parameters_of(module.net)
    if isinstance(module.net, GPTClassifier):
        log.info(
            "model: %s parameters, of which %s in its head of %d classes, %.1f MB in fp32",
            f"{parameters:,}", f"{parameters_of(module.net.out_head):,}", module.net.classifier.n_classes,
            4 * parameters / 1e6,
        )  # fmt: skip
    elif parts.is_gpt(cfg):
        config, count = settled.config, count_parameters(settled.config)
        head = "tied" if config.tie_weights else "untied"
        log.info(
            "model: %s parameters with its %s head (tied %s, untied %s), %.1f MB in fp32",
            f"{count.total:,}", head, f"{count.tied:,}", f"{count.untied:,}", count.fp32_bytes / 1e6,
        )  # fmt: skip
        if config.tie_weights and config.init == "torch" and dict(module.start) == {"init": "random"}:
            log.warning(
                "model.init=torch draws the embeddings from N(0, 1), and the tied head takes them over: the"
                " first loss is far above ln(vocab_size) = %.1f; model.init=gpt2 is made for a tied head",
                math.log(config.vocab_size),
            )
    else:
        log.info("model: %s, %s parameters", cfg.model._target_, f"{parameters:,}")
    if module.tune != ALL:
        log.info("%s", parts.tuning_of(cfg).report(module.net))
    for line in datamodule.report(parameters=parameters, world_size=trainer.world_size):
        log.info("%s", line)
    device, chosen = device_type(cfg.trainer.accelerator), parts.choose(cfg.trainer)
    log.info(
        "device: %d x %s, precision %s (%s), %s",
        trainer.world_size, device, chosen.precision, chosen.reason,
        settled.fast_path.fitted_to(module.net),
    )  # fmt: skip
    log.info("plan: %d optimizer steps", module.total_steps)
