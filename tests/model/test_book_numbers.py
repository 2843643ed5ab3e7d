"""The book's untrained 124M model, drawn from seed 123, gives the book's published numbers."""

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

from gptpl.generation import generate
from gptpl.model import GPTConfig, GPTModel

BOOK = GPTConfig(
    vocab_size=50257,
    context_length=256,
    emb_dim=768,
    n_heads=12,
    n_layers=12,
    drop_rate=0.1,
    qkv_bias=False,
)

# tiktoken's GPT-2 encoding of "Every effort moves you" ...
PROMPT = [6109, 3626, 6100, 345]
# ... and of what the book prints after it, " rentingetic wasn\u0645 refres RexMeCHicular stren". The letter
# after "wasn" is U+0645, ARABIC LETTER MEEM, token 25405; the Latin "m" that some copies show is token 76.
PUBLISHED_CONTINUATION = [34245, 5139, 2492, 25405, 17434, 17853, 5308, 3398, 13174, 43071]


@pytest.fixture(scope="module")
def model() -> Iterator[GPTModel]:
    with torch.random.fork_rng():
        torch.manual_seed(123)
        yield GPTModel(BOOK).eval()


def test_first_loss_and_perplexity(model: GPTModel) -> None:
    tokens = torch.tensor([[16833, 3626, 6100], [40, 1107, 588]])  # "every effort moves", "I really like"
    targets = torch.tensor(
        [[3626, 6100, 345], [1107, 588, 11311]]
    )  # " effort moves you", " really like chocolate"
    with torch.no_grad():
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    assert loss.item() == pytest.approx(10.7940, abs=5e-5)
    assert loss.exp().item() == pytest.approx(48_725, abs=2)


def test_greedy_text(model: GPTModel) -> None:
    tokens = generate(model, torch.tensor([PROMPT]), max_new_tokens=10)
    assert tokens.tolist() == [PROMPT + PUBLISHED_CONTINUATION]


def test_size(model: GPTModel) -> None:
    assert sum(parameter.numel() for parameter in model.parameters()) == 162_419_712
