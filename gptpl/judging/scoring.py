"""Every answer of a file scored by a judge model."""

from collections.abc import Iterator, Sequence
from functools import partial

from gptpl.judging.judge import Judge, Verdict
from gptpl.judging.parsing import parse_score
from gptpl.judging.prompts import conversation
from gptpl.judging.responses import Entry
from gptpl.judging.settings import JudgeModel
from gptpl.judging.threads import in_threads


def judged(
    entries: Sequence[Entry], judge: Judge, settings: JudgeModel
) -> Iterator[tuple[int, Verdict[float]]]:
    """Yields (place, verdict) as the judge answers; a verdict's value is a score, or None.

    The answer is part of what the judge reads: one that is written to sway it may do so.

    Raises InputError where the judge cannot be asked any more.
    """
    prompt, reminder = settings.score_prompts()
    low, high = settings.min_score, settings.max_score
    parse = partial(parse_score, low=low, high=high)

    def score(entry: Entry) -> Verdict[float]:
        fields: dict[str, object] = {
            "instruction": entry.instruction,
            "input": entry.input,
            "output": entry.output,
            "model_response": entry.model_response,
            "rubric": settings.rubric,
            "min_score": f"{low:g}",
            "max_score": f"{high:g}",
        }
        messages = conversation(settings.system, prompt.filled(fields))
        return judge.verdict(messages, parse, reminder=reminder.filled(fields))

    return in_threads(entries, score, threads=settings.max_concurrent)
