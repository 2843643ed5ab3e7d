"""A run's log file hears what concerns the run, and the process's logging does not notice."""

import logging
import os
import warnings
from functools import partial

import pytest

from gptpl.cli.console import console
from gptpl.errors import InputError
from gptpl.training.run_log import RunLogFile

OURS = logging.getLogger("gptpl.somewhere")
LIGHTNING = logging.getLogger("lightning.pytorch.somewhere")
THEIRS = logging.getLogger("their_package.callbacks")


def say() -> None:
    for log in (OURS, LIGHTNING, THEIRS):
        log.info("info of %s", log.name)
        log.warning("warning of %s", log.name)


def lines(folder):
    """Level and message of each record, without the source lines of warnings."""
    written = (folder / "train.log").read_text().splitlines()
    return [" ".join(line.split()[2:]) for line in written if line.startswith("20")]


def state():
    loggers = [logging.root, *map(logging.getLogger, ("gptpl", "lightning.pytorch", "lightning", "hydra"))]
    levels = [(log.level, log.propagate, list(log.handlers)) for log in loggers]
    return levels, warnings.showwarning, list(warnings.filters)


@pytest.fixture
def root_lines():
    """What a program's own handler at the root logger gets."""
    found: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record):
            found.append(record.getMessage())

    handler = Keep()
    logging.root.addHandler(handler)
    yield found
    logging.root.removeHandler(handler)


@pytest.mark.parametrize("level", [logging.NOTSET, logging.INFO, logging.ERROR])
def test_other_handlers_get_what_they_got_without_it(tmp_path, root_lines, request, level):
    request.addfinalizer(partial(logging.getLogger("gptpl").setLevel, logging.getLogger("gptpl").level))
    logging.getLogger("gptpl").setLevel(level)
    before = state()
    say()
    without = list(root_lines)
    root_lines.clear()
    with RunLogFile() as log_file:
        log_file.open(tmp_path)
        say()
    assert root_lines == without
    assert state() == before
    assert lines(tmp_path) == [
        "INFO info of gptpl.somewhere",
        "WARNING warning of gptpl.somewhere",
        "WARNING warning of lightning.pytorch.somewhere",
    ]


def test_nothing_is_shown_but_what_python_shows_anyway(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(logging.root, "handlers", [])  # pytest's own; then logging shows warnings
    with RunLogFile() as log_file:
        log_file.open(tmp_path)
        OURS.info("quiet")
        OURS.warning("loud")
    assert "".join(capsys.readouterr()) == "loud\n"


def test_warnings_are_written_and_shown(tmp_path):
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with RunLogFile() as log_file:
            log_file.open(tmp_path)
            warnings.warn("watch out", UserWarning, stacklevel=1)
            warnings.warn("The loader does not have many workers", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["watch out"]
    assert "UserWarning: watch out" in lines(tmp_path)[0]
    assert "workers" not in (tmp_path / "train.log").read_text()


def test_lines_of_building_come_first_and_a_second_session_is_appended(tmp_path):
    log_file = RunLogFile()
    with log_file:
        OURS.info("built")
    OURS.error("between")
    assert not list(tmp_path.iterdir())
    for session in ("first", "second"):
        with log_file:
            log_file.open(tmp_path)
            OURS.info(session)
    assert lines(tmp_path) == ["INFO built", "INFO first", "INFO second"]


def test_a_command_writes_what_it_shows(tmp_path, capsys):
    before = state()
    with console(), RunLogFile(whole_process=True) as log_file:
        log_file.open(tmp_path)
        say()
        warnings.simplefilter("always")
        warnings.warn("watch out", UserWarning, stacklevel=1)
    assert state() == before
    shown = capsys.readouterr().err.splitlines()
    assert shown == [
        "info of gptpl.somewhere",
        "warning: warning of gptpl.somewhere",
        "warning: warning of lightning.pytorch.somewhere",
        "info of their_package.callbacks",
        "warning: warning of their_package.callbacks",
        "warning: watch out",
    ]
    written = lines(tmp_path)
    assert len(written) == len(shown)
    for line, text in zip(written, shown, strict=True):
        level, message = ("WARNING", text[9:]) if text.startswith("warning: ") else ("INFO", text)
        assert line.startswith(level)
        assert message in line


def test_other_processes_have_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with RunLogFile() as log_file:
        log_file.open(tmp_path)
        OURS.info("unheard")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "folder"])
def test_a_name_that_is_no_file_is_refused(tmp_path, kind):
    run, outside = tmp_path / "run", tmp_path / "outside"
    run.mkdir()
    if kind == "pipe":
        os.mkfifo(run / "train.log")
    elif kind == "folder":
        (run / "train.log").mkdir()
    else:
        (run / "train.log").symlink_to(outside)
        if kind == "link":
            outside.write_text("precious")
    with (
        pytest.raises(InputError, match=r"train\.log must be a plain file, not a link"),
        RunLogFile() as log_file,
    ):
        log_file.open(run)
    assert outside.exists() == (kind == "link")
    if kind == "link":
        assert outside.read_text() == "precious"
