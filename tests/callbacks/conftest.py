"""A tiny language model in a real Trainer: seconds of training become a fraction of one."""

import logging
import math
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from gptpl.model import GPTConfig, GPTModel
from gptpl.tokenizers import BytesTokenizer

Batch = tuple[Tensor, Tensor]
BATCHES = 4  # an epoch


class TinyModule(L.LightningModule):
    """What the callbacks may rely on, and no more."""

    guessing_loss = math.log(257)
    loss_unit = "nats per token"

    def __init__(self, total_steps: int = 8, lr: float = 0.1) -> None:
        super().__init__()
        self.net = GPTModel(
            GPTConfig(
                vocab_size=257,
                context_length=16,
                emb_dim=16,
                n_heads=2,
                n_layers=1,
                drop_rate=0.1,
                qkv_bias=False,
            )
        )
        self.tokenizer = BytesTokenizer()
        self.total_steps = total_steps
        self.tokens_seen = 0
        self.lr = lr
        self.tokens_per_second: float | None = None
        self.train_losses: list[float] = []
        self.sums: dict[str, float] = {}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss_of(batch)
        self.tokens_seen += batch[0].numel()
        self.tokens_per_second = 310.4
        self.train_losses.append(loss.item())
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.log("train/loss", self.train_losses[-1])
        self.log("train/perplexity", torch.tensor(self.train_losses[-1]).exp())

    def on_validation_epoch_start(self) -> None:
        self.sums = {}

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        name = ("eval/train_loss", "val/loss")[dataloader_idx]
        self.sums[name] = self.sums.get(name, 0.0) + self.loss_of(batch).item()

    def on_validation_epoch_end(self) -> None:
        metrics = self.sums | {"val/perplexity": torch.tensor(self.sums["val/loss"]).exp().item()}
        self.log_dict(metrics)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self.loss_of(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("test/loss", self.loss_of(batch))

    def loss_of(self, batch: Batch) -> Tensor:
        inputs, targets = batch
        return F.cross_entropy(self.net(inputs).flatten(0, 1), targets.flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def loader(batches: int, seed: int) -> "DataLoader[Any]":
    tokens = torch.randint(0, 257, (batches, 2, 17), generator=torch.Generator().manual_seed(seed))
    batched = TensorDataset(tokens[..., :-1], tokens[..., 1:])
    # The loader's own generator keeps it from drawing on the global one.
    return DataLoader(batched, batch_size=None, generator=torch.Generator())


class Training:
    """Runs Trainers in a temporary folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def module(self, **options: Any) -> TinyModule:
        torch.manual_seed(1)
        return TinyModule(**options)

    def trainer(self, *callbacks: L.Callback, **options: Any) -> L.Trainer:
        progress = any(isinstance(callback, L.pytorch.callbacks.ProgressBar) for callback in callbacks)
        defaults: dict[str, Any] = {
            "accelerator": "cpu",
            "devices": 1,
            "callbacks": list(callbacks),
            "check_val_every_n_epoch": None,
            "default_root_dir": self.folder,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "enable_progress_bar": progress,
            "log_every_n_steps": 1,
            "logger": False,
            "max_steps": 8,
            "num_sanity_val_steps": -1,
            "val_check_interval": 2,
        }
        return L.Trainer(**(defaults | options))

    def fit(
        self,
        *callbacks: L.Callback,
        module: TinyModule | None = None,
        resume: Path | None = None,
        **options: Any,
    ) -> L.Trainer:
        module = self.module() if module is None else module
        trainer = self.trainer(*callbacks, **options)
        trainer.fit(module, loader(BATCHES, 1), [loader(1, 1), loader(1, 2)], ckpt_path=resume)
        return trainer

    loader = staticmethod(loader)


@pytest.fixture
def training(tmp_path: Path) -> Training:
    return Training(tmp_path / "lightning")


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """The messages that gptpl has logged so far."""
    with caplog.at_level(logging.INFO, logger="gptpl"):
        yield lambda: [record.getMessage() for record in caplog.records if record.name.startswith("gptpl")]


@pytest.fixture
def two_ranks(tmp_path: Path) -> Callable[[Callable[[int], Any]], list[Any]]:
    """Call a function with its rank in two processes that are a group; returns what it returned on each."""

    def run(function: Callable[[int], Any]) -> list[Any]:
        context = multiprocessing.get_context("fork")
        queue: Any = context.Queue()

        def rank_of(rank: int) -> None:
            store = f"file://{tmp_path / 'ranks'}"
            torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
            queue.put((rank, function(rank)))
            torch.distributed.destroy_process_group()

        ranks = [context.Process(target=rank_of, args=(rank,)) for rank in range(2)]
        for rank in ranks:
            rank.start()
        found = dict(queue.get(timeout=60) for _ in ranks)
        for rank in ranks:
            rank.join(60)
        return [found[0], found[1]]

    return run
