"""A rule of a filter: lines in capitals."""

from collections.abc import Iterable
from dataclasses import dataclass

from gptpl.filters import Finding, Rule, line_end


@dataclass(frozen=True, kw_only=True)
class Shouting(Rule):
    """Lines with more capitals than a share of their characters."""

    share: float = 0.5

    def find(self, part: str) -> Iterable[Finding]:
        if sum(map(str.isupper, part)) > self.share * len(part):
            yield Finding(rule="shouting", start=0, end=len(part))

    def part_end(self, text: str, start: int) -> int | None:
        return line_end(text, start)
