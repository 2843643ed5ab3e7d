"""How close an answer is to its reference, by its words alone."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from gptpl.judging.responses import Entry


@dataclass(frozen=True, kw_only=True)
class ReferenceScores:
    """Scores of one answer, each from 0 to 1.

    Attributes:
        exact_match: 1 where the answer is the reference, but for case, punctuation, articles and white space.
        token_f1: harmonic mean of the shares of words in common, order ignored; of SQuAD, as exact_match.
        rouge_l: F-measure of the longest common subsequence of words.
        well_formed: 1 where the answer is not blank, holds none of the template's markers, and is so by the
            entry's own "well_formed" where it has one: only the program that asked the model knows whether
            the model ended its answer.
    """

    exact_match: float
    token_f1: float
    rouge_l: float
    well_formed: float


NAMES = ("exact_match", "token_f1", "rouge_l", "well_formed")
"""Fields of ReferenceScores, in the order in which they are shown."""


def reference_scores(entry: Entry, *, markers: Sequence[str]) -> ReferenceScores:
    """The scores of one answer; all by torchmetrics but `well_formed`.

    ROUGE sees letters a to z and digits alone, so that it says nothing of texts in other scripts. The time
    of ROUGE-L grows with the product of both lengths.

    Sources: Rajpurkar et al. 2016, "SQuAD"; Lin 2004, "ROUGE".

    Args:
        entry: answer and reference.
        markers: what only the prompt's template holds, such as "### Instruction".
    """
    # Imported here, for it takes seconds.
    from torchmetrics.functional.text import rouge_score, squad

    predicted = {"prediction_text": entry.model_response, "id": "0"}
    target = {"answers": {"text": [entry.output], "answer_start": [0]}, "id": "0"}
    words = squad(predicted, target)  # type: ignore[arg-type]
    rouge = rouge_score(entry.model_response, entry.output, rouge_keys="rougeL")
    blank = not entry.model_response.strip()
    ended = entry.fields.get("well_formed") is not False
    return ReferenceScores(
        exact_match=float(words["exact_match"]) / 100,
        token_f1=float(words["f1"]) / 100,
        rouge_l=float(rouge["rougeL_fmeasure"]),
        well_formed=float(
            ended and not blank and not any(marker in entry.model_response for marker in markers)
        ),
    )


def by_name(scores: Sequence[ReferenceScores]) -> dict[str, list[float]]:
    """Every kind of score as a list over the entries."""
    rows = [asdict(each) for each in scores]
    return {name: [row[name] for row in rows] for name in NAMES}
