"""The progress bar on a terminal, its lines elsewhere, and the arithmetic behind both."""

import io
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
from tqdm import tqdm

from gptpl.callbacks.pace import Pace
from gptpl.callbacks.progress import ProgressBar
from gptpl.callbacks.progress_display import LogLines, TerminalBar, open_display
from gptpl.callbacks.progress_text import clock_text, evaluation_text, training_text
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
    streams = SimpleNamespace(stdout=screen, stderr=screen)
    monkeypatch.setattr("gptpl.callbacks.progress_display.sys", streams)
    monkeypatch.setattr("gptpl.callbacks.progress_display.REDRAW_SECONDS", 0.0)
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
    assert re.fullmatch(r"step 8/8 \|#+\| \(epoch 2\) loss \d\.\d\d ppl \d+ tok/s 310 took \d:\d\d", bars[0])
    drawn = re.findall(r"step (\d)/8", terminal.getvalue())
    assert drawn == sorted(drawn), "the bar went back"
    assert set(drawn) == set("012345678")


def test_bar_shows_the_loss_of_its_own_step_and_the_time_left(training: Any, terminal: Terminal) -> None:
    module = training.module()
    training.fit(ProgressBar(), module=module)
    shown = dict(re.findall(r"step (\d)/8[^\r]*loss (\d\.\d\d)", terminal.getvalue()))
    assert shown == {str(step): f"{loss:.2f}" for step, loss in enumerate(module.train_losses, start=1)}
    left = re.findall(r"step (\d)/8[^\r]* time left 0:00", terminal.getvalue())
    assert list(dict.fromkeys(left)) == list("234567"), "the first step gives no pace"


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


@pytest.mark.parametrize("on_terminal", [True, False])
def test_validate_test_and_predict_alone(
    training: Any, request: pytest.FixtureRequest, logged: Logged, on_terminal: bool
) -> None:
    screen = request.getfixturevalue("terminal") if on_terminal else None
    module, bar = training.module(), ProgressBar()
    trainer = training.trainer(bar)
    trainer.validate(module, [training.loader(1, 1), training.loader(2, 2)], verbose=False)
    trainer.test(module, training.loader(4, 2), verbose=False)
    trainer.predict(module, training.loader(5, 2))
    if screen is not None:
        assert [line.split(" |")[0] for line in screen.screen() if "batch" in line] == [
            "batch 3/3",
            "batch 4/4",
            "batch 5/5",
        ]
    else:
        assert [line.strip() for line in logged()] == ["batch 3/3", "batch 4/4", "batch 5/5"]


# --- without a terminal -------------------------------------------------------------------------------


def test_lines_without_a_terminal(
    training: Any, logged: Logged, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(10**6))
    monkeypatch.setattr("gptpl.callbacks.progress_display.time.monotonic", lambda: float(next(now)))
    training.fit(ProgressBar(log_every_seconds=6))
    text = "".join(capsys.readouterr())
    assert not re.search(r"[\r\x1b\b]|step \d/", text)
    lines = logged()
    assert sum("val loss" in line for line in lines) == 5
    steps = [
        line for line in lines if re.match(r"step \d/8 \(epoch [12]\) loss \d\.\d\d ppl \d+ tok/s 310", line)
    ]
    assert 2 < len(steps) < 8
    assert any(re.search(r" time left \d+:\d\d$", line) for line in steps)
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
    monkeypatch.setattr("gptpl.callbacks.progress_display.time.monotonic", lambda: now)
    lines = LogLines("step", total=None, every_seconds=15)
    assert not lines.due()
    now = 115.0
    assert lines.due()
    lines.show(3, "words")
    assert not lines.due()
    assert logged() == ["step 3/? words"]


def test_bar_lets_every_logger_of_the_terminal_write_above_it(terminal: Terminal) -> None:
    own = logging.getLogger("test.own")
    own.propagate = False
    handler = logging.StreamHandler(terminal)
    own.addHandler(handler)
    try:
        bar = TerminalBar("step", total=10, initial=0)
        bar.show(1, "working")
        own.warning("above")
        bar.show(2, "working")
        bar.close()
    finally:
        own.removeHandler(handler)
    assert handler.stream is terminal
    assert [line.split(" ")[0] for line in terminal.screen()] == ["above", "step", ""]


def test_terminal_without_a_width_gets_lines(monkeypatch: pytest.MonkeyPatch, terminal: Terminal) -> None:
    monkeypatch.setattr(terminal, "fileno", lambda: 2)
    kinds: dict[int, type] = {0: LogLines, 80: TerminalBar}
    for columns, kind in kinds.items():
        size = os.terminal_size((columns, 24))
        monkeypatch.setattr(
            "gptpl.callbacks.progress_display.os.get_terminal_size", lambda fd, size=size: size
        )
        display = open_display("step", total=1, log_every_seconds=1)
        assert isinstance(display, kind)
        display.close()


# --- words and numbers --------------------------------------------------------------------------------


def test_training_text() -> None:
    metrics = {"train/loss": 5.1199, "train/perplexity": 167.4, "train/tokens_per_second": 310.2}
    text = training_text(epoch=4, metrics=metrics, end="time left 1:20")
    assert text == "(epoch 4) loss 5.12 ppl 167 tok/s 310 time left 1:20"
    assert training_text(epoch=1, metrics={"train/loss": None}, end="") == "(epoch 1)"
    odd = {"train/loss": float("nan"), "train/perplexity": float("inf")}
    assert training_text(epoch=1, metrics=odd, end="") == "(epoch 1) loss nan ppl inf"


def test_evaluation_text() -> None:
    full = evaluation_text(train_loss=4.069, val_loss=6.226, val_perplexity=505.7)
    assert full == "train loss 4.07, val loss 6.23 (val perplexity 506)"
    assert evaluation_text(train_loss=None, val_loss=6.226, val_perplexity=None) == "val loss 6.23"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (80, "1:20"), (3599, "59:59"), (3661, "1:01:01")]
)
def test_clock_text(seconds: float, text: str) -> None:
    assert clock_text(seconds) == text


def test_pace_leaves_out_the_first_step() -> None:
    now = 0.0
    pace = Pace(step=10, clock=lambda: now)
    pace.reach(10)
    assert pace.seconds_left(10, total=20) is None
    now = 60.0  # the first step compiles
    pace.reach(11)
    assert pace.seconds_left(11, total=20) is None
    now = 64.0
    pace.reach(13)
    assert pace.seconds_left(13, total=20) == pytest.approx(7 * 2.0)
    assert pace.seconds_left(25, total=20) == 0.0
    assert pace.seconds_taken() == 64.0


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_pause_between_lines_must_be_positive(seconds: float) -> None:
    with pytest.raises(InputError, match=f"log_every_seconds={seconds}"):
        ProgressBar(log_every_seconds=seconds)
