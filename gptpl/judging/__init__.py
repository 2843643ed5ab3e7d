"""Answers judged: against their references, by a judge model over HTTP, and against another model's."""

from gptpl.judging.comparison import Preference, compared
from gptpl.judging.judge import Judge, Verdict
from gptpl.judging.reference_scores import ReferenceScores, reference_scores
from gptpl.judging.responses import Entry, Pair, paired, read_responses
from gptpl.judging.scoring import judged
from gptpl.judging.settings import JudgeModel, NoJudge
from gptpl.judging.statistics import Mean, bootstrap_mean, check_bootstrap, sign_test

__all__ = [
    "Entry",
    "Judge",
    "JudgeModel",
    "Mean",
    "NoJudge",
    "Pair",
    "Preference",
    "ReferenceScores",
    "Verdict",
    "bootstrap_mean",
    "check_bootstrap",
    "compared",
    "judged",
    "paired",
    "read_responses",
    "reference_scores",
    "sign_test",
]
