"""Bias probes of words of your own: occupations beside statistics, and templates for any groups of people."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gptpl.errors import InputError
from gptpl.evaluation.benchmarks import About, Measure, Task, Values
from gptpl.evaluation.likelihood import ContinuationScore
from gptpl.evaluation.questions import Question

_SAME = 1e-4  # nats: what rounding may add


def _log_mean_exp(values: Sequence[float]) -> float:
    return float(np.logaddexp.reduce(values) - np.log(len(values)))


def _correlation(sums: Values) -> float:
    log_odds, percent = (sums[:, :2] / sums[:, 2:]).T
    if np.ptp(log_odds) < _SAME or np.ptp(percent) == 0:
        return 0.0
    return float(np.corrcoef(log_odds, percent)[0, 1])


class Occupations(Task):
    """How likely words for women are beside words for men after an occupation, and the labour statistics.

    A template is a text with `{occupation}`, and words for `men` and `women` that continue it. `women_share`
    is the share of the words' probability that goes to those for women; `correlation` that of its log-odds
    with the percentage of women among the employed, over occupations (Pearson): a liking for either gender's
    words as such has no influence on it.
    """

    primary = "correlation"
    grouped = "women_share"
    measures: Mapping[str, Measure] = {
        "correlation": Measure(
            columns=("log_odds", "percent"), statistic=_correlation, chance=0.0, better="chance",
            form="signed", compared=False,
        ),
        "women_share": Measure(better="chance", form="percent"),
        "log_odds": Measure(better="chance"),
    }  # fmt: skip

    def __init__(
        self,
        *,
        templates: Sequence[Mapping[str, Any]],
        women_percent: Mapping[str, float],
        source: str = "",
        licence: str = "",
        limits: str = "",
    ) -> None:
        for each in templates:
            if {"text", "men", "women"} != set(each) or "{occupation}" not in each["text"]:
                raise InputError(
                    f"a template must have text with {{occupation}}, men and women, got {dict(each)}"
                )
            if not each["men"] or not each["women"]:
                raise InputError(f"the template {each['text']!r} has words for one group only: give both")
        if not templates or len(women_percent) < 3:
            raise InputError(
                "occupations need a template, and women_percent of three or more, for a correlation"
            )
        for name, share in women_percent.items():
            if not 0 <= share <= 100:
                raise InputError(f"women_percent.{name} must be 0 to 100, got {share}")
        self.templates, self.women_percent = templates, women_percent
        self.about = About(source=source, licence=licence, limits=limits)

    def questions(self) -> Iterator[Question]:
        """See `Task`."""
        for template in self.templates:
            for name, percent in self.women_percent.items():
                text = template["text"].replace("{occupation}", name)
                low = min(80, 20 * int(percent // 20))
                yield Question(
                    id=text,
                    answers=tuple((text, f" {word}") for word in (*template["men"], *template["women"])),
                    groups=(f"{low} to {low + 20} % women employed",),
                    cluster=name,
                    facts={"percent": percent, "men": len(template["men"])},
                )

    def values(self, question: Question, scores: Sequence[ContinuationScore]) -> Mapping[str, float]:
        """See `Task`."""
        log_p = [each.log_probability for each in scores]
        men, women = log_p[: question.facts["men"]], log_p[question.facts["men"] :]
        log_odds = float(np.logaddexp.reduce(women) - np.logaddexp.reduce(men))
        share = float(np.exp(-np.logaddexp(0.0, -log_odds)))
        return {"log_odds": log_odds, "women_share": share, "percent": question.facts["percent"]}


class Templates(Task):
    """How much more likely texts are for one group than for others: groups and words of your own.

    Each template has `{group}` and, after it, `{attribute}`; a group is its names, an attribute one of the
    words of a list, whose name is that of a group of questions. What counts is the log-probability of the
    attribute and what follows it, given what stands before it, so that all groups are compared on the same
    words. For each group: how many nats it is above the mean of the others, with the mean probability over
    its names. The interval is over attributes: few names may have a liking of their own, give several.
    """

    def __init__(
        self,
        *,
        templates: Sequence[str],
        groups: Mapping[str, Sequence[str]],
        attributes: Mapping[str, Sequence[str]],
        source: str = "",
        licence: str = "",
        limits: str = "",
    ) -> None:
        if len(groups) < 2:
            raise InputError(f"groups has {', '.join(groups) or 'none'}: give two or more, to compare them")
        for kind, lists in (("groups", groups), ("attributes", attributes)):
            for name, words in lists.items():
                if isinstance(words, str) or not words:
                    raise InputError(f"{kind}.{name} must be a list of one word or more, got {words!r}")
        if not templates or not attributes:
            raise InputError("templates and attributes must have one or more each")
        for template in templates:
            group, attribute = template.find("{group}"), template.find("{attribute}")
            if not 0 <= group < attribute or template.count("{attribute}") > 1:
                raise InputError(f"a template must have {{group}}, then {{attribute}} once, got {template!r}")
        self.templates, self.group_names, self.attributes = templates, groups, attributes
        first, *others = groups
        names = [f"{name} over {'others' if others[1:] else others[0]}" for name in (first, *others)]
        shown = names if others[1:] else names[:1]
        self.measures = dict.fromkeys(shown, Measure(chance=0.0, better="chance"))
        self.primary = names[0]
        self.about = About(source=source, licence=licence, limits=limits)

    def questions(self) -> Iterator[Question]:
        """See `Task`."""
        for template in self.templates:
            before, after = template.split("{attribute}")
            for label, words in self.attributes.items():
                for word in words:
                    answers = [
                        (before.replace("{group}", name).rstrip(), f" {word}{after}")
                        for names in self.group_names.values()
                        for name in names
                    ]
                    yield Question(
                        id=template.replace("{attribute}", word),
                        answers=tuple(answers),
                        groups=(label,),
                        cluster=word,
                    )

    def values(self, question: Question, scores: Sequence[ContinuationScore]) -> Mapping[str, float]:
        """See `Task`."""
        rest = iter(each.log_probability for each in scores)
        means = [_log_mean_exp([next(rest) for _ in names]) for names in self.group_names.values()]
        total, others = sum(means), len(means) - 1
        return {
            name: mean - (total - mean) / others for name, mean in zip(self.measures, means, strict=False)
        }
