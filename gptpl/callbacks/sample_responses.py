"""Answers of the model while it is tuned, and how many of them have the form of an answer."""

import logging
from pathlib import Path

import lightning as L
import torch

from gptpl.callbacks.readings import epochs_done, language_module
from gptpl.callbacks.record_file import Record
from gptpl.callbacks.sample_views import show_samples
from gptpl.callbacks.samples import Samples
from gptpl.data.instructions.datamodule import InstructionDataModule
from gptpl.data.instructions.entries import Entry
from gptpl.data.sampler import evenly_spaced
from gptpl.errors import InputError
from gptpl.generation import SamplingRules
from gptpl.text import one_line
from gptpl.training.answers import Answerer
from gptpl.training.instruction_tuning import InstructionModule
from gptpl.training.sharding import FullyShardedStrategy

log = logging.getLogger(__name__)

GREEDY = SamplingRules()


class SampleResponses(Samples):
    """Answers some validation instructions greedily, at chosen moments of the training and at its end.

    Each answer goes to the log, to every logger that shows tables, and as one JSON object a line to `path`:
    `step`, `epoch`, `tokens_seen`, `prompt` (instruction and input), `strategy`, `continuation` (the
    answer), `reference`, `well_formed`. The loggers get `val/well_formed`, the share of them that are (see
    `Answerer.answer`). Otherwise as `SampleText`: the first process alone, no bit of the training is changed,
    a resumed run takes back what was written after the step that it resumes from.

    Args:
        path: the JSON Lines file.
        entries: validation entries to answer, evenly spaced; those whose prompt leaves no room are not used.
        max_new_tokens: an answer is broken off after so many.
        every_n_steps: answer whenever the optimizer steps are a multiple of this; None: not by steps.
        every_n_epochs: answer whenever the finished epochs are a multiple of this; None: not by epochs.

    Raises InputError for a number below 1, and for a training that is no instruction tuning.
    """

    def __init__(
        self,
        *,
        path: str | Path,
        entries: int = 8,
        max_new_tokens: int = 100,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = 1,
    ) -> None:
        numbers = {"entries": entries, "max_new_tokens": max_new_tokens}
        intervals = {"every_n_steps": every_n_steps, "every_n_epochs": every_n_epochs}
        for name, value in (numbers | intervals).items():
            if value is not None and value < 1:
                raise InputError(f"{name}={value} of the sampled responses: give 1 or more")
        super().__init__(path=path, every_n_steps=every_n_steps, every_n_epochs=every_n_epochs)
        self.entries = entries
        self.max_new_tokens = max_new_tokens
        self._asked: list[Entry] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Choose the entries, and see whether this process answers."""
        answerer = self._answerer(pl_module)
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, InstructionDataModule)
        val = [entry for entry in data.splits.val if _has_room(answerer, entry)]
        self._asked = [val[number] for number in evenly_spaced(len(val), self.entries)]
        if not self._asked:
            log.warning("No responses are sampled: every validation prompt fills the model's context.")
        sharded = isinstance(trainer.strategy, FullyShardedStrategy)
        if sharded and trainer.is_global_zero:
            log.warning("No responses are sampled: the strategy fsdp spreads the model over the processes.")
        self._active = trainer.is_global_zero and not sharded and bool(self._asked)

    def check_against(self, module: L.LightningModule) -> None:
        """Raises InputError for a training that is no instruction tuning."""
        self._answerer(module)

    def _answerer(self, pl_module: L.LightningModule) -> Answerer:
        if not isinstance(pl_module, InstructionModule):
            raise InputError(
                "callbacks.sample_responses answers instructions, which this training does not learn: choose"
                " task=instruct, or callbacks=default"
            )
        return Answerer(
            net=pl_module.net,
            tokenizer=pl_module.tokenizer,
            template=pl_module.template,
            rules=GREEDY,
            max_new_tokens=self.max_new_tokens,
        )

    def _sample(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write and show the answers of this step, unless they are there."""
        if not self._active:
            return
        position: Record = {
            "step": trainer.global_step,
            "epoch": round(epochs_done(trainer), 4),
            "tokens_seen": language_module(pl_module).tokens_seen,
        }
        records = [
            position | {"prompt": _question(entry), "strategy": {"temperature": 0.0}} for entry in self._asked
        ]
        if all(record in self._file for record in records):
            return
        answerer = self._answerer(pl_module)
        prompts = [answerer.prompt(entry.instruction, entry.input) for entry in self._asked]
        # A compiled block would be compiled again for the windows of a text beyond the context.
        with torch.compiler.set_stance("force_eager"):
            answers = answerer.answers(prompts)
        records = [
            record
            | {"continuation": answer.text, "reference": entry.output, "well_formed": answer.well_formed}
            for record, entry, answer in zip(records, self._asked, answers, strict=True)
        ]
        self._file.append(records)
        _show(trainer, records)


def _has_room(answerer: Answerer, entry: Entry) -> bool:
    try:
        answerer.prompt(entry.instruction, entry.input)
    except InputError:
        return False
    return True


def _question(entry: Entry) -> str:
    return f"{entry.instruction}\n{entry.input}" if entry.input else entry.instruction


def _show(trainer: L.Trainer, records: list[Record]) -> None:
    """The answers of one step to the log and to the loggers."""
    step = records[0]["step"]
    for record in records:
        texts = one_line(record["prompt"]), one_line(record["continuation"])
        log.info("answer at step %d (epoch %.3g): [%s] %s", step, record["epoch"], *texts)
    share = sum(record["well_formed"] for record in records) / len(records)
    log.info("well-formed answers at step %d: %.0f %% of %d", step, 100 * share, len(records))
    for logger in trainer.loggers:
        logger.log_metrics({"val/well_formed": share}, step=step)
    show_samples(trainer, "responses", records)
