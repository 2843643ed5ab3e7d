"""Filters of content: a verdict for a text, whole or while it is being written.

`PersonalData().verdict("Write to jo@example.org.").text` is "Write to [e-mail address]."

A filter is a rule, or `AllOf` several. `gptpl.ClassifierRule` judges by a classifier of gptpl's own.
"""

from gptpl.filters.content_filter import (
    Action,
    AllOf,
    Filter,
    FilterStream,
    Finding,
    NoFilter,
    Rule,
    Verdict,
    line_end,
    summary,
    word_end,
)
from gptpl.filters.rules import Patterns, PersonalData, WordList

__all__ = [
    "Action",
    "AllOf",
    "Filter",
    "FilterStream",
    "Finding",
    "NoFilter",
    "Patterns",
    "PersonalData",
    "Rule",
    "Verdict",
    "WordList",
    "line_end",
    "summary",
    "word_end",
]
