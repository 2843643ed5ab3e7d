"""Answers of the model during instruction tuning, and how many of them are well-formed."""

import logging
from contextlib import suppress
from pathlib import Path

import lightning as L

from gptpl.callbacks.record_file import Record
from gptpl.callbacks.sample_text import Samples
from gptpl.data.instructions.datamodule import InstructionDataModule
from gptpl.data.sampler import evenly_spaced
from gptpl.errors import InputError
from gptpl.evaluation.answers import Answerer
from gptpl.filters import Filter
from gptpl.generation import SamplingRules
from gptpl.training.instruction_tuning import InstructionModule
from gptpl.training.module import TrainingModule

log = logging.getLogger(__name__)


class SampleResponses(Samples):
    """Answers some validation instructions greedily, during the training and at its end; see `Samples`.

    A record's `prompt` is instruction and input, its `continuation` the answer; it also has the `reference`
    and whether the answer is `well_formed`. The loggers get the fraction of those, `val/well_formed`.

    `entries` are chosen evenly spaced from those whose prompt leaves room in the model's context. Raises
    InputError for a number below 1, and for a training that is not instruction tuning.
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
        filter: Filter | None = None,
    ) -> None:
        super().__init__(
            path=path,
            max_new_tokens=max_new_tokens,
            every_n_steps=every_n_steps,
            every_n_epochs=every_n_epochs,
            filter=filter,
        )
        self.entries = self._positive("entries", entries)
        self._asked: list[dict[str, str]] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Also choose the entries."""
        super().on_fit_start(trainer, pl_module)
        answerer = self._answerer(pl_module)
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, InstructionDataModule)
        fitting = []
        for entry in data.splits.val:
            with suppress(InputError):  # no room for an answer
                asked = answerer.prompt(entry.instruction, entry.input)
                question = f"{entry.instruction}\n{entry.input}" if entry.input else entry.instruction
                fitting.append({"asked": asked, "prompt": question, "reference": entry.output})
        self._asked = [fitting[number] for number in evenly_spaced(len(fitting), self.entries)]
        if not self._asked:
            log.warning("No responses are sampled: every validation prompt fills the model's context.")
            self._active = False

    def check_against(self, module: L.LightningModule) -> None:
        """Raise InputError for a training that is not instruction tuning."""
        self._answerer(module)

    def _answerer(self, pl_module: L.LightningModule) -> Answerer:
        if not isinstance(pl_module, InstructionModule):
            raise InputError(
                "callbacks.sample_responses needs instruction tuning: choose task=instruct, or"
                " callbacks=default"
            )
        return Answerer(
            net=pl_module.net,
            tokenizer=pl_module.tokenizer,
            template=pl_module.template,
            rules=SamplingRules(),
            max_new_tokens=self.max_new_tokens,
            filter=self.filter,
        )

    def _sample(self, trainer: L.Trainer, module: TrainingModule, position: Record) -> None:
        greedy = {"temperature": 0.0}
        records = [position | {"prompt": each["prompt"], "strategy": greedy} for each in self._asked]
        if all(record in self._file for record in records):
            return
        answers = self._answerer(module).answers([each["asked"] for each in self._asked])
        for record, each, answer in zip(records, self._asked, answers, strict=True):
            record |= {"continuation": answer.text, "reference": each["reference"]}
            record["well_formed"] = answer.well_formed
            if answer.verdict is not None:
                record["filtered"] = answer.verdict.counts
        self._keep(trainer, records, name="answer", table="responses")
        step, fraction = position["step"], sum(answer.well_formed for answer in answers) / len(answers)
        log.info("well-formed answers at step %d: %.0f %% of %d", step, 100 * fraction, len(answers))
        for logger in trainer.loggers:
            logger.log_metrics({"val/well_formed": fraction}, step=step)
