"""Answers judged: against their references, by a judge model over HTTP, and against another model's.

`score("responses.json", judge=JudgeModel(model="llama3")).lines()` is the table of `gptpl judge`.
"""

from gptpl.judging.judge import JudgeModel, NoJudge
from gptpl.judging.measures import Mean, ReferenceScores
from gptpl.judging.results import Comparison, Scores, compare, score

__all__ = ["Comparison", "JudgeModel", "Mean", "NoJudge", "ReferenceScores", "Scores", "compare", "score"]
