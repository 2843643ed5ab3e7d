"""What a corpus holds, to look at before training on it: as lines for a terminal, and as a web page.

What training would refuse is read, too: files and records that cannot be read are counted, and named.
"""

import hashlib
import heapq
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from gptpl.data.pretraining.encoding import vocabulary_sha256
from gptpl.data.sources import Corpus
from gptpl.data.sources.base import SECTION, Piece, Section
from gptpl.data.sources.formats import kind_of
from gptpl.errors import InputError
from gptpl.files.durable import write_atomically
from gptpl.files.template import package_templates
from gptpl.text import bytes_text, count_text, near, printable, shortened, table, visible
from gptpl.tokenizers import GPT2Tokenizer, Tokenizer

SAMPLE_BYTES = 200_000_000
"""Bytes of text that are read of a larger corpus."""
MOST_COMPARED = 1 << 20
"""Different documents that are compared, about 100 MB; of more, those with low hashes."""
FREQUENT, REPEATED, EXAMPLES, SCRIPTS = 20, 5, 5, 12
"""Rows that are shown, EXAMPLES of each kind of odd documents."""
_BATCH = 1 << 22  # characters given to the tokenizer at a time
_GRAINS = 6  # parts of a sample, at least: so few that pieces of plain files are read as a whole
_KEPT, _SHOWN = 300, 70  # characters of the beginning of a document
_BAR = 32  # characters
_END = "end of document: <|endoftext|>"
_ODD = {
    "is binary": "binary",
    "not UTF-8": "not UTF-8",
    " is empty": "empty",
    "damaged or cut short": "damaged",
    "not a whole Parquet": "damaged",
    "not valid JSON": "not JSON",
    "must be a JSON object": "not JSON",
    " has no ": "no text in the field",
    "must be a text": "no text in the field",
    "not texts": "no text in the field",
}
"""What is odd, by the words of the readers' errors."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A part of the report: sentences, and rows; with `amounts`, a bar as long as each ends its row."""

    title: str
    notes: Sequence[str] = ()
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    right: Collection[int] = ()
    amounts: Sequence[int] = ()

    @property
    def bars(self) -> list[float]:
        """The lengths of the bars, 0 to 1."""
        return [amount / max(self.amounts) for amount in self.amounts]


@dataclass(frozen=True, kw_only=True, eq=False)
class CorpusReport:
    """The numbers of a corpus, or of an evenly spread sample of it.

    Attributes:
        name, files, file_bytes: the corpus, its files, and their bytes on disk.
        total_bytes, read_bytes: bytes of the files, of compressed ones an estimate of what they hold, and of
            the part that was read, which everything below is about.
        documents, parts: those read as a whole; those of which the sample, or damage, left a part. Empty ones
            are odd, and in neither.
        characters, text_bytes: the latter in UTF-8.
        token_counts: how often each token occurs, (vocab_size,), without those between documents.
        gpt2_tokens: tokens of GPT-2's tokenizer, where the run's is another.
        lengths: documents by length in tokens.
        longest: length in tokens, and place.
        scripts: characters by script, or kind.
        odd: by what is odd, how many, and where the first of them are.
        compared, duplicates: documents that were compared, a `compared_share` of all, and those of them that
            equal an earlier one. `repeated`: those that occur most often.
        max_length: tokens of a sequence.
        sequences: the first of training, each with its last target: T + 1 tokens.
        no_sequences: why there are none that were asked for.
    """

    name: str
    files: int
    file_bytes: int
    total_bytes: int
    read_bytes: int
    documents: int
    parts: int
    characters: int
    text_bytes: int
    tokenizer: Tokenizer
    token_counts: NDArray[np.int64]
    gpt2_tokens: int | None
    lengths: Mapping[int, int]
    longest: tuple[int, str]
    scripts: Mapping[str, int]
    odd: Mapping[str, tuple[int, Sequence[str]]]
    compared: int
    compared_share: float
    duplicates: int
    repeated: Sequence[tuple[int, str]]
    max_length: int
    sequences: Sequence[Sequence[int]] = ()
    no_sequences: str = ""

    @property
    def tokens(self) -> int:
        """Tokens of the texts, without those between documents."""
        return int(self.token_counts.sum())

    @property
    def sampled(self) -> bool:
        """Whether only a part was read."""
        return self.read_bytes < self.total_bytes

    def length(self, fraction: float) -> int:
        """The length in tokens that this fraction of the documents has at most; 0 without documents."""
        lengths = sorted(self.lengths)
        ends = np.cumsum([self.lengths[length] for length in lengths])
        return lengths[int(np.searchsorted(ends, fraction * ends[-1]))] if lengths else 0

    def tables(self) -> list[Table]:
        """All parts, the sequences without their text."""
        made = [self._counts(), self._lengths(), self._scripts(), self._frequent(), self._odd()]
        made.append(self._duplicates())
        if self.no_sequences:
            made.append(Table(title="Sequences", notes=[f"cannot be shown: {self.no_sequences}"]))
        elif self.sequences:
            note = "all tokens but the last are the inputs; the target of each is the token after it"
            title = f"The first {count_text(len(self.sequences), 'sequence')} of training"
            made.append(Table(title=title, notes=[note]))
        return made

    def lines(self) -> list[str]:
        """The report for a terminal."""
        lines = [self._title()]
        for each in self.tables():
            lines += ["", each.title, *(f"  {printable(note)}" for note in each.notes)]
            rows = [row for row in (each.header, *each.rows) if row and each.rows]
            if each.amounts:
                bars = ["█" * round(_BAR * bar) or "▏" * (bar > 0) for bar in each.bars]
                rows = [[*row, bar] for row, bar in zip(rows, ["", *bars], strict=True)]
            lines += [f"  {line}" for line in (table(rows, right=each.right) if rows else ())]
        for title, parts in self._shown_sequences():
            lines += ["", f"  {title}"]
            for place, text in enumerate(parts):
                lines += [f"  +--- {_END} ---"] * (place > 0)
                lines += [f"  | {line}" for line in printable(text).split("\n")]
        return lines

    def page(self) -> str:
        """The report as an HTML document that needs nothing else; text is displayed, never interpreted."""
        templates = package_templates(
            finalize=lambda value: value if hasattr(value, "__html__") else printable(str(value))
        )
        return templates.get_template("evaluation/corpus_report.html").render(
            title=self._title(),
            tables=self.tables(),
            sequences=self._shown_sequences(),
            end=_END,
        )

    def write(self, path: Path | str) -> None:
        """Write the page, in place of an older one."""
        path = Path(path).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, self.page())

    def _title(self) -> str:
        return f"{self.name}: {count_text(self.files, 'file')}, {bytes_text(self.file_bytes)}"

    def _counts(self) -> Table:
        notes = []
        if self.sampled:
            whole = self.tokens * self.total_bytes // max(1, self.read_bytes)
            notes = [
                f"sampled: {bytes_text(self.read_bytes)} of about {bytes_text(self.total_bytes)},"
                " evenly spread over the files, of compressed ones from the beginning; all numbers are of the"
                " sample (sample_bytes=null reads all)",
                f"the whole has about {whole:,} tokens",
            ]
        rows = [("documents", f"{self.documents:,}")]
        if self.parts:
            why = "where the sample ends, or by damage" if self.sampled else "by damage"
            rows.append(("  cut", f"{self.parts:,} {why}"))
        rows += [("characters", f"{self.characters:,}"), ("bytes in UTF-8", f"{self.text_bytes:,}")]
        for name, tokens in ((self.tokenizer.name, self.tokens), ("gpt2", self.gpt2_tokens)):
            if tokens is not None:
                each = self.text_bytes / max(1, tokens)
                rows.append((f"tokens, {name} tokenizer", f"{tokens:,}, of {each:.2f} bytes on average"))
        return Table(title="Counts", notes=notes, rows=rows)

    def _lengths(self) -> Table:
        documents = self.documents
        if not documents:
            return Table(title="Lengths of documents", notes=["there is no whole document"])
        mean = sum(length * count for length, count in self.lengths.items()) / documents
        low, median, high = (f"{self.length(fraction):,}" for fraction in (0.05, 0.5, 0.95))
        longer = sum(count for length, count in self.lengths.items() if length > self.max_length)
        bins: Counter[int] = Counter()
        for length, count in self.lengths.items():
            bins[max(0, length - 1).bit_length()] += count  # bin n has 2^(n-1) + 1 to 2^n
        amounts = {n: bins[n] for n in range(min(bins), max(bins) + 1)}
        return Table(
            title="Lengths of documents",
            notes=[
                f"median {median} tokens, mean {mean:,.1f}; 5 % have up to {low}, 95 % up to {high}",
                f"the longest has {self.longest[0]:,}: {self.longest[1]}",
                f"{longer:,} ({longer / documents:.1%}) are longer than a sequence, data.max_length="
                f"{self.max_length}",
            ],
            header=("tokens up to", "documents", ""),
            rows=[(f"{2**n:,}", f"{count:,}", f"{count / documents:.1%}") for n, count in amounts.items()],
            right={0, 1, 2},
            amounts=list(amounts.values()),
        )

    def _scripts(self) -> Table:
        found = Counter(self.scripts).most_common()
        if len(others := found[SCRIPTS:]) > 1:
            found = [*found[:SCRIPTS], (f"{len(others)} others", sum(count for _, count in others))]
        rows = [(name, f"{count:,}", f"{count / self.characters:.2%}") for name, count in found]
        amounts = [count for _, count in found]
        return Table(title="Scripts", header=("", "characters", ""), rows=rows, right={1, 2}, amounts=amounts)

    def _frequent(self) -> Table:
        counts, vocabulary = self.token_counts, list(self.tokenizer.vocabulary_bytes())
        used = int((counts > 0).sum())
        notes = [f"{used:,} of the vocabulary's {len(counts):,} tokens occur ({used / len(counts):.1%})"]
        if ends := int(counts[self.tokenizer.eot_id]):
            notes.append(
                f"<|endoftext|> is written in the texts {count_text(ends, 'time')}: it ends a document there"
            )
        first = [token for token in np.argsort(-counts, kind="stable")[:FREQUENT].tolist() if counts[token]]
        texts = [visible(vocabulary[token].decode("utf-8", "backslashreplace")) for token in first]
        return Table(
            title=f"Most frequent tokens of the {self.tokenizer.name} tokenizer",
            notes=notes,
            header=("token", "id", "times", ""),
            rows=[
                (text, f"{token}", f"{counts[token]:,}", f"{counts[token] / self.tokens:.2%}")
                for token, text in zip(first, texts, strict=True)
            ],
            right={1, 2, 3},
            amounts=counts[first].tolist(),
        )

    def _odd(self) -> Table:
        title, rows = "Odd documents", []
        for kind, (count, examples) in self.odd.items():
            more = ["..."] * (count > len(examples))
            cells = [(kind, f"{count:,}"), *[("", "")] * count]
            rows += [(*cell, each) for cell, each in zip(cells, [*examples, *more], strict=False)]
        if not rows:
            return Table(title=title, notes=[f"none: all are text, of {SECTION:,} characters at most"])
        notes = [
            "training with data=corpus leaves empty documents out, with data=text_file it refuses them; it"
            " stops at what cannot be read"
        ]
        return Table(title=title, notes=notes, header=("", "count", "the first"), rows=rows, right={1})

    def _duplicates(self) -> Table:
        rate, share = self.duplicates / max(1, self.compared), self.compared_share
        notes = [f"{self.duplicates:,} of {self.compared:,} documents ({rate:.1%}) equal an earlier one"]
        if share < 1:
            notes.append(f"these are {share:.2%} of all: those whose hash is low, with all their copies")
        rows = [(f"{times:,}", shortened(text, _SHOWN)) for times, text in self.repeated]
        return Table(title="Duplicates", notes=notes, header=("times", "text"), rows=rows, right={0})

    def _shown_sequences(self) -> list[tuple[str, list[str]]]:
        """Of each sequence a title, and its texts between the ends of documents."""
        shown = []
        for number, tokens in enumerate(self.sequences, 1):
            ends = [place for place, token in enumerate(tokens) if token == self.tokenizer.eot_id]
            edges = zip([0, *(place + 1 for place in ends)], [*ends, len(tokens)], strict=True)
            texts = [self.tokenizer.decode(tokens[start:end]) for start, end in edges]
            first, last = (visible(self.tokenizer.decode([tokens[place]])) for place in (0, -1))
            title = f"{number}: {len(tokens) - 1:,} tokens, {count_text(len(ends), 'document')} end in it"
            shown.append((f'{title}; the first input is "{first}", the last target "{last}"', texts))
        return shown


# --- reading --------------------------------------------------------------------------------------------


def corpus_report(
    corpora: Sequence[Corpus],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    name: str = "",
    sample_bytes: int | None = SAMPLE_BYTES,
) -> CorpusReport:
    """Count what corpora hold, or about `sample_bytes` of their text, evenly spread (None: all).

    The report has their `name`, or that of the first one.
    What cannot be read is reported, and left out. A tokenizer without a vocabulary takes it from what is
    read. The memory does not grow with the text. Raises InputError where there are no files.
    """
    listing = [entry for corpus in corpora for entry in corpus.listing()]
    pieces = [(corpus, piece) for corpus in corpora for piece in _readable_pieces(corpus)]
    total = sum(piece.size for _, piece in pieces)
    wanted = total if sample_bytes is None else min(total, sample_bytes)
    taken = 0

    def read(
        what: str, refused: Callable[[Piece, InputError], None]
    ) -> Iterator[tuple[Piece, Section | None]]:
        nonlocal taken
        taken = 0
        with tqdm(total=wanted, unit="B", unit_scale=True, desc=what, disable=None) as bar:

            def count(size: int) -> None:
                nonlocal taken
                taken += size
                bar.update(size)

            yield from _sample(pieces, wanted, total, refused, count)

    if vocabulary_sha256(tokenizer) is None:
        found = read("making the vocabulary", lambda piece, error: None)
        tokenizer = tokenizer.fitted_to(section.text for _, section in found if section is not None)
    counts = _Counts(tokenizer)
    for piece, section in read("reading", counts.refuse):
        counts.add(piece, section)
    return CorpusReport(
        name=name or corpora[0].name,
        files=len(listing),
        file_bytes=sum(size for _, size, _ in listing),
        total_bytes=total,
        read_bytes=taken,
        tokenizer=tokenizer,
        max_length=max_length,
        **counts.numbers(),
    )


def _readable_pieces(corpus: Corpus) -> list[Piece]:
    """The pieces, or where one of the files is refused, which it is when it is read, too, the files."""
    try:
        return corpus.pieces()
    except InputError:
        return [Piece(path=path, size=path.stat().st_size) for path in corpus.files()]


def _sample(
    pieces: Sequence[tuple[Corpus, Piece]],
    wanted: int,
    total: int,
    refused: Callable[[Piece, InputError], None],
    count: Callable[[int], None],
) -> Iterator[tuple[Piece, Section | None]]:
    """The sections of the pieces, or of as many bytes of them as are `wanted`; `count` takes these.

    Small pieces are read as a whole or not at all, of large ones the beginning is; None comes after that.
    """
    grain, passed, taken = wanted // _GRAINS, 0, 0
    for corpus, piece in pieces:
        passed += piece.size
        due = passed * wanted // max(1, total) - taken
        if wanted < total and due < min(piece.size, grain) / 2:
            continue
        read = 0
        for section in corpus.readable_sections(piece, partial(refused, piece)):
            yield piece, section
            size = len(section.text.encode("utf-8", "surrogatepass"))
            count(size)
            read += size
            if wanted < total and read >= max(due, grain):
                yield piece, None
                taken += read
                break
        else:
            count(piece.size - read)  # of what is not text, and of an estimate
            taken += piece.size


@dataclass(kw_only=True, eq=False)
class _Document:
    """What is known of a document so far; `begins`: its beginning was read."""

    piece: Piece
    number: int  # in its piece, with what cannot be read
    begins: bool
    beginning: str
    characters: int = 0
    tokens: int = 0
    digest: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=8))

    @property
    def place(self) -> str:
        """What messages call it."""
        path, start = self.piece.path, self.piece.start
        if path is None:
            return f"document {self.number:,}"
        if (kind := kind_of(path)) not in ("JSON Lines", "Parquet"):
            return near(path)
        after = f" after {'row group' if kind == 'Parquet' else 'byte'} {start:,}" if start else ""
        return f"{near(path)}, document {self.number:,}{after}"


class _Counts:
    """Counts sections as they come, in batches."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.documents = self.parts = self.characters = self.text_bytes = self.gpt2_tokens = 0
        self.token_counts = np.zeros(tokenizer.vocab_size, np.int64)
        self.lengths: Counter[int] = Counter()
        self.longest = (0, "")
        self.odd: dict[str, tuple[int, list[str]]] = {}
        self._tokenizer = tokenizer
        self._gpt2 = None if tokenizer.name == GPT2Tokenizer.name else GPT2Tokenizer()
        self._code_points = np.zeros(0x110000, np.int64)
        self._times: dict[int, int] = {}  # by the hash of a text
        self._limit = 1 << 64  # of the hashes
        self._repeated: dict[int, str] = {}  # beginnings, of texts that occur twice
        self._piece: Piece | None = None
        self._in_piece = 0  # documents
        self._open: _Document | None = None
        self._texts: list[tuple[_Document, str]] = []  # what waits to be encoded
        self._ended: list[_Document] = []
        self._waiting = 0  # characters

    def refuse(self, piece: Piece, error: InputError) -> None:
        """Count what cannot be read in a piece."""
        self._enter(piece)
        self._leave()
        self._in_piece += 1
        message = str(error)
        kind = next((kind for words, kind in _ODD.items() if words in message), "cannot be read")
        self._add_odd(kind, message)

    def add(self, piece: Piece, section: Section | None) -> None:
        """Take the next section of a piece; None: nothing more of the piece."""
        self._enter(piece)
        if section is None:
            self._leave()
            return
        if self._open is None:
            self._in_piece += 1
            begins = not piece.within or self._in_piece > 1
            self._open = _Document(
                piece=piece, number=self._in_piece, begins=begins, beginning=section.text[:_KEPT]
            )
        data = section.text.encode("utf-8", "surrogatepass")
        self.text_bytes += len(data)
        self._open.digest.update(data)
        self._open.characters += len(section.text)
        self._texts.append((self._open, section.text))
        self._waiting += len(section.text)
        if section.ends:
            self._ended.append(self._open)
            self._open = None
        if self._waiting >= _BATCH or len(self._texts) >= _BATCH // 64:
            self._encode()

    def numbers(self) -> dict[str, Any]:
        """The fields of the report that are counted."""
        self._leave()
        self._encode()
        most = heapq.nlargest(REPEATED, self._repeated, key=lambda each: self._times[each])
        compared = sum(self._times.values())
        found = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return found | {
            "scripts": scripts_of(self._code_points),
            "gpt2_tokens": None if self._gpt2 is None else self.gpt2_tokens,
            "compared": compared,
            "compared_share": self._limit / (1 << 64),
            "duplicates": compared - len(self._times),
            "repeated": [(self._times[each], self._repeated[each]) for each in most],
        }

    def _enter(self, piece: Piece) -> None:
        """What comes next is in this piece, which may continue the one before."""
        if (before := self._piece) is not piece:
            self._piece, self._in_piece = piece, 0
            if not (before and (before.path, before.end) == (piece.path, piece.start)):
                self._leave()

    def _leave(self) -> None:
        """The open document is not read to its end."""
        self.parts += self._open is not None
        self._open = None

    def _add_odd(self, kind: str, example: str) -> None:
        count, examples = self.odd.get(kind, (0, []))
        self.odd[kind] = (count + 1, examples if len(examples) == EXAMPLES else [*examples, example])

    def _encode(self) -> None:
        texts = [text for _, text in self._texts]
        encoded = self._tokenizer.encode_many(texts)
        for (document, _), ids in zip(self._texts, encoded, strict=True):
            document.tokens += len(ids)
        ids = np.concatenate([np.empty(0, np.int64), *encoded], dtype=np.int64)
        self.token_counts += np.bincount(ids, minlength=len(self.token_counts))
        if self._gpt2 is not None:
            self.gpt2_tokens += sum(map(len, self._gpt2.encode_many(texts)))
        characters = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
        self.characters += len(characters)
        self._code_points += np.bincount(characters, minlength=len(self._code_points))
        for document in self._ended:
            self._end(document)
        self._texts, self._ended, self._waiting = [], [], 0

    def _end(self, document: _Document) -> None:
        if not document.begins:
            self.parts += 1
        elif not document.characters:
            self._add_odd("empty", document.place)
        else:
            self.documents += 1
            self.lengths[document.tokens] += 1
            if document.tokens > self.longest[0]:
                self.longest = (document.tokens, document.place)
            if document.characters > SECTION:
                beginning = shortened(document.beginning, _SHOWN)
                example = f"{document.place}: {document.characters:,} characters: {beginning}"
                self._add_odd(f"over {SECTION:,} characters", example)
            self._compare(int.from_bytes(document.digest.digest()), document.beginning)

    def _compare(self, hashed: int, beginning: str) -> None:
        """Count a text by its hash; of too many, those below a limit are kept, with all copies of each."""
        if hashed >= self._limit:
            return
        times = self._times[hashed] = self._times.get(hashed, 0) + 1
        if times == 2:
            self._repeated[hashed] = beginning
        if len(self._times) > MOST_COMPARED:
            self._limit //= 2
            self._times = {each: n for each, n in self._times.items() if each < self._limit}
            self._repeated = {each: text for each, text in self._repeated.items() if each < self._limit}


# --- scripts --------------------------------------------------------------------------------------------

_SCRIPTS = """
Arabic Armenian Bengali Bopomofo CJK Cyrillic Devanagari Ethiopic Georgian Greek Gujarati Gurmukhi Hangul
Hebrew Hiragana Ideographic Kannada Katakana Khmer Lao Latin Malayalam Mongolian Myanmar Oriya Sinhala Tamil
Telugu Thai Tibetan
"""
_BY_NAME = {name.upper(): name for name in _SCRIPTS.split()} | dict.fromkeys(("CJK", "IDEOGRAPHIC"), "Han")
"""Scripts by a word in the Unicode names of their letters."""


def scripts_of(code_points: NDArray[np.int64]) -> dict[str, int]:
    """Characters of each script or other kind, of how often each code point occurs, (0x110000,)."""
    found: Counter[str] = Counter()
    for code in np.flatnonzero(code_points).tolist():
        found[_script(chr(code))] += int(code_points[code])
    return dict(found)


def _script(character: str) -> str:
    category = unicodedata.category(character)
    if character.isspace():
        return "white space"
    if character == "\N{REPLACEMENT CHARACTER}":
        return "U+FFFD (for broken characters)"
    if category[0] in "LM":
        words = re.findall("[A-Z]+", unicodedata.name(character, ""))
        return next((_BY_NAME[word] for word in words if word in _BY_NAME), "other letters and marks")
    if category in ("So", "Sk") and (character >= "\U0001f000" or "\u2600" <= character <= "\u27bf"):
        return "emoji and pictures"
    return {"N": "digits", "P": "punctuation", "S": "symbols"}.get(category[0], "control characters")
