"""The settings of the commands' root configs with their types; what a group is, its class says."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from gptpl.resuming import FREE, INEXACT, NEXT_STEP


@dataclass(kw_only=True)
class TrainSettings:
    """conf/train.yaml."""

    name: Annotated[str | None, FREE]
    run_dir: str | None
    resume: Annotated[str | None, FREE]
    trust: Annotated[Sequence[str], FREE]
    tags: Annotated[Sequence[str], FREE]
    notes: Annotated[str | None, FREE]
    seed: int
    deterministic: Annotated[bool, INEXACT]
    on_nonfinite: Annotated[Literal["stop", "rollback"], NEXT_STEP]
    skip_steps: Annotated[Sequence[int], NEXT_STEP]
    eval_every_n_steps: Annotated[int, NEXT_STEP]
    eval_train_batches: Annotated[int | None, NEXT_STEP]
    eval_val_batches: Annotated[int | None, NEXT_STEP]


@dataclass(kw_only=True)
class ModelSettings:
    """What the commands that use a model share."""

    checkpoint: str
    device: str
    trust: Sequence[str]


@dataclass(kw_only=True)
class GenerateSettings(ModelSettings):
    """conf/generate.yaml."""

    prompt: str | None
    prompt_file: str | None
    max_new_tokens: int
    num_samples: int
    stop: Sequence[str]
    num_beams: int | None
    seed: int | None
    alternatives: int | None
    statistics: bool
    memorisation: bool
    training_text: str | None
    precision: str


@dataclass(kw_only=True)
class RespondSettings(ModelSettings):
    """conf/respond.yaml."""

    instruction: str | None
    input: str
    file: str | None
    split: str | None
    output: str | None
    template: str | None
    response_marker: str | None
    instruction_column: str
    input_column: str | None
    too_long: str
    max_new_tokens: int
    batch_size: int
    seed: int | None
    precision: str


@dataclass(kw_only=True)
class ClassifySettings(ModelSettings):
    """conf/classify.yaml."""

    text: str | None
    file: str | None
    text_column: str
    format: str | None
    columns: Sequence[str] | None
    output: str | None
    batch_size: int


@dataclass(kw_only=True)
class EvaluateSettings(ModelSettings):
    """conf/evaluate.yaml."""

    split: str


@dataclass(kw_only=True)
class InspectSettings(ModelSettings):
    """conf/inspect.yaml."""

    text: str | None
    text_file: str | None
    output: str
    alternatives: int


@dataclass(kw_only=True)
class JudgeSettings:
    """conf/judge.yaml."""

    responses: str
    compare: str | None
    output: str | None
    both_orders: bool
    seed: int
    bootstrap_samples: int
    markers: Sequence[str]


@dataclass(kw_only=True)
class WeightsFetchSettings:
    """conf/weights_fetch.yaml."""

    size: str
    source: str
    mirror: str | None


@dataclass(kw_only=True)
class WeightsConvertSettings(ModelSettings):
    """conf/weights_convert.yaml."""

    format: str
    output: str
    dtype: str | None
    verify: bool


@dataclass(kw_only=True)
class SweepSettings:
    """conf/sweep.yaml, whose groups are the search and the launcher."""


@dataclass(kw_only=True)
class SearchSettings:
    """The node `sweep`; `params` are settings to sweep over, each with its values in Hydra's grammar."""

    sampler: str
    n_trials: int | None
    pruner: str
    seed: int
    params: dict[str, Any]
    retry_failed: bool
    mix: bool
    metric: str
    mode: Literal["min", "max"] | None


@dataclass(kw_only=True)
class PlanSettings:
    """The node `plan` of conf/plan.yaml."""

    output: str
    timed_steps: int | None


@dataclass(kw_only=True)
class FindLrSettings:
    """The node `find` of conf/find_lr.yaml."""

    min_lr: float
    max_lr: float
    steps: int
    output: str


@dataclass(kw_only=True)
class FindBatchSizeSettings:
    """The node `find` of conf/find_batch_size.yaml."""

    max_batch_size: int | None
    timed_steps: int
    output: str


@dataclass(kw_only=True)
class VerifySettings:
    """The node `verify` of conf/verify_resume.yaml."""

    steps: int
    stops: Sequence[int] | None
    seed: int
    keep: str | None


ROOTS: dict[str, type] = {
    "train": TrainSettings,
    "plan": TrainSettings,
    "find_lr": TrainSettings,
    "find_batch_size": TrainSettings,
    "verify_resume": TrainSettings,
    "generate": GenerateSettings,
    "respond": RespondSettings,
    "classify": ClassifySettings,
    "evaluate": EvaluateSettings,
    "inspect": InspectSettings,
    "judge": JudgeSettings,
    "weights_fetch": WeightsFetchSettings,
    "weights_convert": WeightsConvertSettings,
    "sweep": SweepSettings,
}
NODES: dict[tuple[str, str], type] = {
    ("sweep", "sweep"): SearchSettings,
    ("plan", "plan"): PlanSettings,
    ("find_lr", "find"): FindLrSettings,
    ("find_batch_size", "find"): FindBatchSizeSettings,
    ("verify_resume", "verify"): VerifySettings,
}
"""The nodes of a root that have no class of their own elsewhere."""
