"""The progress bar on a terminal, its lines elsewhere, and the arithmetic behind both."""

import fcntl
import io
import logging
import multiprocessing
import os
import pty
import re
import struct
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
from tqdm import tqdm

from gptpl.callbacks.progress import EVALUATED, TRAINED, Display, ProgressBar, seconds_left, words
from gptpl.cli.console import console
from gptpl.errors import InputError

Logged = Callable[[], list[str]]


class Terminal(io.StringIO):
    """Keeps what was written and can tell what its user would see."""

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """The lines left standing; a carriage return lets later text cover earlier text."""
        lines = []
        for line in self.getvalue().split("\n"):
            cells: list[str] = []
            for part in line.split("\r"):
                cells[: len(part)] = part
            lines.append("".join(cells).rstrip())
        return lines


def open_bars() -> list[Any]:
    return list(getattr(tqdm, "_instances", []))


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """A terminal that shows both outputs and what the root logger gets, as in the commands."""
    screen = Terminal()
    # pytest puts its own sys.stderr in place again before the test; the display's view of it can be kept.
    streams = SimpleNamespace(stdout=screen, stderr=screen, modules={})
    monkeypatch.setattr("gptpl.callbacks.progress.sys", streams)
    monkeypatch.setattr("gptpl.callbacks.progress.REDRAW_SECONDS", 0.0)
    handler = logging.StreamHandler(screen)
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    handler.addFilter(lambda record: record.name.startswith(("gptpl", "test")))
    level = logging.root.level
    logging.root.addHandler(handler)
    logging.root.setLevel(logging.INFO)
    yield screen
    logging.root.removeHandler(handler)
    logging.root.setLevel(level)
    assert handler.stream is screen, "the handler was not given back its stream"
    assert not open_bars(), "a bar was left open"


def test_one_bar_over_the_whole_training(training: Any, terminal: Terminal) -> None:
    training.fit(ProgressBar())
    bars = [line for line in terminal.screen() if line.startswith("step")]
    assert len(bars) == 1
    assert re.fullmatch(r"step 8/8 \|#+\| \(epoch 2\) loss \d\.\d\d ppl \d+ tok/s 310 took \d\.\d s", bars[0])
    drawn = re.findall(r"step (\d)/8", terminal.getvalue())
    assert drawn == sorted(drawn), "the bar went back"
    assert set(drawn) == set("012345678")


def test_bar_shows_the_loss_of_its_own_step_and_the_time_left(training: Any, terminal: Terminal) -> None:
    module = training.module()
    training.fit(ProgressBar(), module=module)
    shown = dict(re.findall(r"step (\d)/8[^\r]*loss (\d\.\d\d)", terminal.getvalue()))
    assert shown == {str(step): f"{loss:.2f}" for step, loss in enumerate(module.train_losses, start=1)}
    left = re.findall(r"step (\d)/8[^\r]* time left 0\.\d s", terminal.getvalue())
    assert list(dict.fromkeys(left)) == list("2345678"), "the first step gives no pace"


def test_evaluations_are_lines_above_the_bar(training: Any, terminal: Terminal) -> None:
    training.fit(ProgressBar())
    lines = [line for line in terminal.screen() if "val loss" in line]
    assert [line.split(":")[1] for line in lines] == [f" step {step}" for step in (0, 2, 4, 6, 8)]
    for line in lines:
        assert re.fullmatch(
            r"gptpl\.callbacks\.progress: step \d: "
            r"train loss \d\.\d\d, val loss \d\.\d\d \(val perplexity \d+\)",
            line,
        )
    assert re.findall(r"step 2/8[^\r]* evaluating (\d/\d)", terminal.getvalue())[:2] == ["1/2", "2/2"]


class RealTerminal:
    """A terminal of 90 columns, as the system has it, and the lines that stand on its screen.

    An emulation of what bars need: carriage return, line feed, cursor up, and a line that is full wraps only
    when one more character comes.
    """

    columns = 90

    def __init__(self) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, self.columns, 0, 0))
        self.stream = os.fdopen(slave, "w", buffering=1, encoding="utf-8")
        self._output = bytearray()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        with suppress(OSError):  # EIO: the other end is closed
            while data := os.read(self._master, 4096):
                self._output += data

    def screen(self) -> list[str]:
        self.stream.close()
        self._reader.join()
        os.close(self._master)
        cells: dict[int, dict[int, str]] = {}
        row = column = 0
        for part in re.findall(r"\x1b\[\w|.|\n", self._output.decode(), re.DOTALL | re.ASCII):
            if part in ("\r", "\n"):
                row, column = (row, 0) if part == "\r" else (row + 1, column)
            elif part == "\x1b[A":
                row -= 1
            else:
                assert len(part) == 1, f"{part!r} is not emulated"
                row, column = (row + 1, 0) if column == self.columns else (row, column)
                cells.setdefault(row, {})[column] = part
                column += 1
        lines = [cells.get(row, {}) for row in range(max(cells) + 1)]
        return ["".join(line.get(c, " ") for c in range(self.columns)).rstrip() for line in lines]


def test_no_line_of_a_real_terminal_mixes_bar_and_log(
    training: Any, logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Warn(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            logging.getLogger("test").warning("warned at %d", trainer.global_step)

    terminal = RealTerminal()
    monkeypatch.setattr("gptpl.callbacks.progress.REDRAW_SECONDS", 0.0)
    monkeypatch.setattr(sys, "stderr", terminal.stream)
    # As dill's logger has it, which torch imports where it is installed.
    monkeypatch.setattr(logging.getLogger("other"), "handlers", [logging.lastResort])
    with console():
        training.fit(ProgressBar(), Warn())
    assert sys.stderr is terminal.stream, "the bar did not give the stream back"
    monkeypatch.undo()
    *lines, bar = terminal.screen()
    assert len(logged()) == 5
    assert [line for line in lines if "warned" not in line] == logged()
    assert [line for line in lines if "warned" in line] == [
        f"warning: warned at {step}" for step in range(1, 9)
    ]
    assert re.fullmatch(r"step 8/8 \|█+\| \(epoch 2\) loss \d\.\d\d ppl \d+ tok/s 310 took \d\.\d s", bar)


class Chatty(L.Callback):
    """Logs and prints in the middle of training."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        logging.getLogger("test").info("logged at %d", trainer.global_step)
        pl_module.print("printed", "at", trainer.global_step, sep="-", end="!\n")


def test_logging_and_printing_do_not_tear_the_bar(training: Any, terminal: Terminal) -> None:
    training.fit(ProgressBar(), Chatty())
    lines = terminal.screen()
    for step in range(1, 9):
        assert f"test: logged at {step}" in lines
        assert f"printed-at-{step}!" in lines


def test_resumed_run_starts_at_its_step(training: Any, terminal: Terminal, tmp_path: Path) -> None:
    training.fit(max_steps=4).save_checkpoint(tmp_path / "at_4.ckpt")
    training.fit(ProgressBar(), resume=tmp_path / "at_4.ckpt")
    drawn = re.findall(r"step (\d)/8", terminal.getvalue())
    assert set(drawn) == set("45678")


def test_error_gives_the_terminal_back(training: Any, terminal: Terminal) -> None:
    class Fail(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        training.fit(ProgressBar(), Fail())
    assert not open_bars()


# --- in a notebook ------------------------------------------------------------------------------------


def test_a_notebook_shows_one_line_that_is_replaced(
    training: Any, logged: Logged, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[list[str]] = []

    class Handle:
        def update(self, data: dict[str, str], *, raw: bool) -> None:
            assert raw
            shown[-1].append(data["text/plain"])

    def display(data: dict[str, str], *, raw: bool, display_id: bool) -> Handle:
        assert raw
        assert display_id
        shown.append([])
        return Handle()

    kernel = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel="one"), display=display)
    monkeypatch.setitem(sys.modules, "IPython", kernel)
    monkeypatch.setitem(sys.modules, "IPython.display", kernel)
    monkeypatch.setattr("gptpl.callbacks.progress.REDRAW_SECONDS", 0.0)
    training.fit(ProgressBar())
    (lines,) = shown
    assert re.fullmatch(
        r"step 8/8 \|█{24}\| \(epoch 2\) loss \d\.\d\d ppl \d+ tok/s 310 took \d\.\d s", lines[-1]
    )
    drawn = [line.split("/")[0] for line in lines]
    assert drawn == sorted(drawn)
    assert not re.search(r"step|\r", "".join(capsys.readouterr()))
    assert len(logged()) == 5, "lines instead of a bar"


# --- without a terminal -------------------------------------------------------------------------------


def test_lines_without_a_terminal(
    training: Any, logged: Logged, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(10**6))
    monkeypatch.setattr("gptpl.callbacks.progress.time.monotonic", lambda: float(next(now)))
    training.fit(ProgressBar(log_every_seconds=5))
    text = "".join(capsys.readouterr())
    assert not re.search(r"[\r\x1b\b]|step \d/", text)
    lines = logged()
    assert sum("val loss" in line for line in lines) == 5
    steps = [
        line for line in lines if re.match(r"step \d/8 \(epoch [12]\) loss \d\.\d\d ppl \d+ tok/s 310", line)
    ]
    assert 2 < len(steps) < 8
    assert any(re.search(r" time left \d+\.\d s$", line) for line in steps)
    assert steps[-1].startswith("step 8/8 ")
    assert " took " in steps[-1]


def test_short_run_has_no_more_lines_than_evaluations_and_its_end(training: Any, logged: Logged) -> None:
    training.fit(ProgressBar())
    assert [line.split(" ")[1] for line in logged()] == ["0:", "2:", "4:", "6:", "8:", "8/8"]


def test_other_processes_are_silent(training: Any, logged: Logged, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(L.Trainer, "is_global_zero", property(lambda self: False))
    training.fit(ProgressBar())
    assert logged() == []


def test_lines_come_when_they_are_due(monkeypatch: pytest.MonkeyPatch, logged: Logged) -> None:
    now = 100.0
    monkeypatch.setattr("gptpl.callbacks.progress.time.monotonic", lambda: now)
    lines = Display(0, 9, 15)
    assert not lines.due()
    now = 115.0
    assert lines.due()
    lines.show(3, "words")
    assert not lines.due()
    assert logged() == ["step 3/9 words"]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
def test_another_thread_may_log_while_a_line_is_logged(tmp_path: Path) -> None:
    """A command's log handler takes its own lock, then tqdm's: a line must not take them the other way."""

    def log_from_two_threads() -> None:
        sys.stderr = (tmp_path / "err").open("w")
        finished = threading.Event()

        def chatter() -> None:
            while not finished.is_set():
                logging.getLogger("mine").info("chatter")

        with console():
            threading.Thread(target=chatter, daemon=True).start()
            display = Display(0, 10_000, 1)
            for step in range(2000):
                display.show(step, "words")
            finished.set()
        sys.stderr.flush()

    process = multiprocessing.get_context("fork").Process(target=log_from_two_threads, daemon=True)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert (tmp_path / "err").read_text().count("step ") == 2000


def test_bar_lets_every_logger_of_the_terminal_write_above_it(terminal: Terminal) -> None:
    own = logging.getLogger("test.own")
    own.propagate = False
    handler = logging.StreamHandler(terminal)
    own.addHandler(handler)
    try:
        bar = Display(0, 10, 15)
        bar.show(1, "working")
        own.warning("above")
        bar.show(2, "working")
        bar.close()
    finally:
        own.removeHandler(handler)
    assert handler.stream is terminal
    assert [line.split(" ")[0] for line in terminal.screen()] == ["above", "step", ""]


def test_terminal_without_a_width_gets_lines(
    monkeypatch: pytest.MonkeyPatch, terminal: Terminal, logged: Logged
) -> None:
    monkeypatch.setattr(terminal, "fileno", lambda: 2)
    for columns, bars in ((0, 0), (80, 1)):
        size = os.terminal_size((columns, 24))
        monkeypatch.setattr("gptpl.callbacks.progress.os.get_terminal_size", lambda fd, size=size: size)
        display = Display(0, 1, 1)
        display.show(1, "words")
        display.close()
        assert logged() == ["step 1/1 words"]
        assert terminal.getvalue().count("step 1/1 |") == 2 * bars  # as it was shown, and left standing


# --- words and numbers --------------------------------------------------------------------------------


def test_words_of_a_step_and_of_an_evaluation() -> None:
    metrics = {"train/loss": 5.1199, "train/perplexity": 167.4, "train/tokens_per_second": 310.2}
    assert words(metrics, TRAINED) == " loss 5.12 ppl 167 tok/s 310"
    assert words({"train/loss": None}, TRAINED) == ""
    odd = {"train/loss": float("nan"), "train/perplexity": float("inf")}
    assert words(odd, TRAINED) == " loss nan ppl inf"
    full = {"eval/train_loss": 4.069, "val/loss": 6.226, "val/perplexity": 505.7}
    assert words(full, EVALUATED) == ", train loss 4.07, val loss 6.23 (val perplexity 506)"
    assert words({"eval/train_loss": None, "val/loss": 6.226}, EVALUATED) == ", val loss 6.23"


def test_the_pace_leaves_out_the_first_step() -> None:
    assert seconds_left(None, 10, total=20, now=0.0) is None
    first = (11, 60.0)  # the first step compiles
    assert seconds_left(first, 11, total=20, now=60.0) is None
    assert seconds_left(first, 13, total=20, now=64.0) == pytest.approx(7 * 2.0)
    assert seconds_left(first, 25, total=20, now=64.0) == 0.0


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_pause_between_lines_must_be_positive(seconds: float) -> None:
    with pytest.raises(InputError, match=f"log_every_seconds must be positive, got {seconds}"):
        ProgressBar(log_every_seconds=seconds)
