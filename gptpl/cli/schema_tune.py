"""Types of what trains, the group `tune`; the other schemas are in `gptpl.cli.schema`."""

from dataclasses import dataclass

from omegaconf import MISSING


@dataclass(kw_only=True)
class TuneConf:
    """A class of `gptpl.training.tuning` without settings."""

    _target_: str = MISSING


@dataclass(kw_only=True)
class LowRankTuneConf(TuneConf):
    """`gptpl.training.tuning.TuneLowRank`."""

    _target_: str = "gptpl.training.tuning.TuneLowRank"
    rank: int = MISSING
    alpha: float = MISSING
    dropout: float = MISSING
    targets: list[str] = MISSING
