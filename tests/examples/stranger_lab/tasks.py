"""A task that measures something of its own."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from gptpl.training.language_model import LanguageModelingModule


class HitRateModule(LanguageModelingModule):
    """Next-token prediction that also counts how often the most likely token is the right one.

    Args:
        of_most_likely: a hit is a target among so many most likely tokens.
    """

    task = "hit_rate"
    metrics: ClassVar = {**LanguageModelingModule.metrics, "val/hit_rate": "max"}

    def __init__(self, net: torch.nn.Module, *, of_most_likely: int = 1, **settings: Any) -> None:
        super().__init__(net, **settings)
        self.of_most_likely = of_most_likely

    def evaluation_sums(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        inputs, targets = batch
        likely = self.net(inputs).topk(self.of_most_likely).indices  # (B, T, k)
        hits = (likely == targets.unsqueeze(-1)).any(-1).sum()
        return {**super().evaluation_sums(batch), "hits": hits.double()}

    def evaluation_metrics(self, sums: Mapping[str, dict[str, Tensor]]) -> dict[str, float]:
        metrics = super().evaluation_metrics(sums)
        _, count = sums["val"]["loss"].tolist()
        return {**metrics, "val/hit_rate": sums["val"]["hits"].item() / count}
