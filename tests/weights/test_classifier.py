"""Classifiers in transformers' format: the same logits there, in padded batches too, and back."""

# B batch, T time, D model, C classes

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2ForSequenceClassification

from gptpl.errors import InputError
from gptpl.model import ClassifierConfig, GPTClassifier, GPTConfig
from gptpl.weights.formats import open_model
from gptpl.weights.hugging_face import bias_as_shift, is_classifier, open_classifier, write_classifier
from gptpl.weights.transfer import load_tensors

PAD = 96
LABELS = ("ham", "spam", "other")


def classifier(*, C: int = 3, head_bias: bool = True, qkv_bias: bool = True, **changes: str) -> GPTClassifier:
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=97, context_length=16, emb_dim=8, n_heads=2, n_layers=2, drop_rate=0.1, qkv_bias=qkv_bias
    )
    net = GPTClassifier(config, ClassifierConfig(n_classes=C, head_bias=head_bias, **changes))  # type: ignore[arg-type]
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return net.eval()


def batch() -> tuple[Tensor, Tensor]:
    """Rows of 7, 3 and 1 tokens."""
    tokens = torch.randint(0, PAD, (3, 7), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([7, 3, 1])
    tokens[torch.arange(7)[None] >= lengths[:, None]] = PAD
    return tokens, lengths


@pytest.mark.parametrize("head_bias", [True, False])
@pytest.mark.parametrize("qkv_bias", [True, False])
@torch.no_grad()
def test_transformers_gives_the_same_logits(tmp_path: Path, head_bias: bool, qkv_bias: bool) -> None:
    net = classifier(head_bias=head_bias, qkv_bias=qkv_bias)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    write_classifier(net, tmp_path, labels=LABELS, pad_id=PAD)
    opened: Any = GPT2ForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    theirs, report = opened
    assert not any(report.values())
    tokens, lengths = batch()
    torch.testing.assert_close(theirs.eval()(tokens).logits, net(tokens, lengths), atol=1e-5, rtol=0)
    alone = theirs(tokens[1:2, :3]).logits
    torch.testing.assert_close(alone, net(tokens[1:2, :3], lengths[1:2]), atol=1e-5, rtol=0)
    assert theirs.config.id2label == dict(enumerate(LABELS))
    assert theirs.config.label2id["other"] == 2
    assert theirs.config.num_labels == 3
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


@torch.no_grad()
def test_a_classifier_of_transformers_is_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_positions=16, n_embd=8, n_head=2, n_layer=2, pad_token_id=PAD)
    config.num_labels = 4
    theirs = GPT2ForSequenceClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    assert is_classifier(tmp_path)
    files, labels = open_classifier(tmp_path)
    assert labels == ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3")
    assert files.config is not None
    net = GPTClassifier(files.config, ClassifierConfig(n_classes=4, head_bias=False)).eval()
    load_tensors(net, files.tensors, files.table)
    tokens, lengths = batch()
    torch.testing.assert_close(net(tokens, lengths), theirs(tokens).logits, atol=1e-5, rtol=0)


def test_the_shift_does_what_the_bias_did() -> None:
    weight, bias = torch.randn(3, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([1.0, -2, 5])
    shift = bias_as_shift(weight, bias)
    assert shift is not None
    torch.testing.assert_close(weight.double() @ shift, bias.double())


def test_what_the_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    twice = classifier(C=2)
    with torch.no_grad():
        twice.out_head.weight[1] = twice.out_head.weight[0]
    with pytest.raises(InputError, match=r"these 2 classes: train it with task\.head_bias=false"):
        write_classifier(twice, tmp_path, labels=LABELS[:2], pad_id=PAD)
    with pytest.raises(InputError, match=r"task\.pooling=last_position: train it with"):
        write_classifier(classifier(pooling="last_position"), tmp_path, labels=LABELS, pad_id=PAD)
    assert not list(tmp_path.iterdir())


def test_it_is_no_language_model(tmp_path: Path) -> None:
    write_classifier(classifier(), tmp_path, labels=LABELS, pad_id=PAD)
    with pytest.raises(InputError, match="holds a classifier, not a language model: use gptpl classify"):
        open_model(tmp_path)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"problem_type": "multi_label_classification"}, "gptpl None or 'single_label_classification'"),
        ({"id2label": {"0": "a"}}, "id2label must name two or more classes"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label must name two or more classes"),
    ],
)
def test_other_classifiers_are_refused(tmp_path: Path, change: dict[str, object], said: str) -> None:
    write_classifier(classifier(), tmp_path, labels=LABELS, pad_id=PAD)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=said):
        open_classifier(tmp_path)
