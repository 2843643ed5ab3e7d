"""What a corpus holds, against plain loops over documents that the test wrote."""

import gzip
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from gptpl.data.sources import Corpus, TextFiles, base, formats
from gptpl.errors import InputError
from gptpl.evaluation import corpus_report as module
from gptpl.evaluation.corpus_report import corpus_report, scripts_of
from gptpl.tokenizers import BytesTokenizer, GPT2Tokenizer, WordsTokenizer

TEXTS = ["Zwölf Bären, 熊 und ☃.\n" * n + "end" * (n % 3) for n in range(1, 40)] + [
    "one",
    "one",
    "two",
    "two",
    "two",
    "x" * 64,
]


def write_lines(path: Path, texts: Sequence[str]) -> TextFiles:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return TextFiles(path)


def write_files(folder: Path, texts: Sequence[str]) -> TextFiles:
    for number, text in enumerate(texts):
        (folder / f"{number:03}.txt").write_text(text, encoding="utf-8")
    return TextFiles(folder)


def test_counts(tmp_path):
    report = corpus_report([write_lines(tmp_path / "x.jsonl", TEXTS)], BytesTokenizer(), max_length=100)
    encoded = [text.encode() for text in TEXTS]
    assert (report.documents, report.parts, report.odd) == (len(TEXTS), 0, {})
    assert report.characters == sum(map(len, TEXTS))
    assert report.text_bytes == report.tokens == sum(map(len, encoded))
    assert report.token_counts.tolist() == [Counter(b"".join(encoded))[byte] for byte in range(257)]
    assert report.gpt2_tokens == sum(len(GPT2Tokenizer().encode(text)) for text in TEXTS)
    assert report.lengths == Counter(map(len, encoded))
    assert report.longest[0] == max(map(len, encoded))
    assert (report.compared, report.duplicates) == (len(TEXTS), 3)
    assert report.repeated == [(3, "two"), (2, "one")]
    for tokens, each in ((report.tokens, 1), (report.gpt2_tokens, report.text_bytes / report.gpt2_tokens)):
        assert f"  {tokens:,}, of {each:.2f} bytes on average" in "\n".join(report.lines())
    assert (report.files, report.file_bytes, report.sampled) == (
        1,
        (tmp_path / "x.jsonl").stat().st_size,
        False,
    )
    lines = "\n".join(report.lines())
    longer = sum(len(each) > 100 for each in encoded)
    assert f"{longer} ({longer / len(TEXTS):.1%}) are longer than a sequence, data.max_length=100" in lines
    for n in range(1, 11):
        there = sum(2 ** (n - 1) < len(each) <= 2**n for each in encoded)
        assert not there or re.search(rf"^ +{2**n:,} +{there} ", lines, re.MULTILINE)


@pytest.mark.parametrize("fraction", [0.05, 0.37, 0.5, 0.95, 1.0])
def test_quantiles(fraction, tmp_path):
    report = corpus_report([write_lines(tmp_path / "x.jsonl", TEXTS)], BytesTokenizer(), max_length=8)
    lengths = [len(text.encode()) for text in TEXTS]
    assert report.length(fraction) == np.quantile(lengths, fraction, method="inverted_cdf")


def test_a_vocabulary_of_the_text(tmp_path):
    report = corpus_report([write_files(tmp_path, TEXTS)], WordsTokenizer(), max_length=8)
    fitted = WordsTokenizer().fitted_to(TEXTS)
    assert report.tokenizer.vocab_size == fitted.vocab_size
    assert report.tokens == sum(len(fitted.encode(text)) for text in TEXTS)


# --- what is odd ----------------------------------------------------------------------------------------


def odd_folder(folder: Path) -> TextFiles:
    bad = [
        b'{"text": "good"}',
        b'{"text": ',
        b'{"body": "x"}',
        b'{"text": 7}',
        b"[1]",
        b'{"text": ""}',
        b'{"text": "last"}',
    ]
    files = {
        "binary.txt": b"abc\0def",
        "blank.txt": b" \n\t\n",
        "good.txt": b"good",
        "latin.txt": "Zw\xf6lf".encode("latin-1"),
        "utf16.txt": "abc".encode("utf-16"),
        "cut.txt.gz": gzip.compress(b"a text that is long enough to be cut " * 9)[:-12],
        "lines.jsonl": b"\n".join(bad) + b"\n",
        "no.parquet": b"PAR1 it is not",
        "large.txt": b"word " * 300_000,
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return TextFiles(folder, pattern="*")


def test_what_is_odd_is_named_and_the_rest_counted(tmp_path):
    pytest.importorskip("pyarrow")
    report = corpus_report([odd_folder(tmp_path)], BytesTokenizer(), max_length=8)
    assert report.documents == 4  # good.txt, large.txt, and two lines
    assert report.lengths == {4: 3, 1_500_000: 1}
    place = r"[\w.]+\.(?:txt|gz|jsonl|parquet)(?:, (?:line|document) \d)?"
    named = {
        kind: [re.findall(place, each)[0] for each in examples] for kind, (_, examples) in report.odd.items()
    }
    assert named == {
        "binary": ["binary.txt"],
        "empty": ["blank.txt", "lines.jsonl, document 6"],
        "damaged": ["cut.txt.gz", "no.parquet"],
        "over 1,048,576 characters": ["large.txt"],
        "not UTF-8": ["latin.txt", "utf16.txt"],
        "not JSON": ["lines.jsonl, line 2", "lines.jsonl, line 5"],
        "no text in the field": ["lines.jsonl, line 3", "lines.jsonl, line 4"],
    }
    assert (report.odd["empty"][0], report.duplicates) == (2, 1)
    lines = "\n".join(report.lines())
    assert "iconv -f WINDOWS-1252" in lines
    assert "large.txt: 1,500,000 characters: word word" in lines


def test_of_many_odd_ones_the_first_are_named(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n' + "broken\n" * 1000)
    report = corpus_report([TextFiles(tmp_path / "x.jsonl")], BytesTokenizer(), max_length=8)
    count, examples = report.odd["not JSON"]
    assert (report.documents, count) == (1, 1000)
    assert [re.findall(r"line (\d+) ", each)[0] for each in examples] == ["2", "3", "4", "5", "6"]


def test_end_of_text_in_a_text_is_said(tmp_path):
    report = corpus_report([write_files(tmp_path, ["a<|endoftext|>b", "c"])], GPT2Tokenizer(), max_length=8)
    assert (report.documents, report.tokens, report.gpt2_tokens) == (2, 4, None)
    assert "  tokens, gpt2 tokenizer  4, of 4.00 bytes on average" in report.lines()
    assert any("<|endoftext|> is written in the texts 1 time:" in line for line in report.lines())


# --- pieces ---------------------------------------------------------------------------------------------


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(formats, "PIECE_BYTES", 1000)


def test_records_of_several_pieces(small_pieces, tmp_path):
    texts = [f"{n}:" + "x" * (n * 37 % 300) for n in range(200)]
    lines = [json.dumps({"text": text}) for text in texts]
    broken = {17, 18, 120, 199}
    (tmp_path / "x.jsonl").write_text(
        "".join("{\n" if n in broken else f"{line}\n" for n, line in enumerate(lines))
    )
    corpus = TextFiles(tmp_path / "x.jsonl")
    assert len(corpus.pieces()) > 10
    report = corpus_report([corpus], BytesTokenizer(), max_length=8)
    good = [text for n, text in enumerate(texts) if n not in broken]
    assert report.lengths == Counter(map(len, good))
    [(count, examples)] = report.odd.values()
    assert [int(re.findall(r"line (\d+) ", each)[0]) - 1 for each in examples] == sorted(broken)
    assert (count, report.parts) == (4, 0)


def test_a_text_of_several_pieces_is_one_document(small_pieces, tmp_path):
    text = "\n".join(f"line {n} of a long text" for n in range(400))
    corpus = write_files(tmp_path, [text, "short"])
    assert len(corpus.pieces()) > 5
    report = corpus_report([corpus], BytesTokenizer(), max_length=8)
    assert (report.documents, report.parts, report.lengths) == (2, 0, {len(text): 1, 5: 1})


def test_a_text_with_damage_within_is_no_document(small_pieces, tmp_path):
    text = "\n".join(f"line {n} of a long text" for n in range(400)).encode()
    (tmp_path / "a.txt").write_bytes(text[:4000] + b"\xff" + text[4001:])
    (tmp_path / "b.txt").write_bytes(b"short")
    report = corpus_report([TextFiles(tmp_path)], BytesTokenizer(), max_length=8)
    assert (report.documents, report.parts, report.lengths) == (1, 2, {5: 1})
    assert 6000 < report.text_bytes < len(text)
    [(_, [message])] = report.odd.values()
    assert "(byte 0xFF at offset 4000)" in message


# --- samples --------------------------------------------------------------------------------------------


def test_a_sample_is_spread_evenly_and_said(tmp_path):
    sizes = [100 + n * 7919 % 400 for n in range(300)]
    corpus = write_files(tmp_path, ["x" * size for size in sizes])
    total = sum(sizes)
    report = corpus_report([corpus], BytesTokenizer(), max_length=8, sample_bytes=total // 10)
    assert report.sampled
    assert report.text_bytes == pytest.approx(total / 10, abs=500)
    assert sum(report.lengths.values()) == report.documents
    whole = [line for line in report.lines() if "the whole has about" in line]
    assert int(whole[0].split()[-2].replace(",", "")) == pytest.approx(total, rel=0.01)
    assert "sampled: " in report.page()


def test_which_files_a_sample_has(tmp_path):
    corpus = write_files(tmp_path, [f"{n:03} " * 50 for n in range(160)])
    tokenizer = WordsTokenizer()
    found = corpus_report([corpus], tokenizer, max_length=8, sample_bytes=16 * 200)
    numbers = [int(word) for word in found.tokenizer.vocabulary_bytes() if word.isdigit()]
    assert len(numbers) == 16
    assert all(9 <= gap <= 11 for gap in np.diff(numbers))


def test_of_a_large_file_the_beginning_is_read(tmp_path):
    lines = "".join(json.dumps({"text": f"{n:06}"}) + "\n" for n in range(20_000))
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(lines.encode(), 1))
    report = corpus_report(
        [TextFiles(tmp_path / "x.jsonl.gz")], BytesTokenizer(), max_length=8, sample_bytes=1200
    )
    assert (report.documents, report.sampled) == (200, True)


def test_a_sample_of_one_text_has_parts_of_it(small_pieces, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "SECTION", 50)
    corpus = write_files(tmp_path, ["\n".join(f"line {n:03} of a text" for n in range(320))])
    assert len(corpus.pieces()) == 6
    report = corpus_report([corpus], BytesTokenizer(), max_length=8, sample_bytes=4000)
    assert (report.documents, report.parts, report.lengths) == (0, 6, {})
    assert report.text_bytes == pytest.approx(4000, abs=300)


def test_a_sample_of_records_that_have_no_text_ends_too(small_pieces, tmp_path):
    lines = [json.dumps({"text": f"{n:03}", "more": "y" * 80}) for n in range(1000)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines) + "\n")
    total = (tmp_path / "x.jsonl").stat().st_size
    refused = corpus_report(
        [TextFiles(tmp_path / "x.jsonl", field="body")],
        BytesTokenizer(),
        max_length=8,
        sample_bytes=total // 5,
    )
    assert refused.odd["no text in the field"][0] == pytest.approx(200, abs=15)
    report = corpus_report(
        [TextFiles(tmp_path / "x.jsonl")], BytesTokenizer(), max_length=8, sample_bytes=total // 5
    )
    assert report.documents == refused.odd["no text in the field"][0]
    [whole] = [line for line in report.lines() if "the whole has about" in line]
    assert int(whole.split()[-2].replace(",", "")) == pytest.approx(3000, rel=0.02)


def test_nothing_is_said_of_a_sample_where_all_is_read(tmp_path):
    corpus = write_files(tmp_path, TEXTS)
    for most in (None, sum(len(text.encode()) for text in TEXTS)):
        report = corpus_report([corpus], BytesTokenizer(), max_length=8, sample_bytes=most)
        assert report.documents == len(TEXTS)
        assert not any("sampled" in line for line in report.lines())


# --- duplicates -----------------------------------------------------------------------------------------


def test_of_too_many_documents_some_are_compared_with_all_their_copies(tmp_path, monkeypatch):
    texts = [f"text {n % 150}" for n in range(600)]  # each four times
    monkeypatch.setattr(module, "MOST_COMPARED", 40)
    report = corpus_report([write_lines(tmp_path / "x.jsonl", texts)], BytesTokenizer(), max_length=8)
    assert 40 < report.compared <= 160
    assert report.duplicates == report.compared * 3 // 4
    assert report.compared_share in (1 / 4, 1 / 8)
    assert {times for times, _ in report.repeated} == {4}
    assert report.documents == 600


# --- a corpus of one's own ------------------------------------------------------------------------------


class Poems(Corpus):
    name = "poems"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def files(self):
        return sorted(self._folder.glob("*.txt"))


class Together(Poems):
    def documents(self):
        yield from ("one", "two")
        raise InputError("the third is not valid JSON")


def test_corpora_of_other_classes(tmp_path):
    write_files(tmp_path, ["one", " ", "one"])
    report = corpus_report([Poems(tmp_path)], BytesTokenizer(), max_length=8)
    assert (report.documents, report.duplicates, report.odd["empty"][0]) == (2, 1, 1)
    report = corpus_report([Together(tmp_path)], BytesTokenizer(), max_length=8)
    assert (report.documents, report.odd) == (2, {"not JSON": (1, ["the third is not valid JSON"])})


# --- scripts --------------------------------------------------------------------------------------------

BY_HAND = {
    "Latin": "aÉßłﬁ\uff21",
    "Cyrillic": "жЯ",
    "Greek": "λΩ",
    "Han": "漢字々",
    "Hiragana": "ひ",
    "Katakana": "カｶ",
    "Hangul": "한ᄀ",
    "Arabic": "عﷺ",
    "Hebrew": "א",
    "Devanagari": "हि",
    "Thai": "ก",
    "digits": "1٣½Ⅷ",
    "punctuation": ".,—«。",
    "symbols": "+$€^©",
    "white space": " \n\t\u3000\u00a0",
    "emoji and pictures": "😀☃🏽",
    "control characters": "\x00\x07\u200b\ue000",
    "U+FFFD (for broken characters)": "\ufffd",
    "other letters and marks": "\u0301\U0001d400ᚠʰ",
}


def test_scripts(tmp_path):
    counts = np.zeros(0x110000, np.int64)
    for characters in BY_HAND.values():
        for times, character in enumerate(characters, 1):
            counts[ord(character)] += times
    expected = {name: sum(range(1, len(each) + 1)) for name, each in BY_HAND.items()}
    assert scripts_of(counts) == expected
    text = "".join(BY_HAND.values()).replace("\x00", "")
    report = corpus_report([write_lines(tmp_path / "x.jsonl", [text])], GPT2Tokenizer(), max_length=8)
    found = {name: len(each.replace("\x00", "")) for name, each in BY_HAND.items()}
    assert report.scripts == found
    assert sum(report.scripts.values()) == report.characters


# --- the page -------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Collects the tags and the text."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


NASTY = "<script>alert(1)</script><img src=x> &amp; {{ title }}"


def test_the_page_displays_texts_and_does_not_interpret_them(tmp_path):
    (tmp_path / "<b>.jsonl").write_text((json.dumps({"text": NASTY}) + "\n") * 3 + "<i>not JSON\n")
    report = corpus_report([TextFiles(tmp_path, pattern="*")], BytesTokenizer(), max_length=8)
    report.write(tmp_path / "new/page.html")
    page = (tmp_path / "new/page.html").read_text(encoding="utf-8")
    read = Reader(page)
    assert NASTY in read.text
    assert "<b>.jsonl, line 4" in read.text
    assert not {"script", "img", "link"} & set(read.tags)
    assert read.tags.count("b") == 0
    assert "http://" not in page
    assert "https://" not in page
    for table in report.tables():
        assert all(cell in read.text for row in table.rows for cell in row)


def test_the_terminal_gets_no_control_characters(tmp_path):
    corpus = write_lines(tmp_path / "x.jsonl", ["\x1b[31mred\u202e", "\x1b[31mred\u202e", "\x07" * 9])
    report = corpus_report([corpus], BytesTokenizer(), max_length=8)
    lines = replace(report, sequences=[[27, 65, 256, 7, 13, 10, 66]]).lines()
    assert lines[-4:] == [
        "  | \ufffdA",
        "  +--- end of document: <|endoftext|> ---",
        "  | \ufffd\ufffd",
        "  | B",
    ]
    assert all(character.isprintable() for line in lines for character in line)


def test_an_empty_corpus(tmp_path):
    (tmp_path / "x.txt").write_text("")
    report = corpus_report([TextFiles(tmp_path / "x.txt")], GPT2Tokenizer(), max_length=8)
    assert (report.documents, report.tokens, report.length(0.5)) == (0, 0, 0)
    lines = report.lines()
    assert "  there is no whole document" in lines
    assert "  times  text" not in lines
    assert "there is no whole document" in report.page()
