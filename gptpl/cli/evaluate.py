"""`gptpl evaluate`: loss and perplexity of a checkpoint on any data."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class
from omegaconf import DictConfig
from tqdm import tqdm

from gptpl.cli.batch import whole_batch_size
from gptpl.cli.build_data import settings_for
from gptpl.cli.classifier_input import names_classifier
from gptpl.cli.console import RunLog
from gptpl.cli.evaluate_classifier import evaluate_classifier
from gptpl.cli.hydra_app import instantiate, run_under_hydra
from gptpl.cli.model_input import loaded_checkpoint
from gptpl.data.datamodule import TextDataModule
from gptpl.data.instructions.datamodule import InstructionDataModule
from gptpl.data.instructions.entries import Entry, read_entries
from gptpl.data.instructions.report import length_lines
from gptpl.data.instructions.split_files import split_file
from gptpl.data.instructions.template import PromptTemplate
from gptpl.data.training_data import Batches, Split
from gptpl.errors import InputError
from gptpl.training.checkpoint import LoadedCheckpoint
from gptpl.training.evaluation import evaluate

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test", "all")


def run(arguments: list[str]) -> int:
    """Prints loss, perplexity and tokens to standard output; returns the exit status."""
    run_under_hydra("evaluate", arguments, _evaluate)
    return 0


def _evaluate(cfg: DictConfig) -> None:
    with RunLog():
        if names_classifier(cfg):
            evaluate_classifier(cfg)
            return
        if cfg.split not in SPLITS:
            raise InputError(f"split={cfg.split} is unknown: choose one of {', '.join(SPLITS)}")
        loaded = loaded_checkpoint(cfg)
        context_length = loaded.net.config.context_length
        max_length = _max_length(cfg, context_length)
        kind = get_class(cfg.data._target_)
        if issubclass(kind, InstructionDataModule):
            name, batches = _instructions(cfg, loaded, max_length)
        elif issubclass(kind, TextDataModule):
            name, batches = _text(cfg, loaded, max_length)
        else:
            raise InputError(
                "a language model is evaluated on text or instructions: choose data=text_file data.path=FILE,"
                " or another text"
            )
        result = evaluate(loaded.net, tqdm(batches, unit="batch", desc="evaluating", disable=None))
        print(f"data        {name}")
        print(f"tokens      {result.tokens:,}")
        print(f"loss        {result.loss:.4f} nats per token")
        print(f"perplexity  {result.perplexity:.2f}")


def _text(cfg: DictConfig, loaded: LoadedCheckpoint, max_length: int) -> tuple[str, Batches]:
    """Name and batches of a text: every token is scored once."""
    if cfg.split == "test":
        raise InputError(
            "split=test is unknown for plain text: choose one of train, val, all, or"
            " data=instruction_file data.path=FILE for a model that answers instructions"
        )
    datamodule = TextDataModule(
        corpus=instantiate(cfg.data.corpus),
        tokenizer=loaded.tokenizer,
        max_length=max_length,
        stride=max_length,
        batch_size=whole_batch_size(cfg.data.batch_size),
        train_ratio=cfg.data.train_ratio,
    )
    name = f"{datamodule.corpus.name}, split {cfg.split}, {max_length} tokens a window"
    return name, datamodule.evaluation_dataloader(cfg.split)


def _instructions(cfg: DictConfig, loaded: LoadedCheckpoint, max_length: int) -> tuple[str, Batches]:
    """Name and batches of instructions, in the template that the model was tuned with, if it was."""
    if cfg.split == "all":
        raise InputError("split=all is for plain text: instructions have train, val and test")
    settings = settings_for(InstructionDataModule, cfg.data, without=("corpus", "packing", "tokenizer"))
    datamodule = InstructionDataModule(
        corpus=instantiate(cfg.data.corpus),
        tokenizer=loaded.tokenizer,
        **settings | {"max_length": max_length, "batch_size": whole_batch_size(cfg.data.batch_size)},
    )
    _settle_template(datamodule, loaded)
    split = cast(Split, cfg.split)
    for line in length_lines({split: datamodule.rows(split)}, max_length):
        log.warning(line.strip())
    if split != "train":
        _say_known(datamodule.splits.of(split), split_file(loaded.path.parent.parent, "train"))
    learned = "answers" if datamodule.mask_instruction else "prompts and answers"
    name = f"{datamodule.name}, split {cfg.split}, {learned}, template {datamodule.template.name}"
    return name, datamodule.split_dataloader(split)


def _settle_template(datamodule: InstructionDataModule, loaded: LoadedCheckpoint) -> None:
    """The model's own, unless the command line asks for another."""
    if "template" not in loaded.task:
        return
    own, asked = PromptTemplate(**loaded.task["template"]), datamodule.template
    given = {text.partition("=")[0].lstrip("+") for text in HydraConfig.get().overrides.task}
    if given.isdisjoint({"data.template", "data.response_marker"}):
        datamodule.template = own
    elif asked.state() != own.state():
        log.warning("the model was tuned with template=%s, not %s", own.name, asked.name)


def _say_known(entries: Sequence[Entry], trained_on: Path) -> None:
    """Warns where the run learned what it is tested on: its file was split by other settings."""
    if not trained_on.is_file():
        return
    learned = {entry.question for entry in read_entries(trained_on)}
    known = sum(entry.question in learned for entry in entries)
    if known:
        log.warning(
            "%d of %d entries are in %s, which the model was trained on: give the run's own data.shuffle,"
            " data.split_seed, data.train_share and data.test_share",
            *(known, len(entries), trained_on),
        )


def _max_length(cfg: DictConfig, context_length: int) -> int:
    """The window: the model's context, unless a shorter one is asked for."""
    stride = cfg.data.get("stride")
    if stride not in (None, cfg.data.max_length):
        raise InputError(
            f"data.stride={stride} has no meaning here: the windows lie end to end, leave it out"
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
