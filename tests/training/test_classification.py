"""A classifier's training against a bare PyTorch loop, what padding does to it, and what is kept of it."""

# B batch, T time, C classes

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptpl.checkpoints.loading import load_classifier, load_foreign_classifier, load_model
from gptpl.data.classification.datamodule import LabelledBatch, LabelledDataModule
from gptpl.data.sources import LabelledFiles
from gptpl.errors import InputError
from gptpl.evaluation.classifier import class_logits, evaluate_classifier, predictions
from gptpl.model import GPTModel
from gptpl.model.parameters import TuneLastBlock
from gptpl.tokenizers import BytesTokenizer, WordsTokenizer
from gptpl.training.classification import ClassificationModule
from gptpl.weights.hugging_face import write_classifier

STEPS = 20
LR = 1e-2


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """120 texts of 1 to 15 bytes in three classes of different size: which letter is in them."""
    draw = random.Random(0)
    lines = []
    for i in range(120):
        label = draw.choice("aabc")
        text = "".join(draw.choice("xyz ") for _ in range(draw.randrange(14))) + label
        lines.append(json.dumps({"text": f"{text}" if i % 7 else f"{text}!", "label": label}))
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(lines))
    return path


def data(path: Path, **changes: Any) -> LabelledDataModule:
    settings: dict[str, Any] = {
        "corpus": LabelledFiles(path=str(path)),
        "tokenizer": BytesTokenizer(),
        "max_length": 16,
        "batch_size": 8,
        "duplicates": "keep",
        "eval_val_batches": None,
    }
    return LabelledDataModule(**(settings | changes))


def module(net: GPTModel, of: LabelledDataModule, **changes: Any) -> ClassificationModule:
    settings: dict[str, Any] = {
        "tokenizer": of.tokenizer,
        "make_optimizer": lambda net: torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.1),
        "lr_factor": lambda step: 1.0,
        "total_steps": STEPS,
        "run_config": {},
        "eval_every_n_steps": 10,
        **of.module_settings(),
    }
    torch.manual_seed(5)
    return ClassificationModule(net, **(settings | changes))


def bare_losses(net: GPTModel, of: LabelledDataModule, weights: Tensor | None) -> list[float]:
    """Plain PyTorch: the batches of two epochs, padded by hand, a new head, AdamW."""
    torch.manual_seed(5)
    head = nn.Linear(16, 3)
    optimizer = torch.optim.AdamW(
        [*(p for name, p in net.named_parameters() if name != "out_head.weight"), *head.parameters()],
        lr=LR,
        weight_decay=0.1,
    )
    examples = of.prepared.splits["train"]
    losses: list[float] = []
    epoch, loader = 0, of.train_dataloader()
    while len(losses) < STEPS:
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        order = list(loader.sampler)
        for start in range(0, len(order), 8):
            chosen = [examples[i] for i in order[start : start + 8]]
            rows = [list(example.text.encode()) for example in chosen]
            longest = max(map(len, rows))
            tokens = torch.tensor([row + [256] * (longest - len(row)) for row in rows])
            hidden = net.hidden(tokens)
            last = torch.stack([hidden[i, len(row) - 1] for i, row in enumerate(rows)])
            labels = torch.tensor(["abc".index(example.label) for example in chosen])
            losses_of = F.cross_entropy(head(last), labels, reduction="none")
            loss = (losses_of if weights is None else losses_of * weights[labels]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        epoch += 1
    return losses[:STEPS]


@pytest.mark.parametrize("balance", ["none", "class_weights"])
def test_losses_are_a_bare_loops(pretraining: Any, texts: Path, balance: str) -> None:
    of = data(texts, balance=balance)
    counts = np.bincount(["abc".index(example.label) for example in of.prepared.splits["train"]])
    weights = None if balance == "none" else torch.tensor(84 / (3 * counts), dtype=torch.float32)
    expected = bare_losses(pretraining.net(), data(texts, balance=balance), weights)
    pretraining.fit(module=module(pretraining.net(), of), data=of, gradient_clip_val=None)
    logged = pretraining.column("train/loss")
    assert list(logged) == list(range(1, STEPS + 1))
    torch.testing.assert_close(torch.tensor(list(logged.values())), torch.tensor(expected), atol=2e-5, rtol=0)
    assert expected[-1] < 0.8 * expected[0]


@torch.no_grad()
def test_a_weight_counts_in_batches_of_one_and_in_micro_batches(pretraining: Any, texts: Path) -> None:
    of = data(texts, balance="class_weights", padding="longest")
    made = module(pretraining.net(drop_rate=0.0), of).eval()
    examples = of.examples("train")
    singles = [examples.__getitems__([i]) for i in range(8)]
    alone = [made.batch_loss(batch) for batch in singles]
    for batch, loss in zip(singles, alone, strict=True):
        plain = F.cross_entropy(made(*batch[:2]), batch.labels)
        weight = of.module_settings()["class_weights"][int(batch.labels)]
        assert loss.item() == pytest.approx(weight * plain.item(), abs=1e-5)
    together = made.batch_loss(examples.__getitems__(range(8)))
    assert torch.stack(alone).mean().item() == pytest.approx(together.item(), abs=1e-5)


@torch.no_grad()
def test_padding_changes_no_logit(pretraining: Any, texts: Path) -> None:
    of = data(texts)
    net = module(pretraining.net(), of).net.eval()
    examples = of.examples("train")
    batch = examples.__getitems__(range(16))
    assert int(batch.lengths.min()) < batch.tokens.shape[1]
    together = net(batch.tokens, batch.lengths)
    wider = F.pad(batch.tokens, (0, 16 - batch.tokens.shape[1]), value=of.tokenizer.eot_id)
    torch.testing.assert_close(net(wider, batch.lengths), together, atol=1e-5, rtol=0)
    for row in range(16):
        alone = examples.__getitems__([row])
        assert alone.tokens.shape == (1, int(batch.lengths[row]))
        torch.testing.assert_close(net(alone.tokens, alone.lengths)[0], together[row], atol=1e-5, rtol=0)


def test_metrics_are_those_of_all_validation_texts(pretraining: Any, texts: Path) -> None:
    of = data(texts, balance="class_weights")
    made = module(pretraining.net(), of)
    trainer = pretraining.fit(module=made, data=of)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    batch = of.examples("val").__getitems__(range(12))
    logits = class_logits(made.net, batch.tokens, batch.lengths).float()
    weights = torch.tensor(of.module_settings()["class_weights"])
    expected = F.cross_entropy(logits, batch.labels, weight=weights).item()
    assert logged["val/loss"] == pytest.approx(expected, abs=1e-5)
    assert logged["val/accuracy"] == pytest.approx((logits.argmax(1) == batch.labels).float().mean().item())
    assert {"val/f1", "val/f1_a", "val/f1_b", "val/f1_c", "val/calibration_error"} <= logged.keys()
    found = evaluate_classifier(made.net, [batch])
    assert found.loss == pytest.approx(F.cross_entropy(logits, batch.labels).item(), abs=1e-5)
    assert found.scores.macro_f1 == pytest.approx(logged["val/f1"], abs=1e-6)


def test_frozen_weights_stay_as_they_are(pretraining: Any, texts: Path) -> None:
    of = data(texts)
    made = module(
        pretraining.net(),
        of,
        make_optimizer=lambda net: torch.optim.AdamW(
            [p for p in net.parameters() if p.requires_grad], lr=LR, weight_decay=0.1
        ),
    )
    TuneLastBlock().apply(made.net)
    before = {name: tensor.clone() for name, tensor in made.net.state_dict().items()}
    pretraining.fit(module=made, data=of)
    changed = {
        name for name, tensor in made.net.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert changed == {name for name in before if name.startswith(("blocks.1.", "final_norm.", "out_head."))}


# --- checkpoints and predictions ------------------------------------------------------------------------


def test_a_checkpoint_gives_the_classifier_back(pretraining: Any, texts: Path, tmp_path: Path) -> None:
    of = data(texts, padding="longest")
    made = module(pretraining.net(), of, pooling="last_position")
    trainer = pretraining.fit(module=made, data=of)
    path = tmp_path / "a.ckpt"
    trainer.save_checkpoint(path, weights_only=True)
    loaded = load_classifier(path)
    longest = max(len(example.text.encode()) for example in of.prepared.splits["train"])
    assert (loaded.labels, loaded.step) == (("a", "b", "c"), STEPS)
    assert (loaded.max_length, loaded.padded_to) == (longest, longest)
    batch = of.examples("test").__getitems__(range(5))
    with torch.no_grad():
        assert torch.equal(
            loaded.net(batch.tokens, batch.lengths), made.net.eval()(batch.tokens, batch.lengths)
        )
    chances = class_logits(made.net, batch.tokens, batch.lengths).softmax(1)
    found = predictions(loaded, [example.text for example in of.prepared.splits["test"][:5]])
    torch.testing.assert_close(
        torch.tensor([each.probabilities for each in found]), chances.float(), atol=1e-6, rtol=0
    )
    with pytest.raises(InputError, match="is a classifier, which writes no text: use gptpl classify"):
        load_model(path)


def test_a_language_model_is_no_classifier(pretraining: Any, tmp_path: Path) -> None:
    trainer = pretraining.fit(module=pretraining.module(total_steps=5))
    path = tmp_path / "a.ckpt"
    trainer.save_checkpoint(path, weights_only=True)
    with pytest.raises(InputError, match="is a language model, not a classifier: train one with gptpl train"):
        load_classifier(path)


def test_an_exported_classifier_gives_the_same_predictions_in_order(
    pretraining: Any, texts: Path, tmp_path: Path
) -> None:
    net = module(pretraining.net(qkv_bias=True), data(texts)).net.eval()
    (tmp_path / "hf").mkdir()
    write_classifier(net, tmp_path / "hf", labels=("a", "b", "c"), pad_id=256)
    (tmp_path / "hf/gptpl.json").write_text(_record(tmp_path / "hf", net))
    loaded = load_foreign_classifier(tmp_path / "hf")
    draw = random.Random(1)
    many = ["".join(draw.choice("abcxyz") for _ in range(draw.randrange(1, 24))) for _ in range(75)]
    found = list(predictions(loaded, iter(many), batch_size=2))  # in three chunks
    assert [each.lost_tokens for each in found] == [max(0, len(text) - 16) for text in many]
    for text, each in zip(many, found, strict=True):
        tokens = torch.tensor([list(text.encode()[:16])])
        with torch.no_grad():
            alone = net(tokens, torch.tensor([tokens.shape[1]])).softmax(1)[0]
        assert each.probabilities == pytest.approx(alone.tolist(), abs=1e-6)


def _record(folder: Path, net: Any) -> str:
    from gptpl.weights.model_files import record_of

    lineage = {"step": 3, "start": {}, "tokens_seen": 0, "data": {}, "losses": {}}
    return json.dumps(record_of(folder, net.config, BytesTokenizer().state(), lineage))


# --- data -------------------------------------------------------------------------------------------------


def test_every_text_keeps_its_label_on_its_way_into_a_batch(texts: Path) -> None:
    of = data(texts, duplicates="group")
    seen = 0
    for batch in of.train_dataloader():
        assert isinstance(batch, LabelledBatch)
        for tokens, length, label in zip(*batch, strict=True):
            text = bytes(tokens[:length].tolist()).decode()
            assert of.prepared.classes[label] in text
            assert (tokens[length:] == 256).all()
            seen += 1
    assert seen == len(of.examples("train")) // 8 * 8


def test_longer_texts_are_cut_and_said_or_refused(texts: Path) -> None:
    cut = data(texts, max_length=4)
    assert max(cut.examples("train").lengths) == 4
    said = [line for line in cut.report(parameters=1, world_size=1) if "too long and cut" in line]
    assert len(said) == 1
    with pytest.raises(InputError, match=r"texts are longer than 4 tokens, the longest has 15: raise data"):
        data(texts, max_length=4, too_long="refuse").load()


def test_words_are_those_of_the_training_texts(texts: Path) -> None:
    of = data(texts, tokenizer=WordsTokenizer())
    words = {word for example in of.prepared.splits["train"] for word in example.text.split()}
    assert of.tokenizer.vocab_size >= 2
    assert any(word in str(of.tokenizer.state()["vocabulary"]) for word in words)


def test_settings_that_cannot_be(texts: Path, pretraining: Any) -> None:
    with pytest.raises(InputError, match=r"data\.padding=both is unknown: choose one of batch, longest"):
        data(texts, padding="both")
    with pytest.raises(InputError, match=r"must not depend on the batch: set data\.padding=longest"):
        module(pretraining.net(), data(texts), pooling="last_position")
    with pytest.raises(InputError, match=r"do not fill one batch of data\.batch_size=200"):
        data(texts, batch_size=200).steps_per_epoch()


def test_the_report_counts_classes_and_batches(texts: Path) -> None:
    of = data(texts)
    lines = of.report(parameters=1, world_size=2)
    assert lines[0] == "data: labelled, 120 rows, 3 classes, bytes tokenizer (257 tokens)"
    assert lines[1].split() == ["training", "validation", "test"]
    assert [line.split()[0] for line in lines[2:5]] == ["a", "b", "c"]
    assert sum(int(line.split()[1]) for line in lines[2:5]) == 84
    assert next(line for line in lines if "batches of 16 texts" in line).split()[-3:] == ["5", "1", "2"]


def test_another_seed_has_the_same_test(texts):
    splits = [data(texts, seed=seed).prepared.splits for seed in (1, 2)]
    assert splits[0] == splits[1]
    first, second = (data(texts, split_seed=seed).content_sha256() for seed in (1, 2))
    assert first != second
