"""Type of the rules that text is sampled by; without OmegaConf, so that `--help` shows it at once."""

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class SamplingConf:
    """Fields of `gptpl.generation.SamplingRules`; the defaults change nothing but choose greedily."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    banned_tokens: list[int] = field(default_factory=list)
    forced_tokens: list[int] = field(default_factory=list)
