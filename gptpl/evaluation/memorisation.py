"""Memorisation: what a model copies of its training text, and what it has learned by heart.

Only verbatim overlap counts, in tokens: a lower bound on what a model has memorised, since a copy with one
word changed goes unseen. Some overlap is to be expected, as common phrases are in every text: compare with
that of held-out text.
"""

import copy
import logging
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gptpl.checkpoints.loading import LoadedCheckpoint
from gptpl.data.pretraining.encoding import cached_corpus, encode_corpus, encode_in_memory
from gptpl.data.pretraining.shards import cached_documents
from gptpl.data.pretraining.token_cache import AnyCorpus
from gptpl.data.sources import Canaries, Corpus, PythonStdlib, Tale, TextFiles
from gptpl.errors import InputError
from gptpl.evaluation.benchmarks import About, Measure, Metric, Metrics, Task, Values
from gptpl.evaluation.likelihood import ContinuationScore
from gptpl.evaluation.questions import Question
from gptpl.evaluation.statistics import TokenIds, check_n, checked_token_ids
from gptpl.generation.text import Completion
from gptpl.model.protocol import context_length
from gptpl.text import count_text

log = logging.getLogger(__name__)

_USUAL_RATIO = 0.9


def training_corpus(
    loaded: LoadedCheckpoint,
    corpus: Corpus | None = None,
    *,
    train_ratio: float | None = None,
    cache_dir: Path | None = None,
) -> AnyCorpus:
    """The text that a model was trained on, in its own tokens and split as it was: `train` is what it read.

    A checkpoint may come from anywhere: nothing is downloaded, opened or written because it names it. Its
    text is identified by the recorded SHA-256, and taken from the cache of encoded texts, from the text that
    ships with gptpl, or from the running Python's source. Any other has to be given as `corpus`, with a
    `train_ratio` if it is neither the recorded one nor 0.9.

    Raises InputError where the recorded text is not available, and what `encode_corpus` raises.
    """
    sha256, recorded_ratio = _recorded(loaded)
    ratio = train_ratio or recorded_ratio
    if corpus is not None:
        if sha256 is not None and corpus.content_sha256() != sha256:
            log.warning("%s is not the text that %s was trained on (SHA-256)", corpus.name, loaded.path)
        return encode_corpus(corpus, loaded.tokenizer, train_ratio=ratio or _USUAL_RATIO, cache_dir=cache_dir)
    if sha256 is not None and ratio is not None:
        found = cached_corpus(sha256, loaded.tokenizer, train_ratio=ratio, cache_dir=cache_dir)
        if found is not None:
            return found
        most = loaded.run_config.get("data", {}).get("val_tokens")
        if isinstance(most, int):
            documents = cached_documents(
                sha256, loaded.tokenizer, val_tokens=most, train_ratio=ratio, cache_dir=cache_dir
            )
            if documents is not None:
                return documents
        for bundled in (Tale(), PythonStdlib()):
            if bundled.content_sha256() == sha256:
                return encode_in_memory(bundled, loaded.tokenizer, content_sha256=sha256, train_ratio=ratio)
    known = f"SHA-256 {sha256[:12]}" if sha256 else "its SHA-256 is not recorded"
    raise InputError(
        f"the text that {loaded.path} was trained on ({known}) is not in this machine's cache of encoded"
        " texts: name it, training_text=FILE (in Python corpus=TextFiles(FILE)), or leave memorisation out"
    )


def _recorded(loaded: LoadedCheckpoint) -> tuple[str | None, float | None]:
    """The text's hash and `train_ratio` as recorded; None for what is missing or invalid."""
    data, settings = loaded.lineage.get("data"), loaded.run_config.get("data")
    sha256 = data.get("sha256") if isinstance(data, Mapping) else None
    ratio = settings.get("train_ratio") if isinstance(settings, Mapping) else None
    return (
        sha256 if isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256) else None,
        ratio if isinstance(ratio, float) and 0 < ratio < 1 else None,
    )


class TrainingText:
    """The training tokens, (N,) ids, indexed so that all positions of a token can be looked up.

    They are one stream: a run may cross the border of two documents, as a sequence of the training may. The
    index takes 8 bytes a token, and `match_lengths` another 4 while it runs.

    Raises InputError unless they are one or more whole numbers.
    """

    def __init__(self, tokens: TokenIds) -> None:
        tokens = checked_token_ids("the training text", tokens)
        if tokens.size == 0:
            raise InputError("the training text has 0 tokens: give the tokens that the model was trained on")
        if tokens.min() >= 0 and tokens.max() < 2**16:  # GPT-2's are, and numpy sorts 16 bits in linear time
            tokens = tokens.astype(np.uint16)
        self.tokens = tokens.size
        """Their number."""
        self._positions = np.argsort(tokens, kind="stable")  # (N,) by token, then from left to right
        ordered = tokens[self._positions]
        starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]).tolist()
        slices = map(slice, starts, [*starts[1:], tokens.size])
        self._slices = dict(zip(ordered[starts].tolist(), slices, strict=True))

    def match_lengths(self, sample: TokenIds) -> NDArray[np.int64]:
        """For each position i of the sample the greatest L for which sample[i:i+L] is in the training text.

        It takes the time of visiting all training positions of every token of the sample, however long the
        matches are: some 2 s on a CPU core for 1,000 tokens against 10 million with a vocabulary like
        GPT-2's, 6 s where the tokens are characters. Raises InputError unless the sample is a sequence of
        ids.
        """
        ids = checked_token_ids("the sample", sample).tolist()
        ending = np.zeros(len(ids), dtype=np.int64)  # length of the longest match whose last position is j
        # run[p + 1]: length of the match that ends at p in the training text and at j in the sample. Shifted
        # by one, so that run[0] = 0 is what precedes the first token.
        run = np.zeros(self.tokens + 1, dtype=np.int32)
        before = np.empty(0, dtype=np.intp)  # where run is not 0
        for j, token in enumerate(ids):
            here = self._positions[self._slices.get(token, slice(0))]
            lengths = run[here] + 1
            run[before] = 0
            before = here + 1
            run[before] = lengths
            ending[j] = lengths.max(initial=0)
        # The longest match that ends at j starts at starts[j], ascending, and every part of it is a match. So
        # the longest match from i ends at the last j with starts[j] <= i. (No match at j: starts[j] = j + 1.)
        ends = np.arange(len(ids))
        starts = ends - ending + 1
        return np.searchsorted(starts, ends, side="right") - ends


@dataclass(frozen=True, kw_only=True)
class Memorisation:
    """What a sample shares word for word with the training text."""

    longest_run: int
    """Tokens of the longest run of the sample that is in the training text."""
    longest_start: int
    """Where it starts in the sample, the first of equals; 0 if there is none."""
    shares: Mapping[int, float]
    """For each n, the fraction of the sample's n-grams that are in the training text; nan without any."""


def memorisation(
    sample: TokenIds, training: TrainingText, n_values: Sequence[int] = (4, 8, 16)
) -> Memorisation:
    """The longest run that the sample shares with the training text, and the fractions of shared n-grams.

    Give the sample without its prompt, which the model did not write. Raises InputError unless every n >= 1
    and the sample is a sequence of token ids.

    Source: Carlini et al. 2023, "Quantifying Memorization Across Neural Language Models" (verbatim runs);
    McCoy et al. 2023, "How Much Do Language Models Copy From Their Training Data?" (n-grams; their novelty
    is 1 - fraction).
    """
    for n in n_values:
        check_n(n)
    lengths = training.match_lengths(sample)
    shares = {}
    for n in n_values:
        grams = lengths[: max(0, len(lengths) - n + 1)]  # one from each start that has n tokens left
        shares[n] = float((grams >= n).mean()) if grams.size else math.nan
    start = int(lengths.argmax()) if lengths.size else 0
    return Memorisation(longest_run=int(lengths.max(initial=0)), longest_start=start, shares=shares)


def memorisation_lines(
    completions: Sequence[Completion], training: TrainingText, *, decode: Callable[[Sequence[int]], str]
) -> list[str]:
    """What several texts share word for word with the training text: a line for each."""
    lines = [f"in the training text of {training.tokens:,} tokens word for word:"]
    for number, completion in enumerate(completions, start=1):
        found = memorisation(completion.tokens, training)
        run = decode(completion.tokens[found.longest_start : found.longest_start + found.longest_run])
        shares = [f", {share:.0%} of its {n}-grams" for n, share in found.shares.items() if share >= 0]
        lines.append(f"  text {number}: {found.longest_run} tokens in a row ({run!r}){''.join(shares)}")
    return lines


# --- what it has learned by heart -----------------------------------------------------------------------

TRAINED, HELD_OUT = "training text", "validation text"
NEVER = "planted 0 times"
_TARGETS = ("gptpl.data.sources.Canaries", "gptpl.data.sources.text.Canaries")


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
    measures: Mapping[str, Measure] = {
        "extracted": Measure(better="low", form="percent"),
        "nats_per_token": Measure(better="low"),
    }
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

    def questions(self) -> Iterator[Question]:
        """See `Task`."""
        if self._loaded is None:
            raise InputError("extraction asks about a model's own training text: evaluate a run's model")
        corpus = training_corpus(self._loaded, self._corpus)
        longest = self._prefixes[-1]
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
                    yield Question(
                        id=f"{name}, token {at}, after {prefix}",
                        answers=((tuple(map(int, tokens[at - prefix : at])), wanted),),
                        gold=0,
                        groups=(f"{name}, after {prefix} tokens",),
                    )

    def values(self, question: Question, scores: Sequence[ContinuationScore]) -> Mapping[str, float]:
        """See `Task`."""
        [score] = scores
        return {"extracted": float(score.is_greedy), "nats_per_token": -score.log_probability / score.tokens}

    def metrics(self, questions: Sequence[Question], values: Mapping[str, Values]) -> Metrics:
        """See `Task`: of all questions together those about the training text after the longest prefix."""
        first = f"{TRAINED}, after {self._prefixes[-1]} tokens"
        own = [place for place, each in enumerate(questions) if each.groups == (first,)]
        if own:
            questions = [questions[place] for place in own]
            values = {name: each[own] for name, each in values.items()}
        return super().metrics(questions, values)


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

    def questions(self) -> Iterator[Question]:
        """See `Task`."""
        if self._planted is None:
            raise InputError("exposure asks about secrets in a model's training text: evaluate a run's model")
        planted = self._planted.planted
        digits, known = len(planted[0].secret), {int(each.secret) for each in planted}
        draw = random.Random(self._seed)
        for each in planted:
            drawn = draw.sample(range(10**digits), min(10**digits, self._references + len(known)))
            others = [number for number in drawn if number not in known][: self._references - 1]
            numbers = [each.secret, *(f"{number:0{digits}}" for number in others)]
            yield Question(
                id=each.secret,
                answers=tuple((each.before, f"{number}{each.after}") for number in numbers),
                gold=0,
                groups=(f"planted {count_text(each.repeats, 'time')}",),
            )

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
