"""`gptpl evaluate`: loss and perplexity of a checkpoint on any data."""

import logging

from omegaconf import DictConfig
from tqdm import tqdm

from gptpl.cli.batch import whole_batch_size
from gptpl.cli.console import RunLog
from gptpl.cli.hydra_app import instantiate, run_under_hydra
from gptpl.cli.model_input import loaded_checkpoint
from gptpl.data.datamodule import TextDataModule
from gptpl.errors import InputError
from gptpl.training.evaluation import evaluate

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "all")


def run(arguments: list[str]) -> int:
    """Prints loss, perplexity and tokens to standard output; returns the exit status."""
    run_under_hydra("evaluate", arguments, _evaluate)
    return 0


def _evaluate(cfg: DictConfig) -> None:
    with RunLog():
        if cfg.split not in SPLITS:
            raise InputError(f"split={cfg.split} is unknown: choose one of {', '.join(SPLITS)}")
        loaded = loaded_checkpoint(cfg)
        context_length = loaded.net.config.context_length
        cfg.data.max_length = cfg.data.stride = _max_length(cfg, context_length)
        datamodule = TextDataModule(
            corpus=instantiate(cfg.data.corpus),
            tokenizer=loaded.tokenizer,
            max_length=cfg.data.max_length,
            stride=cfg.data.stride,
            batch_size=whole_batch_size(cfg.data.batch_size),
            train_ratio=cfg.data.train_ratio,
        )
        batches = datamodule.evaluation_dataloader(cfg.split)
        result = evaluate(loaded.net, tqdm(batches, unit="batch", desc="evaluating", disable=None))
        print(
            f"data        {datamodule.corpus.name}, split {cfg.split}, {cfg.data.max_length} tokens a window"
        )
        print(f"tokens      {result.tokens:,}")
        print(f"loss        {result.loss:.4f} nats per token")
        print(f"perplexity  {result.perplexity:.2f}")


def _max_length(cfg: DictConfig, context_length: int) -> int:
    """The window: the model's context, unless a shorter one is asked for."""
    if cfg.data.stride is not None:
        raise InputError(
            f"data.stride={cfg.data.stride} has no meaning here: the windows lie end to end, leave it out"
        )
    asked = cfg.data.max_length
    if asked is None:
        return context_length
    if asked > context_length:
        raise InputError(
            f"data.max_length={asked} is longer than the model's context of {context_length} tokens:"
            f" leave it out, or give at most {context_length}"
        )
    return int(asked)
