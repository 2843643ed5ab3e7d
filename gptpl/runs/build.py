"""How a run is made: overrides -> config -> Trainer, data and module -> a `Run` to change and fit.

1. `build` composes the config (`gptpl.config.compose`); `resume` takes that of an earlier run.
2. `_build` claims the run's folder, so that no other process trains there.
3. `settle` makes the Trainer and the data, and decides every number that follows from them.
4. `build_module` gives the model its weights and wraps it in the LightningModule of the task.
5. `Run.fit` calls `gptpl.runs.fit.train`, and that `Trainer.fit`; a step is in `gptpl.training.module`.
"""

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning as L
from torch import nn

from gptpl.callbacks.samples import SampleResponses, SampleText
from gptpl.callbacks.stopping import CTRL_C, RunStopped, StopAtBoundary, duration
from gptpl.checkpoints.files import CheckpointFolder, GoodCheckpoint
from gptpl.checkpoints.format import RANDOM, check_same_model
from gptpl.checkpoints.resume_state import random_state
from gptpl.config.compose import Config, composed, plain
from gptpl.config.groups import Folder, walk
from gptpl.config.instantiate import instantiate, partial_of
from gptpl.config.overrides import resumed_run
from gptpl.config.signatures import OWN_PACKAGES
from gptpl.data.pretraining.datamodule import SequenceData
from gptpl.data.stock_data import UNKNOWN
from gptpl.data.training_data import TrainingData, planned_batches
from gptpl.errors import InputError
from gptpl.files.run_record import recorded_versions
from gptpl.generation.sampling import check_seed
from gptpl.model import GPTConfig, GPTModel, parameters_of
from gptpl.model.parameters import ALL, Tuning
from gptpl.model.protocol import check_language_model
from gptpl.runs import parts
from gptpl.runs.claims import (
    AUTO,
    RunClaim,
    claim_new_run,
    process_checkpoint,
    process_run_dir,
    run_to_continue,
)
from gptpl.runs.listing import find_run, runs_folder
from gptpl.runs.parallel_plan import must_be_sharded, process_count
from gptpl.runs.resume import Resumption, found_by_node, resume_plan
from gptpl.runs.resume_rules import lr_ceiling, spelt
from gptpl.runs.trainer import (
    check_strategy,
    configured_trainer,
    fast_path_of,
    kept_choices,
    say_otherwise,
    timings_of,
)
from gptpl.training.autotune import Timings, machine_name
from gptpl.training.costs import whole_memory
from gptpl.training.lightning_internals import let_module_end
from gptpl.training.module import TrainingModule, planned_steps
from gptpl.training.performance import FastPath, device_type, keep_freed_memory
from gptpl.training.processes import Processes, find_launcher, meet, processes
from gptpl.training.run_log import RunLogFile, is_first_process
from gptpl.training.sharding import SHARDED
from gptpl.weights.starting import RandomWeights, StartingWeights

log = logging.getLogger(__name__)

_SHARED_SECONDS = 5
"""How long another machine may take to see a new file."""


@dataclass(kw_only=True)
class Run:
    """A training run, built and checked; its folder is locked, and nothing is written there before `fit`.

    Attributes:
        config: every setting, as plain data.
        run_dir: the folder that the run writes to.
        datamodule, module, trainer: Lightning's objects; they may be changed before `fit`.
        resume: the checkpoint and settings to resume from; None for a new run.
        config_dir, trusted: the user's config folder, and packages that classes of the run come from.
        command, overrides: what started it, for its record.
        log_file: writes the log to the run's train.log.
        claim: the lock on the folder; None in worker processes, those of further devices.
        performance: precision, attention kernel, loss head and compilation, and the machine that they were
            chosen on, for `run.json`.
        measured: the seconds that each of them took here, if they were measured.
        random: state of the CPU's random generators, restored when `fit` begins.
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
    overrides: Sequence[str] = ()
    log_file: RunLogFile = field(default_factory=RunLogFile)
    claim: RunClaim | None = None
    performance: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, float] | None = None
    random: Mapping[str, Any] = field(default_factory=partial(random_state, accelerators=False))

    @property
    def start_step(self) -> int:
        """Optimizer steps finished before `fit`."""
        return 0 if self.resume is None else self.resume.step

    def fit(self) -> dict[str, float]:
        """Train, complete the run's folder, and return the final metrics.

        Ctrl-C finishes the step, saves, and raises KeyboardInterrupt. A finished run with no step left
        returns no metrics. Raises NonFiniteError, after writing a report, where loss or gradient is not
        finite and `on_nonfinite` is not "rollback".
        """
        from gptpl.runs.fit import train  # here, as it imports this module

        try:
            return train(self)
        except RunStopped as stop:
            if stop.reason == CTRL_C:
                raise KeyboardInterrupt from None
            raise

    def stop(self) -> None:
        """Make `fit` finish the step, save and return; from any thread or callback."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, StopAtBoundary):
                callback.stop()

    def close(self) -> None:
        """Release the folder of a run that will not be trained; `fit` does so itself."""
        if self.claim is not None:
            self.claim.release()
            self.claim = None


def build(
    *config: Config | str,
    config_dir: Folder | None = None,
    config_name: str = "train",
    log_file: RunLogFile | None = None,
    trusted: frozenset[str] = frozenset(),
    again: bool = False,
) -> Run:
    """Build the run of a composed config or of overrides: `build("experiment=quick", "optimizer.lr=1e-3")`.

    The override `resume=RUN` continues that run, see `resume`; `resume=auto` the one in `run_dir`, if it has
    a checkpoint. Every setting is checked by building what it is for, cheap parts first: a wrong number is
    refused before a large text is read. Only the run's empty folder and the cache of encoded text are
    written. Raises InputError for whatever is wrong.

    Only with a composed config: `trusted`, packages of the classes that it names, are recorded for those who
    resume the run; `again` sets aside what a run that saved nothing has left in `run_dir`.
    """
    if len(config) == 1 and not isinstance(config[0], str):
        if not isinstance(config[0], Mapping):
            raise InputError(
                f"build takes a composed config, or overrides one by one, got {type(config[0]).__name__}:"
                " give build('experiment=quick', 'optimizer.lr=1e-3')"
            )
        if config[0].get("resume"):
            raise InputError("resume=... in a composed config: use gptpl.resume(RUN, *overrides)")
        return _build(config[0].copy(), None, config_dir, log_file, trusted=trusted, again=again)
    given, asked = resumed_run([str(each) for each in config])
    overrides, run = run_to_continue(given, asked)
    if run is not None:
        made = resume(run, *overrides, config_dir=config_dir, log_file=log_file)
    else:
        found = composed(overrides, config_name, config_dir=config_dir)
        made = _build(found.cfg, None, config_dir, log_file, trusted=found.trusted, again=asked == AUTO)
    made.overrides = given
    return made


def resume(
    run: str | Path, *overrides: str, config_dir: Folder | None = None, log_file: RunLogFile | None = None
) -> Run:
    """Build a run that continues from its newest intact checkpoint; overrides apply from the next step on."""
    try:
        plan = resume_plan(find_run(run, key="resume"), overrides, config_dir=config_dir, find=_newest_good)
    except BaseException as error:
        if (together := processes()) is not None:
            together.failed(error, reads=True)
        raise
    return _build(plan.config, plan, config_dir, log_file, trusted=plan.trusted)


def _newest_good(cfg: Config, folder: CheckpointFolder) -> GoodCheckpoint | None:
    if (together := _meet(cfg)) is not None:
        return found_by_node(folder, together)
    known = process_checkpoint(folder.folder)
    return folder.newest_good() if known is None else GoodCheckpoint(path=known, damaged=[])


def rolled_back(run: Run, *overrides: str) -> Run:
    """Build this process's own run again, from its newest intact checkpoint on."""
    plan = resume_plan(run.run_dir, overrides, config_dir=run.config_dir, own=True)
    rebuilt = _build(plan.config, plan, run.config_dir, run.log_file, trusted=plan.trusted | run.trusted)
    rebuilt.command = run.command
    return rebuilt


def planned_config(overrides: Sequence[str], *, config_dir: Folder | None = None) -> tuple[Config, Config]:
    """The config that `build` would train with, and Hydra's own settings; nothing is built."""
    overrides, run = run_to_continue(*resumed_run(overrides))
    found = composed(overrides, config_dir=config_dir)
    if run is not None:
        return resume_plan(find_run(run, key="resume"), overrides, config_dir=config_dir).config, found.hydra
    _settle_run_dir(found.cfg)
    return found.cfg, found.hydra


def _build(
    cfg: Config,
    resume: Resumption | None,
    config_dir: Folder | None,
    log_file: RunLogFile | None,
    trusted: frozenset[str] = frozenset(),
    again: bool = False,
) -> Run:
    together = _meet(cfg)
    claim: RunClaim | None = None
    try:
        if is_first_process():
            claim = _claim(cfg, resume, again=again)
        if together is not None:  # each exchange below is one of all processes
            if resume is None:
                together.gathered(None)  # that of `found_by_node`, in processes that found a run to resume
            together.agree({"the step to continue from, in a folder that all share,": resume and resume.step})
            if resume is None:
                cfg.run_dir = together.from_first(lambda: cfg.run_dir)
            if cfg.trainer.sharded_checkpoints:
                _check_shared(Path(cfg.run_dir), together)
        with log_file or RunLogFile() as run_log:  # keeps the lines until `fit` opens train.log
            if together is not None:
                log.info("processes: %s", together.launcher)
            settled = settle(cfg, resume, tries_compiling=True)
            module = build_module(settled, resume=resume, weights=settled.weights)
            for callback in settled.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, SampleText | SampleResponses):
                    callback.check_against(module)
            _report(settled, module)
            if resume is not None:
                resume.report(settled.trainer.world_size, module)
            if together is not None:
                together.agree(_facts(module, settled, resume))
    except BaseException as error:
        if claim is not None:
            claim.release()
        if together is not None:
            together.failed(error, reads=True)
        raise
    kind, fast_path = device_type(settled.cfg.trainer.accelerator), settled.fast_path.fitted_to(module.net)
    return Run(
        config=module.run_config,
        run_dir=Path(settled.cfg.run_dir),
        datamodule=settled.datamodule,
        module=module,
        trainer=settled.trainer,
        resume=resume,
        config_dir=config_dir,
        trusted=trusted - OWN_PACKAGES,
        log_file=run_log,
        claim=claim,
        performance={"device": kind, "machine": machine_name(kind), **fast_path.record()},
        measured=None if settled.timings is None else settled.timings.measured,
    )


def _meet(cfg: Config) -> Processes | None:
    """Meet the other processes of a launcher; InputError where a run on several nodes has none.

    Lightning could start them on each node, but they would not know of one another before the first step.
    """
    timeout, device = duration(cfg.trainer.timeout, "trainer.timeout"), device_type(cfg.trainer.accelerator)
    together, nodes, node = meet(timeout, device), cfg.trainer.num_nodes, os.environ.get("NODE_RANK") or "0"
    if together is None and find_launcher() is None and (nodes > 1 or node != "0"):
        given = f"trainer.num_nodes={nodes}" if nodes > 1 else f"the environment has NODE_RANK={node}"
        count, first = nodes if nodes > 1 else "NODES", os.environ.get("MASTER_ADDR") or "FIRST_NODE"
        raise InputError(
            f"{given}, but no launcher has started this process: start it with srun, or on every node with"
            f" torchrun --nnodes {count} --nproc-per-node DEVICES --node-rank {node} --master-addr {first}"
            " -m gptpl train ..., without trainer.num_nodes"
        )
    return together


def _check_shared(run_dir: Path, together: Processes) -> None:
    """Raise InputError where a process does not see a file that the first one makes in the run's folder."""
    seen = together.seeing(run_dir, seconds=_SHARED_SECONDS)
    if not all(seen):
        raise InputError(
            f"{together.named(seen.index(False))} does not see the first one's files in {run_dir}, and with"
            " trainer.sharded_checkpoints=true every process writes there: give a run_dir that all share"
        )


def _facts(module: TrainingModule, settled: "Settled", resume: Resumption | None) -> dict[str, Any]:
    """What must be the same in all processes of a run."""
    started = {} if resume is None else {"the checkpoint's step": resume.step}
    config = {key: spelt(value) for key, value in walk(module.run_config)}
    shape = {"the number of steps": settled.total_steps, "the fast path": settled.fast_path.record()}
    data = {"the data's SHA-256": settled.datamodule.content_sha256()}
    return {**recorded_versions(), **started, **config, **shape, **data}


def _claim(cfg: Config, resume: Resumption | None, *, again: bool) -> RunClaim:
    """Lock the run's folder, before anything slow; its path goes into the config."""
    if resume is not None:
        return RunClaim(resume.run_dir)
    run_dir = None if cfg.run_dir is None else Path(cfg.run_dir)
    claim = claim_new_run(run_dir, name=run_name(cfg), again=again)
    cfg.run_dir = str(claim.path)
    return claim


def run_name(cfg: Config) -> str:
    """The folder under `runs/` of a run with these settings."""
    choices = cfg.get("choices") or {}
    return str(cfg.name or choices.get("experiment") or choices.get("data") or "run")


def _settle_run_dir(cfg: Config) -> None:
    cfg.name = run_name(cfg)
    run_dir = process_run_dir() or Path(cfg.run_dir or runs_folder() / cfg.name / "<date>_<time>")
    cfg.run_dir = str(run_dir.expanduser().absolute())


# --- Trainer and data -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Settled:
    """A run before its model is built: its config with every number decided, its Trainer and its data.

    `weights` will initialise the model. `fast_path` is how it is computed: precision, attention kernel, loss
    head, compilation; `timings` are what that was chosen by, if it was measured.
    """

    cfg: Config
    trainer: L.Trainer
    datamodule: TrainingData
    weights: StartingWeights
    tune: Tuning
    fast_path: FastPath
    timings: Timings | None
    total_steps: int

    @property
    def config(self) -> GPTConfig:
        """The model's configuration. Raises InputError for a model of the user's own class."""
        parts.check_gpt(self.cfg, "a plan needs a GPTModel")
        return parts.model_config(self.cfg)


def settle(cfg: Config, resume: Resumption | None = None, *, tries_compiling: bool = False) -> Settled:
    """Make all of a run but its model, which may not fit into memory; decided numbers go into `cfg`.

    `tries_compiling` as for `gptpl.training.performance.choose_compile`: where the run will be trained.
    """
    if resume is None and cfg.get("resume"):
        raise InputError(
            f"resume={cfg.resume} is for gptpl train and gptpl.resume: this command looks at a new run"
        )
    _settle_run_dir(cfg)
    check_seed(cfg.seed)
    if any(step < 1 for step in cfg.skip_steps):
        raise InputError(f"skip_steps={cfg.skip_steps}: optimizer steps are counted from 1")
    check_strategy(cfg)
    if parts.is_gpt(cfg):
        parts.model_config(cfg)  # refuses a wrong shape
    if resume is None:
        parts.check_data(cfg)
    kept = kept_choices(cfg, resume)
    fast_path = fast_path_of(cfg, kept=kept)  # as far as it is given: refuses an impossible choice
    if fast_path.keep_freed_memory:
        keep_freed_memory()
    weights = parts.starting_weights(cfg) if resume is None else RandomWeights()
    if resume is None:  # else the weights are in the checkpoint
        parts.check_weights(cfg, weights)
        if weights.reads_text and cfg.trainer.strategy in SHARDED:
            raise InputError(
                f"init: the bits of {type(weights).__name__} depend on the machine, and trainer.strategy="
                f"{cfg.trainer.strategy} needs the same in every process: use init=random, or trainer=ddp"
            )
    # A few seconds, if they are not in the cache; of several processes, the first one measures.
    timings = timings_of(cfg) if kept is None else None
    fast_path = fast_path_of(cfg, timings=timings, kept=kept)  # all but compilation, which the length decides
    if resume is not None:
        say_otherwise(cfg, resume, fast_path)
    _settle_strategy(cfg, fast_path, weights)
    trainer = configured_trainer(cfg, fast_path)  # with its callbacks and loggers
    resumed_batch = None if resume is None else resume.batch_of(trainer.world_size)
    if cfg.trainer.max_steps is not None:  # a wrong schedule is refused before the data are read
        parts.schedule(cfg, cfg.trainer.max_steps)

    datamodule = parts.build_datamodule(cfg, resume=resume, weights=weights)
    parts.settle_vocabulary(cfg, datamodule)
    if resumed_batch is None or resumed_batch == (cfg.data.batch_size, 1):
        parts.settle_batch(cfg, trainer, datamodule, fast_path)  # data.batch_size=auto, accumulation
    else:
        parts.share_batch(trainer, datamodule, *resumed_batch)
    batches = datamodule.steps_per_epoch(world_size=trainer.world_size)
    if batches == UNKNOWN and trainer.max_steps == -1:
        raise InputError(f"{datamodule.name} has an unknown number of batches: give trainer.max_steps")
    total_steps = planned_steps(trainer, planned_batches(trainer, batches))
    let_module_end(trainer)  # the module stops it after total_steps and the last evaluation
    if resume is not None:
        resume.check_horizon(total_steps)
    if parts.is_gpt(cfg):
        config, tokenizer = parts.model_config(cfg), datamodule.tokenizer.state()
        if resume is None:
            weights.check(config, tokenizer)
        else:
            check_same_model(resume.header, config, tokenizer)
    return Settled(
        cfg=cfg,
        trainer=trainer,
        datamodule=datamodule,
        weights=weights,
        tune=instantiate(cfg.tune),
        fast_path=fast_path_of(
            cfg, timings=timings, kept=kept, total_steps=total_steps, tries_compiling=tries_compiling
        ),
        timings=timings,
        total_steps=total_steps,
    )


def _settle_strategy(cfg: Config, path: FastPath, weights: StartingWeights) -> None:
    """FSDP in place of "auto" where a run of several processes has no room on its GPUs otherwise."""
    memory = whole_memory(device_type(cfg.trainer.accelerator))
    if (together := processes()) is not None:  # all decide the same, by the smallest
        told = together.gathered(memory)
        memory = None if None in told else min(told)
    if cfg.trainer.strategy == AUTO and memory is not None and not weights.reads_text:
        why = must_be_sharded(cfg, path, processes=process_count(cfg), device_bytes=memory)
        if why is not None:
            cfg.trainer.strategy = "fsdp"
            log.info("strategy: fsdp, as %s", why)


# --- the module -----------------------------------------------------------------------------------------


def build_module(
    settled: Settled, *, weights: StartingWeights, resume: Resumption | None = None
) -> TrainingModule:
    """Make the module of `cfg.task` around a model with these weights.

    Random weights depend on `cfg.seed` alone; a resumed run's weights are loaded from its checkpoint when
    training starts. Raises InputError for an optimizer or a schedule that cannot be made, and for missing
    weights.
    """
    cfg, datamodule = settled.cfg, settled.datamodule
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    net, start = _model(settled, weights, resume)
    make_optimizer = parts.optimizer_factory(cfg)  # called when training starts
    make_optimizer(net)  # and here, to refuse a wrong setting
    given: dict[str, Any] = {
        "tokenizer": datamodule.tokenizer,
        "make_optimizer": make_optimizer,
        "total_steps": settled.total_steps,
        "run_config": parts.recorded(cfg),
        "eval_every_n_steps": cfg.eval_every_n_steps,
        "skip_steps": tuple(cfg.skip_steps),
        "data_sha256": datamodule.content_sha256(),
        "global_batch": datamodule.batch_size * settled.trainer.world_size * datamodule.micro_batches,
        "micro_batches": datamodule.micro_batches,
        "start": start,
        "tune": settled.tune.state(),
        **_learning_rate(cfg, settled.total_steps, resume),  # lr_factor(step), or a scheduler like torch's
        **datamodule.module_settings(),  # such as the labels of a classifier
    }
    if not parts.is_gpt(cfg):
        given["model_config"] = plain(cfg.model)
    module: TrainingModule = partial_of(cfg.task)(net, **given)  # a classifier gets its head here
    settled.tune.apply(module.net)  # freezes weights, or adds low-rank matrices
    make_optimizer(module.net)  # refuses one without parameters to train
    fast_path = settled.fast_path.fitted_to(module.net)
    fast_path.apply(module.net)  # attention kernel, recomputation, compilation
    module.compiled = fast_path.compile.compiled
    module.head = fast_path.head  # how the loss is computed from the last hidden states
    return module


def _model(
    settled: Settled, weights: StartingWeights, resume: Resumption | None
) -> tuple[nn.Module, Mapping[str, Any]]:
    """The model, and for its record where its first weights come from."""
    if resume is None and isinstance(settled.datamodule, SequenceData):
        weights.read_text(cast(Any, settled.datamodule.encoded.train))
    if parts.is_gpt(settled.cfg):
        if resume is None:
            return weights.make_model(settled.config)
        net: nn.Module = GPTModel(settled.config)
    else:  # a class of the user's
        net, data, model = instantiate(settled.cfg.model), settled.datamodule, plain(settled.cfg.model)
        check_language_model(net, tokens=data.tokenizer.vocab_size, max_length=data.max_length)
        if resume is None:
            return net, weights.fill(net, model, data.tokenizer.state())
        check_same_model(resume.header, model, data.tokenizer.state())
    return net, resume.header.get("start", RANDOM)


def _learning_rate(cfg: Config, total_steps: int, resume: Resumption | None) -> dict[str, Any]:
    """The module's arguments for the schedule.

    A run that is resumed with more steps stays at or below what its original schedule had left, unless the
    user sets a learning rate: a cosine over more steps would rise again.
    """
    lr_factor = parts.schedule(cfg, total_steps)
    if lr_factor is None:
        return {"make_scheduler": partial_of(cfg.scheduler)}
    ceiling = None
    if resume is not None and not resume.lr_asked:
        old_total = resume.header["total_steps"]
        ceiling = lr_ceiling(
            parts.schedule(cfg, old_total) or lr_factor, step=resume.step, old_total_steps=old_total,
            total_steps=total_steps, ceiling=resume.header["lr_ceiling"],
        )  # fmt: skip
    return {"lr_factor": lr_factor, "lr_ceiling": ceiling}


def _report(settled: Settled, module: TrainingModule) -> None:
    cfg, world_size, net = settled.cfg, settled.trainer.world_size, module.net
    parameters = parameters_of(net)
    name = "" if parts.is_gpt(cfg) else f"{cfg.model._target_}, "
    log.info("model: %s%s parameters, %.1f MB in fp32", name, f"{parameters:,}", 4 * parameters / 1e6)
    config = net.config if isinstance(net, GPTModel) and module.start == RANDOM else None
    if config is not None and config.tie_weights and config.init == "torch":
        log.warning(
            "model.init=torch draws the embeddings from N(0, 1), and the tied head shares them: the first"
            " loss is far above ln(vocab_size) = %.1f; model.init=gpt2 suits a tied head",
            math.log(config.vocab_size),
        )
    if module.tune != ALL:
        log.info("%s", settled.tune.report(net))
    for line in settled.datamodule.report(parameters=parameters, world_size=world_size):
        log.info("%s", line)
    device = device_type(cfg.trainer.accelerator)
    log.info("device: %d x %s, %s", world_size, device, settled.fast_path.fitted_to(net))
    log.info("plan: %d optimizer steps", module.total_steps)
