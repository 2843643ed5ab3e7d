"""Names and types of the settings at the root of each command's config.

A field that is a dataclass is a node of settings, such as `find` in `find.steps`. Settings of config groups
are not listed: their classes have them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, make_dataclass
from typing import Annotated, Any, Literal

from pydantic import PositiveInt

from gptpl.settings import FREE, INEXACT, NEXT_STEP, NOT_NEGATIVE, POSITIVE, SEED, SIZE


@dataclass(kw_only=True)
class _Train:
    name: Annotated[str | None, FREE]
    run_dir: str | None
    resume: Annotated[str | None, FREE]
    trust: Annotated[Sequence[str], FREE]
    tags: Annotated[Sequence[str], FREE]
    notes: Annotated[str | None, FREE]
    seed: Annotated[int, SEED]
    deterministic: Annotated[bool, INEXACT]
    on_nonfinite: Annotated[Literal["stop", "rollback"], NEXT_STEP]
    skip_steps: Annotated[Sequence[int], NEXT_STEP]
    eval_every_n_steps: Annotated[int, NEXT_STEP, POSITIVE]
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
    seed: Annotated[int | None, SEED]
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
    split: Literal["train", "val", "test"] | None
    output: str | None
    template: str | None
    response_marker: str | None
    instruction_column: str
    input_column: str | None
    too_long: Literal["refuse", "skip"]
    max_new_tokens: PositiveInt
    batch_size: PositiveInt
    seed: Annotated[int | None, SEED]
    precision: str


@dataclass(kw_only=True)
class _Serve(_Model):  # limits of these: gptpl.serving.server.ServerSettings
    also: Sequence[str]
    names: Sequence[str] | None
    host: str
    port: int
    api_key: str | None
    insecure: bool
    cors: Sequence[str]
    chat_template: str | None
    filter_prompts: bool
    feedback: str | None
    log_texts: bool
    max_rows: int
    prompt_piece: int
    kept_mb: int
    max_queue: int
    max_per_client: int
    requests_per_minute: int | None
    max_body_kb: int
    timeout_s: float
    grace_s: float
    drift_reference: int
    drift_window: int
    drift_threshold: float
    drift_file: str | None
    precision: str


@dataclass(kw_only=True)
class _Classify(_Model):
    text: str | None
    file: str | None
    text_column: str
    format: str | None
    columns: Sequence[str] | None
    output: str | None
    batch_size: PositiveInt


@dataclass(kw_only=True)
class _OwnData:  # of the model's own run
    batch_size: int
    max_length: int | None


@dataclass(kw_only=True)
class _Evaluate(_Model):
    split: str
    precision: str
    compare_with: Sequence[str]
    output: str | None


@dataclass(kw_only=True)
class _Inspect(_Model):
    text: str | None
    text_file: str | None
    output: str
    tabs: Sequence[str] | None
    beside: str | None
    alternatives: int
    max_tokens: int
    ablation_tokens: int


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
class _Card(_Model):
    output: str | None
    intended_use: str | None
    licence: str | None


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
class _PlanNode:
    output: str
    timed_steps: int | None
    nodes: int | None  # limits of these: gptpl.runs.parallel_plan.Cluster
    devices_per_node: int | None
    memory_gb: float | None
    tflops: float | None
    gb_per_second_within: float | None
    gb_per_second_between: float | None
    microseconds_per_hop: float | None
    dry_run: bool


@dataclass(kw_only=True)
class _DataShow(_Train):
    output: str | None
    sequences: Annotated[int, NOT_NEGATIVE]
    sample_bytes: Annotated[int | None, SIZE]


@dataclass(kw_only=True)
class _FindLrNode:
    min_lr: float
    max_lr: float
    steps: int
    output: str


@dataclass(kw_only=True)
class _FindBatchSizeNode:
    max_batch_size: int | None
    timed_steps: int
    output: str


@dataclass(kw_only=True)
class _VerifyNode:
    steps: int
    stops: Sequence[int] | None
    seed: int
    kill: str | None
    keep: str | None


@dataclass(kw_only=True)
class _TokenizerNode:
    vocab_size: PositiveInt
    special_tokens: Sequence[str]
    sample_bytes: PositiveInt | None
    output: str


@dataclass(kw_only=True)
class _DoctorNode:
    seconds: Annotated[float, POSITIVE]
    megabytes: PositiveInt


@dataclass(kw_only=True)
class _SubmitNode:
    nodes: PositiveInt
    gpus_per_node: Annotated[int, NOT_NEGATIVE]
    time: str | int | None
    partition: str | None
    account: str | None
    cpus_per_task: PositiveInt | None
    mem: str | int | None
    job_name: str | None
    options: Sequence[str]
    setup: str | None
    signal_seconds: int
    max_requeues: Annotated[int, NOT_NEGATIVE]
    file: str | None
    dry_run: bool


def _with_node(name: str, node: type, *bases: type) -> type:
    """The settings of `bases` and one node, `name`."""
    return make_dataclass(name, [(name, node)], bases=bases, kw_only=True)


ROOTS: dict[str, type] = {
    "train": _Train,
    "submit": _with_node("submit", _SubmitNode, _Train),
    "plan": _with_node("plan", _PlanNode, _Train),
    "autotune": _Train,
    "data_encode": _Train,
    "data_show": _DataShow,
    "find_lr": _with_node("find", _FindLrNode, _Train),
    "find_batch_size": _with_node("find", _FindBatchSizeNode, _Train),
    "verify_resume": _with_node("verify", _VerifyNode, _Train),
    "generate": _Generate,
    "respond": _Respond,
    "serve": _Serve,
    "classify": _Classify,
    "evaluate": _with_node("data", _OwnData, _Evaluate),
    "inspect": _Inspect,
    "judge": _Judge,
    "weights_fetch": _WeightsFetch,
    "weights_convert": _WeightsConvert,
    "card": _Card,
    "sweep": _with_node("sweep", _Search),
    "tokenizer_train": _with_node("tokenizer", _TokenizerNode),
    "doctor": _with_node("doctor", _DoctorNode),
}
