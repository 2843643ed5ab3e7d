"""A GPT-2-style model that classifies texts."""

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
    """The head of a classifier: `n_classes` logits, 2 or more, with or without a bias.

    `pooling` says where they are read: at the "last_token" of each row that is not padding, or at the
    "last_position" of the row, padding or not, as in the book. The book's head has a bias, that of
    transformers' GPT2ForSequenceClassification has none.
    """

    n_classes: int
    pooling: Pooling = "last_token"
    head_bias: bool = True

    def __post_init__(self) -> None:
        if self.n_classes < 2:
            raise InputError(f"n_classes must be at least 2, got {self.n_classes}")
        if self.pooling not in get_args(Pooling):
            choices = ", ".join(get_args(Pooling))
            raise InputError(f"pooling={self.pooling!r} is unknown: choose one of {choices}")


class GPTClassifier(GPTBackbone):
    """The backbone and a head, drawn after it, that gives the classes' logits at one position of a row."""

    def __init__(self, config: GPTConfig, classifier: ClassifierConfig) -> None:
        super().__init__(config)
        self.classifier = classifier
        self.out_head = nn.Linear(config.emb_dim, classifier.n_classes, bias=classifier.head_bias)

    @classmethod
    def on(cls, net: GPTBackbone, classifier: ClassifierConfig) -> Self:
        """A classifier that shares the layers of another model, all but its head."""
        with torch.device("meta"):
            made = cls(net.config, classifier)
        for name, layers in net.named_children():
            if name != "out_head":
                setattr(made, name, layers)
        made.recompute_blocks = net.recompute_blocks
        made.out_head = nn.Linear(net.config.emb_dim, classifier.n_classes, bias=classifier.head_bias)
        made.out_head.to(device=net.device, dtype=net.tok_emb.weight.dtype)
        return made

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Logits of the classes: tokens (B, T) int64, padded at the end, lengths (B,) int64 -> (B, C).

        `lengths` are the rows' tokens that are not padding, 1 or more.
        """
        hidden = self.hidden(tokens)  # (B, T, D)
        if self.classifier.pooling == "last_position":
            return self.out_head(hidden[:, -1])
        rows = torch.arange(len(tokens), device=tokens.device)
        return self.out_head(hidden[rows, lengths - 1])
