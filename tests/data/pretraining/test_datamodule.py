# B sequences in a batch, T tokens in a sequence

import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gptpl.data.pretraining.datamodule import TextDataModule
from gptpl.data.sources import TextFiles
from gptpl.data.training_data import IGNORED
from gptpl.errors import InputError
from gptpl.tokenizers import BytesTokenizer, WordsTokenizer

Batch = tuple[Tensor, Tensor]


@pytest.fixture
def make(tmp_path: Path):
    """Make a datamodule of random characters, one token each, so that no two sequences are alike."""

    def build(characters: int = 1000, **changes: Any) -> TextDataModule:
        draw = random.Random(0)
        text = "".join(chr(draw.randrange(33, 127)) for _ in range(characters))
        (tmp_path / "text.txt").write_text(text)
        arguments: dict[str, Any] = {
            "corpus": TextFiles(tmp_path / "text.txt"),
            "tokenizer": BytesTokenizer(),
            "max_length": 8,
            "stride": 8,
            "batch_size": 2,
            "cache_dir": tmp_path / "cache",
        }
        return TextDataModule(**(arguments | changes))

    return build


def on_rank(module: TextDataModule, rank: int, world_size: int) -> TextDataModule:
    module.trainer = SimpleNamespace(
        global_rank=rank, world_size=world_size, overfit_batches=0, limit_train_batches=1.0
    )  # type: ignore[assignment]
    return module


def equal(a: list[Batch], b: list[Batch]) -> bool:
    pairs = zip(a, b, strict=True)
    return all(x.equal(u) and y.equal(v) for (x, y), (u, v) in pairs)


# --- the published experiment's counts ------------------------------------------------------------------


def test_the_counts_of_the_published_experiment(make):
    """A text of 5,145 tokens, 256/256, batch 2: 9 training batches and 1 validation batch, each (2, 256)."""
    module = make(5145, max_length=256, stride=256)
    train, (evaluated, val) = list(module.train_dataloader()), module.val_dataloader()
    assert [len(train), len(list(evaluated)), len(list(val))] == [9, 5, 1]
    for inputs, targets in [*train, *evaluated, *val]:
        assert inputs.shape == targets.shape == (2, 256)
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs[:, 1:].equal(targets[:, :-1])
        assert (targets != IGNORED).all()


# --- training -------------------------------------------------------------------------------------------


def test_an_epoch_holds_every_training_sequence_once_and_the_next_another_order(make):
    module = make(1000, batch_size=4)
    loader = module.train_dataloader()
    sequences = module.examples("train")
    known = {tuple(sequences[index][1].tolist()): index for index in range(len(sequences))}
    assert len(known) == len(sequences)
    orders = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        orders.append([known[tuple(row.tolist())] for _, targets in loader for row in targets])
    assert all(len(set(order)) == len(order) == len(sequences) // 4 * 4 for order in orders)
    assert orders[0] != orders[1] != sorted(orders[1])


def test_workers_change_no_batch(make):
    module, with_workers = make(), make(num_workers=2)
    loader = with_workers.train_dataloader()
    assert loader.persistent_workers
    for epoch in range(2):
        alone = module.train_dataloader()
        for each in (loader, alone):
            each.sampler.set_epoch(epoch)
        assert equal(list(loader), list(alone))


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_see_together_what_one_process_sees_with_the_wide_batch(make, world_size: int):
    wide = make(batch_size=2 * world_size)
    narrow = [on_rank(make(), rank, world_size) for rank in range(world_size)]
    shares = zip(*(module.train_dataloader() for module in narrow), strict=True)
    joined = [(torch.cat([x for x, _ in share]), torch.cat([y for _, y in share])) for share in shares]
    assert equal(joined, list(wide.train_dataloader()))


@pytest.mark.parametrize("accumulate", [1, 2, 3, 7])
@pytest.mark.parametrize("limit", [100, 430])
def test_steps_per_epoch_are_those_that_lightning_takes(make, accumulate: int, limit: int):
    module, model = make(limit), Recorder()
    quiet_trainer(max_epochs=2, accumulate_grad_batches=accumulate).fit(model, datamodule=module)
    assert model.trainer.global_step == 2 * module.steps_per_epoch(accumulate=accumulate)


def test_steps_per_epoch_with_several_ranks(make):
    module = make(1000)  # 900 training tokens, 112 sequences
    assert [module.steps_per_epoch(world_size=ranks) for ranks in (1, 2, 3)] == [56, 28, 18]
    assert module.steps_per_epoch(world_size=3, accumulate=4) == 5


def test_less_than_one_batch_says_what_to_do(make):
    module = make(100, batch_size=32)
    for use in (module.train_dataloader, module.steps_per_epoch):
        with pytest.raises(InputError, match=r"11 sequences.*data\.batch_size=32: lower .*more text"):
            use()
    with pytest.raises(InputError, match="batch_size=6 on each of 2 devices"):
        make(100, batch_size=6).steps_per_epoch(world_size=2)


# --- evaluation -----------------------------------------------------------------------------------------


def test_evaluation_uses_the_same_sequences_every_time_in_order(make):
    module = make()
    loaders = module.val_dataloader()
    first = [list(loader) for loader in loaders]
    for loader in loaders:
        loader.sampler.set_epoch(5)  # as Lightning does
    assert all(equal(list(loader), batches) for loader, batches in zip(loaders, first, strict=True))
    # 10 sequences of 112 in the training text, evenly spaced
    rows = [row for inputs, _ in first[0] for row in inputs]
    sequences = module.examples("train")
    expected = [sequences[number * 112 // 10][0] for number in range(10)]
    assert all(a.equal(b) for a, b in zip(rows, expected, strict=True))


def test_all_batches_are_full_ones_in_training_and_all_in_validation(make):
    module = make(990, batch_size=5, eval_train_batches=None, eval_val_batches=None)
    assert (len(module.examples("train")), len(module.examples("val"))) == (111, 12)
    train, val = (list(loader) for loader in module.val_dataloader())
    assert [len(inputs) for inputs, _ in train] == [5] * 22
    assert [len(inputs) for inputs, _ in val] == [5, 5, 2]
    rows = torch.cat([inputs for inputs, _ in val])
    assert rows.equal(torch.stack([module.examples("val")[index][0] for index in range(12)]))


def test_more_batches_than_there_are_means_all(make):
    module = make(990, batch_size=5, eval_train_batches=1000, eval_val_batches=1000)
    assert [len(loader) for loader in module.val_dataloader()] == [22, 3]


def test_a_training_text_smaller_than_a_batch_can_still_be_evaluated(make):
    train, val = make(100, batch_size=32, train_ratio=0.5).val_dataloader()
    assert [len(inputs) for inputs, _ in [*train, *val]] == [6, 6]


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_evaluate_together_exactly_what_one_process_evaluates(make, world_size: int):
    limits = {"eval_train_batches": 2, "eval_val_batches": None}
    wide = make(990, batch_size=2 * world_size, **limits)
    narrow = [on_rank(make(990, **limits), rank, world_size) for rank in range(world_size)]
    for loader, *others in zip(*(m.val_dataloader() for m in [wide, *narrow]), strict=True):
        assert len({len(other) for other in others}) == 1
        for (_, targets), *shares in zip(loader, *others, strict=True):
            assert len({share[1].shape for share in shares}) == 1  # no rank has more to do
            rows = torch.cat([share[1] for share in shares])
            assert rows[(rows != IGNORED).any(1)].equal(targets)
            assert ((rows == IGNORED).any(1) == (rows == IGNORED).all(1)).all()


@pytest.mark.parametrize("split", ["train", "val", "all"])
@pytest.mark.parametrize("characters", [10, 15, 100, 1000])
@pytest.mark.parametrize("world_size", [1, 3])
def test_every_token_but_the_first_is_scored_once(make, split: Any, characters: int, world_size: int):
    modules = [on_rank(make(characters, train_ratio=0.6, stride=3), r, world_size) for r in range(world_size)]
    encoded: Any = modules[0].load()
    tokens: Any = {"train": encoded.train, "val": encoded.val, "all": [*encoded.train, *encoded.val]}[split]
    loaders = [module.evaluation_dataloader(split) for module in modules]
    assert len({len(loader) for loader in loaders}) == 1
    if world_size == 1:  # no sequence without a target, also when the last one is full: 9 tokens of 15
        assert all((targets != IGNORED).any(1).all() for _, targets in loaders[0])
    scored = [
        (int(x), int(y))
        for loader in loaders
        for inputs, targets in loader
        for x, y in zip(inputs.flatten(), targets.flatten(), strict=True)
        if y != IGNORED
    ]
    assert Counter(scored) == Counter((int(tokens[i]), int(tokens[i + 1])) for i in range(len(tokens) - 1))


def test_a_split_with_nothing_to_score_is_refused(make):
    module = make(2)
    with pytest.raises(InputError, match="val split has 1 tokens, none to score"):
        module.evaluation_dataloader("val")
    with pytest.raises(InputError, match="training split has 1 tokens, too short"):
        module.val_dataloader()


# --- the global random numbers --------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_no_loader_touches_the_global_random_numbers(make, num_workers: int):
    module = make(num_workers=num_workers)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    loaders = [module.train_dataloader(), *module.val_dataloader(), module.evaluation_dataloader("all")]
    for loader in loaders:
        list(loader)
    assert torch.get_rng_state().equal(before)


# --- with Lightning -------------------------------------------------------------------------------------


class Recorder(L.LightningModule):
    """Learns nothing and keeps every batch that it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained: list[Batch] = []
        self.evaluated: list[list[Batch]] = [[], []]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.trained.append(batch)
        return self.weight * 0

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int) -> None:
        self.evaluated[dataloader_idx].append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def quiet_trainer(**arguments: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **arguments,
    )


def test_a_trainer_gets_every_epoch_in_its_own_order_and_evaluation_changes_none(make):
    module, model = make(200), Recorder()
    quiet_trainer(max_epochs=3, val_check_interval=3, num_sanity_val_steps=2).fit(model, datamodule=module)
    expected: list[Batch] = []
    loader = make(200).train_dataloader()
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        expected += list(loader)
    assert equal(model.trained, expected)
    assert len(loader) == 11
    assert len(model.evaluated[0]) == 2 + 9 * 5  # two for the check before training
    assert equal(model.evaluated[0][2:7], model.evaluated[0][7:12])


# --- loading --------------------------------------------------------------------------------------------


def test_it_loads_once_and_by_hand(make, monkeypatch: pytest.MonkeyPatch):
    module = make(tokenizer=WordsTokenizer())
    encoded = module.load()
    monkeypatch.setattr(
        "gptpl.data.pretraining.datamodule.encode_corpus", lambda *_, **__: pytest.fail("again")
    )
    module.prepare_data()
    module.setup("fit")
    module.setup("validate")
    assert module.load() is module.encoded is encoded
    assert module.tokenizer is encoded.tokenizer
    assert len(module.examples("val").tokens) == encoded.stats.val_tokens


def test_setup_refuses_a_validation_text_without_a_sequence(make):
    module = make(50)
    module.prepare_data()
    with pytest.raises(InputError, match="validation split has 5 tokens"):
        module.setup()


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 0},
        {"max_length": 0},
        {"stride": -1},
        {"train_ratio": 1},
        {"num_workers": -1},
        {"eval_train_batches": 0},
        {"eval_val_batches": -5},
    ],
)
def test_numbers_out_of_range_are_refused_at_once(make, changes: dict[str, int]):
    ((name, value),) = changes.items()
    with pytest.raises(InputError, match=rf"^(data\.)?{name}.* {value}\b"):
        make(**changes)
    with pytest.raises(InputError, match="seed must be at least 0, got -1"):
        make(seed=-1)


def test_memory_is_pinned_where_there_is_a_gpu(make, monkeypatch: pytest.MonkeyPatch):
    def pins(module: TextDataModule) -> set[bool]:
        loaders: list[DataLoader[Batch]] = [module.train_dataloader(), *module.val_dataloader()]
        return {loader.pin_memory for loader in loaders}

    assert pins(make(pin_memory=False)) == {False}
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert pins(make()) == {True}
    assert pins(make(pin_memory=False)) == {False}
