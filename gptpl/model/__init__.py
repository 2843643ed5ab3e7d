"""The GPT-2-style model: configuration, layers, initial weights, size, KV cache. Needs torch alone.

A model of another kind may take its place: `gptpl.model.protocol` says what it has to be, and may be able to.
"""

from gptpl.model.classifier import ClassifierConfig, GPTClassifier
from gptpl.model.gpt import (
    FeedForward,
    GPTBackbone,
    GPTConfig,
    GPTModel,
    MultiHeadAttention,
    SwiGLU,
    TransformerBlock,
)
from gptpl.model.inference import CachedGPT, Int8GPT, KVCache
from gptpl.model.parameters import ParameterCount, count_parameters, empty_model, parameters_of
from gptpl.model.protocol import eval_mode

__all__ = [
    "CachedGPT",
    "ClassifierConfig",
    "FeedForward",
    "GPTBackbone",
    "GPTClassifier",
    "GPTConfig",
    "GPTModel",
    "Int8GPT",
    "KVCache",
    "MultiHeadAttention",
    "ParameterCount",
    "SwiGLU",
    "TransformerBlock",
    "count_parameters",
    "empty_model",
    "eval_mode",
    "parameters_of",
]
