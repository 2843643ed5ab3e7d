"""The shape of a GPT-2-style model, in the field names of "Build a Large Language Model (From Scratch)"."""

from dataclasses import dataclass
from typing import Annotated

from gptpl.errors import InputError
from gptpl.model.initialisation import INITIALISATIONS
from gptpl.resuming import NEXT_STEP

_SIZES = ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers")
_MOST_LAYERS = 10_000
_MOST_BYTES = 2**50
"""Of the weights in float32: more than any machine's memory, and few enough for torch to count them."""


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """What a `GPTModel` is built from; checked when made, so that no model sees an impossible shape.

    Attributes:
        vocab_size: number of tokens the model knows; ids run from 0 to vocab_size - 1.
        context_length: most tokens the model can look at at once (rows of the position table).
        emb_dim: width of the residual stream; a multiple of n_heads.
        n_heads: attention heads per block.
        n_layers: transformer blocks.
        drop_rate: dropout probability of the embeddings, the attention weights and each shortcut; 0 <= p < 1.
        qkv_bias: whether the query-key-value projection has a bias (the book's: no; OpenAI's GPT-2: yes).
        tie_weights: whether the head uses the token embedding's matrix (the book's: no; OpenAI's GPT-2: yes).
        init: how the weights are drawn, see `gptpl.model.initialisation`. "torch" gives the book's numbers;
            "gpt2" is GPT-2's, and the one to choose with tied weights.

    Raises:
        InputError: for a size below 1, a drop_rate outside [0, 1), an emb_dim that n_heads does not divide,
            an unknown init, more than 10,000 blocks, and more weights than any memory holds.
    """

    vocab_size: int
    context_length: int
    emb_dim: int
    n_heads: int
    n_layers: int
    drop_rate: Annotated[float, NEXT_STEP] = 0.1
    qkv_bias: bool
    tie_weights: bool = False
    init: str = "torch"

    def __post_init__(self) -> None:
        for field in _SIZES:
            size = getattr(self, field)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise InputError(f"{field}={size!r} is not a size: give a whole number of at least 1")
        if self.emb_dim % self.n_heads:
            raise InputError(
                f"emb_dim={self.emb_dim} is not divisible by n_heads={self.n_heads}: "
                f"every head has the same width, so make emb_dim a multiple of n_heads"
            )
        if not 0 <= self.drop_rate < 1:
            raise InputError(f"drop_rate={self.drop_rate} is no dropout probability: give 0 <= drop_rate < 1")
        if self.init not in INITIALISATIONS:
            raise InputError(f"init={self.init!r} is unknown: choose one of {', '.join(INITIALISATIONS)}")
        if self.n_layers > _MOST_LAYERS:
            raise InputError(f"n_layers={self.n_layers} is too many: give {_MOST_LAYERS:,} or fewer")
        if 4 * self.n_parameters > _MOST_BYTES:
            largest = max(("emb_dim", "vocab_size", "context_length"), key=lambda field: getattr(self, field))
            raise InputError(
                f"{largest}={getattr(self, largest)} makes a model of {self.n_parameters:,} parameters,"
                f" {4 * self.n_parameters:,} bytes in float32, which no memory holds: give smaller sizes"
            )

    @property
    def n_parameters(self) -> int:
        """Parameters of a `GPTModel` of this shape; a tied head counts once."""
        D, tables = self.emb_dim, self.vocab_size + self.context_length
        head = 0 if self.tie_weights else self.vocab_size * D
        block = 12 * D * D + (13 if self.qkv_bias else 10) * D
        return tables * D + self.n_layers * block + 2 * D + head
