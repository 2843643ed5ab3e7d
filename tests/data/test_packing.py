"""Documents packed into rows: nothing is lost, nothing is read twice, every document begins as it should."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptpl.data import packing
from gptpl.data.packing import Packing
from gptpl.data.pretraining.datamodule import PackedSequences, TextDataModule
from gptpl.data.sampler import PADDING
from gptpl.data.sources import TextFiles
from gptpl.errors import InputError
from gptpl.model import GPTConfig, GPTModel
from gptpl.tokenizers import BytesTokenizer
from gptpl.training.language_model import LanguageModelingModule

EOT = 9
documents_of = st.lists(st.lists(st.integers(0, 8), max_size=30), min_size=1, max_size=40)


def stream(documents: list[list[int]]) -> np.ndarray[Any, Any]:
    return np.array([token for each in documents for token in (*each, EOT)], dtype=np.uint16)


@given(documents=documents_of, T=st.integers(1, 12), block=st.integers(1, 50))
def test_every_target_but_the_first_tokens_is_in_one_place(
    documents: list[list[int]], T: int, block: int
) -> None:
    tokens = stream(documents)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "BLOCK", block)
        packed = Packing.of(tokens, eot_id=EOT, T=T)
    rows = PackedSequences(tokens, packed, max_length=T)
    batch = rows.__getitems__(list(range(len(rows))))
    known = batch.targets >= 0
    assert batch.segments is not None
    assert known.sum() == len(tokens) - 1 == batch.tokens == packed.lengths.sum()
    assert ((batch.segments > 0) == known).all()
    # Every pair of a token and its successor, once.
    pairs = sorted(zip(batch.inputs[known].tolist(), batch.targets[known].tolist(), strict=True))
    assert pairs == sorted(zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True))
    # A segment has the end-of-text token nowhere but at its beginning, and whole documents end with it.
    for row in range(len(rows)):
        for number in range(1, int(batch.segments[row].max()) + 1):
            own = batch.segments[row] == number
            assert EOT not in batch.inputs[row][own][1:].tolist()
    long = [len(each) + 1 for each in documents]
    long[0] -= 1  # before the first there is no end-of-text token
    assert packed.cut == sum(length > T for length in long)
    assert packed.documents == sum(length > 0 for length in long)


def test_short_documents_share_rows_and_long_ones_begin_their_own() -> None:
    tokens = stream([[1, 1], [2] * 7, [3, 3, 3], [4]])
    rows = PackedSequences(tokens, Packing.of(tokens, eot_id=EOT, T=4), max_length=4)
    batch = rows.__getitems__([*range(len(rows)), PADDING])
    assert batch.segments is not None
    assert batch.inputs.tolist() == [[9, 2, 2, 2], [2, 2, 2, 2], [9, 3, 3, 3], [1, 1, 9, 4], [0] * 4]
    assert batch.targets.tolist() == [[2, 2, 2, 2], [2, 2, 2, 9], [3, 3, 3, 9], [1, 9, 4, 9], [-100] * 4]
    assert batch.segments.tolist() == [[1] * 4, [1] * 4, [1] * 4, [1, 1, 2, 2], [0] * 4]
    assert rows.packing.tokens == 16


def test_the_last_document_may_have_no_end() -> None:
    tokens = np.array([1, 2, EOT, 3, 4], dtype=np.uint16)
    batch = PackedSequences(tokens, Packing.of(tokens, eot_id=EOT, T=8), max_length=8).__getitems__([0])
    assert batch.inputs.tolist() == [[1, 2, 9, 3, 0, 0, 0, 0]]
    assert batch.targets.tolist() == [[2, 9, 3, 4, *[-100] * 4]]


def test_a_packing_is_kept_complete_or_not_at_all(tmp_path: Path) -> None:
    tokens = stream([[1, 1], [2] * 7, [3, 3, 3]])
    made = Packing.of(tokens, eot_id=EOT, T=4)
    Packing.write(tmp_path / "kept", tokens, eot_id=EOT, T=4)
    found = Packing.read(tmp_path / "kept")
    for each in (found, pickle.loads(pickle.dumps(found)), pickle.loads(pickle.dumps(made))):  # noqa: S301
        assert isinstance(each.starts, np.memmap) == (each.folder is not None)
        for name in ("starts", "lengths", "rows"):
            np.testing.assert_array_equal(getattr(each, name), getattr(made, name))
        assert (each.documents, each.cut, each.tokens) == (3, 1, len(tokens) - 1)
    assert len(pickle.dumps(found)) < 500
    (tmp_path / "kept" / "starts.bin").write_bytes(made.starts[:-1].tobytes())
    with pytest.raises(ValueError, match="incomplete"):
        Packing.read(tmp_path / "kept")
    (tmp_path / "kept" / "counts.json").unlink()
    with pytest.raises(OSError, match="counts"):
        Packing.read(tmp_path / "kept")


# ------------------------------------------------------------------------------------------------ in training


def data_of(folder: Path, **settings: Any) -> TextDataModule:
    lines = [json.dumps({"text": f"document {n} " + "x" * (n % 50)}) for n in range(200)]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    given: dict[str, Any] = {
        "corpus": TextFiles(folder / "texts.jsonl"), "tokenizer": BytesTokenizer(), "max_length": 32,
        "split": "documents", "packing": "best_fit", "cache_dir": folder / "cache", "batch_size": 4,
    }  # fmt: skip
    return TextDataModule(**given | settings)


def test_a_text_is_packed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_of(tmp_path)
    data.setup()
    first = [batch.inputs.tolist() for batch in data.train_dataloader()]
    assert len(first) == len(data.examples("train")) // 4 == data.steps_per_epoch()
    monkeypatch.setattr(packing, "pack_documents", None)
    assert [batch.inputs.tolist() for batch in data_of(tmp_path).train_dataloader()] == first
    workers = data_of(tmp_path, num_workers=1)
    assert [batch.inputs.tolist() for batch in workers.train_dataloader()] == first
    lines = "\n".join(data.report(parameters=None, world_size=1))
    assert "sequences of 32 tokens, of whole documents" in lines
    cut = data.examples("train").packing.cut  # type: ignore[union-attr]
    assert f"{cut:,} of {data.encoded.stats.train_documents:,} documents are longer than one" in lines


def test_a_document_is_read_as_if_it_stood_alone(tmp_path: Path) -> None:
    config = GPTConfig(
        vocab_size=257, context_length=32, emb_dim=16, n_heads=2, n_layers=2, drop_rate=0.0, qkv_bias=False
    )
    torch.manual_seed(0)
    net = GPTModel(config)
    batch = next(iter(data_of(tmp_path).train_dataloader()))
    module = LanguageModelingModule(net, tokenizer=BytesTokenizer(), packed=True)
    assert module.padded
    total = torch.zeros(())
    for inputs, targets, segments in zip(*batch[:3], strict=True):
        for number in range(1, int(segments.max()) + 1):
            own = segments == number
            logits = net(inputs[own][None])[0]
            total += torch.nn.functional.cross_entropy(logits, targets[own], reduction="sum")
    assert batch.tokens == module.tokens_in(batch) == module.loss_weight(batch)
    torch.testing.assert_close(module.batch_loss(batch), total / batch.tokens)
    sums = module.evaluation_sums(batch)
    assert sums["loss"][1] == batch.tokens
    torch.testing.assert_close(sums["loss"][0].float(), total.detach())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"packing": "worst_fit"}, r"data\.packing=worst_fit is unknown: choose one of concat, best_fit"),
        ({"stride": 5}, r"data\.stride=5 has no meaning with data\.packing=best_fit"),
    ],
)
def test_settings_without_meaning_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        data_of(tmp_path, **settings)


def test_the_same_texts_in_another_order_are_packed_again(tmp_path: Path) -> None:
    texts = [f"document {n} " + "x" * (n % 50) for n in range(200)]
    for name, more in (("plain", {}), ("longer", {"meta": "y" * 500})):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"text": text, **more}) for text in texts]
        (tmp_path / name / "texts.jsonl").write_text("\n".join(lines))
    settings: dict[str, Any] = {
        "tokenizer": BytesTokenizer(), "max_length": 32, "split": "documents", "packing": "best_fit",
        "val_tokens": 20, "cache_dir": tmp_path / "cache",
    }  # fmt: skip
    one, other = (
        TextDataModule(corpus=TextFiles(tmp_path / name / "texts.jsonl"), **settings)
        for name in ("plain", "longer")
    )
    for data in (one, other):
        data.setup()
    assert one.content_sha256() == other.content_sha256()
    assert one.encoded.train[:].tolist() != other.encoded.train[:].tolist()
    for data in (one, other):
        rows: Any = data.examples("train")
        ends = np.flatnonzero(data.encoded.train[:] == 256)
        assert set(ends.tolist()) - {len(data.encoded.train) - 1} <= {*rows.packing.starts.tolist()}


def test_a_text_without_a_target_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("0123456789")
    data = TextDataModule(
        corpus=TextFiles(tmp_path / "short.txt"), tokenizer=BytesTokenizer(), max_length=4,
        packing="best_fit", cache_dir=tmp_path / "cache",
    )  # fmt: skip
    with pytest.raises(InputError, match="the validation split has 1 tokens, none to learn"):
        data.setup()
