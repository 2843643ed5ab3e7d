"""What the data of all tasks share: batches, and loaders that can begin within an epoch, on every rank."""

# B examples in a rank's batch, R ranks

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol, TypedDict

import lightning as L
import torch
from torch.utils.data import DataLoader

from gptpl.data.sampler import EpochSampler, Indices, InOrder, evenly_spaced, rank_share
from gptpl.data.splits import Split
from gptpl.errors import InputError
from gptpl.resuming import FREE
from gptpl.tokenizers import Tokenizer

Batches = DataLoader[Any]
IGNORED = -100
"""The target that torch's cross-entropy leaves out."""


class BatchedExamples(Protocol):
    """Examples of a split, which make batches of themselves; torch's DataLoader finds that by its name."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: Sequence[int]) -> Any:
        """A batch of them. PADDING in place of a number makes a row that counts nowhere."""


class Chosen:
    """Some of the examples, in the order of their numbers; PADDING stays what it is."""

    def __init__(self, examples: BatchedExamples, numbers: Indices) -> None:
        self._examples = examples
        self._numbers = numbers.tolist()

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitems__(self, indices: Sequence[int]) -> Any:
        return self._examples.__getitems__([self._numbers[index] for index in indices])


class Positioned:
    """Says to Lightning, by having a state, that a loader can begin within an epoch.

    The state is empty: the position is the training's, in finished steps, and given to `start_at`. A loader
    knows how many batches were fetched, which with worker processes are more than were trained on.
    """

    def state_dict(self) -> dict[str, object]:
        """Nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Takes nothing over."""


class PositionedLoader(Positioned, Batches):
    """A DataLoader that can begin within an epoch."""


class Loading(TypedDict, total=False):
    """The settings that every kind of data hands on to `TrainingData`."""

    seed: int
    num_workers: int
    pin_memory: bool | None
    persistent_workers: bool
    eval_train_batches: int | None
    eval_val_batches: int | None


class TrainingData(L.LightningDataModule, ABC):
    """Training and validation examples as batches; what an example and a batch are, a subclass says.

    Usable by hand as well as through a Trainer. Under R ranks (of the attached trainer) each gets B examples
    of every global batch of R x B, so that they see together, in training and in evaluation, what one process
    sees with batches of R x B. No loader touches the global random numbers: each has a generator of its own.

    Args:
        batch_size: B, examples in a batch of one rank.
        seed: decides, with the epoch, the order of the training examples.
        num_workers: processes that prepare training batches: 0 is right nearly always; evaluation uses none.
        pin_memory: prepare batches in page-locked memory. None: only where there is a CUDA device.
        persistent_workers: keep the workers from epoch to epoch (nothing to keep without workers).
        eval_train_batches, eval_val_batches: global batches, evenly spaced, to evaluate on; None: of training
            examples all full ones, of validation examples all.

    Raises InputError for a number out of range.
    """

    max_length: int
    """Tokens of the longest row of a batch."""
    units: str = "examples"
    """How messages call several examples."""
    too_few_remedy: str = "lower data.batch_size, or give more examples"
    """What helps where the training examples do not fill a batch."""

    def __init__(
        self,
        *,
        batch_size: int,
        seed: int = 123,
        num_workers: Annotated[int, FREE] = 0,
        pin_memory: Annotated[bool | None, FREE] = None,
        persistent_workers: Annotated[bool, FREE] = True,
        eval_train_batches: int | None = 5,
        eval_val_batches: int | None = 5,
    ) -> None:
        super().__init__()
        check_at_least(1, "data.batch_size", batch_size)
        check_at_least(1, "eval_train_batches", eval_train_batches)
        check_at_least(1, "eval_val_batches", eval_val_batches)
        check_at_least(0, "data.num_workers", num_workers)
        check_at_least(0, "seed", seed)
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.persistent_workers = persistent_workers
        self.eval_train_batches = eval_train_batches
        self.eval_val_batches = eval_val_batches
        self._start = (0, 0)

    # --- a kind of data's own -------------------------------------------------------------------------

    @property
    @abstractmethod
    def name(self) -> str:  # type: ignore[override]  # Lightning's is None
        """How logs and records call the data."""

    @property
    @abstractmethod
    def train_tokens(self) -> int:
        """Tokens of the training split, each counted once."""

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the tokens, with its vocabulary."""

    @abstractmethod
    def content_sha256(self) -> str:
        """Hash of what is trained on, as far as it decides the examples: a resumed run must have the same."""

    @abstractmethod
    def load(self) -> object:
        """Read everything, or take it from a cache; later calls cost nothing."""

    @abstractmethod
    def examples(self, split: Split) -> BatchedExamples:
        """The examples of a split, in a fixed order. Raises InputError where there are none."""

    @abstractmethod
    def report(self, *, parameters: int, world_size: int) -> list[str]:
        """What the data are, in lines for the person who is about to train a model of so many parameters."""

    def module_settings(self) -> dict[str, Any]:
        """What the task's module has to know of the data, as its keyword arguments."""
        return {}

    @property
    def caveat(self) -> str:
        """A sentence on the training examples without which their losses would mislead; "": there is none."""
        return ""

    def write_record(self, run_dir: Path) -> None:
        """Leave in a run's folder what somebody may want to look at, or the run's model to be tested on."""

    # --- Lightning's hooks ----------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Fill the caches. Lightning calls it in one process, and `setup` in all of them after it."""
        self.load()

    def setup(self, stage: str | None = None) -> None:
        """Open both splits. Raises InputError if one of them has no example."""
        self.examples("train")
        self.examples("val")

    # --- training -------------------------------------------------------------------------------------

    def train_dataloader(self) -> Batches:
        """Shuffled batches of this rank; the last incomplete global batch is dropped.

        Of a trainer with `overfit_batches` the first ones, in order.
        """
        rank, world_size = self._rank_and_world_size()
        sampler = self._sampler(rank, world_size, start=self._start)
        if self.trainer:
            sampler.limit = planned_batches(self.trainer, sampler.batches)
        return self._loader(self.examples("train"), sampler, num_workers=self.num_workers)

    def start_at(self, *, epoch: int, batch: int) -> None:
        """Makes training loaders begin at that epoch, and in it after so many batches of each rank."""
        self._start = (epoch, batch)

    def steps_per_epoch(self, *, world_size: int = 1, accumulate: int = 1) -> int:
        """Return the optimizer steps of an epoch when each takes `accumulate` batches from every rank.

        An epoch's last step may have fewer batches, as in Lightning. Raises InputError if there is no batch.
        """
        return -(-self._sampler(0, world_size).batches // accumulate)

    def _sampler(self, rank: int, world_size: int, *, start: tuple[int, int] = (0, 0)) -> EpochSampler:
        count = len(self.examples("train"))
        overfit = self.trainer is not None and self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        sampler = (InOrder if overfit else EpochSampler)(
            count,
            batch_size=self.batch_size,
            seed=self.seed,
            shuffle=not overfit,
            rank=rank,
            world_size=world_size,
            start=start,
        )
        if not sampler.batches:
            devices = f" on each of {world_size} devices" if world_size > 1 else ""
            raise InputError(
                f"the training split has {count:,} {self.units}, which do not fill one batch of "
                f"data.batch_size={self.batch_size}{devices}: {self.too_few_remedy}"
            )
        return sampler

    # --- evaluation -----------------------------------------------------------------------------------

    def val_dataloader(self) -> list[Batches]:
        """Return two loaders, of training examples and of validation examples, the same in every evaluation.

        Under several ranks the last batch may hold rows whose targets are all -100 (see `rank_share`): sum
        losses and count targets over the ranks, and divide then, for the exact mean.
        """
        global_batch = self.batch_size * self._rank_and_world_size()[1]
        full = max(1, len(self.examples("train")) // global_batch)
        return [
            self._evaluation_loader("train", min(self.eval_train_batches or full, full)),
            self._evaluation_loader("val", self.eval_val_batches),
        ]

    def split_dataloader(self, split: Split) -> Batches:
        """All examples of a split in order, the last, short batch included."""
        return self._evaluation_loader(split, None)

    def _evaluation_loader(self, split: Split, batches: int | None) -> Batches:
        """A loader of `batches` global batches (None: all), their examples evenly spaced."""
        examples = self.examples(split)
        available = len(examples)
        wanted = available if batches is None else batches * self.batch_size * self._rank_and_world_size()[1]
        return self._in_order(examples, evenly_spaced(available, wanted))

    def _in_order(self, examples: BatchedExamples, numbers: Indices) -> Batches:
        """Batches of this rank's share of the examples with these numbers."""
        rank, world_size = self._rank_and_world_size()
        share = rank_share(numbers, batch_size=self.batch_size, rank=rank, world_size=world_size)
        # An EpochSampler, so that Lightning does not divide it once more.
        in_order = InOrder(len(share), batch_size=1, seed=self.seed, shuffle=False)
        return self._loader(Chosen(examples, share), in_order)

    def _rank_and_world_size(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _loader(self, examples: BatchedExamples, sampler: EpochSampler, *, num_workers: int = 0) -> Batches:
        return PositionedLoader(
            examples,  # type: ignore[arg-type]  # torch asks for a Dataset, and uses what is named above
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=num_workers,
            collate_fn=_identity,
            pin_memory=torch.cuda.is_available() if self.pin_memory is None else self.pin_memory,
            persistent_workers=self.persistent_workers and num_workers > 0,
            generator=torch.Generator().manual_seed(self.seed),  # else every pass draws from the global one
        )


def _identity(batch: Any) -> Any:
    """Collates nothing: `__getitems__` made a batch. A named function, for workers to unpickle."""
    return batch


def check_at_least(least: int, name: str, value: int | None) -> None:
    """Raises InputError for a number below the least; None is none."""
    if value is not None and value < least:
        raise InputError(f"{name}={value} is too small: give {least} or more")


def planned_batches(trainer: L.Trainer, batches: int) -> int:
    """Batches of an epoch that the Trainer makes of so many, by its `limit_train_batches`.

    Lightning sets that by `overfit_batches` and `fast_dev_run` too. Raises InputError where none is left.
    """
    limit = trainer.limit_train_batches
    planned = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    if planned < 1:
        raise InputError(
            f"trainer.limit_train_batches={limit} leaves none of an epoch's {batches} batches: give more"
        )
    return planned
