"""Samples while the model learns: text after prompts, and answers to instructions."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch

from gptpl.callbacks.after_step import AfterStep, epochs_done, language_module
from gptpl.callbacks.records import Record, RecordFile
from gptpl.data.instructions.datamodule import InstructionDataModule
from gptpl.data.sampler import evenly_spaced
from gptpl.errors import InputError
from gptpl.evaluation.answers import Answerer
from gptpl.filters import Filter, summary
from gptpl.generation import SamplingRules, complete
from gptpl.generation.sampling import mixed_generator
from gptpl.model import GPTClassifier
from gptpl.model.protocol import device_of, vocab_size
from gptpl.text import one_line
from gptpl.training.instruction_tuning import InstructionModule
from gptpl.training.loggers import log_table
from gptpl.training.module import TrainingModule
from gptpl.training.sharding import FullyShardedStrategy

log = logging.getLogger(__name__)


class Samples(AfterStep, ABC):
    """Samples from the model every so many steps or epochs, and at the end of training.

    Samples go to the log, to every logger that shows tables, and as JSON Lines to `path`: `step`, `epoch`,
    `tokens_seen`, `prompt`, `strategy`, `continuation`, and what a subclass adds. A resumed run first drops
    the samples of the step that it starts from and of later ones, and repeats those due at that step. The
    first process alone samples, and no bit of the training changes. There are none under strategies that
    shard the model.

    Args:
        path: the JSON Lines file.
        max_new_tokens: of one sample.
        every_n_steps: sample after optimizer steps that are a multiple of this; None: not by steps.
        every_n_epochs: sample after epochs that are a multiple of this; None: not by epochs.
        filter: judges the samples: files, log and loggers get the texts that may be shown. The number of
            findings of each rule is `filtered` in the records, and logged.

    Raises InputError for a number below 1, and for a filter that is not a `Filter`.
    """

    repeats_on_resume = True
    what: ClassVar[str]
    """The name of the samples in messages."""

    def __init__(
        self,
        *,
        path: str | Path,
        max_new_tokens: int,
        every_n_steps: int | None,
        every_n_epochs: int | None,
        filter: Filter | None,
    ) -> None:
        super().__init__()
        if not (filter is None or isinstance(filter, Filter)):
            raise InputError(
                f"filter={filter} of the {self.what} is not a filter: choose one as in"
                " +filter@callbacks.sample_text.filter=personal_data"
            )
        self.filter = filter if filter is not None and filter.rules else None
        self.max_new_tokens = self._positive("max_new_tokens", max_new_tokens)
        self.every_n_steps, self.every_n_epochs = (
            None if value is None else self._positive(name, value)
            for name, value in (("every_n_steps", every_n_steps), ("every_n_epochs", every_n_epochs))
        )
        self._file = RecordFile(Path(path))
        self._active = False
        self._sampled_step: int | None = None

    def _positive(self, name: str, value: int) -> int:
        if value < 1:
            raise InputError(f"{name} of the {self.what} must be 1 or more, got {value!r}")
        return value

    @abstractmethod
    def check_against(self, module: TrainingModule) -> None:
        """Raise InputError for a model or a task that cannot be sampled from."""

    @abstractmethod
    def _sample(self, trainer: L.Trainer, module: TrainingModule, position: Record) -> None:
        """Make and keep the samples of this step, epoch and tokens seen."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse what would fail at the first sample; decide whether this process samples."""
        self.check_against(language_module(pl_module))
        sharded = isinstance(trainer.strategy, FullyShardedStrategy)
        if sharded and trainer.is_global_zero:
            log.warning("No %s: the strategy fsdp divides the model among the processes.", self.what)
        self._active = trainer.is_global_zero and not sharded

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the file at the step that training starts from, whose samples are repeated."""
        super().on_train_start(trainer, pl_module)
        self._sampled_step = None
        if self._active:
            self._file.start(step=trainer.global_step - 1)

    def due(self, trainer: L.Trainer, pl_module: L.LightningModule) -> bool:
        """After every `every_n_steps` steps."""
        return self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0

    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sample, once after a step, which may be due in several ways: by steps, by epochs, as the last."""
        if not self._active or self._sampled_step == trainer.global_step:
            return
        self._sampled_step = trainer.global_step
        module, epoch = language_module(pl_module), round(epochs_done(trainer), 4)
        position = {"step": trainer.global_step, "epoch": epoch, "tokens_seen": module.tokens_seen}
        # A compiled block would be compiled again for the sequences of a text beyond the context.
        with torch.compiler.set_stance("force_eager"):
            self._sample(trainer, module, position)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sample after every `every_n_epochs` epochs."""
        super().on_train_epoch_end(trainer, pl_module)
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self.after_step(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sample from the finished model."""
        super().on_train_end(trainer, pl_module)
        self.after_step(trainer, pl_module)

    def _keep(
        self, trainer: L.Trainer, records: Sequence[Record], *, name: str, table: str, how: str = ""
    ) -> None:
        """Send the samples of one step and strategy to the file, the log and the loggers."""
        self._file.append(records)
        step, epoch = records[0]["step"], records[0]["epoch"]
        rows = [[record["prompt"], record["continuation"]] for record in records]
        counts = [record.get("filtered", {}) for record in records]
        if any(counts):
            log.info("%ss at step %d%s: %s", name, step, how, summary(counts))
        for row in rows:
            log.info("%s at step %d (epoch %.3g)%s: [%s] %s", name, step, epoch, how, *map(one_line, row))
        log_table(trainer.loggers, f"sample/{table}", ("prompt", "continuation"), rows, step)


class SampleText(Samples):
    """Continues every prompt by every strategy, during the training and at its end; see `Samples`.

    Every sample draws from a generator of its own, seeded from the `seed`, which its record has too, and the
    step: it does not depend on the other prompts and strategies. Strategies are `SamplingRules`, or mappings
    with their fields; a top_k above the vocabulary keeps all of it.

    Raises InputError for invalid arguments; when `fit` starts, for a prompt without tokens.
    """

    what = "text samples"

    def __init__(
        self,
        *,
        prompts: Sequence[str],
        path: str | Path,
        strategies: Sequence[SamplingRules | Mapping[str, Any]] = (SamplingRules(),),
        max_new_tokens: int = 50,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = 1,
        seed: int = 123,
        filter: Filter | None = None,
    ) -> None:
        super().__init__(
            path=path,
            max_new_tokens=max_new_tokens,
            every_n_steps=every_n_steps,
            every_n_epochs=every_n_epochs,
            filter=filter,
        )
        if isinstance(prompts, str) or not prompts or not all(isinstance(p, str) and p for p in prompts):
            raise InputError(f"prompts must be a list of one or more texts, none empty, got {prompts!r}")
        self.prompts = list(dict.fromkeys(prompts))
        self.strategies = list(dict.fromkeys(SamplingRules.of(strategy) for strategy in strategies))
        if not self.strategies:
            raise InputError("strategies must be one or more, such as {temperature: 0.0}, got []")
        if seed < 0:
            raise InputError(f"seed of the text samples must be 0 or more, got {seed}")
        self.seed = seed

    def check_against(self, module: TrainingModule) -> None:
        """Fit the strategies to the vocabulary; errors as `Samples`, and for a prompt without tokens."""
        if isinstance(module.net, GPTClassifier):
            raise InputError(
                "callbacks.sample_text needs a model that writes text: leave it out with"
                " '~callbacks.sample_text'"
            )
        V = vocab_size(module.net)
        self.strategies = list(dict.fromkeys(strategy.within(V) for strategy in self.strategies))
        for strategy in self.strategies:
            strategy.check_vocabulary(V)
        for prompt in self.prompts:
            if len(module.tokenizer.encode(prompt)) == 0:
                raise InputError(f"prompt {prompt!r} has no tokens: give one word or more")

    def _sample(self, trainer: L.Trainer, module: TrainingModule, position: Record) -> None:
        for strategy in self.strategies:
            own = {"temperature": strategy.temperature, "top_k": strategy.top_k} | strategy.changes
            records = [
                position | {"prompt": prompt, "strategy": own, "seed": self.seed} for prompt in self.prompts
            ]
            completions = complete(
                module.net,
                module.tokenizer,
                [record["prompt"] for record in records],
                rules=strategy,
                max_new_tokens=self.max_new_tokens,
                generator=mixed_generator(device_of(module.net), self.seed, position["step"]),
                filter=self.filter,
            )
            for record, completion in zip(records, completions, strict=True):
                record["continuation"] = completion.text
                if completion.verdict is not None:
                    record["filtered"] = completion.verdict.counts
            table = strategy.name.replace(", ", "_").replace(" ", "_")
            self._keep(trainer, records, name="sample", table=table, how=f", {strategy.name}")


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
