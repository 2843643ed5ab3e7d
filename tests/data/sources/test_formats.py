"""Text, JSON Lines and Parquet, compressed or not, in pieces."""

import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptpl.data.sources import PythonStdlib, TextFiles, base, formats
from gptpl.data.sources.base import Piece, in_sections, sampled
from gptpl.errors import InputError
from gptpl.tokenizers import GPT2Tokenizer

TEXTS = ["One day\nit rained.\n", "Zwölf Bären, 熊 und\u3000熊.\n\n  Ende\n", "a " * 300 + "\nlast"]


def whole(piece: Piece, field: str | None = "text") -> list[str]:
    """The documents of a piece, each from its sections."""
    documents: list[str] = []
    open_ = False
    for text, ends in formats.sections(piece, field):
        documents[-1:] = [documents[-1] + text] if open_ else [*documents[-1:], text]
        open_ = not ends
    return documents


def pieces(path: Path) -> Iterator[Piece]:
    return formats.pieces_of(path, "text")


def json_lines(texts: Iterable[str], key: str = "text") -> bytes:
    return "".join(json.dumps({"id": 7, key: text}) + "\n" for text in texts).encode()


def parquet(texts: Iterable[str | None], key: str = "text", **options: int) -> bytes:
    arrow = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    out = io.BytesIO()
    pq.write_table(arrow.table({"id": list(range(len(list(texts)))), key: list(texts)}), out, **options)
    return out.getvalue()


def zst(data: bytes) -> bytes:
    pytest.importorskip("backports.zstd")
    from backports import zstd

    return bytes(zstd.compress(data))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.txt", lambda: TEXTS[0].encode()),
        ("x.md.gz", lambda: gzip.compress(TEXTS[0].encode())),
        ("x.txt.zst", lambda: zst(TEXTS[0].encode())),
        ("x.jsonl", lambda: json_lines(TEXTS)),
        ("x.ndjson.gz", lambda: gzip.compress(json_lines(TEXTS))),
        ("x.JSONL.ZST", lambda: zst(json_lines(TEXTS))),
        ("x.parquet", lambda: parquet(TEXTS)),
    ],
)
def test_the_same_documents_from_every_kind_of_file(name: str, content: Callable[[], bytes], tmp_path: Path):
    path = tmp_path / name
    path.write_bytes(content())
    expected = TEXTS[:1] if name.lower().startswith(("x.txt", "x.md")) else TEXTS
    assert [each for piece in pieces(path) for each in whole(piece)] == expected
    corpus = TextFiles(path)
    assert list(corpus.documents()) == expected
    assert [text for piece in corpus.pieces() for text, _ in corpus.sections(piece)] == expected


def test_line_ends_and_byte_order_mark(tmp_path: Path):
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert whole(Piece(path=path)) == ["one\ntwo\nthree\n"]


def test_blank_documents_come_as_such(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(json_lines(["a", "", " \n ", "b"]) + b"\n\n")  # blank lines are no documents
    assert whole(Piece(path=path)) == ["a", "", "", "b"]
    path = tmp_path / "x.parquet"
    path.write_bytes(parquet(["a", None, "b"]))
    assert whole(Piece(path=path)) == ["a", "", "b"]
    path = tmp_path / "x.txt"
    path.write_bytes(b" \n \n")
    assert list(formats.sections(Piece(path=path), "text")) == [("", True)]


# --- pieces of a large file -----------------------------------------------------------------------------


def real_text() -> str:
    """Code and prose with indentation, blank lines, tables and other alphabets."""
    files = PythonStdlib().files()[:40]
    return "".join(text for path in files if (text := path.read_text(errors="replace")).strip())[:400_000]


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_pieces_have_the_tokens_of_the_whole(line_end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = real_text() + "".join(TEXTS) * 20
    path = tmp_path / "x.txt"
    path.write_bytes(text.replace("\n", line_end).encode())
    monkeypatch.setattr(formats, "PIECE_BYTES", 10_007)
    monkeypatch.setattr(base, "SECTION", 3001)
    parts = list(pieces(path))
    assert len(parts) > 30
    found = [section for piece in parts for section in formats.sections(piece, "text")]
    assert len(found) > 100
    assert [section.ends for section in found] == [False] * (len(found) - 1) + [True]
    assert "".join(section.text for section in found) == text
    tokenizer = GPT2Tokenizer()
    tokens = np.concatenate([tokenizer.encode(section.text) for section in found])
    assert np.array_equal(tokens, tokenizer.encode(text))


@given(
    st.lists(
        st.sampled_from(["word", "é", "\u3000", "\x85", " ", "\n", "\r\n", "\n\n", "/x", "熊", "\ufeff"])
    ),
    st.integers(3, 40),
)
def test_pieces_are_the_file(tmp_path_factory: pytest.TempPathFactory, words: list[str], size: int):
    path = tmp_path_factory.mktemp("pieces") / "x.txt"
    path.write_bytes("".join(words).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "PIECE_BYTES", size)
        parts = list(pieces(path))
        found = [section for piece in parts for section in formats.sections(piece, "text")]
    text = "".join(words).removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if len(parts) > 1 or text.strip():
        assert "".join(section.text for section in found) == text
    assert [section.ends for section in found].count(True) == 1
    assert found[-1].ends


def test_a_long_line_is_cut_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(formats, "PIECE_BYTES", 5000)
    monkeypatch.setattr(formats, "_FAR", 2000)
    monkeypatch.setattr(formats, "_WINDOW", 700)
    for line in ("word " * 8000, "é" * 20_000):
        path = tmp_path / "x.txt"
        path.write_text(line, encoding="utf-8")
        parts = list(pieces(path))
        assert len(parts) > 5
        assert "".join(text for piece in parts for text, _ in formats.sections(piece, "text")) == line


def test_windows_of_zstd_as_long_as_they_come(tmp_path: Path):
    zstd = pytest.importorskip("backports.zstd")
    long = zstd.CompressionParameter.enable_long_distance_matching
    options = {zstd.CompressionParameter.window_log: 28, long: 1}
    path = tmp_path / "x.txt.zst"
    with zstd.open(path, "wb", options=options) as file:
        file.write(b"A line of text.\n" * 1000)
    assert whole(Piece(path=path)) == ["A line of text.\n" * 1000]


@pytest.mark.parametrize("size", [40, 100, 1000])
def test_every_line_is_in_one_piece(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    texts = [f"document {n} " + "x" * (n % 50) for n in range(60)]
    path = tmp_path / "x.jsonl"
    path.write_bytes(json_lines(texts))
    monkeypatch.setattr(formats, "PIECE_BYTES", size)
    parts = list(pieces(path))
    assert len(parts) > 1
    assert [each for piece in parts for each in whole(piece)] == texts


def test_row_groups_are_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    texts = [f"document {n}" for n in range(100)]
    path = tmp_path / "x.parquet"
    path.write_bytes(parquet(texts, row_group_size=7))
    monkeypatch.setattr(formats, "PIECE_BYTES", 200)
    parts = list(pieces(path))
    assert len(parts) > 3
    assert [each for piece in parts for each in whole(piece)] == texts


@given(st.lists(st.text(st.sampled_from("ab \n."), max_size=30), max_size=30))
def test_sections_are_the_document(parts: list[str]):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "SECTION", 20)
        found = list(in_sections(parts))
    text = "".join(parts)
    assert "".join(section.text for section in found) == (text if text.strip() or len(found) > 1 else "")
    assert [section.ends for section in found] == [False] * (len(found) - 1) + [True]
    assert max(len(section.text) for section in found) <= 2 * 20


# --- bad input ------------------------------------------------------------------------------------------


def read(path: Path) -> None:
    for piece in pieces(path):
        list(formats.sections(piece, "text"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", lambda: b"good\n" * 9 + b"b\xe4d\n", r"x\.txt is not UTF-8 \(byte 0xE4 at offset 46\)"),
        ("x.txt", lambda: b"good\n\0", r"x\.txt is binary, not text \(zero byte at offset 5\)"),
        ("x.txt", lambda: "good".encode("utf-16"), r"x\.txt is UTF-16"),
        ("x.txt.gz", lambda: gzip.compress(b"good\n" * 999)[:-20], r"x\.txt\.gz is damaged or cut short"),
        ("x.txt.gz", lambda: b"no gzip", r"x\.txt\.gz is damaged or cut short"),
        ("x.txt.zst", lambda: zst(np.random.default_rng(0).bytes(9999).hex().encode())[:-20], "cut short"),
        ("x.jsonl", lambda: json_lines(["a"] * 30) + b'{"text": ', r"x\.jsonl, line 31 is not valid JSON"),
        ("x.jsonl", lambda: json_lines(["a"] * 30, "body"), r"x\.jsonl, line 1 has no 'text'"),
        (
            "x.jsonl",
            lambda: json_lines(["a"] * 30) + b'{"text": 3}\n',
            r"x\.jsonl, line 31: 'text' must be",
        ),
        ("x.jsonl", lambda: json_lines(["a"] * 30) + b"\xff\n", r"x\.jsonl, line 31, is not UTF-8"),
        (
            "x.parquet",
            lambda: parquet(["a"], "body"),
            r"no column 'text' \(it has 'id', 'body'\)",
        ),
        ("x.parquet", lambda: parquet(["a"])[:-9], r"x\.parquet is not a whole Parquet file"),
    ],
)
@pytest.mark.parametrize("size", [100, 1 << 20])
def test_what_is_wrong_is_named(
    name: str,
    content: Callable[[], bytes],
    message: str,
    size: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    path = tmp_path / name
    path.write_bytes(content())
    monkeypatch.setattr(formats, "PIECE_BYTES", size)  # also in a piece within the file
    with pytest.raises(InputError, match=message):
        read(path)


def test_a_column_that_holds_no_text(tmp_path: Path):
    path = tmp_path / "x.parquet"
    path.write_bytes(parquet(["a"]))
    with pytest.raises(InputError, match="column 'id' holds int64, not texts"):
        list(formats.sections(Piece(path=path), "id"))


def test_a_folder_of_several_kinds(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(json_lines(["a"]))
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "c.png").write_bytes(b"\0")
    with pytest.raises(InputError, match=r"several kinds, JSON Lines \(a\.jsonl\), text \(b\.txt\)"):
        TextFiles(tmp_path, pattern=None).files()
    (tmp_path / "b.txt").unlink()
    assert [path.name for path in TextFiles(tmp_path, pattern=None).files()] == ["a.jsonl"]
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(InputError, match="no file is text, JSON Lines or Parquet"):
        TextFiles(tmp_path, pattern=None).files()


def test_an_empty_document_in_a_text_that_is_divided_by_characters(tmp_path: Path):
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(json_lines(["a", " "])))
    with pytest.raises(InputError, match="has an empty document"):
        list(TextFiles(path).documents())


# ------------------------------------------------------------------------------------------------- samples


def test_a_sample_is_evenly_spread_over_files(tmp_path: Path) -> None:
    for number in range(100):
        (tmp_path / f"{number:03}.txt").write_text(f"{number:03}" + "é" * 498)  # 999 bytes
    corpus = TextFiles(tmp_path, pattern=None)
    assert [text[:3] for text in sampled(corpus)] == [f"{number:03}" for number in range(100)]
    read = [int(text[:3]) for text in sampled(corpus, 20_000)]
    assert 18 <= len(read) <= 22
    assert set(np.diff(read)) <= {4, 5, 6}


def test_of_large_files_the_beginnings_of_all_parts_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "PIECE_BYTES", 10_000)
    lines = [json.dumps({"text": f"{number:05}"}) for number in range(10_000)]  # 18 bytes each
    (tmp_path / "all.jsonl").write_text("\n".join(lines))
    read = [int(text) for text in sampled(TextFiles(tmp_path, pattern=None), 6_000)]
    assert 1000 <= len(read) <= 1400  # of 5 bytes
    assert min(read) < 100
    assert max(read) > 9000
    assert len(np.flatnonzero(np.diff(read) > 1)) >= 10
