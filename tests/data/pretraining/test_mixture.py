"""Several corpora in proportions: each as often as its share says, whatever happens in between."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from gptpl.data.pretraining import mixture
from gptpl.data.pretraining.mixture import Draws, MixtureDataModule, Source
from gptpl.data.pretraining.shards import encode_documents
from gptpl.data.sampler import EpochSampler, InOrder
from gptpl.data.sources import Tale, TextFiles
from gptpl.errors import InputError
from gptpl.tokenizers import BytesTokenizer, WordsTokenizer

LETTERS = {"a": 60, "b": 30, "c": 90}
"""Documents of each source; a document has 40 times its letter, and its number."""


def write(folder: Path) -> None:
    for letter, count in LETTERS.items():
        lines = [json.dumps({"text": f"{letter * 40}{n}"}) + "\n" for n in range(count)]
        (folder / f"{letter}.jsonl").write_text("".join(lines))


def made(folder: Path, shares: Mapping[str, Mapping[str, float]], **settings: Any) -> MixtureDataModule:
    write(folder)
    given: dict[str, Any] = {
        "sources": {name: {"path": folder / f"{name}.jsonl", **share} for name, share in shares.items()},
        "tokenizer": BytesTokenizer(), "max_length": 20, "batch_size": 3, "val_tokens": 60,
        "cache_dir": folder / "cache", "encode_workers": 1,
    }  # fmt: skip
    return MixtureDataModule(**given | settings)


def letters_of(data: MixtureDataModule, epochs: int = 1) -> list[Counter[str]]:
    """How many sequences each source gives in each epoch; a sequence is of the source that it begins in."""
    found = []
    ends = np.cumsum([len(part.train) for part in data.parts])
    for epoch in range(epochs):
        data.start_at(epoch=epoch, batch=0)
        sampler = data.train_dataloader().sampler
        indices = list(sampler)
        assert len(indices) == data.train_examples // 3 * 3
        sequences = [len(part) for part in data.examples("train").datasets]
        borders = np.cumsum(sequences)
        found.append(Counter("abc"[int(np.searchsorted(borders, index, side="right"))] for index in indices))
        for index in indices[:5]:
            source = int(np.searchsorted(borders, index, side="right"))
            inputs, _ = data.examples("train").__getitems__([index])
            own = data.parts[source].train[: int(ends[-1])]
            place = (index - (borders[source] - sequences[source])) * 20
            assert inputs[0].tolist() == own[place : place + 20].tolist()
    return found


def test_weights_are_shares_and_nothing_is_drawn_twice_before_all_is(tmp_path: Path) -> None:
    data = made(tmp_path, {"a": {"weight": 1}, "b": {"weight": 2}, "c": {"weight": 0}})
    available = dict(zip("abc", map(len, data.examples("train").datasets), strict=True))
    assert available["a"] > available["b"] / 2  # so all of b is read
    [counts] = letters_of(data)
    assert data.draws.counts == [round(available["b"] / 2), available["b"], 0]
    assert abs(counts["a"] - data.draws.counts[0]) <= 2, "an incomplete batch was left out"
    assert counts["c"] == 0
    indices = data.draws.indices(np.arange(data.draws.count), epoch=0)
    assert len(set(indices.tolist())) == data.draws.count


def test_epochs_and_tokens_may_be_mixed(tmp_path: Path) -> None:
    data = made(tmp_path, {"a": {"epochs": 2.5}, "b": {"tokens": 400}, "c": {"epochs": 1}})
    a, _, c = map(len, data.examples("train").datasets)
    assert data.draws.counts == [round(2.5 * a), 20, c]
    assert data.train_examples == sum(data.draws.counts)
    assert data.steps_per_epoch() == data.train_examples // 3
    report = data.report(parameters=None, world_size=1)
    line = next(line for line in report if line.split()[:2] == ["a", "60"])
    assert line.split()[1:] == [
        "60", f"{data.parts[0].stats.train_tokens:,}", str(round(2.5 * a)),
        f"{round(2.5 * a) / data.train_examples:.1%}", f"{round(2.5 * a) / a:.2f}",
    ]  # fmt: skip


@pytest.mark.parametrize("counts", [[7, 5, 0], [3, 40, 11], [20, 1, 1]])
def test_after_any_epoch_all_of_a_source_have_been_drawn_equally_often(counts: list[int]) -> None:
    ranges = [range(7), range(7, 12), range(12, 20)]
    draws = Draws(ranges, counts, seed=3)
    read: Counter[int] = Counter()
    orders = set()
    for epoch in range(9):
        sampler = EpochSampler(
            draws.count, draw=draws.indices, batch_size=1, seed=3, computed=True, start=(epoch, 0)
        )
        indices = sampler.order().flatten().tolist()
        orders.add(tuple(indices))
        assert [sum(index in own for index in indices) for own in ranges] == counts
        read.update(indices)
        for own, count in zip(ranges, counts, strict=True):
            times = [read[index] for index in own]
            assert sum(times) == count * (epoch + 1)
            assert max(times) - min(times) <= 1
    assert len(orders) == 9


def test_every_reading_of_a_source_has_an_order_of_its_own() -> None:
    draws = Draws([range(30), range(30, 60)], [30, 30], seed=1)
    read = [draws.indices(np.arange(60), epoch=epoch).tolist() for epoch in range(3)]
    orders = [tuple(index % 30 for index in own[start : start + 30]) for own in read for start in (0, 30)]
    assert len(set(orders)) == 6


def test_the_order_is_the_same_for_any_number_of_ranks_and_from_any_batch_on() -> None:
    draws = Draws([range(50), range(50, 80)], [20, 30], seed=1)

    def order(ranks: int, start: tuple[int, int] = (1, 0), seed: int = 1) -> list[int]:
        samplers = [
            EpochSampler(
                draws.count, draw=draws.indices, batch_size=10 // ranks, seed=seed, rank=rank,
                world_size=ranks, computed=True, start=start,
            )
            for rank in range(ranks)
        ]  # fmt: skip
        own = [np.array(list(sampler)).reshape(-1, 10 // ranks) for sampler in samplers]
        return np.concatenate(own, axis=1).flatten().tolist()

    assert order(1) == order(2) == order(5)
    assert order(2, (1, 3)) == order(1)[30:]
    assert order(1, seed=2) != order(1)


def test_validation_is_the_same_for_every_mixture_and_shares_its_caches(tmp_path: Path) -> None:
    first = made(tmp_path, {"a": {"weight": 1}, "b": {"weight": 2}})
    other = made(tmp_path, {"a": {"epochs": 3}, "b": {"tokens": 100}}, max_length=16)
    alone = encode_documents(
        TextFiles(tmp_path / "b.jsonl", pattern=None, name="corpus"), BytesTokenizer(), val_tokens=60,
        workers=1, cache_dir=tmp_path / "cache",
    )  # fmt: skip
    first.load()
    entries = {path.name for path in (tmp_path / "cache" / "shards").iterdir() if path.is_dir()}
    assert len(entries) == 2
    assert first.encoded.val.tolist() == other.encoded.val.tolist()
    assert first.encoded.val.tolist()[-len(alone.val) :] == alone.val.tolist()
    assert first.content_sha256() == other.content_sha256()
    assert made(tmp_path, {"a": {"weight": 1}, "c": {"weight": 2}}).content_sha256() != first.content_sha256()


def test_evaluated_training_sequences_are_in_proportion(tmp_path: Path) -> None:
    data = made(tmp_path, {"a": {"weight": 0}, "b": {"weight": 1}, "c": {"weight": 1}}, eval_train_batches=10)
    train, *_ = data.val_dataloader()
    letters = Counter(chr(token) for inputs, _ in train for token in inputs.flatten().tolist())
    assert letters["a"] == 0
    assert 0.4 < letters["b"] / (letters["b"] + letters["c"]) < 0.6


def test_every_source_is_validated_on_as_much(tmp_path: Path) -> None:
    data = made(tmp_path, {"a": {"weight": 1}, "b": {"weight": 0}}, eval_val_batches=4, batch_size=2)
    _, *loaders = data.val_dataloader()
    assert data.evaluated == ("train", "val/a", "val/b")
    for letter, loader in zip("ab", loaders, strict=True):
        batches = [inputs for inputs, _ in loader]
        assert [len(inputs) for inputs in batches] == [2, 2]
        letters = Counter(chr(token) for inputs in batches for token in inputs.flatten().tolist())
        assert letters.most_common(1)[0][0] == letter
        assert letters["b" if letter == "a" else "a"] == 0


def test_text_of_one_source_in_the_validation_of_another_is_told(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    rng = np.random.default_rng(0)
    texts = ["".join(map(chr, rng.integers(97, 123, 200))) for _ in range(40)]
    for folder, own in (("one", texts), ("two", [*texts[::-1], *("x" + text for text in texts)])):
        (tmp_path / folder / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in own))
    settings: dict[str, Any] = {
        "sources": {name: {"path": tmp_path / name, "weight": 1} for name in ("one", "two")},
        "tokenizer": BytesTokenizer(), "max_length": 32, "cache_dir": tmp_path / "cache", "encode_workers": 1,
    }  # fmt: skip
    stats = MixtureDataModule(**settings).encoded.stats
    train = bytes(int(token) % 256 for token in MixtureDataModule(**settings).encoded.train[:])
    val = MixtureDataModule(**settings).encoded.val
    blocks = [bytes(int(t) % 256 for t in val[n : n + 32]) for n in range(0, len(val) - 31, 32)]
    assert stats.compared_blocks == len(blocks)
    assert stats.duplicate_blocks == sum(block in train for block in blocks) > 0
    assert MixtureDataModule(**settings).encoded.stats == stats


def test_duplicates_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stats = made(tmp_path, {"a": {"weight": 1}, "b": {"weight": 2}}).encoded.stats
    monkeypatch.setattr(mixture, "count_duplicates", None)
    assert made(tmp_path, {"a": {"weight": 1}, "b": {"weight": 2}}).encoded.stats == stats


def test_a_vocabulary_is_made_from_all_sources(tmp_path: Path) -> None:
    data = made(tmp_path, {"a": {"epochs": 1}, "b": {"epochs": 1}}, tokenizer=WordsTokenizer(), max_length=2)
    words = cast(WordsTokenizer, data.tokenizer).vocabulary
    assert f"{'a' * 40}59" in words
    assert f"{'b' * 40}29" in words


def test_packed_documents_of_sources(tmp_path: Path) -> None:
    data = made(tmp_path, {"a": {"epochs": 1}, "b": {"tokens": 900}}, packing="best_fit", max_length=64)
    rows = data.examples("train").datasets[1]
    # A document has 41 or 42 tokens, of which no two fit into a row.
    assert {len(rows.packing.lengths), rows.packing.documents, len(rows)} == {len(rows)}
    assert data.draws.counts[1] == round(900 / (rows.packing.tokens / len(rows))) > 900 / 64
    assert data.module_settings() == {"packed": True}
    report = "\n".join(data.report(parameters=None, world_size=1))
    assert "0 of 87 documents are longer than one" in report or "documents are longer than one" in report


def test_overfitting_takes_the_sources_of_the_mixture(tmp_path: Path) -> None:
    data = made(tmp_path, {"a": {"weight": 0}, "b": {"weight": 1}})
    sampler = data.make_sampler(
        InOrder, batch_size=3, seed=1, shuffle=False, rank=0, world_size=1, computed=True
    )
    first = len(data.examples("train").datasets[0])
    assert min(sampler) >= first
    assert isinstance(sampler, InOrder)


def test_a_source_may_be_a_corpus_of_ones_own(tmp_path: Path) -> None:
    class Numbers(Tale):
        name = "numbers"

        def documents(self) -> Iterator[str]:
            yield from map(str, range(1000, 1300))

    data = MixtureDataModule(
        sources={"one": Source(corpus=Numbers(), epochs=1), "two": {"corpus": Numbers(), "epochs": 1}},
        tokenizer=BytesTokenizer(), max_length=64, cache_dir=tmp_path, encode_workers=1, val_tokens=10,
    )  # fmt: skip
    assert data.draws.counts[0] == data.draws.counts[1] == len(data.examples("train").datasets[0])


def test_what_is_wrong_with_a_source_names_it(tmp_path: Path) -> None:
    data = MixtureDataModule(
        sources={"tale": {"corpus": Tale(), "epochs": 1}}, tokenizer=BytesTokenizer(), max_length=64,
        cache_dir=tmp_path, encode_workers=1,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"data\.sources\.tale: tale has 1 document, too few to validate on"):
        data.load()


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (None, r"data\.sources is not set: name at least one, e\.g\."),
        ({}, r"data\.sources is not set"),
        ({"a": {"path": "x"}}, r"data\.sources\.a has no share: give one of weight, epochs and tokens"),
        ({"a": {"path": "x", "weight": 1, "epochs": 2}}, r"data\.sources\.a has weight and epochs: give one"),
        ({"a": {"path": "x", "weight": -1}}, r"data\.sources\.a\.weight must be a number from 0 on, got -1"),
        ({"a": {"path": "x", "weight": float("nan")}}, r"a\.weight must be a number from 0 on, got nan"),
        ({"a": {"path": "x", "weight": float("inf")}}, r"a\.weight must be a number from 0 on, got inf"),
        ({"a": {"path": "x", "epochs": "two"}}, r"a\.epochs must be a number from 0 on, got 'two'"),
        ({"a": {"path": "x", "weight": 0}, "b": {"path": "x", "weight": 0}}, r"every share is 0"),
        (
            {"a": {"path": "x", "weight": 1}, "b": {"path": "x", "tokens": 5}},
            r"some have weights, others not",
        ),
        (
            {"a": {"paht": "x", "weight": 1}},
            r"data\.sources\.a has no setting 'paht': choose of path, pattern",
        ),
        (
            {"a": {"corpus": "x", "weight": 1}},
            r"data\.sources\.a: give path, pattern and field of files, or a",
        ),
        ({"a": {"corpus": Tale(), "path": "x", "weight": 1}}, r"data\.sources\.a: give path, pattern and"),
        ({"a": {"corpus": Tale(), "pattern": "x", "weight": 1}}, r"data\.sources\.a: give path, pattern and"),
        ({2023: {"path": "x", "weight": 1}}, r"data\.sources has the name 2023: give a word"),
        ({"{}": {"path": "x", "weight": 1}}, r"data\.sources has the name '{}': give a word"),
        ({"a": 3}, r"data\.sources\.a must be settings such as"),
        ([{"path": "x", "weight": 1}], r"data\.sources must have names"),
    ],
)
def test_sources_that_are_wrong_are_named(sources: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        MixtureDataModule(sources=sources, tokenizer=BytesTokenizer(), max_length=8)


def test_a_share_of_less_than_a_sequence_and_a_source_without_one_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.sources\.b would give 0\.\d+ of a sequence in an epoch"):
        made(tmp_path, {"a": {"weight": 1}, "b": {"weight": 1e-6}}).train_dataloader()
    with pytest.raises(InputError, match=r"data\.sources\.b: the training split has .* too short"):
        made(tmp_path, {"a": {"weight": 1}, "b": {"weight": 1}}, max_length=1500).setup()
