"""How the weights of a new model are drawn: one function a name, chosen by `GPTConfig.init`.

"torch"  what torch's own layers draw while `GPTModel` builds them: the book's model, number for number
         (embeddings N(0, 1), linear layers U(-1/sqrt(fan_in), 1/sqrt(fan_in))).
         With tied weights the head takes over the embedding's N(0, 1): the first logits then have a standard
         deviation of about sqrt(emb_dim), and the first loss of the 124M model is in the hundreds, not near
         ln(vocab_size) = 10.8. Choose "gpt2" for tied weights.
"gpt2"   GPT-2's: see `draw_gpt2`. The first loss is close to ln(vocab_size), tied or not.
"""

import math
from collections.abc import Callable, Mapping

from torch import nn

GPT2_STD = 0.02
# The last matrix of each shortcut: what it makes is added to the residual stream.
_RESIDUAL_PROJECTIONS = ("attn.out_proj.weight", "ff.down_proj.weight")


def keep_torch(model: nn.Module, n_layers: int) -> None:
    """Leave every weight as torch's layers drew it."""


def draw_gpt2(model: nn.Module, n_layers: int) -> None:
    """Redraw the weights in place as GPT-2 does: matrices N(0, 0.02), biases 0, LayerNorm scales 1.

    Residual projections get 0.02 / sqrt(2 n_layers): every block adds two of them to the residual stream,
    whose variance would otherwise grow with depth (Radford et al. 2019, "Language Models are Unsupervised
    Multitask Learners", 2.3).
    """
    for name, parameter in model.named_parameters():  # a tied head comes once, as the token embedding
        if name.endswith(".bias"):
            nn.init.zeros_(parameter)
        elif name.endswith(_RESIDUAL_PROJECTIONS):
            nn.init.normal_(parameter, std=GPT2_STD / math.sqrt(2 * n_layers))
        elif parameter.dim() == 2:
            nn.init.normal_(parameter, std=GPT2_STD)
        else:
            nn.init.ones_(parameter)


INITIALISATIONS: Mapping[str, Callable[[nn.Module, int], None]] = {"torch": keep_torch, "gpt2": draw_gpt2}
