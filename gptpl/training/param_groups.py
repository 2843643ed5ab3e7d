"""Which parameters weight decay pulls on."""

from typing import Any, Literal

from torch import nn

from gptpl.errors import InputError

Decay = Literal["matrices", "all"]


def decay_groups(net: nn.Module, *, weight_decay: float, decay: Decay = "matrices") -> list[dict[str, Any]]:
    """Optimizer parameter groups: decayed first, then (where there are any) undecayed ones.

    Args:
        net: its trainable parameters are each put into exactly one group; a tied weight counts once.
        weight_decay: AdamW's decoupled decay of the first group; 0.01 to 0.3 is usual.
        decay: `matrices` decays weights and embeddings (2 dimensions and more) and spares biases and
            LayerNorm gains, as GPT-3 and nanoGPT do; `all` decays everything, as the book does.
    """
    if decay not in ("matrices", "all"):
        raise InputError(f"optimizer.decay={decay} is unknown: choose matrices or all")
    parameters = [p for p in net.parameters() if p.requires_grad]
    decayed = [p for p in parameters if decay == "all" or p.dim() >= 2]
    spared = [p for p in parameters if not (decay == "all" or p.dim() >= 2)]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
