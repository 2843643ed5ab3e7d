"""What a filter finds in a text, and what becomes of the text, whole or while it is being written."""

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from gptpl.errors import InputError
from gptpl.text import count_text, nearest

Action = Literal["mark", "withhold", "report"]
"""What becomes of a text: places are marked, the whole text is withheld, or findings are only counted."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a rule found in the characters from `start` to before `end`."""

    rule: str
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was found in a text, in the order of places, and the text that may be shown for it.

    `action` is what became of the text: the strongest action of the rules that found something, or None.
    """

    findings: tuple[Finding, ...]
    text: str
    action: Action | None

    @property
    def counts(self) -> dict[str, int]:
        """The number of findings of each rule that found something."""
        return dict(Counter(finding.rule for finding in self.findings))

    @property
    def changed(self) -> bool:
        """Whether the text that may be shown is another one."""
        return self.action in ("mark", "withhold")


def summary(texts: Iterable[Mapping[str, int]]) -> str:
    """`filter: 2 of 5 texts: e-mail address 1, spam 1`, from the `counts` of each text."""
    given = list(texts)
    total: Counter[str] = Counter()
    for counts in given:
        total.update(counts)
    found = ", ".join(f"{rule} {number}" for rule, number in total.most_common())
    return f"filter: {sum(map(bool, given))} of {count_text(len(given), 'text')}{found and f': {found}'}"


class Filter(ABC):
    """Judges texts by rules.

        verdict = filter.verdict(text)                    # verdict.text is what may be shown
        stream = filter.stream()
        shown = [*map(stream.feed, pieces), stream.finish()]  # the same in pieces, as soon as they are judged

    The label that marks a place, such as `[e-mail address]`, names the rules that found something there; the
    notice in place of a text that is withheld, `[withheld: spam]`, those that withhold it.
    """

    @property
    @abstractmethod
    def rules(self) -> "tuple[Rule, ...]":
        """The rules, each with an action of its own."""

    @property
    def identity(self) -> str:
        """A text that is another one for a filter that may judge otherwise."""
        return "; ".join(rule.identity for rule in self.rules)

    @property
    def changes_texts(self) -> bool:
        """Whether a text that may be shown can be another one; else findings are only reported."""
        return any(rule.action != "report" for rule in self.rules)

    def verdict(self, text: str) -> Verdict:
        """The verdict for a whole text."""
        stream = self.stream()
        stream.feed(text)
        stream.finish()
        return stream.verdict

    def stream(self) -> "FilterStream":
        """A judge of one text that comes in pieces."""
        return FilterStream(self.rules)


@dataclass(frozen=True, kw_only=True)
class NoFilter(Filter):
    """Lets every text pass."""

    @property
    def rules(self) -> "tuple[Rule, ...]":
        """An empty tuple."""
        return ()


@dataclass(frozen=True, kw_only=True)
class Rule(Filter):
    """A filter of one rule. A class of yours extends it as a frozen dataclass, and has `find`.

    A text is judged part by part, without what is before and after the part. `part_end` says where a part
    ends; a stream holds back the part that has not ended. Without a `part_end` of its own, a rule judges the
    text as a whole. `word_end` and `line_end` are there to be called.
    """

    action: Action = "mark"

    def __post_init__(self) -> None:
        if self.action not in (offered := get_args(Action)):
            raise InputError(
                f"action={self.action} of a filter is unknown{nearest(str(self.action), offered)}; choose one"
                f" of {', '.join(offered)}"
            )

    @property
    def rules(self) -> "tuple[Rule, ...]":
        """This one."""
        return (self,)

    @property
    def identity(self) -> str:
        """The settings; of a class that reads files also what they hold."""
        return repr(self)

    @abstractmethod
    def find(self, part: str) -> Iterable[Finding]:
        """What is found in a part of a text, with places in the part; an empty place is no finding."""

    def part_end(self, text: str, start: int) -> int | None:
        """The end, after `start`, of the part that begins there; None while what follows may change it.

        It may look at `text[start:]` only, and has to stay the same whatever follows.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class AllOf(Filter):
    """Several filters, each with its own action. A member that is None is left out.

    Raises InputError if none is left, and for a member that is no filter.
    """

    filters: Mapping[str, Filter | None]

    def __post_init__(self) -> None:
        for name, each in self.filters.items():
            if not (each is None or isinstance(each, Filter)):
                raise InputError(f"filters.{name} must be a filter, got {type(each).__name__}")
        if not self.rules:
            raise InputError("filters has no filter: give one or more, or choose filter=none")

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Those of all members, in their order."""
        return tuple(rule for each in self.filters.values() if each is not None for rule in each.rules)


# --- parts of texts, for `Rule.part_end` ----------------------------------------------------------------

_WORD_OR_SPACE = re.compile(r"\s+|\S+")
_LINE_END = re.compile(r"\r?\n")


def word_end(text: str, start: int) -> int | None:
    """The end of the characters up to the next white space, or of the white space that begins there."""
    found = _WORD_OR_SPACE.match(text, start)
    return found.end() if found and found.end() < len(text) else None


def line_end(text: str, start: int) -> int | None:
    """The end of the line, without its line break, or of the line break that begins there."""
    found = _LINE_END.search(text, start)
    if found is None:
        return None
    return found.end() if found.start() == start else found.start()


# --- a text in pieces -----------------------------------------------------------------------------------


class FilterStream:
    """Releases a text as soon as no rule can find anything more in it.

    The pieces that `feed` and `finish` return are together the text of the `verdict`. No character of a
    finding is released before it has been judged; where a rule withholds whole texts, `finish` releases all.
    """

    def __init__(self, rules: tuple[Rule, ...]) -> None:
        self._rules = rules
        self._judged = [0] * len(rules)
        """How many characters each rule has judged."""
        self._withholding = any(rule.action == "withhold" for rule in rules)
        self._text = ""
        self._released = 0
        """How many characters of the text."""
        self._found: list[tuple[Finding, Action]] = []
        self._shown: list[str] = []
        self._verdict: Verdict | None = None

    @property
    def verdict(self) -> Verdict:
        """The verdict for the whole text, once it is finished."""
        if self._verdict is None:
            raise RuntimeError("the text is not finished: call finish() first")
        return self._verdict

    def feed(self, piece: str) -> str:
        """Add the next piece of the text; returns what can be released, which may be nothing."""
        self._text += piece
        for number, rule in enumerate(self._rules):
            while (end := rule.part_end(self._text, self._judged[number])) is not None:
                self._judge(number, end)
        if self._withholding:
            return ""
        return self._release(min(self._judged, default=len(self._text)))

    def finish(self) -> str:
        """Judge what is left, and return the rest of what may be shown."""
        for number in range(len(self._rules)):
            if self._judged[number] < len(self._text):
                self._judge(number, len(self._text))
        actions = {action for _, action in self._found}
        notices = [finding for finding, action in self._found if action == "withhold"]
        if notices:
            rest = _label(notices, "withheld: ")
            self._shown.append(rest)
        else:
            rest = self._release(len(self._text))
        self._verdict = Verdict(
            findings=tuple(sorted((finding for finding, _ in self._found), key=_place)),
            text="".join(self._shown),
            action=next((each for each in ("withhold", "mark", "report") if each in actions), None),
        )
        return rest

    def _judge(self, number: int, end: int) -> None:
        """Have a rule judge its part up to character `end`."""
        rule, start = self._rules[number], self._judged[number]
        for each in rule.find(self._text[start:end]):
            if each.start < each.end:
                finding = replace(each, start=each.start + start, end=each.end + start)
                self._found.append((finding, rule.action))
        self._judged[number] = end

    def _release(self, end: int) -> str:
        """The text up to character `end`, or to a finding that reaches beyond: others may overlap it."""
        shown: list[str] = []
        place = self._released
        marked = [each for each, action in self._found if action == "mark" and each.start >= place]
        for group in _overlapping(marked):
            start, last = group[0].start, max(finding.end for finding in group)
            if last > end:
                end = min(end, start)
                break
            shown += [self._text[place:start], _label(group)]
            place = last
        shown.append(self._text[place:end])
        self._released = end
        self._shown += shown
        return "".join(shown)


def _place(finding: Finding) -> tuple[int, int, str]:
    return finding.start, -finding.end, finding.rule


def _overlapping(findings: Iterable[Finding]) -> Iterator[list[Finding]]:
    """Groups of findings that overlap, in the order of places."""
    group: list[Finding] = []
    end = 0
    for each in sorted(findings, key=_place):
        if group and each.start >= end:
            yield group
            group = []
        group.append(each)
        end = max(end, each.end)
    if group:
        yield group


def _label(findings: Iterable[Finding], before: str = "") -> str:
    names = dict.fromkeys(finding.rule for finding in sorted(findings, key=_place))
    return f"[{before}{', '.join(names)}]"
