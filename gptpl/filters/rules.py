"""Rules of filters: words of a list, patterns, personal data."""

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Literal

from gptpl.errors import InputError, os_error_text
from gptpl.filters.content_filter import Finding, Rule, line_end, word_end
from gptpl.text import nearest

# --- words ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class WordList(Rule):
    """Whole words of a list.

    Words are equal whose case-folded forms have the same normal form NFKC: full-width letters and ligatures
    are the letters that they show, and invisible characters are none. A word begins with a letter or digit
    and may have other characters (`don't`, `e-mail`, `c++`); `mail` is found in `e-mail`, not in `mailing`.

    Attributes:
        words: the words themselves.
        path: a UTF-8 file with a word on each line, in addition; empty lines have no meaning.
        name: the rule's name in labels and counts.

    Raises InputError for a list without words, for a file that cannot be read, and for a word with white
    space in it.
    """

    words: Sequence[str] = ()
    path: str | Path | None = None
    name: str = "word"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.words, str):
            raise InputError(f"words={self.words!r} is one text: give a list of words")
        if not self._entries:
            raise InputError(
                "the word list is empty: give words=[...], or path=FILE with a word on each line"
            )

    @property
    def identity(self) -> str:
        """The settings, and the words."""
        return f"{self!r} {sorted(map(tuple, self._entries.values()))}"

    def find(self, part: str) -> Iterator[Finding]:
        """At each beginning of a word the longest word of the list, if there is one."""
        text, kinds, places = _normalised(part)
        after = 0
        for beginning in re.finditer(r"w+", kinds):
            start = beginning.start()
            for entry in self._entries.get(text[start : beginning.end()], ()) if start >= after else ():
                end = start + len(entry)
                if text.startswith(entry, start) and kinds[end : end + 1] != "w":
                    after = end
                    yield Finding(rule=self.name, start=places[start][0], end=places[end - 1][1])
                    break

    def part_end(self, text: str, start: int) -> int | None:
        """White space ends a part."""
        return word_end(text, start)

    @cached_property
    def _entries(self) -> dict[str, list[str]]:
        """The normalised words by the letters and digits that they begin with, longest first."""
        found: dict[str, set[str]] = {}
        for word in [*self.words, *self._lines()]:
            text, kinds, _ = _normalised(word)
            beginning = re.match(r"w+", kinds)
            if beginning is None or re.search(r"\s", text):
                raise InputError(
                    f"{word!r} in a word list is not a word that begins with a letter or digit: give it to"
                    " filter=patterns"
                )
            found.setdefault(text[: beginning.end()], set()).add(text)
        return {first: sorted(words, key=len, reverse=True) for first, words in found.items()}

    def _lines(self) -> list[str]:
        if self.path is None:
            return []
        path = Path(self.path).expanduser()
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            raise InputError(f"the word list cannot be read: {os_error_text(error)}") from error
        except UnicodeDecodeError as error:
            raise InputError(f"the word list {path} is not UTF-8: save it as UTF-8") from error
        return [line.strip() for line in lines if line.strip()]


_MOST_MARKS = 32  # on a letter: to put them in order takes the square of their number


def _normalised(text: str) -> tuple[str, str, Sequence[tuple[int, int]]]:
    """The text in a form to compare; "w" for each of its letters and digits; where each comes from.

    The form is NFKD, which is equal where NFKC is, and made character by character. Invisible characters
    (category Cf, such as the soft hyphen) are left out.
    """
    if text.isascii():
        kinds = re.sub(r"[^w]", "-", re.sub(r"[^\W_]", "w", text))
        return text.lower(), kinds, [(place, place + 1) for place in range(len(text))]
    characters: list[str] = []
    places: list[tuple[int, int]] = []
    # A letter together with the marks that follow it (category M), whose order may change.
    starts, marks = [0], 0
    for place, each in enumerate(text):
        marks = marks + 1 if unicodedata.category(each)[0] == "M" else 0
        if not marks % _MOST_MARKS:
            starts.append(place)
    for start, end in pairwise(dict.fromkeys([*starts, len(text)])):
        if unicodedata.category(text[start]) == "Cf":
            continue
        normal = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text[start:end]).casefold())
        characters += normal
        places += [(start, end)] * len(normal)
    kinds = "".join(
        "w" if each.isalnum() or unicodedata.category(each)[0] == "M" else "-" for each in characters
    )
    return "".join(characters), kinds, places


# --- patterns -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Patterns(Rule):
    """Regular expressions of yours, in the syntax of Python's `re`, each with a name.

    A pattern that takes exponential time on some texts, such as `(a+)+b`, does so here: nothing stops it.

    Attributes:
        patterns: the regular expressions by the names that labels and counts have.
        unit: what a pattern reads at a time: a word (up to white space), a line without its line break, or
            the whole text. A stream waits for the end of it.

    Raises InputError for no pattern, and for one that is wrong or matches the empty text.
    """

    patterns: Mapping[str, str]
    unit: Literal["word", "line", "text"] = "line"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unit not in ("word", "line", "text"):
            raise InputError(f"unit={self.unit} of the patterns is unknown: choose one of word, line, text")
        if not self._compiled:
            raise InputError("patterns is empty: give a regular expression with a name, as patterns.NAME=...")

    def find(self, part: str) -> Iterator[Finding]:
        """The matches of each pattern, which do not overlap."""
        for name, pattern in self._compiled.items():
            for match in pattern.finditer(part):
                yield Finding(rule=name, start=match.start(), end=match.end())

    def part_end(self, text: str, start: int) -> int | None:
        """The end of the unit."""
        if self.unit == "text":
            return None
        return word_end(text, start) if self.unit == "word" else line_end(text, start)

    @cached_property
    def _compiled(self) -> dict[str, re.Pattern[str]]:
        found = {}
        for name, pattern in self.patterns.items():
            try:
                found[name] = re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise InputError(f"patterns.{name}={pattern} is not a regular expression: {error}") from error
            if found[name].search("") is not None:
                raise InputError(
                    f"patterns.{name}={pattern} matches the empty text: let it match a character"
                )
        return found


# --- personal data --------------------------------------------------------------------------------------

_IBAN_LENGTHS = {
    country: length
    for length, countries in {
        15: "NO", 16: "BE", 18: "DK FI FK FO GL NL SD", 19: "MK SI", 20: "AT BA EE KZ LT LU MN XK",
        21: "CH HR LI LV", 22: "BG BH CR DE GB GE IE ME RS VA", 23: "AE GI IL IQ OM SO TL",
        24: "AD CZ ES MD PK RO SA SE SK TN VG", 25: "LY PT ST", 26: "IS TR", 27: "BI DJ FR GR IT MC MR SM",
        28: "AL AZ BY CY DO GT HN HU LB NI PL SV", 29: "BR EG PS QA UA", 30: "JO KW MU YE", 31: "MT SC",
        32: "LC", 33: "RU",
    }.items()
    for country in countries.split()
}  # fmt: skip
"""The number of characters by country, of SWIFT's IBAN registry."""
_CARDS = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})"  # Visa
    r"|(?:5[1-5]\d{4}|222[1-9]\d\d|22[3-9]\d{3}|2[3-6]\d{4}|27[01]\d{3}|2720\d\d)\d{10}"  # Mastercard
    r"|3[47]\d{13}"  # American Express
    r"|(?:6011|65\d\d|64[4-9]\d)\d{12}"  # Discover
    r"|3(?:0[0-5]|[689]\d)\d{11}"  # Diners Club
    r"|35(?:2[89]|[3-8]\d)\d{12}"  # JCB
    r"|62\d{14,17}"  # UnionPay
)
_SPACE = " \u00a0\u202f"  # within a number, but one at a time
_OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_EMAIL = re.compile(r"(?<![\w.%+'-])[\w.%+'-]+@(?:[\w-]+\.)+[^\W\d_]{2,}")
_IBAN_START = re.compile(r"(?<![^\W_])[A-Za-z]{2}\d\d(?=[ \u00a0\u202f]?[A-Za-z\d])")
_IP_ADDRESS = re.compile(rf"(?<!\w)(?<!\d\.)(?:{_OCTET}\.){{3}}{_OCTET}(?!\w|\.\d)", re.ASCII)
_DIGIT_GROUPS = re.compile(rf"(?<!\w)(?<!\d[.,])\d+(?:[{_SPACE}-]\d+)*(?!\w)", re.ASCII)
_PHONE = re.compile(
    rf"(?<![\w+(])(?<!\d[.,/-])(?:\(?\+|\(|0(?!\.)|(?=\d{{3}}[{_SPACE}.-]\d{{3}}[{_SPACE}.-]\d{{4}}(?!\w)))"
    rf"(?:[{_SPACE}.-]?\(?\d\)?)+(?!\w|:\d)",
    re.ASCII,
)
_OPEN_IBAN = re.compile(rf"(?:^|[\W_])[A-Z]{{2}}\d\d(?:[{_SPACE}][A-Z\d]{{4}})*$", re.ASCII)
_SPACES = re.compile(r"\s+")
_APART = re.compile(r"[^\w.@%+'(),/:-]")  # what is before it has no influence on what is found after it
_LONGEST_PART = 4096  # characters without white space that are judged together
_LONGEST_NUMBER = 200  # characters of numbers, one behind the other, that are judged together
_NO_PHONE = re.compile(
    r"\(?(?:1[5-9]|20)\d\d\b"  # a year
    r"|\d{1,2}[.-]\d{1,2}[.-]\d{4}\b"  # a date
    r"|0-\d+-\d+-\d\b"  # a book
    r"|(?:\(?\d\b[ -]?){3}"  # digits one by one
)

Kind = Literal["e-mail address", "IBAN", "card number", "IP address", "phone number"]
KINDS: tuple[Kind, ...] = ("e-mail address", "IBAN", "card number", "IP address", "phone number")
"""Where two overlap, it is the earlier one."""


@dataclass(frozen=True, kw_only=True)
class PersonalData(Rule):
    """Personal data that can be told by their form.

    - `e-mail address`.
    - `IBAN`: bank accounts with the right length for their country and the right check digits (ISO 13616),
      in groups of four capitals and digits, or without spaces in any case.
    - `card number`: payment cards with the first digits and the length of an issuer's and the right check
      digit (Luhn), in one group of digits, or several of three or more.
    - `IP address`: of version 4; a version number with four parts looks the same.
    - `phone number`: 9 to 15 digits that begin with +, 0 or a bracket, after + also 8, or as in 555-123-4567.
      Of digits in many groups it is a guess where one number ends and the next begins.

    A number is not continued across line breaks or two spaces. `kinds` are those that are reported. Of 4,096
    characters without white space, what is behind the last one that is no part of such data, such as a quote,
    is judged with those that follow; only where there is none may an address be cut in two, and missed.
    """

    kinds: Sequence[Kind] = KINDS

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.kinds, str) or not self.kinds:
            raise InputError(f"kinds={self.kinds!r} must be a list of one or more of {', '.join(KINDS)}")
        for kind in self.kinds:
            if kind not in KINDS:
                raise InputError(
                    f"kinds of personal data has no {kind!r}{nearest(str(kind), KINDS)}; choose from"
                    f" {', '.join(KINDS)}"
                )

    def find(self, part: str) -> Iterator[Finding]:
        """Those of the kinds asked for; what belongs to a kind before in `KINDS` is not another kind, too."""
        taken: list[tuple[int, int]] = []
        finders = (_emails, _ibans, _cards, _ip_addresses, _phone_numbers)
        for kind, finder in zip(KINDS, finders, strict=True):
            found = _outside(finder(part), taken)
            taken = sorted([*taken, *found])
            if kind in self.kinds:
                yield from (Finding(rule=kind, start=start, end=end) for start, end in found)

    def part_end(self, text: str, start: int) -> int | None:
        """White space ends a part, unless a number may continue after it."""
        limit = start + _LONGEST_PART
        for space in _SPACES.finditer(text, start, limit):
            ended = space.end() < len(text)
            if space.start() == start:
                return space.end() if ended else None
            before = text[space.start() - 1]
            number = _is_digit(before) or before == ")"
            iban = _OPEN_IBAN.search(text[max(start, space.start() - 45) : space.start()])
            if not (number or iban):
                return space.start()
            if not ended:
                return None  # the next character decides
            after = text[space.end()]
            goes_on = _is_digit(after) or (number and after == "(") or (iban and "A" <= after <= "Z")
            too_long = space.start() - start > _LONGEST_NUMBER
            if not goes_on or too_long or space.group() not in [*_SPACE]:
                return space.start()
        if len(text) < limit:
            return None
        apart = _APART.search(text[start:limit][::-1])
        return limit - (0 if apart is None else apart.start())


Span = tuple[int, int]


def _is_digit(character: str) -> bool:
    return "0" <= character <= "9"


def _outside(spans: Iterable[Span], taken: Sequence[Span]) -> list[Span]:
    """The spans that overlap none of those that are taken, which are sorted."""
    ends = [*accumulate((end for _, end in taken), max)]
    found = []
    for start, end in spans:
        before = bisect_left(taken, (end,))  # the number of those that begin before its end
        if not before or ends[before - 1] <= start:
            found.append((start, end))
    return found


def luhn_is_right(digits: str) -> bool:
    """Whether the last digit is the check digit of the others (ISO/IEC 7812-1)."""
    values = [int(each) * (2 if place % 2 else 1) for place, each in enumerate(reversed(digits))]
    return sum(value // 10 + value % 10 for value in values) % 10 == 0


def iban_is_right(iban: str) -> bool:
    """Whether capitals and digits are an IBAN: its country's length, and a remainder of 1 by 97."""
    if len(iban) != _IBAN_LENGTHS.get(iban[:2]):
        return False
    return int("".join(str(int(each, 36)) for each in iban[4:] + iban[:4])) % 97 == 1


def _emails(text: str) -> Iterator[Span]:
    return (match.span() for match in _EMAIL.finditer(text)) if "@" in text else iter(())


def _ibans(text: str) -> Iterator[Span]:
    for begin in _IBAN_START.finditer(text):
        start = begin.start()
        length = _IBAN_LENGTHS.get(text[start : start + 2].upper(), 0)
        groups = re.compile(
            rf"[A-Za-z\d]{{{length}}}(?![^\W_])"
            rf"|[A-Z\d]{{4}}(?:[{_SPACE}][A-Z\d]{{4}}){{{length // 4 - 1}}}"
            + (rf"[{_SPACE}][A-Z\d]{{{length % 4}}}" if length % 4 else "")
            + r"(?![^\W_])",
            re.ASCII,
        )
        found = groups.match(text, start) if length else None
        if found and iban_is_right(re.sub(rf"[{_SPACE}]", "", found.group()).upper()):
            yield found.span()


def _cards(text: str) -> Iterator[Span]:
    for whole in _DIGIT_GROUPS.finditer(text):
        groups = [(whole.start() + each.start(), each.group()) for each in re.finditer(r"\d+", whole.group())]
        first = 0
        while first < len(groups):
            last = _last_of_card([digits for _, digits in groups[first : first + 7]])
            if last is None:
                first += 1
                continue
            place, digits = groups[first + last]
            yield groups[first][0], place + len(digits)
            first += last + 1


def _last_of_card(groups: Sequence[str]) -> int | None:
    """The number of the group with which a card number ends that begins with the first one."""
    digits = ""
    for number, group in enumerate(groups):
        digits += group
        if len(group) < 3 or len(digits) > 19:
            return None
        if _CARDS.fullmatch(digits) and luhn_is_right(digits):
            return number
    return None


def _ip_addresses(text: str) -> Iterator[Span]:
    return (match.span() for match in _IP_ADDRESS.finditer(text))


def _phone_numbers(text: str) -> Iterator[Span]:
    for match in _PHONE.finditer(text):
        if _NO_PHONE.match(match.group()):
            continue
        groups = [(match.start() + each.start(), each.group()) for each in re.finditer(r"\d+", match.group())]
        beginning = match.start() if ")" in match.group() else match.start() + match.group().startswith("(")
        first, least = 0, 8 if "+" in match.group() else 9
        while first < len(groups):
            last, count = first, len(groups[first][1])
            # Take groups up to 15 digits in total; stop early where a number looks complete.
            for _, digits in groups[first + 1 : first + 15]:
                another = len(groups[last][1]) >= 9 or (count >= 11 and re.match(r"0\d\d", digits))
                if another or count + len(digits) > 15:
                    break
                last, count = last + 1, count + len(digits)
            if least <= count <= 15:
                place, digits = groups[last]
                yield beginning if first == 0 else groups[first][0], place + len(digits)
            first, least = last + 1, 9
