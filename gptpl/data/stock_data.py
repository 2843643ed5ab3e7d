"""A LightningDataModule that knows nothing of gptpl, as training data: what it lacks is answered here."""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import lightning as L
import numpy as np
import torch

from gptpl.data.splits import Split
from gptpl.data.training_data import BatchedExamples, Batches, Positioned, TrainingData
from gptpl.errors import InputError
from gptpl.tokenizers import Tokenizer

UNKNOWN = sys.maxsize
"""As a number of batches: the loader has no length."""
_OWN_HOOKS = (
    "state_dict",
    "load_state_dict",
    "on_before_batch_transfer",
    "transfer_batch_to_device",
    "on_after_batch_transfer",
)
"""Lightning's hooks that are those of the stranger's datamodule."""


class StockData(TrainingData):
    """Any LightningDataModule with a `train_dataloader` and a `val_dataloader` of the task's batches.

    Its loaders draw from random numbers of their own, the same for the same seed and epoch. A resumed run
    fetches the batches of its epoch again, leaves out those it has had, and goes on with the next. That
    repeats the uninterrupted run where batches depend on nothing but torch's, NumPy's and Python's global
    random numbers and the loader's generator. Evaluations read the same first batches each time.

    Args:
        own: the datamodule; where it has `tokenizer`, `name`, `max_length`, `batch_size` or
            `content_sha256()`, they count.
        tokenizer: what turned text into its tokens, where it does not say so itself.
        seed: decides, with the epoch, what its loaders draw.
        eval_train_batches, eval_val_batches: batches of an evaluation; None: all.
    """

    def __init__(
        self,
        own: L.LightningDataModule,
        *,
        tokenizer: Tokenizer,
        seed: int,
        eval_train_batches: int | None = None,
        eval_val_batches: int | None = None,
    ) -> None:
        size = getattr(own, "batch_size", None)
        super().__init__(
            batch_size=size if isinstance(size, int) else 1,
            seed=seed,
            eval_train_batches=eval_train_batches,
            eval_val_batches=eval_val_batches,
        )
        self.own = own
        self._given_tokenizer = tokenizer
        self._done: set[str] = set()
        for hook in _OWN_HOOKS:
            setattr(self, hook, getattr(own, hook))

    @property
    def name(self) -> str:  # type: ignore[override]
        """Its name, or that of its class."""
        return str(getattr(self.own, "name", None) or type(self.own).__name__)

    @property
    def tokenizer(self) -> Tokenizer:
        """Its own, or the one given."""
        own = getattr(self.own, "tokenizer", None)
        return own if isinstance(own, Tokenizer) else self._given_tokenizer

    @property
    def max_length(self) -> int:  # type: ignore[override]
        """Where it does not say, the least that there is."""
        return int(getattr(self.own, "max_length", None) or 1)

    @property
    def train_tokens(self) -> int:
        """Not known."""
        return 0

    def content_sha256(self) -> str:
        """What it says; "": it does not, and changed data are not noticed."""
        own = getattr(self.own, "content_sha256", None)
        return str(own()) if callable(own) else ""

    def examples(self, split: Split) -> BatchedExamples:
        """Raises InputError: it has batches alone."""
        raise InputError(f"{self.name} has no examples by number: it is a LightningDataModule of your own")

    def report(self, *, parameters: int, world_size: int) -> list[str]:
        """The number of batches, and what is not promised."""
        count = self.steps_per_epoch(world_size=world_size)
        batches = "as many batches as it gives" if count == UNKNOWN else f"{count:,} batches"
        lines = [
            f"data: {self.name}, {batches} an epoch",
            "  a LightningDataModule of your own: resuming within an epoch fetches its earlier batches again,"
            " and is exact only where they depend on nothing but global random numbers",
        ]
        if not self.content_sha256():
            lines.append("  without a content_sha256() of its own: changed data are not noticed")
        return lines

    # --- Lightning's hooks ----------------------------------------------------------------------------

    def load(self) -> None:
        """Its `prepare_data`."""
        self._once("prepare_data", self.own.prepare_data)

    def setup(self, stage: str | None = None) -> None:
        """Its `setup` for fitting, once. Raises InputError where it has not the loaders that a run needs."""
        if self._once("setup", lambda: self.own.setup("fit")):
            self.val_dataloader()

    def teardown(self, stage: str) -> None:
        """Its own."""
        self.own.teardown(stage)
        self._done.discard("setup")

    def _once(self, what: str, call: Callable[[], None]) -> bool:
        """Whether it had to be called."""
        if what in self._done:
            return False
        self.own.trainer = self.trainer
        with _RandomNumbers(self.seed, 0).used():
            call()
        self._done.add(what)
        return True

    # --- loaders --------------------------------------------------------------------------------------

    def train_dataloader(self) -> Batches:
        """Its own, which begins where the training is."""
        return self._replayed("train_dataloader", self._position)

    def val_dataloader(self) -> list[Batches]:
        """The first batches of an epoch of training, and those of its own `val_dataloader`."""
        return [
            self._replayed("train_dataloader", limit=self.eval_train_batches),
            self._replayed("val_dataloader", limit=self.eval_val_batches),
        ]

    def split_dataloader(self, split: Split) -> Batches:
        """All batches of a split, of training those of an epoch."""
        return self._replayed(f"{split}_dataloader")

    def steps_per_epoch(self, *, world_size: int = 1, accumulate: int = 1) -> int:
        """UNKNOWN for a loader without a length. Raises InputError for several devices."""
        if world_size > 1:
            raise InputError(
                f"{self.name} is a LightningDataModule of your own, which gives each of {world_size} devices"
                " the same batches: train on one (trainer.devices=1), or derive it from"
                " gptpl.data.training_data.TrainingData"
            )
        try:
            batches = len(self.train_dataloader())
        except (TypeError, NotImplementedError):
            return UNKNOWN
        if batches == 0:
            raise InputError(
                f"{self.name}.train_dataloader() has no batch: give more data, or smaller batches"
            )
        return -(-batches // accumulate)

    def _position(self) -> tuple[int, int]:
        """Epoch of the training, always the first where it overfits, and how many batches of it are done."""
        epoch, batch = self._start
        if self.trainer is None:
            return epoch, 0
        now = self.trainer.current_epoch
        first = self.trainer.overfit_batches  # type: ignore[attr-defined]
        return (0 if first else now), batch if now == epoch else 0

    def _replayed(
        self, name: str, position: Callable[[], tuple[int, int]] = lambda: (0, 0), limit: int | None = None
    ) -> Batches:
        there = getattr(type(self.own), name) is not getattr(L.LightningDataModule, name)
        with _RandomNumbers(self.seed, 0).used():
            loader = getattr(self.own, name)() if there else None
        if isinstance(loader, list | tuple) and len(loader) == 1:
            [loader] = loader
        if loader is None or isinstance(loader, list | tuple | dict):
            raise InputError(
                f"{self.name}.{name}() must give one loader of batches, got {type(loader).__name__}"
            )
        return cast(Batches, _ReplayedLoader(loader, self.seed, position, limit))


@dataclass(frozen=True)
class _ReplayedLoader(Positioned):
    """A loader whose batches are the same for the same seed and epoch."""

    loader: Any
    seed: int
    position: Callable[[], tuple[int, int]]
    limit: int | None

    def __len__(self) -> int:
        return len(self.loader) if self.limit is None else min(len(self.loader), self.limit)

    def __iter__(self) -> Iterator[Any]:
        epoch, skip = self.position()
        numbers = _RandomNumbers(self.seed, epoch + 1)
        samplers = [getattr(self.loader, name, None) for name in ("sampler", "batch_sampler")]
        for part in (self.loader, *samplers):
            if isinstance(generator := getattr(part, "generator", None), torch.Generator):
                generator.manual_seed(numbers.seed)
            if callable(set_epoch := getattr(part, "set_epoch", None)):
                set_epoch(epoch)
        with numbers.used():
            batches = iter(self.loader)
        count = 0
        while self.limit is None or count < self.limit:
            with numbers.used():
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            count += 1
            if count > skip:
                yield batch


class _RandomNumbers:
    """The global random numbers of this process's CPU, as somebody has them to themselves from a seed on."""

    def __init__(self, seed: int, epoch: int) -> None:
        self.seed = int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint32)[0])
        self._state: tuple[Any, ...] | None = None

    @contextmanager
    def used(self) -> Iterator[None]:
        """Everything drawn inside comes from them, and leaves those outside as they were."""
        outside = _state()
        if self._state is None:
            torch.default_generator.manual_seed(self.seed)
            np.random.seed(self.seed)  # noqa: NPY002 (the global ones)
            random.seed(self.seed)
        else:
            _set_state(self._state)
        try:
            yield
        finally:
            self._state = _state()
            _set_state(outside)


def _state() -> tuple[Any, ...]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002 (the global ones)


def _set_state(state: tuple[Any, ...]) -> None:
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])  # noqa: NPY002 (the global ones)
    random.setstate(state[2])
