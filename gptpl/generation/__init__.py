"""Text from a model: sampling rules (pure functions of logits) and the decoding loop."""

from gptpl.generation.decode import generate
from gptpl.generation.rules import apply_temperature, keep_top_k, next_token

__all__ = ["apply_temperature", "generate", "keep_top_k", "next_token"]
