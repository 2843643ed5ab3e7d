"""Text from the model while it learns."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import numpy as np
import torch

from gptpl.callbacks.after_step import AfterStep, epochs_done, language_module
from gptpl.callbacks.record_file import Record, RecordFile
from gptpl.errors import InputError
from gptpl.generation import SamplingRules, complete
from gptpl.model import GPTClassifier
from gptpl.model.protocol import device_of, vocab_size
from gptpl.text import one_line
from gptpl.training.loggers import log_table
from gptpl.training.module import TrainingModule
from gptpl.training.sharding import FullyShardedStrategy

log = logging.getLogger(__name__)


class Samples(AfterStep, ABC):
    """Makes the model write after every so many steps or epochs, and at the end of training.

    What it wrote goes to the log, to every logger that shows tables, and as one JSON object a line to `path`:
    `step`, `epoch`, `tokens_seen`, `prompt`, `strategy`, `continuation`, and what a subclass adds. A resumed
    run first takes back the samples of the step it resumes from and of later ones, and makes anew what is due
    at that step. It happens on the first process alone, and changes no bit of the training. Under strategies
    that shard the model there are no samples.

    Args:
        path: the JSON Lines file.
        max_new_tokens: of one sample at most.
        every_n_steps: sample whenever the optimizer steps are a multiple of this; None: not by steps.
        every_n_epochs: sample whenever the finished epochs are a multiple of this; None: not by epochs.

    Raises InputError for a number below 1.
    """

    repeats_on_resume = True
    what: ClassVar[str]
    """What messages call the samples."""

    def __init__(
        self, *, path: str | Path, max_new_tokens: int, every_n_steps: int | None, every_n_epochs: int | None
    ) -> None:
        super().__init__()
        self.max_new_tokens = self._positive("max_new_tokens", max_new_tokens)
        self.every_n_steps, self.every_n_epochs = (
            None if value is None else self._positive(name, value)
            for name, value in (("every_n_steps", every_n_steps), ("every_n_epochs", every_n_epochs))
        )
        self._file = RecordFile(Path(path))
        self._active = False

    def _positive(self, name: str, value: int) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{name}={value!r} of the {self.what}: give 1 or more")
        return value

    @abstractmethod
    def check_against(self, module: TrainingModule) -> None:
        """Raises InputError for a model or a task that cannot be sampled as is asked for."""

    @abstractmethod
    def _sample(self, trainer: L.Trainer, module: TrainingModule, position: Record) -> None:
        """Write and show the samples of this step, its position, that are not yet there."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse what would only fail at the first sample, and see whether this process samples."""
        self.check_against(language_module(pl_module))
        sharded = isinstance(trainer.strategy, FullyShardedStrategy)
        if sharded and trainer.is_global_zero:
            log.warning("No %s: the strategy fsdp spreads the model over the processes.", self.what)
        self._active = trainer.is_global_zero and not sharded

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the file at the step that training starts from."""
        super().on_train_start(trainer, pl_module)
        if self._active:
            # Those of the step itself are made again, for the loggers, too, have gone back before them.
            self._file.start(step=trainer.global_step - 1)

    def due(self, trainer: L.Trainer, pl_module: L.LightningModule) -> bool:
        """After every `every_n_steps` steps."""
        return self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0

    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sample after the step."""
        self._sample_here(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sample when the epoch is due."""
        super().on_train_epoch_end(trainer, pl_module)
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._sample_here(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sample the finished model."""
        super().on_train_end(trainer, pl_module)
        self._sample_here(trainer, pl_module)

    def _sample_here(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._active:
            return
        module, epoch = language_module(pl_module), round(epochs_done(trainer), 4)
        position = {"step": trainer.global_step, "epoch": epoch, "tokens_seen": module.tokens_seen}
        # A compiled block would be compiled again for the windows of a text beyond the context.
        with torch.compiler.set_stance("force_eager"):
            self._sample(trainer, module, position)

    def _keep(
        self, trainer: L.Trainer, records: Sequence[Record], *, name: str, table: str, how: str = ""
    ) -> None:
        """The samples of one step and strategy to the file, the log and the loggers."""
        self._file.append(records)
        step, epoch = records[0]["step"], records[0]["epoch"]
        rows = [[record["prompt"], record["continuation"]] for record in records]
        for row in rows:
            log.info("%s at step %d (epoch %.3g)%s: [%s] %s", name, step, epoch, how, *map(one_line, row))
        log_table(trainer.loggers, f"sample/{table}", ("prompt", "continuation"), rows, step)


class SampleText(Samples):
    """Continues every prompt by every strategy, at chosen moments of the training and at its end.

    Sampling is in the data type of the weights. Every sample draws from a generator of its own, seeded from
    `seed`, which its record has too, and the step, so that it does not depend on which other prompts and
    strategies are listed. Strategies are `SamplingRules`, or mappings with their fields; a top_k above the
    vocabulary keeps all of it, which the log says once. See `Samples` for when and where.

    Raises InputError for unusable arguments; when `fit` starts, for a prompt in which the tokenizer sees no
    token.
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
    ) -> None:
        super().__init__(
            path=path,
            max_new_tokens=max_new_tokens,
            every_n_steps=every_n_steps,
            every_n_epochs=every_n_epochs,
        )
        self.prompts = _checked_prompts(prompts)
        self.strategies = list(dict.fromkeys(SamplingRules.of(strategy) for strategy in strategies))
        if not self.strategies:
            raise InputError("strategies=[] samples nothing: give at least one, such as {temperature: 0.0}")
        if seed < 0:
            raise InputError(f"seed={seed} of the text samples is negative: give 0 or more")
        self.seed = seed

    def check_against(self, module: TrainingModule) -> None:
        """Fits the strategies to the vocabulary.

        Raises InputError for a prompt that holds no token, and for a model that writes no text.
        """
        if isinstance(module.net, GPTClassifier):
            raise InputError(
                "callbacks.sample_text needs a model that writes text: leave it out with"
                " '~callbacks.sample_text'"
            )
        V = vocab_size(module.net)
        self.strategies = [strategy.within(V) for strategy in self.strategies]
        for strategy in self.strategies:
            strategy.check_vocabulary(V)
        for prompt in self.prompts:
            if len(module.tokenizer.encode(prompt)) == 0:
                raise InputError(f"prompt {prompt!r} holds no token: give at least one word to continue")

    def _sample(self, trainer: L.Trainer, module: TrainingModule, position: Record) -> None:
        # Mixed into 32 bits because torch's CPU generator ignores the upper half of a seed.
        seed = int(np.random.SeedSequence((self.seed, position["step"])).generate_state(1)[0])
        for strategy in self.strategies:
            own = {"temperature": strategy.temperature, "top_k": strategy.top_k} | strategy.changes
            records = [
                position | {"prompt": prompt, "strategy": own, "seed": self.seed} for prompt in self.prompts
            ]
            records = [record for record in records if record not in self._file]
            if not records:
                continue
            completions = complete(
                module.net,
                module.tokenizer,
                [record["prompt"] for record in records],
                rules=strategy,
                max_new_tokens=self.max_new_tokens,
                generator=torch.Generator(device_of(module.net)).manual_seed(seed),
            )
            for record, completion in zip(records, completions, strict=True):
                record["continuation"] = completion.text
            table = strategy.name.replace(", ", "_").replace(" ", "_")
            self._keep(trainer, records, name="sample", table=table, how=f", {strategy.name}")


def _checked_prompts(prompts: Sequence[str]) -> list[str]:
    if isinstance(prompts, str):
        raise InputError(f"prompts={prompts!r} is one text: give a list of texts")
    if not prompts:
        raise InputError("prompts=[] samples nothing: give at least one text")
    for prompt in prompts:
        if not isinstance(prompt, str) or not prompt:
            raise InputError(f"prompt {prompt!r} is no text to continue: give at least one character")
    return list(dict.fromkeys(prompts))
