"""The scores of a finished classifier: the same however many processes divide the texts."""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gptpl.callbacks.checkpoints import BestCheckpoint
from gptpl.callbacks.classification import FinalScores
from gptpl.data.classification.datamodule import LabelledDataModule, LabelledTexts
from gptpl.data.sources import LabelledFiles
from gptpl.evaluation.classifier import evaluate_classifier
from gptpl.tokenizers import BytesTokenizer
from gptpl.training.classification import ClassificationModule

SPLITS = {"train": 84, "val": 12, "test": 25}


@pytest.fixture
def data(tmp_path: Path) -> LabelledDataModule:
    """121 texts of 1 to 15 bytes in three classes: which letter they end with."""
    draw = random.Random(0)
    texts = [
        {"text": "".join(draw.choice("xyz ") for _ in range(draw.randrange(14))) + label, "label": label}
        for label in draw.choices("aabc", k=sum(SPLITS.values()))
    ]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(map(json.dumps, texts)))
    corpus, tokenizer = LabelledFiles(path=str(path)), BytesTokenizer()
    data = LabelledDataModule(
        corpus=corpus, tokenizer=tokenizer, max_length=16, batch_size=8, duplicates="keep"
    )
    assert {split: len(texts) for split, texts in data.load().items()} == SPLITS
    return data


def scored(
    pretraining: Any,
    data: LabelledDataModule,
    rank: int,
    world_size: int,
    *callbacks: Any,
    compiled: bool = False,
) -> dict[str, float]:
    torch.manual_seed(5)  # the head is new
    module = ClassificationModule(
        pretraining.net(), tokenizer=data.tokenizer, run_config={}, **data.module_settings()
    )
    module.compiled = compiled
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    trainer: Any = SimpleNamespace(
        datamodule=data,
        callbacks=list(callbacks),
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        world_size=world_size,
        global_rank=rank,
        is_global_zero=rank == 0,
    )
    data.trainer = trainer
    callback = FinalScores()
    callback.on_train_end(trainer, module)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    return callback.final_metrics


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
def test_two_processes_divide_the_texts_and_find_the_same_scores(
    pretraining: Any, data: LabelledDataModule, two_ranks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = scored(pretraining, data, 0, 1)
    labels = data.prepared.classes
    names = ("loss", "accuracy", "f1", *(f"f1_{label}" for label in labels), "calibration_error")
    assert alone.keys() == {*(f"test/{name}" for name in names), "best_train/accuracy", "best_val/accuracy"}
    read: list[int] = []
    getitems = LabelledTexts.__getitems__

    def counted(self: LabelledTexts, numbers: Any) -> Any:
        read.append(len(numbers))
        return getitems(self, numbers)

    monkeypatch.setattr(LabelledTexts, "__getitems__", counted)

    def rank_of(rank: int) -> Any:
        return scored(pretraining, data, rank, 2), sum(read)

    (first, read_by_first), (second, read_by_second) = two_ranks(rank_of)
    assert first == second
    assert first == pytest.approx(alone, rel=1e-6)
    assert read_by_first == read_by_second == (84 + 12 + 26) / 2  # one of them padding


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
def test_best_weights_that_one_process_cannot_read_are_nobodys(
    pretraining: Any, data: LabelledDataModule, two_ranks: Any, tmp_path: Path
) -> None:
    """As on two machines without a shared folder."""
    last = scored(pretraining, data, 0, 1)

    def rank_of(rank: int) -> Any:
        best = BestCheckpoint(dirpath=tmp_path)
        best.best_model_path = str(tmp_path / f"{rank}.ckpt")
        return scored(pretraining, data, rank, 2, best)

    (tmp_path / "0.ckpt").write_bytes(b"is not read")
    first, second = two_ranks(rank_of)
    assert first == second
    assert first == pytest.approx(last, rel=1e-6)


def test_blocks_compiled_for_training_are_not_compiled_for_scores(
    pretraining: Any, data: LabelledDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    stances: list[str] = []

    @contextmanager
    def set_stance(stance: str) -> Iterator[None]:
        stances.append(stance)
        yield
        stances.append("default")

    monkeypatch.setattr(torch.compiler, "set_stance", set_stance)
    found: list[list[str]] = []

    def evaluate(*given: Any, **named: Any) -> Any:
        found.append(stances[-1:])
        return evaluate_classifier(*given, **named)

    monkeypatch.setattr("gptpl.callbacks.classification.evaluate_classifier", evaluate)
    plain = scored(pretraining, data, 0, 1)
    assert (found, stances) == ([[]] * 3, [])
    assert scored(pretraining, data, 0, 1, compiled=True) == plain
    assert found[3:] == [["force_eager"]] * 3
    assert stances[-1] == "default"
