"""The classifier: what it takes over, and at which position it reads its logits."""

import pytest
import torch
import torch.nn.functional as F

from gptpl.errors import InputError
from gptpl.model import ClassifierConfig, GPTClassifier, GPTConfig, GPTModel

CONFIG = GPTConfig(
    vocab_size=50, context_length=12, emb_dim=16, n_heads=2, n_layers=2, drop_rate=0.0, qkv_bias=True
)
LENGTHS = (3, 7, 1)


@pytest.fixture
def net() -> GPTModel:
    torch.manual_seed(0)
    return GPTModel(CONFIG).eval()


@pytest.fixture
def rows() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(50, (length,), generator=draw) for length in LENGTHS]


def padded(rows: list[torch.Tensor], length: int, padding: int) -> torch.Tensor:
    return torch.stack([F.pad(row, (0, length - len(row)), value=padding) for row in rows])


@pytest.mark.parametrize("length", [7, 12])
@pytest.mark.parametrize("padding", [0, 49])
def test_padding_never_changes_a_logit(net, rows, length, padding):
    classifier = GPTClassifier.on(net, ClassifierConfig(n_classes=3)).eval()
    alone = [classifier(row[None], torch.tensor([len(row)]))[0] for row in rows]
    together = classifier(padded(rows, length, padding), torch.tensor(LENGTHS))
    torch.testing.assert_close(together, torch.stack(alone), rtol=0, atol=1e-5)


def test_the_book_reads_the_last_position_padding_or_not(net, rows):
    classifier = GPTClassifier.on(net, ClassifierConfig(n_classes=2, pooling="last_position")).eval()
    tokens = padded(rows, 9, 49)
    expected = F.linear(net.hidden(tokens)[:, -1], classifier.out_head.weight, classifier.out_head.bias)
    torch.testing.assert_close(classifier(tokens, torch.tensor(LENGTHS)), expected)


def test_the_layers_are_taken_over_and_the_head_is_drawn_as_torch_does(net):
    torch.manual_seed(5)
    expected = torch.nn.Linear(16, 4)
    torch.manual_seed(5)
    classifier = GPTClassifier.on(net, ClassifierConfig(n_classes=4))
    assert classifier.blocks is net.blocks
    assert classifier.tok_emb.weight is net.tok_emb.weight
    assert torch.equal(classifier.out_head.weight, expected.weight)
    assert torch.equal(classifier.out_head.bias, expected.bias)
    names = set(classifier.state_dict())
    assert names == {*net.state_dict(), "out_head.bias"}


def test_it_can_be_built_by_itself_and_without_a_bias():
    classifier = GPTClassifier(CONFIG, ClassifierConfig(n_classes=2, head_bias=False))
    assert set(dict(classifier.out_head.named_parameters())) == {"weight"}
    assert classifier(torch.zeros(1, 5, dtype=torch.int64), torch.tensor([5])).shape == (1, 2)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"n_classes": 1}, "must be at least 2, got 1"),
        ({"n_classes": 2, "pooling": "mean"}, "mean"),
    ],
)
def test_impossible_heads_are_refused(settings, named):
    with pytest.raises(InputError, match=named):
        ClassifierConfig(**settings)
