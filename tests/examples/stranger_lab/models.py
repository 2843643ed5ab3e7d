"""A language model that shares nothing with gptpl's GPT-2."""

# B batch, T time, V vocabulary

from torch import Tensor, nn


class TinyGRU(nn.Module):
    """A GRU over an embedding.

    Args:
        vocab_size: V.
        context_length: the largest T; the model itself has no limit.
        width: of the embedding and of the state.
        drop_rate: of the embedding.
    """

    def __init__(
        self, *, vocab_size: int, context_length: int, width: int = 24, drop_rate: float = 0.1
    ) -> None:
        super().__init__()
        self.vocab_size, self.context_length = vocab_size, context_length
        self.embedding = nn.Embedding(vocab_size, width)
        self.drop = nn.Dropout(drop_rate)
        self.rnn = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) of tokens (B, T)."""
        states, _ = self.rnn(self.drop(self.embedding(tokens)))
        return self.head(states)
