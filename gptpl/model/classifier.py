"""A GPT-2-style model that tells to which class a text belongs."""

# B batch, T time, D model, C classes

from dataclasses import dataclass
from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn

from gptpl.errors import InputError
from gptpl.model.gpt import GPTBackbone, GPTConfig

Pooling = Literal["last_token", "last_position"]


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """What a classifier has besides its backbone: a head of `n_classes` logits, 2 or more.

    `pooling` says where they are read: "last_token", the last real token of each row, so that padding changes
    nothing; or "last_position", the last one of the row, padding or not, as the book does. The book's head
    has a bias, that of transformers' GPT2ForSequenceClassification has none.

    Raises InputError for fewer than 2 classes or an unknown pooling.
    """

    n_classes: int
    pooling: Pooling = "last_token"
    head_bias: bool = True

    def __post_init__(self) -> None:
        if self.n_classes < 2:
            raise InputError(f"n_classes={self.n_classes} leaves nothing to tell apart: give 2 or more")
        if self.pooling not in get_args(Pooling):
            choices = ", ".join(get_args(Pooling))
            raise InputError(f"pooling={self.pooling!r} is unknown: choose one of {choices}")


class GPTClassifier(GPTBackbone):
    """The backbone, and a head, drawn after it, that gives the classes' logits at one position of a row."""

    def __init__(self, config: GPTConfig, classifier: ClassifierConfig) -> None:
        super().__init__(config)
        self._add_head(classifier)

    @classmethod
    def on(cls, net: GPTBackbone, classifier: ClassifierConfig) -> Self:
        """A classifier that shares the layers of another model, all but its head."""
        with torch.device("meta"):
            made = cls(net.config, classifier)
        for name, layers in net.named_children():
            if name != "out_head":
                setattr(made, name, layers)
        made.recompute_blocks = net.recompute_blocks
        made._add_head(classifier)
        weight = net.final_norm.weight
        made.out_head.to(device=weight.device, dtype=weight.dtype)
        return made

    def _add_head(self, classifier: ClassifierConfig) -> None:
        self.classifier = classifier
        self.out_head = nn.Linear(self.config.emb_dim, classifier.n_classes, bias=classifier.head_bias)

    @property
    def n_parameters(self) -> int:
        """With the classes' head in place of the language model's."""
        D, head = self.config.emb_dim, self.classifier
        language_head = 0 if self.config.tie_weights else self.config.vocab_size * D
        return self.config.n_parameters - language_head + (D + head.head_bias) * head.n_classes

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Logits of the classes: tokens (B, T) int64, padded at the end, lengths (B,) int64 -> (B, C).

        `lengths` are the rows' real tokens, 1 or more.
        """
        hidden = self.hidden(tokens)  # (B, T, D)
        if self.classifier.pooling == "last_position":
            return self.out_head(hidden[:, -1])
        rows = torch.arange(len(tokens), device=tokens.device)
        return self.out_head(hidden[rows, lengths - 1])
