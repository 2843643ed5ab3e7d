"""Types of the commands' root configs; the other schemas are in `gptpl.cli.schema`."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass(kw_only=True)
class TrainConf:
    """Root of `gptpl train`."""

    name: str | None = None
    run_dir: str | None = None
    resume: str | None = None
    seed: int = MISSING
    deterministic: bool = False
    on_nonfinite: str = "stop"
    skip_steps: list[int] = field(default_factory=list)
    eval_every_n_steps: int = MISSING
    eval_train_batches: int | None = MISSING
    eval_val_batches: int | None = MISSING
    model: Any = MISSING
    init: Any = MISSING
    tokenizer: Any = MISSING
    data: Any = MISSING
    task: Any = MISSING
    tune: Any = MISSING
    optimizer: Any = MISSING
    scheduler: Any = MISSING
    trainer: Any = MISSING
    callbacks: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class GenerateConf:
    """Root of `gptpl generate`."""

    checkpoint: str = MISSING
    prompt: str | None = MISSING
    prompt_file: str | None = MISSING
    max_new_tokens: int = MISSING
    num_samples: int = MISSING
    stop: list[str] = MISSING
    num_beams: int | None = MISSING
    seed: int | None = MISSING
    alternatives: int | None = MISSING
    statistics: bool = MISSING
    memorisation: bool = MISSING
    precision: str = MISSING
    device: str = MISSING
    init: Any = None
    sampling: Any = MISSING


@dataclass(kw_only=True)
class RespondConf:
    """Root of `gptpl respond`."""

    checkpoint: str = MISSING
    instruction: str | None = MISSING
    input: str = MISSING
    file: str | None = MISSING
    split: str | None = MISSING
    output: str | None = MISSING
    template: str | None = MISSING
    response_marker: str | None = MISSING
    instruction_column: str = MISSING
    input_column: str | None = MISSING
    too_long: str = MISSING
    max_new_tokens: int = MISSING
    batch_size: int = MISSING
    seed: int | None = MISSING
    precision: str = MISSING
    device: str = MISSING
    init: Any = None
    sampling: Any = MISSING


@dataclass(kw_only=True)
class ClassifyConf:
    """Root of `gptpl classify`."""

    checkpoint: str = MISSING
    text: str | None = MISSING
    file: str | None = MISSING
    text_column: str = MISSING
    format: str | None = MISSING
    columns: list[str] | None = MISSING
    output: str | None = MISSING
    batch_size: int = MISSING
    device: str = MISSING
    init: Any = None


@dataclass(kw_only=True)
class EvaluateConf:
    """Root of `gptpl evaluate`."""

    checkpoint: str = MISSING
    split: str = MISSING
    device: str = MISSING
    init: Any = None
    data: Any = MISSING


@dataclass(kw_only=True)
class InspectConf:
    """Root of `gptpl inspect`."""

    checkpoint: str = MISSING
    text: str | None = MISSING
    text_file: str | None = MISSING
    output: str = MISSING
    alternatives: int = MISSING
    device: str = MISSING
    init: Any = None


@dataclass(kw_only=True)
class WeightsFetchConf:
    """Root of `gptpl weights fetch`."""

    size: str = MISSING
    source: str = MISSING
    mirror: str | None = MISSING


@dataclass(kw_only=True)
class WeightsConvertConf:
    """Root of `gptpl weights convert`."""

    checkpoint: str = MISSING
    format: str = MISSING
    output: str = MISSING
    dtype: str | None = MISSING
    verify: bool = MISSING
    init: Any = None
    model: Any = None
    tokenizer: Any = None


@dataclass(kw_only=True)
class SweepConf:
    """Root of `gptpl sweep`."""

    sweep: Any = MISSING
