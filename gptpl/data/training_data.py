"""What the data of all tasks share: batches, and loaders that can begin within an epoch, on every rank."""

# B examples in a rank's batch, R ranks

import signal
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Annotated, Any, Protocol, TypedDict, cast

import lightning as L
import torch
from torch.utils.data import DataLoader, Subset

from gptpl.data.sampler import EpochSampler, Indices, InOrder, evenly_spaced, rank_share
from gptpl.data.splits import Split
from gptpl.errors import InputError
from gptpl.settings import FREE
from gptpl.tokenizers import Tokenizer

Batches = DataLoader[Any]
IGNORED = -100
"""The target that torch's cross-entropy leaves out."""


class BatchedExamples(Protocol):
    """Examples of a split by index; torch's DataLoader takes whole batches from `__getitems__`."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: list[int]) -> Any:
        """A batch. PADDING in place of an index makes a row that counts nowhere."""


class Positioned:
    """Tells Lightning, by having a state, that a loader can begin within an epoch.

    The state is empty: the position is the training's, in finished steps, and given to `start_at`. A loader
    only knows how many batches were fetched, which with worker processes are more than were trained on.
    """

    def state_dict(self) -> dict[str, object]:
        """Empty."""
        return {}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Ignore it."""


class PositionedLoader(Positioned, Batches):
    """A DataLoader that can begin within an epoch."""


class Loading(TypedDict, total=False):
    """The settings that every datamodule passes on to `TrainingData`."""

    seed: int
    num_workers: int
    pin_memory: bool | None
    persistent_workers: bool
    eval_train_batches: int | None
    eval_val_batches: int | None


class TrainingData(L.LightningDataModule, ABC):
    """Training and validation examples as batches; subclasses say what an example and a batch are.

    Usable by hand as well as with a Trainer. Each of R ranks (of the attached trainer) gets B examples of
    every global batch of R x B: together they see, in training and in evaluation, what one process sees with
    batches of R x B. No loader touches the global random numbers: each has a generator of its own.

    Args:
        batch_size: B, examples in a batch of one rank.
        seed: decides, with the epoch, the order of the training examples.
        num_workers: processes that prepare training batches: 0 is right nearly always; evaluation uses none.
        pin_memory: prepare batches in page-locked memory. None: only where there is a CUDA device.
        persistent_workers: keep the workers from epoch to epoch.
        eval_train_batches, eval_val_batches: global batches, evenly spaced, to evaluate on; None: of training
            examples all full ones, of validation examples all.

    Raises InputError for a number out of range.
    """

    name: str
    """What logs and records call the data."""
    max_length: int
    """Tokens of the longest row of a batch."""
    units: str = "examples"
    """What messages call several examples."""
    computed_order: bool = False
    """Whether the order of the training examples is computed, for any number of them; see `EpochSampler`."""
    evaluated: tuple[str, ...] = ("train", "val")
    """The splits of `val_dataloader`, in order; `val/NAME` in place of "val" for parts of it."""
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
        self.micro_batches = 1
        """Batches of every rank that make up a global batch of the run."""
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.persistent_workers = persistent_workers
        self.eval_train_batches = eval_train_batches
        self.eval_val_batches = eval_val_batches
        self._start = (0, 0)

    # --- what a subclass defines ----------------------------------------------------------------------

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
        """Hash of everything that decides the examples: a resumed run must have the same."""

    @property
    def row_count(self) -> int | None:
        """Rows, entries or documents that were read of the files; None: not known.

        It is recorded next to the hash: a file that was cut off at the end of a row is otherwise valid.
        """
        return None

    def difference(self, sha256: str, rows: int | None = None) -> str:
        """How the data differ from those with this hash and number of rows; empty: they are the same."""
        found = self.content_sha256()
        if found == sha256:
            return ""
        now = self.row_count
        lost = "" if None in (rows, now) or rows == now else f"{now:,} rows, not {rows:,}; "
        return f"{lost}SHA-256 {found[:12] or 'unknown'}, not {sha256[:12]}"

    @abstractmethod
    def load(self) -> object:
        """Read everything, or take it from a cache; later calls cost nothing."""

    @abstractmethod
    def examples(self, split: Split) -> BatchedExamples:
        """The examples of a split, in a fixed order. Raises InputError where there are none."""

    @abstractmethod
    def report(self, *, parameters: int | None, world_size: int) -> list[str]:
        """A description of the data for the person about to train a model of so many parameters, in lines.

        `parameters` None: not known.
        """

    def module_settings(self) -> dict[str, Any]:
        """What the task's module has to know of the data, as its keyword arguments."""
        return {}

    @property
    def caveat(self) -> str:
        """A sentence on the training examples without which their losses would mislead; often empty."""
        return ""

    def write_record(self, run_dir: Path) -> None:
        """Keep the splits in a run's folder, to be looked at and to test the model on."""

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

        With `overfit_batches` of the trainer the first ones, in order.
        """
        rank, world_size = self._rank_and_world_size()
        sampler = self._sampler(rank, world_size, start=self._start)
        if self.trainer:
            sampler.limit = planned_batches(self.trainer, sampler.batches)
        return self._loader(self.examples("train"), sampler, num_workers=self.num_workers)

    def start_at(self, *, epoch: int, batch: int) -> None:
        """Make training loaders begin in that epoch, after so many batches of each rank."""
        self._start = (epoch, batch)

    def steps_per_epoch(self, *, world_size: int = 1, accumulate: int = 1) -> int:
        """The optimizer steps of an epoch when each takes `accumulate` batches from every rank.

        An epoch's last step may have fewer batches, as in Lightning. Raises InputError if there is no batch.
        """
        return -(-self._sampler(0, world_size).batches // accumulate)

    def _sampler(self, rank: int, world_size: int, *, start: tuple[int, int] = (0, 0)) -> EpochSampler:
        overfit = self.trainer is not None and self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        sampler = self.make_sampler(
            InOrder if overfit else EpochSampler,
            batch_size=self.batch_size,
            seed=self.seed,
            shuffle=not overfit,
            rank=rank,
            world_size=world_size,
            start=start,
            computed=self.computed_order,
            micro_batches=self.micro_batches,
        )
        if not sampler.batches:
            devices = f" on each of {world_size} devices" if world_size > 1 else ""
            raise InputError(
                f"the training split has {sampler.count:,} {self.units}, which do not fill one batch of "
                f"data.batch_size={self.batch_size}{devices}: {self.too_few_remedy}"
            )
        return sampler

    def make_sampler(self, kind: type[EpochSampler], **settings: Any) -> EpochSampler:
        """A sampler of the training examples, in random order or, `InOrder`, in their own."""
        return kind(len(self.examples("train")), **settings)

    @property
    def train_examples(self) -> int:
        """The examples of a training epoch, before incomplete batches are dropped."""
        return len(self.examples("train"))

    # --- evaluation -----------------------------------------------------------------------------------

    def val_dataloader(self) -> list[Batches]:
        """Two loaders, of training examples and of validation examples, the same in every evaluation.

        With several ranks the last batch may hold rows with all targets -100 (see `rank_share`): for the
        exact mean, sum losses and count targets over the ranks, and divide then.
        """
        full = max(1, self.train_examples // self._global_batch)
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
        available = self.train_examples if split == "train" else len(examples)
        wanted = available if batches is None else batches * self._global_batch
        return self._in_order(examples, self.evaluated_indices(split, wanted))

    def evaluated_indices(self, split: Split, wanted: int) -> Indices:
        """Which examples of a split are evaluated, if `wanted` of them are; all if there are fewer."""
        return evenly_spaced(len(self.examples(split)), wanted)

    def _in_order(self, examples: BatchedExamples, indices: Indices) -> Batches:
        """Batches of this rank's part of the examples with these indices."""
        rank, world_size = self._rank_and_world_size()
        own = rank_share(indices, batch_size=self.batch_size, rank=rank, world_size=world_size)
        # An EpochSampler, so that Lightning does not divide it once more.
        in_order = InOrder(len(own), batch_size=1, seed=self.seed, shuffle=False)
        return self._loader(Subset(cast(Any, examples), own.tolist()), in_order)

    @property
    def _global_batch(self) -> int:
        return self.batch_size * self._rank_and_world_size()[1] * self.micro_batches

    def _rank_and_world_size(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _loader(self, examples: BatchedExamples, sampler: EpochSampler, *, num_workers: int = 0) -> Batches:
        return PositionedLoader(
            examples,  # type: ignore[arg-type]  # torch asks for a Dataset, and uses what is named above
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=num_workers,
            worker_init_fn=_outlive_a_signal,
            collate_fn=_identity,
            pin_memory=torch.cuda.is_available() if self.pin_memory is None else self.pin_memory,
            persistent_workers=self.persistent_workers and num_workers > 0,
            generator=torch.Generator().manual_seed(self.seed),  # else every pass draws from the global one
        )


def _identity(batch: Any) -> Any:
    """The batch that `__getitems__` made; a named function, for workers to unpickle."""
    return batch


def _outlive_a_signal(worker: int) -> None:
    """Let a worker process ignore the first SIGTERM; torch would have it end, and the main process fail.

    torchrun and SLURM signal all processes, and the main one needs its workers to finish the step. A second
    SIGTERM ends them.
    """
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))


def check_at_least(least: int, name: str, value: int | None) -> None:
    """Raise InputError for a number below the least; None passes."""
    if value is not None and value < least:
        raise InputError(f"{name} must be at least {least}, got {value}")


def planned_batches(trainer: L.Trainer, batches: int) -> int:
    """Batches of an epoch that the Trainer uses of so many, by its `limit_train_batches`.

    Lightning sets that from `overfit_batches` and `fast_dev_run` too. Raises InputError where none is left.
    """
    limit = trainer.limit_train_batches
    planned = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    if planned < 1:
        raise InputError(
            f"trainer.limit_train_batches={limit} leaves none of an epoch's {batches} batches: give more"
        )
    return planned
