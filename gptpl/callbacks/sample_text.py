"""Text from the model while it learns."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch

from gptpl.callbacks.readings import LanguageModule, epochs_done, language_module
from gptpl.callbacks.record_file import Record
from gptpl.callbacks.sample_views import show_samples
from gptpl.callbacks.samples import Samples
from gptpl.errors import InputError
from gptpl.generation import SamplingRules, complete
from gptpl.model import GPTClassifier
from gptpl.model.protocol import device_of, vocab_size
from gptpl.text import one_line
from gptpl.training.sharding import FullyShardedStrategy

log = logging.getLogger(__name__)


class SampleText(Samples):
    """Continues every prompt by every strategy, at chosen moments of the training and at its end.

    Each sample goes to the log, to every logger that shows tables, and as one JSON object a line to `path`:
    `step`, `epoch`, `tokens_seen`, `prompt`, `strategy`, `seed`, `continuation`. A resumed run first
    takes back the samples of the step it resumes from and of later ones, and makes anew what is due at that
    step.

    Sampling happens on the first process alone, in the data type of the weights, and changes no bit of the
    training: every sample draws from a generator of its own, seeded from `seed` and the step, so that it does
    not depend on which other prompts and strategies are listed. Under strategies that shard the model there
    are no samples.

    Args:
        prompts: texts to continue.
        strategies: how tokens are chosen: `SamplingRules`, or mappings with their fields.
        path: the JSON Lines file.
        max_new_tokens: length of a continuation in tokens, unless the model ends the text before.
        every_n_steps: sample whenever the optimizer steps are a multiple of this; None: not by steps.
        every_n_epochs: sample whenever the finished epochs are a multiple of this; None: not by epochs.
        seed: 0 or more.

    Raises InputError for unusable arguments; when `fit` starts, for a prompt in which the tokenizer sees no
    token. A top_k above the vocabulary keeps all of it, which the log says once.
    """

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
        if every_n_steps is not None:
            _positive("every_n_steps", every_n_steps)
        if every_n_epochs is not None:
            _positive("every_n_epochs", every_n_epochs)
        super().__init__(path=path, every_n_steps=every_n_steps, every_n_epochs=every_n_epochs)
        self.prompts = _checked_prompts(prompts)
        self.strategies = list(dict.fromkeys(SamplingRules.of(strategy) for strategy in strategies))
        if not self.strategies:
            raise InputError("strategies=[] samples nothing: give at least one, such as {temperature: 0.0}")
        self.max_new_tokens = _positive("max_new_tokens", max_new_tokens)
        if seed < 0:
            raise InputError(f"seed={seed} of the text samples is negative: give 0 or more")
        self.seed = seed

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse what would only fail at the first sample, and see whether this process samples."""
        self.check_against(language_module(pl_module))
        sharded = isinstance(trainer.strategy, FullyShardedStrategy)
        if sharded and trainer.is_global_zero:
            log.warning("No text samples: the strategy fsdp spreads the model over the processes.")
        self._active = trainer.is_global_zero and not sharded

    def check_against(self, module: LanguageModule) -> None:
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

    def _sample(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write and show the samples of this step that are not yet there."""
        step = trainer.global_step
        if not self._active:
            return
        module = language_module(pl_module)
        epoch = round(epochs_done(trainer), 4)
        position: Record = {"step": step, "epoch": epoch, "tokens_seen": module.tokens_seen}
        for strategy in self.strategies:
            own = {"temperature": strategy.temperature, "top_k": strategy.top_k} | strategy.changes
            records = [
                position | {"prompt": prompt, "strategy": own, "seed": self.seed} for prompt in self.prompts
            ]
            records = [record for record in records if record not in self._file]
            if records:
                texts = self._continuations(module, [record["prompt"] for record in records], strategy, step)
                made = zip(records, texts, strict=True)
                records = [record | {"continuation": text} for record, text in made]
                self._file.append(records)
                _show(trainer, records, strategy)

    def _continuations(
        self, module: LanguageModule, prompts: Sequence[str], strategy: SamplingRules, step: int
    ) -> list[str]:
        device = device_of(module.net)
        # A compiled block would be compiled again for the windows of a text beyond the context.
        with torch.compiler.set_stance("force_eager"):
            completions = complete(
                module.net,
                module.tokenizer,
                prompts,
                rules=strategy,
                max_new_tokens=self.max_new_tokens,
                generator=torch.Generator(device).manual_seed(_sample_seed(self.seed, step)),
            )
        return [completion.text for completion in completions]


def _show(trainer: L.Trainer, records: Sequence[Record], strategy: SamplingRules) -> None:
    """Records of one step and strategy to the log and to the loggers."""
    for record in records:
        position = (record["step"], record["epoch"], strategy.name)
        texts = (one_line(record["prompt"]), one_line(record["continuation"]))
        log.info("sample at step %d (epoch %.3g), %s: [%s] %s", *position, *texts)
    show_samples(trainer, strategy.name.replace(", ", "_").replace(" ", "_"), records)


def _sample_seed(seed: int, step: int) -> int:
    # Mixed into 32 bits because torch's CPU generator ignores the upper half of a seed.
    return int(np.random.SeedSequence((seed, step)).generate_state(1)[0])


def _checked_prompts(prompts: Sequence[str]) -> list[str]:
    if isinstance(prompts, str):
        raise InputError(f"prompts={prompts!r} is one text: give a list of texts")
    if not prompts:
        raise InputError("prompts=[] samples nothing: give at least one text")
    for prompt in prompts:
        if not isinstance(prompt, str) or not prompt:
            raise InputError(f"prompt {prompt!r} is no text to continue: give at least one character")
    return list(dict.fromkeys(prompts))


def _positive(name: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name}={value!r} of the text samples: give 1 or more")
    return value
