"""Types of a sweep's own settings; the other schemas are in `gptpl.cli.schema`."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True)
class SearchConf:
    """`gptpl.sweeps.study.Search`, and settings to sweep over, each with its values in Hydra's grammar."""

    sampler: str = "grid"
    n_trials: int | None = 20
    pruner: str = "none"
    seed: int = 0
    params: dict[str, str] = field(default_factory=dict)
    retry_failed: bool = False
    mix: bool = False


@dataclass(kw_only=True)
class ProcessesConf:
    """`gptpl.sweeps.jobs.Processes`."""

    _target_: str = "gptpl.sweeps.jobs.Processes"
    n_jobs: int | None = None
    gpus_per_trial: int | None = None


@dataclass(kw_only=True)
class SlurmConf:
    """`gptpl.sweeps.executors.slurm`; from `timeout_min` on, parameters of submitit."""

    _target_: str = "gptpl.sweeps.executors.slurm"
    n_jobs: int = 8
    cluster: str | None = None
    timeout_min: int = 60
    cpus_per_task: int | None = None
    gpus_per_node: int | None = None
    mem_gb: float | None = None
    nodes: int = 1
    tasks_per_node: int = 1
    slurm_partition: str | None = None
    slurm_additional_parameters: dict[str, Any] | None = None


@dataclass(kw_only=True)
class RayConf:
    """`gptpl.sweeps.executors.ray`."""

    _target_: str = "gptpl.sweeps.executors.ray"
    n_jobs: int = 8
    address: str | None = None
    cpus_per_trial: int = 1
    gpus_per_trial: float = 0.0


@dataclass(kw_only=True)
class JoblibConf:
    """`gptpl.sweeps.executors.joblib`."""

    _target_: str = "gptpl.sweeps.executors.joblib"
    n_jobs: int = 2
