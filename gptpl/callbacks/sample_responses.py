"""Answers of the model while it is tuned, and how many of them have the form of an answer."""

import logging
from pathlib import Path

import lightning as L

from gptpl.callbacks.record_file import Record
from gptpl.callbacks.sample_text import Samples
from gptpl.data.instructions.datamodule import InstructionDataModule
from gptpl.data.instructions.entries import Entry
from gptpl.data.sampler import evenly_spaced
from gptpl.errors import InputError
from gptpl.evaluation.answers import Answerer
from gptpl.generation import SamplingRules
from gptpl.training.instruction_tuning import InstructionModule

log = logging.getLogger(__name__)


class SampleResponses(Samples):
    """Answers some validation instructions greedily, at chosen moments of the training and at its end.

    `prompt` is instruction and input, `continuation` the answer; to them come `reference` and `well_formed`.
    The loggers get `val/well_formed`, the share of answers that are (see `Answerer.answer`).

    `entries` are so many, evenly spaced; those whose prompt leaves no room are not used. See `Samples` for
    when and where.

    Raises InputError for a number below 1, and for a training that is no instruction tuning.
    """

    what = "sampled responses"

    def __init__(
        self,
        *,
        path: str | Path,
        entries: int = 8,
        max_new_tokens: int = 100,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = 1,
    ) -> None:
        super().__init__(
            path=path,
            max_new_tokens=max_new_tokens,
            every_n_steps=every_n_steps,
            every_n_epochs=every_n_epochs,
        )
        self.entries = self._positive("entries", entries)
        self._asked: list[Entry] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Choose the entries, too."""
        super().on_fit_start(trainer, pl_module)
        answerer = self._answerer(pl_module)
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, InstructionDataModule)
        val = [entry for entry in data.splits.val if _has_room(answerer, entry)]
        self._asked = [val[number] for number in evenly_spaced(len(val), self.entries)]
        if not self._asked:
            log.warning("No responses are sampled: every validation prompt fills the model's context.")
            self._active = False

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
            rules=SamplingRules(),
            max_new_tokens=self.max_new_tokens,
        )

    def _sample(self, trainer: L.Trainer, module: L.LightningModule, position: Record) -> None:
        records = [
            position | {"prompt": _question(entry), "strategy": {"temperature": 0.0}} for entry in self._asked
        ]
        if all(record in self._file for record in records):
            return
        answerer = self._answerer(module)
        prompts = [answerer.prompt(entry.instruction, entry.input) for entry in self._asked]
        for record, entry, answer in zip(records, self._asked, answerer.answers(prompts), strict=True):
            record |= {"continuation": answer.text, "reference": entry.output}
            record["well_formed"] = answer.well_formed
        self._keep(trainer, records, name="answer", table="responses")
        step, share = position["step"], sum(record["well_formed"] for record in records) / len(records)
        log.info("well-formed answers at step %d: %.0f %% of %d", step, 100 * share, len(records))
        for logger in trainer.loggers:
            logger.log_metrics({"val/well_formed": share}, step=step)


def _has_room(answerer: Answerer, entry: Entry) -> bool:
    try:
        answerer.prompt(entry.instruction, entry.input)
    except InputError:
        return False
    return True


def _question(entry: Entry) -> str:
    return f"{entry.instruction}\n{entry.input}" if entry.input else entry.instruction
