"""What a misspelt word was meant to be."""

import difflib
from collections.abc import Iterable


def nearest(word: str, candidates: Iterable[str], *, likeness: float = 0.5) -> str:
    """A question for the candidate most like the word; empty where none has the likeness, of 0 to 1."""
    others = [candidate for candidate in candidates if not word.startswith(f"{candidate}.")]
    found = difflib.get_close_matches(word, others, n=1, cutoff=likeness)
    return f": did you mean {found[0]}?" if found else ""
