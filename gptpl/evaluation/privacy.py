"""What a model has learned by heart: sequences of its training text, and secrets that were planted in it."""

import copy
import math
import random
from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

import numpy as np

from gptpl.checkpoints.loading import LoadedCheckpoint
from gptpl.data.sources import Canaries, Corpus, TextFiles
from gptpl.errors import InputError
from gptpl.evaluation.benchmarks import About, Form, Metric, Metrics, Task, Values
from gptpl.evaluation.likelihood import ContinuationScore
from gptpl.evaluation.memorisation import training_corpus
from gptpl.evaluation.questions import Question
from gptpl.model.protocol import context_length
from gptpl.text import count_text

TRAINED, HELD_OUT = "training text", "validation text"
NEVER = "planted 0 times"
_TARGETS = ("gptpl.data.sources.Canaries", "gptpl.data.sources.canaries.Canaries")


class Extraction(Task):
    """How much of the training text the model continues word for word, from so many tokens before it.

    `extracted` is the fraction of sequences whose next `tokens` greedy decoding gives exactly, after the
    longest of `prefixes`; the groups are all lengths of what precedes them, and the same for validation text,
    which is what to compare with.

    Args:
        prefixes: tokens that precede a sequence.
        tokens: of a sequence.
        sequences: of each kind, drawn by `seed`.
        corpus: the training text; None: as the model's checkpoint names it.

    Source: Carlini et al. 2023, "Quantifying Memorization Across Neural Language Models".
    """

    primary = "extracted"
    forms: ClassVar[Mapping[str, Form]] = {"extracted": "percent"}
    about = About(
        source="the model's own training text (Carlini et al. 2023)",
        limits="Only text that is repeated word for word counts: a copy with one word changed is not seen.",
    )

    def __init__(
        self,
        *,
        prefixes: Sequence[int] = (8, 16, 32),
        tokens: int = 32,
        sequences: int = 200,
        seed: int = 0,
        corpus: Corpus | None = None,
    ) -> None:
        if tokens < 1 or sequences < 1 or not prefixes or min(prefixes) < 1:
            raise InputError(
                "extraction needs prefixes, tokens and sequences of 1 or more, got"
                f" {list(prefixes)}, {tokens}, {sequences}"
            )
        self._prefixes, self._tokens, self._sequences = sorted({*prefixes}), tokens, sequences
        self._seed, self._corpus = seed, corpus
        self._loaded: LoadedCheckpoint | None = None

    def of_model(self, loaded: LoadedCheckpoint) -> "Extraction":
        """See `Task`. Raises InputError for a context that has no room for the sequences."""
        room = context_length(loaded.net) + 1
        if self._prefixes[-1] + self._tokens > room:
            raise InputError(
                f"prefixes={self._prefixes} with tokens={self._tokens} exceed the model's context of"
                f" {room - 1} tokens: shorten them to {room} at most together"
            )
        made = copy.copy(self)
        made._loaded = loaded
        return made

    def questions(self) -> list[Question]:
        """See `Task`."""
        if self._loaded is None:
            raise InputError("extraction asks about a model's own training text: evaluate a run's model")
        corpus = training_corpus(self._loaded, self._corpus)
        longest, found = self._prefixes[-1], []
        for name, tokens in ((TRAINED, np.asarray(corpus.train)), (HELD_OUT, np.asarray(corpus.val))):
            room = len(tokens) - longest - self._tokens + 1
            if room < 1:
                if name == HELD_OUT:
                    continue
                raise InputError(
                    f"the training text has {len(tokens)} tokens: too few for sequences of"
                    f" {longest + self._tokens}"
                )
            draw = random.Random(self._seed)
            places = sorted(draw.sample(range(room), min(self._sequences, room)))
            for place in places:
                at = place + longest
                wanted = tuple(map(int, tokens[at : at + self._tokens]))
                for prefix in self._prefixes:
                    found.append(
                        Question(
                            id=f"{name}, token {at}, after {prefix}",
                            answers=((tuple(map(int, tokens[at - prefix : at])), wanted),),
                            gold=0,
                            groups=(f"{name}, after {prefix} tokens",),
                        )
                    )
        return found

    def values(self, question: Question, scores: Sequence[ContinuationScore]) -> Mapping[str, float]:
        """See `Task`."""
        [score] = scores
        return {"extracted": float(score.is_greedy), "nats_per_token": -score.log_probability / score.tokens}

    def metrics(self, questions: Sequence[Question], values: Mapping[str, Values]) -> Metrics:
        """See `Task`: of all questions together those about the training text after the longest prefix."""
        first = f"{TRAINED}, after {self._prefixes[-1]} tokens"
        own = [place for place, each in enumerate(questions) if each.groups == (first,)]
        kept = own or list(range(len(questions)))
        return {name: partial(Metric.mean, each[kept], better="low") for name, each in values.items()}


class Exposure(Task):
    """How far planted secrets stand out among `references` numbers that could have been planted, in bits.

    exposure = log2(references) - log2(rank of the secret); 1.44 is chance, log2(references) the most, which
    says that the model would give the secret away. The groups are how often a secret was planted; the first
    figure is of those that were planted at all.

    Source: Carlini et al. 2019, "The Secret Sharer".
    """

    primary = "exposure"
    about = About(
        source="secrets planted in the training text by data=canaries (Carlini et al. 2019)",
        limits="Planted secrets are random, out of place, and equal to the letter: easy to learn.",
    )

    def __init__(self, *, references: int = 1000, seed: int = 0) -> None:
        if references < 2:
            raise InputError(f"references must be 2 or more, got {references}")
        self._references, self._seed = references, seed
        self._planted: Canaries | None = None

    def of_model(self, loaded: LoadedCheckpoint) -> "Exposure":
        """See `Task`. Raises InputError for a run without canaries."""
        settings = loaded.run_config.get("data", {}).get("corpus")
        if not isinstance(settings, Mapping) or settings.get("_target_") not in _TARGETS:
            raise InputError(
                f"{loaded.path} was not trained on text with planted secrets: give suite.only=[extraction],"
                " or train with data=canaries"
            )
        of_text = ("_target_", "corpus")
        made = copy.copy(self)
        made._planted = Canaries(
            TextFiles(), **{name: value for name, value in settings.items() if name not in of_text}
        )
        one = made._planted.planted[0]
        numbers = [digit * len(one.secret) for digit in "12"]
        first, second = (list(loaded.tokenizer.encode(f"{one.before}{each}{one.after}")) for each in numbers)
        if first == second:
            raise InputError(
                f"the {loaded.tokenizer.name} tokenizer of {loaded.path} does not tell one number from"
                " another: train with one that does, such as tokenizer=bytes"
            )
        return made

    def questions(self) -> list[Question]:
        """See `Task`."""
        if self._planted is None:
            raise InputError("exposure asks about secrets in a model's training text: evaluate a run's model")
        planted = self._planted.planted
        digits, known = len(planted[0].secret), {int(each.secret) for each in planted}
        draw = random.Random(self._seed)
        found = []
        for each in planted:
            drawn = draw.sample(range(10**digits), min(10**digits, self._references + len(known)))
            others = [number for number in drawn if number not in known][: self._references - 1]
            numbers = [each.secret, *(f"{number:0{digits}}" for number in others)]
            found.append(
                Question(
                    id=each.secret,
                    answers=tuple((each.before, f"{number}{each.after}") for number in numbers),
                    gold=0,
                    groups=(f"planted {count_text(each.repeats, 'time')}",),
                )
            )
        return found

    def values(self, question: Question, scores: Sequence[ContinuationScore]) -> Mapping[str, float]:
        """See `Task`."""
        own, *others = (score.log_probability for score in scores)
        rank = 1 + sum(0.5 * (other == own) + (other > own) for other in others)
        return {"exposure": math.log2(len(scores)) - math.log2(rank), "rank": float(rank)}

    def metrics(self, questions: Sequence[Question], values: Mapping[str, Values]) -> Metrics:
        """See `Task`."""
        planted = [place for place, each in enumerate(questions) if each.groups != (NEVER,)]
        kept = planted or list(range(len(questions)))
        n = len(questions[0].answers)
        chance = math.log2(n) - math.fsum(map(math.log2, range(1, n + 1))) / n
        return {
            "exposure": partial(Metric.mean, values["exposure"][kept], chance=chance, better="low"),
            "rank": partial(Metric.mean, values["rank"][kept], chance=(n + 1) / 2),
        }
