"""Corpora: which files, in which order, what text, and one clear line for all that can be wrong."""

import hashlib
import logging
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

from gptpl.data.sources import Corpus, Downloaded, InstructionFile, PythonStdlib, Tale, TextFiles
from gptpl.errors import InputError


def write(folder: Path, **contents: str | bytes) -> None:
    """Write files; `__` in a keyword stands for `/`, the ending is `.txt`."""
    for name, content in contents.items():
        path = folder / f"{name.replace('__', '/')}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def names(corpus: Corpus, folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in corpus.files()]


def failure(corpus: Corpus) -> str:
    with pytest.raises(InputError) as raised:
        list(corpus.documents())
    message = str(raised.value)
    assert "\n" not in message
    return message


# ------------------------------------------------------------------------------ the user's own text


def test_one_file_is_one_document(tmp_path: Path) -> None:
    write(tmp_path, book="Once upon a time, naïve 東京.\n")
    corpus = TextFiles(str(tmp_path / "book.txt"))
    assert corpus.files() == [tmp_path / "book.txt"]
    assert list(corpus.documents()) == ["Once upon a time, naïve 東京.\n"]


def test_a_folder_is_read_to_any_depth_in_the_order_of_its_paths(tmp_path: Path) -> None:
    write(tmp_path, b="b", a__z="z", a__c__d="d", c="c")
    (tmp_path / "notes.md").write_text("not text")
    (tmp_path / "folder.txt").mkdir()
    assert names(TextFiles(tmp_path), tmp_path) == ["a/c/d.txt", "a/z.txt", "b.txt", "c.txt"]
    assert list(TextFiles(tmp_path).documents()) == ["d", "z", "b", "c"]
    assert names(TextFiles(tmp_path, pattern="*.txt"), tmp_path) == ["b.txt", "c.txt"]
    assert names(TextFiles(tmp_path, pattern="*.md"), tmp_path) == ["notes.md"]


def test_what_is_hidden_is_left_out_unless_it_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path, **{"a": "a", ".b": "b", ".git__c": "c", "d__.e__f": "f"})
    assert names(TextFiles(tmp_path), tmp_path) == ["a.txt"]
    assert names(TextFiles(tmp_path / "*.txt"), tmp_path) == ["a.txt"]
    assert names(TextFiles(tmp_path, pattern=".git/*.txt"), tmp_path) == [".git/c.txt"]
    assert names(TextFiles(tmp_path / ".git"), tmp_path) == [".git/c.txt"]


def test_a_glob_finds_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, x__one="1", x__two="2", y__one="3", y__deep__one="4")
    assert names(TextFiles(f"{tmp_path}/*/one.txt"), tmp_path) == ["x/one.txt", "y/one.txt"]
    assert names(TextFiles(f"{tmp_path}/**/one.txt"), tmp_path) == [
        "x/one.txt",
        "y/deep/one.txt",
        "y/one.txt",
    ]
    assert names(TextFiles(f"{tmp_path}/x/t?[o].txt"), tmp_path) == ["x/two.txt"]
    monkeypatch.chdir(tmp_path / "x")
    assert TextFiles("../y/*.txt").files() == [Path("../y/one.txt")]
    assert TextFiles("*.txt").files() == [Path("one.txt"), Path("two.txt")]


def test_brackets_in_real_names_are_no_glob(tmp_path: Path) -> None:
    write(tmp_path, **{"data [v2]__a [1]": "text"})
    for path in ("data [v2]/a [1].txt", "data [v2]", "data [v2]/*.txt"):
        assert names(TextFiles(tmp_path / path), tmp_path) == ["data [v2]/a [1].txt"]


def test_the_home_folder_is_written_as_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write(tmp_path, book="text")
    for path in ("~/book.txt", "~", "~/*.txt", Path("~/book.txt")):
        assert TextFiles(path).files() == [tmp_path / "book.txt"]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\xef\xbb\xbfmark", "mark"),
        (b"a\r\nb\rc\nd\r\n\r\n", "a\nb\nc\nd\n\n"),
        ("form\ffeed\x85next\u2028line".encode(), "form\ffeed\x85next\u2028line"),
    ],
    ids=["byte order mark", "line endings", "other separators"],
)
def test_text_is_the_same_whatever_system_wrote_it(data: bytes, text: str, tmp_path: Path) -> None:
    write(tmp_path, book=data)
    assert list(TextFiles(tmp_path / "book.txt").documents()) == [text]


@pytest.mark.parametrize("path", [None, ""])
def test_no_path(path: str | None) -> None:
    assert failure(TextFiles(path)) == (
        "data.path is not set: name a file, folder or glob, e.g. data.path=book.txt"
    )


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("missing.txt", "does not exist"),
        ("missing/book.txt", "does not exist"),
        ("*.md", "no file matches *.md"),
        ("missing/*.txt", "no file matches *.txt"),
        ("empty", "no file matches **/*.txt: check the path, or set data.pattern"),
        ("book.txt/inside", "does not exist"),
        ("n" * 300, "File name too long"),
    ],
)
def test_nothing_there(path: str, reason: str, tmp_path: Path) -> None:
    write(tmp_path, book="text")
    (tmp_path / "empty").mkdir()
    message = failure(TextFiles(tmp_path / path))
    assert str(tmp_path / path) in message
    assert reason in message


def test_a_name_is_that_of_the_class_or_the_one_given() -> None:
    class Poems(TextFiles):
        name = "poems"

    assert [TextFiles().name, TextFiles(name="mine").name, Poems().name] == ["text_file", "mine", "poems"]


@pytest.mark.parametrize("path", [".", "./sub", "sub"])
def test_a_listing_does_not_depend_on_how_the_folder_is_named(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sub/deep").mkdir(parents=True)
    for name in ("b.txt", "deep/a.txt"):
        (tmp_path / "sub" / name).write_text("x")
    monkeypatch.chdir(tmp_path)
    found = TextFiles(path).listing()
    assert [name for name, size, _ in found] == ["b.txt", "deep/a.txt"]
    assert found == TextFiles(tmp_path / "sub").listing()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "lost").mkdir(mode=0)
    assert [path.name for path in TextFiles(tmp_path).files()] == ["a.txt"]
    assert "left out, as it cannot be read" in caplog.text


@pytest.mark.parametrize("pattern", ["", "/etc/*.txt"])
def test_an_impossible_pattern(pattern: str, tmp_path: Path) -> None:
    assert repr(pattern) in failure(TextFiles(tmp_path, pattern=pattern))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "neither a file nor a folder" in failure(TextFiles(tmp_path / "pipe"))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (b" \r\n\t\n", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"\x7fELF\x02\x01\x00\x00", "is binary, not text (zero byte at offset 6)"),
        ("naïve".encode("latin-1"), "is not UTF-8 (byte 0xEF at offset 2): convert it, e.g. iconv"),
        (b"\xef\xbb\xbfok \xff", "is not UTF-8 (byte 0xFF at offset 6)"),
        (b"half a character \xf0\x9f", "is not UTF-8 (byte 0xF0 at offset 17)"),
        ("text".encode("utf-16"), "is UTF-16, not UTF-8: convert it, e.g. iconv -f UTF-16"),
    ],
)
def test_a_file_without_text_is_named_among_the_others(data: bytes, reason: str, tmp_path: Path) -> None:
    write(tmp_path, a="good", b=data, c="good")
    message = failure(TextFiles(tmp_path))
    assert message.startswith(f"{tmp_path / 'b.txt'} ")
    assert reason in message


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, book="text")
    corpus = TextFiles(tmp_path / "book.txt")

    def refuse(path: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)  # the tests may run as root, who may read all
    assert failure(corpus) == f"cannot read {tmp_path / 'book.txt'} (Permission denied): " + (
        "check the path and its permissions"
    )
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match="Permission denied"):
        corpus.content_sha256()


# ------------------------------------------------------------------------------ JSON Lines


def test_each_line_of_json_lines_is_a_document(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text(
        '{"text": "one\\n\u2028"}\n\n{"id": 7, "text": "two"}\n', encoding="utf-8"
    )
    (tmp_path / "c.NDJSON").write_text('{"text": "\\u00fc"}')
    write(tmp_path, a="plain", d='{"text": "plain too"}')
    assert list(TextFiles(tmp_path, pattern="*").documents()) == [
        *("plain", "one\n\u2028", "two", "ü", '{"text": "plain too"}'),
    ]


def test_the_field_of_json_lines_can_be_named_or_the_file_be_plain_text(tmp_path: Path) -> None:
    content = '{"text": "a", "body": "b"}\n'
    (tmp_path / "x.jsonl").write_text(content)
    assert list(TextFiles(tmp_path / "x.jsonl", field="body").documents()) == ["b"]
    assert list(TextFiles(tmp_path / "x.jsonl", field=None).documents()) == [content]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"body": "b"}', "has no 'text' (it has 'body'): add it, or set data.field"),
        ('{"text": 5}', ": 'text' must be a text, got 5"),
        ('{"text": " "}', ": 'text' is empty"),
        ('{"text": "a"', " is not valid JSON ("),
        ("plain text", " is not valid JSON ("),
        ('["text"]', " must be a JSON object, got ['text']"),
        ('{"text": "\\ud800"}', " is not valid JSON ("),
    ],
)
def test_a_line_without_a_text_is_named(line: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"text": "good"}}\n{line}\n')
    message = failure(TextFiles(path))
    assert message.startswith(f"{path}, line 2")
    assert reason in message


def test_the_hash_of_json_lines_is_that_of_file_and_field(tmp_path: Path) -> None:
    def sha256(content: str, field: str | None = "text") -> str:
        (tmp_path / "x.jsonl").write_text(content)
        return TextFiles(tmp_path / "x.jsonl", field=field).content_sha256()

    content = '{"text": "a", "body": "b"}\n'
    hashes = [sha256(content, field) for field in ("text", "body", None)] + [sha256('{"text": "b"}')]
    assert len(set(hashes)) == 4
    assert sha256(content) == hashes[0]


# ------------------------------------------------------------------------------ identity of content


@pytest.mark.parametrize("kind", ["text_files.TextFiles", "instruction_file.InstructionFile"])
def test_the_content_hash_is_that_of_older_runs(kind: str, tmp_path: Path) -> None:
    """A module may move: the hash is of the name that the class had when gptpl first wrote one."""
    write(tmp_path, book="text")
    name = kind.rpartition(".")[2]
    corpus = {"TextFiles": TextFiles, "InstructionFile": InstructionFile}[name](tmp_path / "book.txt")
    expected = hashlib.sha256(f"gptpl.data.corpora.{kind}".encode() + hashlib.sha256(b"text").digest())
    assert corpus.content_sha256() == expected.hexdigest()


def test_the_content_hash_of_the_tale_is_that_of_older_runs() -> None:
    assert Tale().content_sha256() == "7b665a2772df147573a431123083bbee3c3c9ac3a2c6c248462e44c3a931a6e0"


def test_the_content_hash_follows_the_bytes_and_not_the_place(tmp_path: Path) -> None:
    write(tmp_path, one__a="first", one__b="second", two__x="first", two__y="second")
    assert TextFiles(tmp_path / "one").content_sha256() == TextFiles(tmp_path / "two").content_sha256()


@pytest.mark.parametrize(
    "other",
    [
        {"a": "first", "b": "seconD"},
        {"a": "second", "b": "first"},
        {"a": "firsts", "b": "econd"},
        {"a": "first", "b": "second", "c": "third"},
        {"a": "firstsecond"},
    ],
    ids=["byte", "order", "boundary", "more", "joined"],
)
def test_the_content_hash_sees_every_difference(other: dict[str, str], tmp_path: Path) -> None:
    write(tmp_path / "one", a="first", b="second")
    write(tmp_path / "two", **other)
    assert TextFiles(tmp_path / "one").content_sha256() != TextFiles(tmp_path / "two").content_sha256()


def test_another_way_of_reading_is_another_content(tmp_path: Path) -> None:
    class Shouted(TextFiles):
        def read(self, path: Path) -> str:
            return super().read(path).upper()

    write(tmp_path, a="text")
    assert Shouted(tmp_path).content_sha256() != TextFiles(tmp_path).content_sha256()


# ------------------------------------------------------------------------------ tale and downloads


def test_the_tale_ships_with_the_package() -> None:
    (text,) = Tale().documents()
    assert 20_000 <= len(text.encode()) <= 30_000
    assert text.isprintable() or set(text) - {"\n"} <= {c for c in text if c.isprintable()}
    assert Tale().name == "tale"


def test_a_downloaded_corpus_is_the_file_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTPL_CACHE", str(tmp_path))
    write(tmp_path, story="A story.\r\n", other="Another.")
    sha256 = hashlib.sha256(b"A story.\r\n").hexdigest()
    corpus = Downloaded("http://host.invalid/story.txt", sha256=sha256, name="a_story")
    assert corpus.name == "a_story"
    assert list(corpus.documents()) == ["A story.\n"]
    renamed = Downloaded("http://host.invalid/x", sha256=sha256, name="a_story", filename="story.txt")
    assert renamed.files() == [tmp_path / "story.txt"]


# ------------------------------------------------------------------------------ the standard library


def python_files(root: Path, **contents: str | bytes) -> None:
    write(root, **contents)
    for path in root.rglob("*.txt"):
        path.rename(path.with_suffix(".py"))


def test_every_source_file_of_the_library_and_nothing_installed(tmp_path: Path) -> None:
    python_files(
        tmp_path,
        **{"a": "1", "b__c": "2", "test__d": "3", "site-packages__e": "4", "x__dist-packages__f": "5"},
        __pycache____g="6",
    )
    (tmp_path / "data.json").write_text("{}")
    assert sorted(names(PythonStdlib(tmp_path), tmp_path)) == ["a.py", "b/c.py", "test/d.py"]


def test_the_order_is_that_of_hashed_paths(tmp_path: Path) -> None:
    modules = [f"module_{number:02}" for number in range(40)]
    for root in (tmp_path / "one", tmp_path / "elsewhere"):
        python_files(root, **dict.fromkeys(modules if root.name == "one" else reversed(modules), "pass"))
    order = names(PythonStdlib(tmp_path / "one"), tmp_path / "one")
    assert order == names(PythonStdlib(tmp_path / "elsewhere"), tmp_path / "elsewhere")
    assert order == sorted(order, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    assert order != sorted(order)


def test_sources_are_decoded_as_they_declare_and_the_rest_is_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    python_files(
        tmp_path,
        latin="# -*- coding: latin-1 -*-\r\nname = 'Zoë'\r\n".encode("latin-1"),
        mark=b"\xef\xbb\xbfplain = 'Zo\xc3\xab'\n",
        empty="",
        blank="\n\n",
        broken=b"name = 'Zo\xeb'\n",
        unknown="# coding: klingon\n",
        binary=b"x = 1\n\0",
    )
    caplog.set_level(logging.INFO)
    corpus = PythonStdlib(tmp_path)
    expected = {"# -*- coding: latin-1 -*-\nname = 'Zoë'\n", "plain = 'Zoë'\n"}
    assert set(corpus.documents()) == expected
    assert set(corpus.documents()) == expected
    assert [record.message for record in caplog.records] == [
        "python_stdlib: 5 of 7 files skipped, empty or not decodable"
    ]
    for name in ("empty", "blank", "broken", "unknown", "binary"):
        with pytest.raises(InputError) as raised:
            corpus.read(tmp_path / f"{name}.py")
        assert str(tmp_path / f"{name}.py") in str(raised.value)


def test_the_running_interpreters_library_is_found() -> None:
    corpus = PythonStdlib()
    library = Path(sysconfig.get_path("stdlib"))
    files = corpus.files()
    assert library / "argparse.py" in files
    assert library / "json" / "decoder.py" in files
    assert not any("site-packages" in path.parts for path in files)
    assert sum(path.stat().st_size for path in files) > 5_000_000
    assert "class ArgumentParser" in corpus.read(library / "argparse.py")


def test_a_library_without_sources(tmp_path: Path) -> None:
    assert str(tmp_path) in failure(PythonStdlib(tmp_path))


@dataclass
class Lines(Corpus):
    """A user's corpus, with a setting that decides what it reads of its file."""

    path: Path
    last: bool = False
    name = "lines"

    def files(self) -> list[Path]:
        return [self.path]

    def read(self, path: Path) -> str:
        return path.read_text().splitlines()[-1 if self.last else 0]


def test_a_setting_that_decides_the_text_is_another_content(tmp_path):
    """Or the cache would give one setting the text of another."""
    path = tmp_path / "a.txt"
    path.write_text("first\nmiddle\nlast")
    of_first = Lines(path).content_sha256()
    assert Lines(path, last=True).content_sha256() != of_first
    path.write_text("first\nanother middle\nlast")
    assert Lines(path).content_sha256() == of_first  # nothing that it reads has changed
