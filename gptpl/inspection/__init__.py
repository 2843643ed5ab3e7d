"""A look inside a model: what its parts do with a text, as numbers and as a web page.

`record` keeps what every part of a `GPTModel` computes, `measures` has functions of it, `Inspection` all of
them for a text, and the page.
"""

from gptpl.inspection.measures import (
    Ablation,
    HeadScores,
    LogitLens,
    Recording,
    ablate,
    ablation,
    head_scores,
    induction_scores,
    logit_lens,
    record,
)
from gptpl.inspection.page import Inspection

__all__ = [
    "Ablation",
    "HeadScores",
    "Inspection",
    "LogitLens",
    "Recording",
    "ablate",
    "ablation",
    "head_scores",
    "induction_scores",
    "logit_lens",
    "record",
]
