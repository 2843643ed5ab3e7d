"""The settings of the commands' root configs with their types; what a group is, its class says.

A field whose type is a class of this file is a node of the root's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from gptpl.resuming import FREE, INEXACT, NEXT_STEP


@dataclass(kw_only=True)
class _Train:
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
class _Model:
    checkpoint: str
    device: str
    trust: Sequence[str]


@dataclass(kw_only=True)
class _Generate(_Model):
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
class _Respond(_Model):
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
class _Classify(_Model):
    text: str | None
    file: str | None
    text_column: str
    format: str | None
    columns: Sequence[str] | None
    output: str | None
    batch_size: int


@dataclass(kw_only=True)
class _OwnData:  # of the model's own run
    batch_size: int | Literal["auto"]
    max_length: int | None


@dataclass(kw_only=True)
class _Evaluate(_Model):
    split: str
    data: _OwnData


@dataclass(kw_only=True)
class _Inspect(_Model):
    text: str | None
    text_file: str | None
    output: str
    alternatives: int


@dataclass(kw_only=True)
class _Judge:
    responses: str
    compare: str | None
    output: str | None
    both_orders: bool
    seed: int
    bootstrap_samples: int
    markers: Sequence[str]


@dataclass(kw_only=True)
class _WeightsFetch:
    size: str
    source: str
    mirror: str | None


@dataclass(kw_only=True)
class _WeightsConvert(_Model):
    format: str
    output: str
    dtype: str | None
    verify: bool


@dataclass(kw_only=True)
class _Search:
    sampler: str
    n_trials: int | None
    pruner: str
    seed: int
    params: dict[str, Any]  # settings to sweep over, each with its values in Hydra's grammar
    retry_failed: bool
    mix: bool
    metric: str
    mode: Literal["min", "max"] | None


@dataclass(kw_only=True)
class _Sweep:
    sweep: _Search


@dataclass(kw_only=True)
class _PlanNode:
    output: str
    timed_steps: int | None


@dataclass(kw_only=True)
class _Plan(_Train):
    plan: _PlanNode


@dataclass(kw_only=True)
class _FindLrNode:
    min_lr: float
    max_lr: float
    steps: int
    output: str


@dataclass(kw_only=True)
class _FindLr(_Train):
    find: _FindLrNode


@dataclass(kw_only=True)
class _FindBatchSizeNode:
    max_batch_size: int | None
    timed_steps: int
    output: str


@dataclass(kw_only=True)
class _FindBatchSize(_Train):
    find: _FindBatchSizeNode


@dataclass(kw_only=True)
class _VerifyNode:
    steps: int
    stops: Sequence[int] | None
    seed: int
    keep: str | None


@dataclass(kw_only=True)
class _Verify(_Train):
    verify: _VerifyNode


ROOTS: dict[str, type] = {
    "train": _Train,
    "plan": _Plan,
    "find_lr": _FindLr,
    "find_batch_size": _FindBatchSize,
    "verify_resume": _Verify,
    "generate": _Generate,
    "respond": _Respond,
    "classify": _Classify,
    "evaluate": _Evaluate,
    "inspect": _Inspect,
    "judge": _Judge,
    "weights_fetch": _WeightsFetch,
    "weights_convert": _WeightsConvert,
    "sweep": _Sweep,
}
