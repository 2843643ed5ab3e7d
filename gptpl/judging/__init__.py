"""Answers judged: against their references, by a judge model over HTTP, and against another model's.

`score("responses.json", judge=JudgeModel(model="llama3")).lines()` is the table of `gptpl judge`.
"""

from gptpl.judging.responses import Mean
from gptpl.judging.results import Comparison, Scores, compare, score
from gptpl.judging.settings import JudgeModel, NoJudge

__all__ = ["Comparison", "JudgeModel", "Mean", "NoJudge", "Scores", "compare", "score"]
