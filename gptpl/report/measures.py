"""What a run cost and reached, as numbers; NaN for what it does not tell."""

import math
import statistics
from dataclasses import dataclass

from gptpl.records.run_record import RunRecord
from gptpl.report.amounts import NONE, digits, duration, gigabytes, whole
from gptpl.report.ranking import best_loss


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Of one run.

    Attributes:
        loss: best validation loss, nats per token.
        last_loss: the last validation loss.
        tokens: seen in training.
        seconds: of training; of a resumed run without the parts that were killed.
        resumed: whether it was resumed.
        tokens_per_second: the median over the logged steps.
        peak_memory_bytes: of the process or the CUDA device.
        parameters: of the model.
    """

    loss: float
    last_loss: float
    tokens: float
    seconds: float
    resumed: bool
    tokens_per_second: float
    peak_memory_bytes: float
    parameters: float

    @property
    def perplexity(self) -> float:
        """Of the best validation loss."""
        return math.exp(self.loss) if self.loss < 700 else math.nan

    def cells(self) -> dict[str, str]:
        """Column -> text."""
        return {
            "validation loss": digits(self.loss),
            "perplexity": digits(self.perplexity),
            "last loss": digits(self.last_loss),
            "tokens": whole(self.tokens),
            "time": duration(self.seconds) + ("*" if self.resumed and math.isfinite(self.seconds) else ""),
            "tokens/s": digits(self.tokens_per_second),
            "peak memory": gigabytes(self.peak_memory_bytes),
            "parameters": whole(self.parameters),
        }


NO_CELLS = dict.fromkeys(
    (
        "validation loss",
        "perplexity",
        "last loss",
        "tokens",
        "time",
        "tokens/s",
        "peak memory",
        "parameters",
    ),
    NONE,
)
"""The columns, for what left no run."""


def measures(run: RunRecord) -> Measures:
    """Reads them from the run's files."""
    speeds = [row["train/tokens_per_second"] for row in run.rows if "train/tokens_per_second" in row]
    tokens = [row["train/tokens_seen"] for row in run.rows if "train/tokens_seen" in row]
    seen = max([*tokens, *(each.tokens_seen for each in run.evaluations)], default=math.nan)
    return Measures(
        loss=best_loss(run),
        last_loss=math.nan if run.last is None else run.last.val_loss,
        tokens=_number(run, "tokens_seen") if "tokens_seen" in run.record else seen,
        seconds=_number(run, "seconds"),
        resumed=bool(run.record.get("resumed")),
        tokens_per_second=statistics.median(speeds) if speeds else math.nan,
        peak_memory_bytes=_number(run, "peak_memory_bytes"),
        parameters=_number(run, "parameters"),
    )


def _number(run: RunRecord, name: str) -> float:
    value = run.record.get(name)
    return float(value) if isinstance(value, int | float) else math.nan
