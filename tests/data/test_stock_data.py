"""A LightningDataModule of a user: the same batches for the same seed and epoch, from any place on."""

import random
from typing import Any, cast

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from gptpl.data.stock_data import UNKNOWN, StockData
from gptpl.errors import InputError
from gptpl.tokenizers import BytesTokenizer


class Numbers(L.LightningDataModule):
    """The numbers from 0 on in a random order, each with what the three global generators have to say."""

    def __init__(self, count: int = 10, **options: Any) -> None:
        super().__init__()
        self.count, self.options = count, options

    def setup(self, stage: str) -> None:
        self.drawn = torch.rand(self.count)

    def _batch(self, rows: list[tuple[Tensor, Tensor]]) -> list[Any]:
        numbers = torch.stack([number for number, _ in rows]).tolist()
        return [numbers, torch.rand(1).item(), np.random.rand(), random.random()]  # noqa: NPY002

    def train_dataloader(self) -> Any:
        data = TensorDataset(torch.arange(self.count), self.drawn)
        return DataLoader(data, batch_size=2, shuffle=True, collate_fn=self._batch, **self.options)

    def val_dataloader(self) -> Any:
        data = TensorDataset(torch.arange(self.count), self.drawn)
        return DataLoader(data, batch_size=5, collate_fn=self._batch)


class Epoch:
    """Stands for the trainer."""

    overfit_batches = 0

    def __init__(self, current_epoch: int) -> None:
        self.current_epoch = current_epoch


def stock(
    own: L.LightningDataModule | None = None, *, seed: int = 1, epoch: int = 0, **settings: Any
) -> StockData:
    data = StockData(own or Numbers(), tokenizer=BytesTokenizer(), seed=seed, **settings)
    data.trainer = cast(Any, Epoch(epoch))
    data.load()
    data.setup()
    return data


def of_epoch(epoch: int, *, seed: int = 1, start: tuple[int, int] = (0, 0), **options: Any) -> list[Any]:
    data = stock(Numbers(**options), seed=seed, epoch=epoch)
    data.start_at(epoch=start[0], batch=start[1])
    return list(data.train_dataloader())


@pytest.mark.parametrize("generator", [False, True])
def test_an_epoch_from_its_middle_on_is_the_rest_of_the_whole(generator):
    def options() -> dict[str, Any]:
        return {"generator": torch.Generator().manual_seed(5)} if generator else {}

    whole = [of_epoch(epoch, **options()) for epoch in range(3)]
    assert [sorted(number for batch in each for number in batch[0]) for each in whole] == [
        list(range(10))
    ] * 3
    assert whole[0] != whole[1] != whole[2] != whole[0]
    assert of_epoch(0, seed=2, **options()) != whole[0]
    for epoch in (0, 2):
        assert of_epoch(epoch, start=(epoch, 3), **options()) == whole[epoch][3:]
        assert of_epoch(epoch, start=(epoch, 5), **options()) == []
    assert of_epoch(2, start=(1, 3), **options()) == whole[2]  # only the epoch that it starts in is short


def test_worker_processes_fetch_the_same():
    rest = of_epoch(1, start=(1, 3), num_workers=1)
    assert rest == of_epoch(1, num_workers=1)[3:]


def test_nothing_of_it_draws_from_the_global_random_numbers():
    def drawn() -> tuple[Any, ...]:
        return torch.rand(1).item(), np.random.rand(), random.random()  # noqa: NPY002

    def seeded() -> None:
        torch.manual_seed(3)
        np.random.seed(3)  # noqa: NPY002
        random.seed(3)

    seeded()
    expected = drawn()
    seeded()
    data = stock()
    for loader in (data.train_dataloader(), *data.val_dataloader()):
        list(loader)
    assert drawn() == expected
    # And those outside play no role for what it draws.
    assert torch.equal(cast(Numbers, stock().own).drawn, cast(Numbers, data.own).drawn)


def test_evaluations_read_the_same_first_batches():
    data = stock(eval_train_batches=2, eval_val_batches=1)
    first = [list(loader) for loader in data.val_dataloader()]
    data.trainer = cast(Any, Epoch(4))
    assert [list(loader) for loader in data.val_dataloader()] == first
    assert [len(batches) for batches in first] == [2, 1]
    assert [len(loader) for loader in data.val_dataloader()] == [2, 1]
    assert len(list(data.split_dataloader("val"))) == 2


class Endless(Numbers):
    """A loader without a length."""

    def train_dataloader(self) -> Any:
        class Stream(IterableDataset[int]):
            def __iter__(self) -> Any:
                yield from range(100)

        return DataLoader(Stream(), batch_size=2)


def test_how_many_batches_an_epoch_has():
    assert stock().steps_per_epoch() == 5
    assert stock().steps_per_epoch(accumulate=2) == 3
    assert stock(Endless()).steps_per_epoch() == UNKNOWN
    with pytest.raises(InputError, match="devices=1"):
        stock().steps_per_epoch(world_size=2)
    with pytest.raises(InputError, match=r"train_dataloader\(\) has no batch"):
        stock(Numbers(1, drop_last=True)).steps_per_epoch()


class Several(Numbers):
    """Two validation sets."""

    def val_dataloader(self) -> Any:
        return [super().val_dataloader(), super().val_dataloader()]


class NoneAtAll(L.LightningDataModule):
    """A datamodule to predict with."""

    def train_dataloader(self) -> Any:
        return DataLoader(range(4))  # type: ignore[arg-type]


@pytest.mark.parametrize("own", [Several(), NoneAtAll()])
def test_it_must_have_one_validation_loader(own):
    with pytest.raises(InputError, match=r"val_dataloader\(\) must give one loader"):
        stock(own)


class Told(Numbers):
    """Says what it may say."""

    name, max_length, batch_size = "told", 7, 4
    tokenizer = BytesTokenizer()

    def content_sha256(self) -> str:
        return "abc"


def test_what_it_says_of_itself_counts():
    data = stock(Told())
    assert (data.name, data.max_length, data.batch_size, data.content_sha256()) == ("told", 7, 4, "abc")
    assert data.tokenizer is Told.tokenizer
    silent = stock()
    assert (silent.name, silent.max_length, silent.batch_size, silent.content_sha256()) == (
        "Numbers",
        1,
        1,
        "",
    )
    assert "changed data are not noticed" in "".join(silent.report(parameters=1, world_size=1))
    assert "changed data are not noticed" not in "".join(data.report(parameters=1, world_size=1))
