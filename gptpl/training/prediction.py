"""What a classifier says of texts: many of them, in their order, and never more than a few in memory."""

# B texts in a batch, C classes

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from gptpl.data.labelled.encoded import encode_texts, padded
from gptpl.data.tokenizers import TokenIds
from gptpl.model import GPTClassifier, eval_mode
from gptpl.training.classifier_checkpoint import LoadedClassifier

T = TypeVar("T")

CHUNK_BATCHES = 16
"""So many batches of texts are sorted by length together: little padding is left in them."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The probabilities of the classes, and how many of a text's tokens were beyond what is read of it."""

    probabilities: tuple[float, ...]
    lost_tokens: int

    @property
    def best(self) -> int:
        """The number of the most likely class."""
        return self.probabilities.index(max(self.probabilities))


def predictions(
    loaded: LoadedClassifier, texts: Iterable[str], *, batch_size: int = 16
) -> Iterator[Prediction]:
    """What the classifier says of each text, in order; texts are taken up a chunk at a time.

    Raises InputError for a text without tokens.
    """
    for chunk in _in_parts(texts, batch_size * CHUNK_BATCHES):
        encoded = encode_texts(chunk, loaded.tokenizer)
        read = [tokens[: loaded.max_length] for tokens in encoded]
        order = sorted(range(len(read)), key=lambda i: len(read[i]))
        found: list[tuple[float, ...]] = [()] * len(read)
        for numbers in _in_parts(order, batch_size):
            rows = class_probabilities(loaded, [read[i] for i in numbers]).tolist()
            for i, row in zip(numbers, rows, strict=True):
                found[i] = tuple(row)
        for tokens, row in zip(encoded, found, strict=True):
            yield Prediction(probabilities=row, lost_tokens=max(0, len(tokens) - loaded.max_length))


def class_probabilities(loaded: LoadedClassifier, encoded: Sequence[TokenIds]) -> Tensor:
    """Probabilities (B, C) in float64 of texts that are encoded, and no longer than what is read of one."""
    tokens, lengths = padded(encoded, pad_id=loaded.pad_id, to_length=loaded.padded_to)
    return class_logits(loaded.net, tokens, lengths).softmax(dim=1)


def class_logits(net: GPTClassifier, tokens: Tensor, lengths: Tensor) -> Tensor:
    """Logits (B, C) in float64 on the CPU, in evaluation mode."""
    with torch.inference_mode(), eval_mode(net):
        return net(tokens.to(net.device), lengths.to(net.device)).cpu().double()


def _in_parts(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """As `itertools.batched` of Python 3.12."""
    iterator = iter(items)
    while part := list(islice(iterator, size)):
        yield part
