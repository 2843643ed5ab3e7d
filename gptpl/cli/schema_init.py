"""Types of the starting weights, the group `init`; the other schemas are in `gptpl.cli.schema`."""

from dataclasses import dataclass

from omegaconf import MISSING


@dataclass(kw_only=True)
class InitConf:
    """`gptpl.weights.starting.RandomWeights`."""

    _target_: str = "gptpl.weights.starting.RandomWeights"


@dataclass(kw_only=True)
class PublishedInitConf:
    """`gptpl.weights.starting.PublishedWeights`."""

    _target_: str = "gptpl.weights.starting.PublishedWeights"
    source: str = MISSING
    size: str | None = None
    path: str | None = None
    mirror: str | None = None
    crop_context: bool = False


@dataclass(kw_only=True)
class FileInitConf:
    """`gptpl.weights.starting.FileWeights`."""

    _target_: str = "gptpl.weights.starting.FileWeights"
    path: str | None = None
    crop_context: bool = False
    crop_vocabulary: bool = False


@dataclass(kw_only=True)
class RunInitConf:
    """`gptpl.training.starting_run.RunWeights`."""

    _target_: str = "gptpl.training.starting_run.RunWeights"
    checkpoint: str | None = None
    crop_context: bool = False
    crop_vocabulary: bool = False
