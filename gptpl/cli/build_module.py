"""From a composed config to the training module: the model, its optimizer and its schedule."""

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
from omegaconf import DictConfig, OmegaConf

from gptpl.cli.hydra_app import instantiate
from gptpl.cli.resume import Resumption
from gptpl.data.training_data import TrainingData
from gptpl.model import GPTConfig, GPTModel
from gptpl.training.lineage import RANDOM
from gptpl.training.training_module import TrainingModule
from gptpl.weights.starting import StartingWeights


def build_module(
    cfg: DictConfig,
    config: GPTConfig,
    datamodule: TrainingData,
    *,
    total_steps: int,
    world_size: int,
    resume: Resumption | None,
    weights: StartingWeights,
) -> TrainingModule:
    """The module of `cfg.task` with a model of these weights, drawn from `cfg.seed`, for `total_steps`.

    A run that is resumed has its weights in the checkpoint. Raises InputError for an optimizer or a schedule
    that cannot be, and for weights that cannot be had.
    """
    # The seed is set right before the weights are drawn, so that they depend on nothing else.
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    if resume is None:
        net, start = weights.make_model(config)
    else:
        net, start = GPTModel(config), resume.header.get("start", RANDOM)
    make_optimizer, tune = instantiate(cfg.optimizer), instantiate(cfg.tune)
    # Made here, and below, only to be refused here, not in the middle of the set-up, if a number is wrong.
    make_optimizer(net)
    lr_factor, lr_ceiling = _schedule(cfg, total_steps, resume)
    module: TrainingModule = instantiate(cfg.task)(
        net,
        tokenizer=datamodule.tokenizer,
        make_optimizer=make_optimizer,
        lr_factor=lr_factor,
        total_steps=total_steps,
        run_config=_plain(cfg),
        lr_ceiling=lr_ceiling,
        eval_every_n_steps=cfg.eval_every_n_steps,
        skip_steps=tuple(cfg.skip_steps),
        data_sha256=datamodule.content_sha256(),
        global_batch=cfg.data.batch_size * world_size,
        start=start,
        tune=tune.state(),
        **datamodule.module_settings(),
    )
    tune.apply(module.net)
    make_optimizer(module.net)
    return module


def _plain(cfg: DictConfig) -> dict[str, Any]:
    plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _schedule(
    cfg: DictConfig, total_steps: int, resume: Resumption | None
) -> tuple[Callable[[int], float], float | None]:
    """The learning rate's factor of a step, and what a resumed run holds it at or below."""
    factor = partial(instantiate(cfg.scheduler).factor, peak_lr=cfg.optimizer.lr)
    lr_factor = partial(factor, total_steps=total_steps)
    lr_factor(0)  # refuses a schedule that does not fit the run
    if resume is None:
        return lr_factor, None
    # Neither schedule nor peak are other ones, or the rate was asked for and there is no ceiling.
    old_factor = partial(factor, total_steps=resume.header["total_steps"])
    return lr_factor, resume.lr_ceiling(old_factor, total_steps)
