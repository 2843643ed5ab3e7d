"""Types of everything a config may hold: a misspelt or ill-typed key dies when the config is composed.

Each dataclass types one kind of YAML; a YAML in conf/ takes its type by `defaults: [/schema/<name>@_here_]`.
Values that every choice of a group shares are the defaults here, so that a YAML shows what is its own.
Nothing heavy is imported: `gptpl train --help` composes these without torch.
"""

from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from gptpl.cli.schema_data import (
    DataConf,
    DownloadedDataConf,
    LabelledDataConf,
    SmsSpamDataConf,
    TextFilesDataConf,
)
from gptpl.cli.schema_init import FileInitConf, InitConf, PublishedInitConf, RunInitConf
from gptpl.cli.schema_instructions import DownloadedInstructionsConf, InstructionFileConf
from gptpl.cli.schema_judge import JudgeConf, JudgeModelConf, NoJudgeConf
from gptpl.cli.schema_outputs import (
    BestCheckpointConf,
    ClassificationReportConf,
    EarlyStoppingConf,
    FinalScoresConf,
    HyperparametersConf,
    LastCheckpointConf,
    LearningRateConf,
    LoggerConf,
    LossCurveConf,
    ProgressBarConf,
    SampleResponsesConf,
    SampleTextConf,
    ThroughputConf,
)
from gptpl.cli.schema_roots import (
    ClassifyConf,
    EvaluateConf,
    GenerateConf,
    InspectConf,
    RespondConf,
    SweepConf,
    TrainConf,
    WeightsConvertConf,
    WeightsFetchConf,
)
from gptpl.cli.schema_sampling import SamplingConf
from gptpl.cli.schema_sweep import JoblibConf, ProcessesConf, RayConf, SearchConf, SlurmConf
from gptpl.cli.schema_tune import LowRankTuneConf, TuneConf

# --- model, tokenizer ---------------------------------------------------------------------------------


@dataclass(kw_only=True)
class ModelConf:
    """Fields of `gptpl.model.GPTConfig`."""

    vocab_size: int | None = "${tokenizer.vocab_size}"  # type: ignore[assignment]
    context_length: int = MISSING
    emb_dim: int = MISSING
    n_heads: int = MISSING
    n_layers: int = MISSING
    drop_rate: float = 0.1
    qkv_bias: bool = MISSING
    tie_weights: bool = MISSING
    init: str = MISSING


@dataclass(kw_only=True)
class TokenizerConf:
    """A tokenizer class; `vocab_size` is None where the vocabulary is made from the data."""

    _target_: str = MISSING
    vocab_size: int | None = MISSING


# --- training -----------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class TaskConf:
    """A LightningModule class; what it needs of the run is given by the command."""

    _target_: str = MISSING
    _partial_: bool = True


@dataclass(kw_only=True)
class ClassificationTaskConf(TaskConf):
    """`gptpl.training.classification.ClassificationModule`."""

    _target_: str = "gptpl.training.classification.ClassificationModule"
    pooling: str = "last_token"
    head_bias: bool = True


@dataclass(kw_only=True)
class AdamWConf:
    """`gptpl.training.optimizers.adamw`."""

    _target_: str = "gptpl.training.optimizers.adamw"
    _partial_: bool = True
    lr: float = 4e-4
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    decay: str = "matrices"


@dataclass(kw_only=True)
class MuonConf(AdamWConf):
    """`gptpl.training.optimizers.muon`."""

    _target_: str = "gptpl.training.optimizers.muon"
    muon_lr: float = 4e-4
    momentum: float = 0.95


@dataclass(kw_only=True)
class ConstantScheduleConf:
    """`gptpl.training.schedules.ConstantSchedule`."""

    _target_: str = "gptpl.training.schedules.ConstantSchedule"
    warmup_steps: int = 0


@dataclass(kw_only=True)
class DecayScheduleConf:
    """A schedule that decays to `min_lr`."""

    _target_: str = MISSING
    warmup_steps: int = 10
    min_lr: float = 1e-6


@dataclass(kw_only=True)
class TrainerConf:
    """What is handed to `lightning.Trainer`, with `auto` decided and said by gptpl."""

    accelerator: str = "auto"
    devices: Any = "auto"
    num_nodes: int = 1
    strategy: str = "auto"
    precision: str = "auto"
    max_epochs: int | None = 10
    max_steps: int | None = None
    max_time: str | None = None
    stop_at_step: int | None = None
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = 1.0
    log_every_n_steps: int = 1
    compile: str = "auto"
    attention: str = "auto"
    head: str = "auto"
    recompute_activations: bool = False
    keep_freed_memory: bool | None = None


SCHEMAS: dict[str, type] = {
    "train": TrainConf,
    "generate": GenerateConf,
    "classify": ClassifyConf,
    "evaluate": EvaluateConf,
    "inspect": InspectConf,
    "judge": JudgeConf,
    "respond": RespondConf,
    "weights_fetch": WeightsFetchConf,
    "weights_convert": WeightsConvertConf,
    "sweep": SweepConf,
    "search": SearchConf,
    "launcher_processes": ProcessesConf,
    "launcher_slurm": SlurmConf,
    "launcher_ray": RayConf,
    "launcher_joblib": JoblibConf,
    "model": ModelConf,
    "init": InitConf,
    "init_published": PublishedInitConf,
    "init_file": FileInitConf,
    "init_run": RunInitConf,
    "tokenizer": TokenizerConf,
    "data": DataConf,
    "data_downloaded": DownloadedDataConf,
    "data_text_files": TextFilesDataConf,
    "data_instructions": DownloadedInstructionsConf,
    "data_instruction_file": InstructionFileConf,
    "data_labelled": LabelledDataConf,
    "data_sms_spam": SmsSpamDataConf,
    "task": TaskConf,
    "task_classify": ClassificationTaskConf,
    "tune": TuneConf,
    "tune_lora": LowRankTuneConf,
    "adamw": AdamWConf,
    "muon": MuonConf,
    "constant_schedule": ConstantScheduleConf,
    "decay_schedule": DecayScheduleConf,
    "trainer": TrainerConf,
    "sampling": SamplingConf,
    "judge_model": JudgeModelConf,
    "judge_none": NoJudgeConf,
    "logger": LoggerConf,
    "sample_text": SampleTextConf,
    "sample_responses": SampleResponsesConf,
    "checkpoint_best": BestCheckpointConf,
    "checkpoint_last": LastCheckpointConf,
    "early_stopping": EarlyStoppingConf,
    "learning_rate": LearningRateConf,
    "progress_bar": ProgressBarConf,
    "loss_curve": LossCurveConf,
    "throughput": ThroughputConf,
    "hyperparameters": HyperparametersConf,
    "classification_report": ClassificationReportConf,
    "final_scores": FinalScoresConf,
}


def register_schemas() -> None:
    """Makes every schema known to Hydra as `/schema/<name>`; calling it again changes nothing."""
    store = ConfigStore.instance()
    for name, node in SCHEMAS.items():
        store.store(group="schema", name=name, node=node, provider="gptpl")
