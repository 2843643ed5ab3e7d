"""A GPT-2-style model that tells to which class a text belongs."""

# B batch, T time, D model, C classes

from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor, nn

from gptpl.errors import InputError
from gptpl.model.backbone import GPTBackbone
from gptpl.model.config import GPTConfig

Pooling = Literal["last_token", "last_position"]
POOLINGS = ("last_token", "last_position")


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """What a classifier has beside its backbone.

    Attributes:
        n_classes: C, 2 or more.
        pooling: where the logits are read: "last_token", the last real token of each row, so that padding
            changes nothing; or "last_position", the last one of the row, padding or not, as the book does.
        head_bias: whether the head has a bias (the book's: yes; transformers' GPT2ForSequenceClassification:
            no).

    Raises:
        InputError: for fewer than 2 classes or an unknown pooling.
    """

    n_classes: int
    pooling: Pooling = "last_token"
    head_bias: bool = True

    def __post_init__(self) -> None:
        if self.n_classes < 2:
            raise InputError(f"n_classes={self.n_classes} leaves nothing to tell apart: give 2 or more")
        if self.pooling not in POOLINGS:
            raise InputError(f"pooling={self.pooling!r} is unknown: choose one of {', '.join(POOLINGS)}")


class GPTClassifier(GPTBackbone):
    """The backbone, and a head that gives the logits of the classes at one position of each row.

    The head is drawn as torch draws a linear layer, after the backbone.
    """

    def __init__(self, config: GPTConfig, classifier: ClassifierConfig) -> None:
        super().__init__(config)
        self._add_head(classifier)

    @classmethod
    def on(cls, net: GPTBackbone, classifier: ClassifierConfig) -> Self:
        """A classifier that takes over the layers of another model, all but its head; nothing is copied."""
        with torch.device("meta"):
            made = cls(net.config, classifier)
        for name in ("tok_emb", "pos_emb", "drop_emb", "blocks", "final_norm"):
            setattr(made, name, getattr(net, name))
        made.recompute_blocks = net.recompute_blocks
        made._add_head(classifier)
        weight = net.final_norm.weight
        made.out_head.to(device=weight.device, dtype=weight.dtype)
        return made

    def _add_head(self, classifier: ClassifierConfig) -> None:
        self.classifier = classifier
        self.out_head = nn.Linear(self.config.emb_dim, classifier.n_classes, bias=classifier.head_bias)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Logits of the classes: tokens (B, T) int64, padded at the end, lengths (B,) int64 -> (B, C).

        `lengths` are the rows' real tokens, 1 or more.
        """
        hidden = self.hidden(tokens)  # (B, T, D)
        if self.classifier.pooling == "last_position":
            return self.out_head(hidden[:, -1])
        rows = torch.arange(len(tokens), device=tokens.device)
        return self.out_head(hidden[rows, lengths - 1])
