"""What a model writes after prompts about groups of people: in how many texts a filter finds something.

The filter judges what the model wrote, not the prompt. Texts are kept as they are, so that another filter
judges them without generating again.
"""

import csv
import hashlib
import io
import json
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, get_args

from torch import nn

from gptpl.errors import InputError
from gptpl.evaluation.benchmarks import Measure, QuestionTask, Task
from gptpl.evaluation.bias import fair_benchmark
from gptpl.evaluation.likelihood import Pair
from gptpl.evaluation.questions import Question, Questions
from gptpl.evaluation.statistics import repetition_rate
from gptpl.evaluation.suite import Suite, SuiteResult
from gptpl.filters import Filter
from gptpl.generation import Completion, SamplingRules, complete
from gptpl.generation.sampling import mixed_generator
from gptpl.model.protocol import cached_form, context_length, device_of
from gptpl.settings import COUNT_OR_NULL, SIZE, check_limits
from gptpl.text import nearest
from gptpl.tokenizers import Tokenizer

BATCH = 16
"""Texts that are generated at a time."""
_NGRAM = 4


def written(
    net: nn.Module, tokenizer: Tokenizer, prompts: Mapping[int, Sequence[int]], *, seed: int, **settings: Any
) -> Iterator[tuple[int, Completion]]:
    """The text after each prompt, by its number, the longest prompts first; `settings` as for `complete`.

    A text that is drawn depends on `seed` and its number, not on the texts that are generated beside it.
    """
    model = cached_form(net, rows=BATCH) or net
    by_length = sorted(prompts, key=lambda number: -len(prompts[number]))
    for at in range(0, len(by_length), BATCH):
        some = by_length[at : at + BATCH]
        generators = [mixed_generator(device_of(net), seed, number) for number in some]
        given = [prompts[number] for number in some]
        texts = complete(model, tokenizer, given, generator=generators, **settings)
        yield from zip(some, texts, strict=True)


# --- prompts --------------------------------------------------------------------------------------------

Domain = Literal["gender", "political_ideology", "profession", "race", "religious_ideology"]
Pairs = Literal["binary", "queer_nonqueer"]


@dataclass(frozen=True, kw_only=True)
class Bold(Questions):
    """Beginnings of sentences of Wikipedia about people, professions and beliefs (Dhamala et al. 2021).

    `each` is the most prompts of a group, drawn; None: all. A cluster is a person or page.
    """

    domain: Domain
    each: Annotated[int | None, COUNT_OR_NULL] = None

    def __post_init__(self) -> None:
        if self.domain not in (known := get_args(Domain)):
            raise InputError(
                f"domain={self.domain} is unknown{nearest(str(self.domain), known)}: choose one of"
                f" {', '.join(known)}"
            )
        check_limits(Bold, each=self.each)

    def read(self) -> Iterator[Question]:
        """See `Questions`."""
        groups = json.loads(fair_benchmark(f"BOLD/data/prompts/{self.domain}_prompt.json"))
        for group, pages in groups.items():
            own = [
                Question(
                    id=f"{group} {page} {number}",
                    answers=((prompt.rstrip(), ""),),
                    groups=(group.replace("_", " "),),
                    cluster=page,
                )
                for page, prompts in pages.items()
                for number, prompt in enumerate(prompts)
                if prompt.strip()
            ]
            if self.each is not None and self.each < len(own):
                own = random.Random(0).sample(own, self.each)
            yield from own


@dataclass(frozen=True, kw_only=True)
class Honest(Questions):
    """Beginnings of sentences about an identity, up to their blank (Nozza et al. 2021, 2022), in English.

    A cluster is an identity, such as "the woman".
    """

    pairs: Pairs = "binary"

    def __post_init__(self) -> None:
        if self.pairs not in (known := get_args(Pairs)):
            raise InputError(f"pairs={self.pairs} is unknown: choose one of {', '.join(known)}")

    def read(self) -> list[Question]:
        """See `Questions`."""
        text = fair_benchmark(f"HONEST/data/{self.pairs}/en_template.tsv")
        return [
            Question(
                id=f"{number}",
                answers=((row["template_masked"].partition("[M]")[0].rstrip(), ""),),
                groups=(row["category"].replace("_", " "),),
                cluster=row["identity"],
            )
            for number, row in enumerate(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t"), 1)
        ]


# --- what is counted ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A text that a model wrote: whether the filter found something, its tokens, and repeated 4-grams.

    `left_out` tokens of its prompt had no room in the context.
    """

    found: bool
    tokens: int
    repetition: float
    left_out: int


class Continued(QuestionTask):
    """Prompts that a model continues, for a `Continuations` suite.

    `found` is the fraction of texts in which the filter finds something; `tokens` and `repetition`, the
    fraction of a text's 4-grams that are repeats, are means.
    """

    primary = "found"
    measures: Mapping[str, Measure] = {
        "found": Measure(better="low", form="percent"),
        "tokens": Measure(),
        "repetition": Measure(better="low", form="percent"),
    }

    def values(self, question: Question, scores: Sequence[Any]) -> Mapping[str, float]:
        """See `Task`; of what was `Judged`."""
        [text] = scores
        return {"found": float(text.found), "tokens": float(text.tokens), "repetition": text.repetition}


# --- the suite ------------------------------------------------------------------------------------------


class Continuations(Suite):
    """Prompts that a model continues by `sampling`, each with `tokens` tokens at most, judged by a `filter`.

    `only`, `limit` and `seed` as for `Suite`; the texts are drawn by `seed`, too.
    """

    def __init__(
        self,
        *,
        tasks: Mapping[str, Task],
        filter: Filter | None = None,
        tokens: Annotated[int, SIZE] = 20,
        sampling: SamplingRules | Mapping[str, Any],
        only: Sequence[str] | None = None,
        limit: int | None = None,
        seed: int = 0,
    ) -> None:
        for name, task in tasks.items():
            if not isinstance(task, Continued):
                raise InputError(f"suite.tasks.{name} is no Continued task: this suite has texts written")
        super().__init__(tasks=tasks, only=only, limit=limit, seed=seed)
        check_limits(Continuations.__init__, "suite.", tokens=tokens)
        self.filter, self.tokens, self.sampling = filter, tokens, SamplingRules.of(sampling)

    def run(self, net: nn.Module, tokenizer: Tokenizer, **settings: Any) -> SuiteResult:
        """See `Suite.run`. Raises InputError without a filter, too."""
        judge = self._judge()
        result = super().run(net, tokenizer, **settings)

        def judged(sha256: str) -> str:  # models are compared by what one filter finds
            return hashlib.sha256(f"{sha256} {judge.identity}".encode()).hexdigest()

        tasks = {name: replace(each, sha256=judged(each.sha256)) for name, each in result.tasks.items()}
        return replace(result, tasks=tasks)

    def check(
        self, net: nn.Module, tokenizer: Tokenizer, *, left_out: Collection[str] = ()
    ) -> dict[str, dict[str, list[Pair]]]:
        """See `Suite.check`. Raises InputError for a context that has no room, and without a filter."""
        self._judge()
        if self.tokens >= context_length(net):
            raise InputError(
                f"suite.tokens={self.tokens} leave no room for a prompt in the model's context of"
                f" {context_length(net)}: give fewer"
            )
        return super().check(net, tokenizer, left_out=left_out)

    def _judge(self) -> Filter:
        if self.filter is None or not self.filter.rules:
            raise InputError(
                "the suite counts texts in which a filter finds something, and has no filter: give one, such"
                " as filter=words filter.path=FILE, or filter=classifier filter.checkpoint=RUN"
            )
        return self.filter

    def _identity(self, task: str) -> str:
        written = f"{super()._identity(task)} {self.sampling} {self.tokens} {self.seed}"
        return hashlib.sha256(written.encode()).hexdigest()

    def _encoded(self, question: Question, tokenizer: Tokenizer) -> list[Pair]:
        [(prompt, _)] = question.answers
        return [([int(token) for token in tokenizer.encode(prompt)] or [tokenizer.eot_id], ())]

    def _answers(
        self, net: nn.Module, tokenizer: Tokenizer, task: str, asked: Mapping[str, list[Pair]]
    ) -> Iterator[dict[str, Any]]:
        room = context_length(net) - self.tokens
        names = [each.id for each in self.questions(task)]
        whole = {number: asked[name][0][0] for number, name in enumerate(names) if name in asked}
        prompts = {number: prompt[-room:] for number, prompt in whole.items()}
        settings = {"rules": self.sampling, "max_new_tokens": self.tokens}
        for number, text in written(net, tokenizer, prompts, seed=self.seed, **settings):
            rate = repetition_rate([text.tokens], _NGRAM) if len(text.tokens) >= _NGRAM else 0.0
            left_out = len(whole[number]) - len(prompts[number])
            yield {names[number]: [text.text, len(text.tokens), rate, left_out]}

    def _scores(self, kept: Any) -> Sequence[Any]:
        text, tokens, repetition, left_out = kept
        found = bool(self._judge().verdict(text).findings)
        return [Judged(found=found, tokens=tokens, repetition=repetition, left_out=left_out)]
