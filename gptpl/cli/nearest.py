"""What a misspelt word was meant to be."""

import difflib
from collections.abc import Iterable


def nearest(word: str, candidates: Iterable[str]) -> str:
    """A question for the candidate most like the word; empty where none is like it."""
    others = [candidate for candidate in candidates if not word.startswith(f"{candidate}.")]
    found = difflib.get_close_matches(word, others, n=1, cutoff=0.5)
    return f": did you mean {found[0]}?" if found else ""
