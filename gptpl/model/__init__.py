"""The GPT-2-style model: configuration, layers, initial weights, size, KV cache. Needs torch alone.

A model of another kind may take its place: `gptpl.model.protocol` says what it has to be, and may be able to.
"""

from gptpl.model.allocation import empty_model
from gptpl.model.attention import MultiHeadAttention
from gptpl.model.backbone import GPTBackbone
from gptpl.model.block import TransformerBlock
from gptpl.model.cached import CachedGPT
from gptpl.model.classifier import ClassifierConfig, GPTClassifier
from gptpl.model.config import GPTConfig
from gptpl.model.eval_mode import eval_mode
from gptpl.model.feed_forward import FeedForward
from gptpl.model.gpt import GPTModel
from gptpl.model.kv_cache import KVCache
from gptpl.model.parameters import ParameterCount, count_parameters, parameters_of

__all__ = [
    "CachedGPT",
    "ClassifierConfig",
    "FeedForward",
    "GPTBackbone",
    "GPTClassifier",
    "GPTConfig",
    "GPTModel",
    "KVCache",
    "MultiHeadAttention",
    "ParameterCount",
    "TransformerBlock",
    "count_parameters",
    "empty_model",
    "eval_mode",
    "parameters_of",
]
