"""Any LightningDataModule as training data: the base class's other promises are kept here."""

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
_FORWARDED_HOOKS = (
    "state_dict",
    "load_state_dict",
    "on_before_batch_transfer",
    "transfer_batch_to_device",
    "on_after_batch_transfer",
)


class StockData(TrainingData):
    """A LightningDataModule with a `train_dataloader` and a `val_dataloader` of the task's batches.

    Its loaders draw from random numbers of their own, the same for the same seed and epoch. A resumed run
    fetches the batches of its epoch again, skips those that it has trained on, and continues with the next.
    That repeats the uninterrupted run where batches depend on nothing but torch's, NumPy's and Python's
    global random numbers and the loader's generator. Evaluations read the same first batches each time.

    Args:
        own: the datamodule; its `tokenizer`, `name`, `max_length`, `batch_size` and `content_sha256()` are
            used where it has them.
        tokenizer: what encoded its text, unless it has one.
        seed: decides, with the epoch, what its loaders draw.
        eval_train_batches, eval_val_batches: batches of an evaluation; None: all.
    """

    train_tokens = 0  # not known

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
        self.name = str(getattr(own, "name", None) or type(own).__name__)
        self._given_tokenizer = tokenizer
        self._done: set[str] = set()
        for hook in _FORWARDED_HOOKS:
            setattr(self, hook, getattr(own, hook))

    @property
    def tokenizer(self) -> Tokenizer:
        """The datamodule's own, or the one given."""
        own = getattr(self.own, "tokenizer", None)
        return own if isinstance(own, Tokenizer) else self._given_tokenizer

    @property
    def max_length(self) -> int:  # type: ignore[override]
        """The datamodule's; 1 where it has none."""
        return int(getattr(self.own, "max_length", None) or 1)

    def content_sha256(self) -> str:
        """The datamodule's; empty where it has none, and changed data are not noticed."""
        own = getattr(self.own, "content_sha256", None)
        return str(own()) if callable(own) else ""

    def examples(self, split: Split) -> BatchedExamples:
        """Raises InputError: there are only batches."""
        raise InputError(f"{self.name} has no examples by number: it is a LightningDataModule of your own")

    def report(self, *, parameters: int | None, world_size: int) -> list[str]:
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
        """Call the datamodule's `prepare_data`, once."""
        self._once("prepare_data", self.own.prepare_data)

    def setup(self, stage: str | None = None) -> None:
        """Call the datamodule's `setup` for fitting, once. Raises InputError where a loader is missing."""
        if self._once("setup", lambda: self.own.setup("fit")):
            self.val_dataloader()

    def teardown(self, stage: str) -> None:
        """Call the datamodule's."""
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
        """The datamodule's, from the position of the training on."""
        return self._replayed("train_dataloader", self._position)

    def val_dataloader(self) -> list[Batches]:
        """The first batches of an epoch of training, and those of the datamodule's `val_dataloader`."""
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
        """Epoch of the training, always the first where it overfits, and batches of it that are done."""
        epoch, batch = self._start
        if self.trainer is None:
            return epoch, 0
        now = self.trainer.current_epoch
        first = self.trainer.overfit_batches  # type: ignore[attr-defined]
        return (0 if first else now), batch if now == epoch else 0

    def _replayed(
        self, name: str, position: Callable[[], tuple[int, int]] = lambda: (0, 0), limit: int | None = None
    ) -> Batches:
        defined = getattr(type(self.own), name) is not getattr(L.LightningDataModule, name)
        with _RandomNumbers(self.seed, 0).used():
            loader = getattr(self.own, name)() if defined else None
        if isinstance(loader, list | tuple) and len(loader) == 1:
            [loader] = loader
        if loader is None or isinstance(loader, list | tuple | dict):
            raise InputError(
                f"{self.name}.{name}() must give one loader of batches, got {type(loader).__name__}"
            )
        return cast(Batches, _ReplayedLoader(loader, self.seed, position, limit))


@dataclass(frozen=True)
class _ReplayedLoader(Positioned):
    """A loader with the same batches for the same seed and epoch."""

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
    """The global random numbers of this process's CPU, as a sequence of its own from a seed on."""

    def __init__(self, seed: int, epoch: int) -> None:
        self.seed = int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint32)[0])
        self._state: tuple[Any, ...] = (
            torch.Generator().manual_seed(self.seed).get_state(),
            np.random.RandomState(self.seed).get_state(),
            random.Random(self.seed).getstate(),
        )

    @contextmanager
    def used(self) -> Iterator[None]:
        """Everything inside draws from this sequence; the numbers outside are not touched.

        Lightning's `isolate_rng` does not restore them after an exception.
        """
        outside = _state()
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
