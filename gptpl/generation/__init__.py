"""Text from a model: sampling rules (pure functions of logits), cached decoding, beam search, text."""

from gptpl.generation.decoding import Beam, Decoding, Step, TokenDetails, beam_search, generate
from gptpl.generation.sampling import SamplingRules, next_token, reshape_logits
from gptpl.generation.text import Completion, Piece, complete, search_text, stream_text

__all__ = [
    "Beam",
    "Completion",
    "Decoding",
    "Piece",
    "SamplingRules",
    "Step",
    "TokenDetails",
    "beam_search",
    "complete",
    "generate",
    "next_token",
    "reshape_logits",
    "search_text",
    "stream_text",
]
