"""Types of loggers and callbacks; the other schemas are in `gptpl.cli.schema`."""

from dataclasses import dataclass

from omegaconf import MISSING

from gptpl.cli.schema_sampling import SamplingConf


@dataclass(kw_only=True)
class LoggerConf:
    """A Lightning logger writing into the run folder."""

    _target_: str = MISSING
    save_dir: str | None = "${run_dir}"  # null until the run has a folder


@dataclass(kw_only=True)
class CallbackConf:
    """A callback class without settings."""

    _target_: str = MISSING


@dataclass(kw_only=True)
class SampleTextConf(CallbackConf):
    """`gptpl.callbacks.sample_text.SampleText`."""

    _target_: str = "gptpl.callbacks.sample_text.SampleText"
    prompts: list[str] = MISSING
    strategies: list[SamplingConf] = MISSING
    max_new_tokens: int = 50
    every_n_steps: int | None = None
    every_n_epochs: int | None = 1
    path: str = "${run_dir}/samples.jsonl"
    seed: int = "${seed}"  # type: ignore[assignment]


@dataclass(kw_only=True)
class SampleResponsesConf(CallbackConf):
    """`gptpl.callbacks.sample_responses.SampleResponses`."""

    _target_: str = "gptpl.callbacks.sample_responses.SampleResponses"
    entries: int = 8
    max_new_tokens: int = 100
    every_n_steps: int | None = None
    every_n_epochs: int | None = 1
    path: str = "${run_dir}/samples.jsonl"


@dataclass(kw_only=True)
class BestCheckpointConf(CallbackConf):
    """`gptpl.callbacks.checkpoints.BestCheckpoint`."""

    _target_: str = "gptpl.callbacks.checkpoints.BestCheckpoint"
    dirpath: str = "${run_dir}/checkpoints"
    monitor: str = "val/loss"


@dataclass(kw_only=True)
class LastCheckpointConf(CallbackConf):
    """`gptpl.callbacks.checkpoints.LastCheckpoint`."""

    _target_: str = "gptpl.callbacks.checkpoints.LastCheckpoint"
    dirpath: str = "${run_dir}/checkpoints"
    every_n_minutes: float | None = 10.0
    every_n_steps: int | None = None
    keep: int = 2


@dataclass(kw_only=True)
class EarlyStoppingConf(CallbackConf):
    """`gptpl.callbacks.early_stopping.EarlyStopping`."""

    _target_: str = "gptpl.callbacks.early_stopping.EarlyStopping"
    monitor: str = "val/loss"
    patience: int = MISSING
    min_delta: float = 0.0
    mode: str = "min"
    verbose: bool = True


@dataclass(kw_only=True)
class LearningRateConf(CallbackConf):
    """`gptpl.callbacks.learning_rate.LearningRate`."""

    _target_: str = "gptpl.callbacks.learning_rate.LearningRate"


@dataclass(kw_only=True)
class ProgressBarConf(CallbackConf):
    """`gptpl.callbacks.progress.ProgressBar`."""

    _target_: str = "gptpl.callbacks.progress.ProgressBar"
    log_every_seconds: float = 15.0


@dataclass(kw_only=True)
class LossCurveConf(CallbackConf):
    """`gptpl.callbacks.loss_curve.LossCurve`."""

    _target_: str = "gptpl.callbacks.loss_curve.LossCurve"
    path: str = "${run_dir}/loss.png"


@dataclass(kw_only=True)
class HyperparametersConf(CallbackConf):
    """`gptpl.callbacks.hyperparameters.Hyperparameters`."""

    _target_: str = "gptpl.callbacks.hyperparameters.Hyperparameters"


@dataclass(kw_only=True)
class ClassificationReportConf(CallbackConf):
    """`gptpl.callbacks.classification_report.ClassificationReport`."""

    _target_: str = "gptpl.callbacks.classification_report.ClassificationReport"
    confusion_path: str = "${run_dir}/confusion.png"
    calibration_path: str = "${run_dir}/calibration.png"


@dataclass(kw_only=True)
class FinalScoresConf(CallbackConf):
    """`gptpl.callbacks.final_scores.FinalScores`."""

    _target_: str = "gptpl.callbacks.final_scores.FinalScores"


@dataclass(kw_only=True)
class ThroughputConf(CallbackConf):
    """`gptpl.callbacks.throughput.Throughput`."""

    _target_: str = "gptpl.callbacks.throughput.Throughput"
    window: int = 20
