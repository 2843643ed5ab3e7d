"""Progress over the whole training, in optimizer steps: a bar in a terminal or notebook, else log lines."""

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TextIO

import lightning as L
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from tqdm import tqdm
from tqdm.contrib import DummyTqdmFile

from gptpl.callbacks.readings import epochs_done, language_module, metric
from gptpl.errors import InputError
from gptpl.text import duration_text

log = logging.getLogger(__name__)

REDRAW_SECONDS = 0.2

LABELS = {
    "train/loss": ("loss", ".2f"),
    "train/perplexity": ("ppl", ",.0f"),
    "train/tokens_per_second": ("tok/s", ",.0f"),
}
"""What each metric is called beside the bar, and how its value is written."""


class ProgressBar(LightningProgressBar):
    """One bar for the whole training: optimizer steps, epoch, loss, perplexity, tokens per second, time left.

    Where there is neither a terminal nor a notebook, a line is logged every `log_every_seconds` instead.
    Every evaluation of a training run is one log line. The time left follows from the pace of all steps of
    this session but the first, evaluations and samples included; a resumed run starts at its step.

    `trainer.validate`, `test` and `predict` show their batches in the same way.

    Args:
        log_every_seconds: above 0.
    """

    def __init__(self, *, log_every_seconds: float = 15.0) -> None:
        super().__init__()
        if not log_every_seconds > 0:
            raise InputError(
                f"log_every_seconds={log_every_seconds!r} of the progress bar: give a number above 0"
            )
        self.log_every_seconds = log_every_seconds
        self.is_enabled = True
        self._display: Display | None = None
        self._pace: Pace | None = None
        self._evaluated = 0
        self._to_evaluate: int | None = None

    def disable(self) -> None:
        """Show nothing; Lightning calls this on all processes but the first."""
        self.is_enabled = False

    def enable(self) -> None:
        """Show again."""
        self.is_enabled = True

    def print(self, *args: Any, sep: str = " ", end: str = "\n", **kwargs: Any) -> None:
        """Print without tearing the bar; `LightningModule.print` comes here."""
        if self._display is None or kwargs.get("file") is not None:
            super().print(*args, sep=sep, end=end, **kwargs)
        else:
            tqdm.write(sep.join(map(str, args)), file=sys.stdout, end=end)

    # --- training -------------------------------------------------------------------------------------

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the display: the evaluation before the first step belongs to the training."""
        self._open("step", total=language_module(pl_module).total_steps, initial=trainer.global_step)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._open("step", total=language_module(pl_module).total_steps, initial=trainer.global_step)
        self._pace = Pace(trainer.global_step)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Show the step before: when it ended, the module had not logged its loss yet."""
        step, total = trainer.global_step, language_module(pl_module).total_steps
        if self._display is None or self._pace is None:
            return
        self._pace.reach(step)
        if self._display.due():
            left = self._pace.seconds_left(step, total=total)
            self._display.show(step, _training_text(trainer, pl_module, _labelled("time left", left)))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the last step, and how long it all took."""
        if self._display is not None and self._pace is not None:
            took = _labelled("took", self._pace.seconds_taken())
            self._display.show(trainer.global_step, _training_text(trainer, pl_module, took))
        self._close()

    # --- evaluation, in a training run or alone -------------------------------------------------------

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count this evaluation's batches."""
        sanity = trainer.sanity_checking
        self._start_evaluation(trainer, trainer.num_sanity_val_batches if sanity else trainer.num_val_batches)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count the test's batches."""
        self._start_evaluation(trainer, trainer.num_test_batches)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count the prediction's batches."""
        self._start_evaluation(trainer, trainer.num_predict_batches)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Count one batch."""
        self._evaluated += 1
        if self._display is None:
            return
        if _fitting(trainer):
            if self._display.due():
                total = "?" if self._to_evaluate is None else self._to_evaluate
                text = _training_text(trainer, pl_module, f"evaluating {self._evaluated}/{total}")
                self._display.show(trainer.global_step, text)
        elif self._display.due() or self._evaluated == self._to_evaluate:
            self._display.show(self._evaluated, "")

    on_test_batch_end = on_validation_batch_end
    on_predict_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log what an evaluation in a training run found."""
        if not _fitting(trainer):
            self._close()
        elif self.is_enabled:
            text = evaluation_text(
                train_loss=metric(trainer, "eval/train_loss"),
                val_loss=metric(trainer, "val/loss"),
                val_perplexity=metric(trainer, "val/perplexity"),
            )
            log.info("step %d: %s", trainer.global_step, text)

    # --- the display's life ---------------------------------------------------------------------------

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Give the terminal back before the error is reported."""
        self._close()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the terminal back in any case."""
        self._close()

    def _open(self, unit: str, *, total: int | None, initial: int = 0) -> None:
        if self.is_enabled and self._display is None:
            self._display = open_display(
                unit, total=total, initial=initial, log_every_seconds=self.log_every_seconds
            )

    def _close(self) -> None:
        if self._display is not None:
            self._display.close()
            self._display = None

    def _start_evaluation(self, trainer: L.Trainer, batches: Sequence[int | float]) -> None:
        self._evaluated = 0
        total = sum(batches)
        self._to_evaluate = None if math.isinf(total) else int(total)
        if not _fitting(trainer):
            self._open("batch", total=self._to_evaluate)


class Pace:
    """Times the steps of one session of training, which starts when this is made.

    The first step is left out of the pace: it may compile the model and fill caches. Whatever happens between
    the other steps, such as evaluations, counts.

    Args:
        step: optimizer steps done before the session.
        clock: seconds from any fixed moment.
    """

    def __init__(self, step: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started_at = clock()
        self._session_start = step
        self._first: tuple[int, float] | None = None  # the first step of the session, and when it was done

    def reach(self, step: int) -> None:
        """Tell that `step` is done; to be called at every step."""
        if self._first is None and step > self._session_start:
            self._first = (step, self._clock())

    def seconds_left(self, step: int, *, total: int) -> float | None:
        """Time from `step` to `total` at the mean pace so far; None while the pace is not known."""
        if self._first is None or step <= self._first[0]:
            return None
        first_step, first_at = self._first
        return max(total - step, 0) * (self._clock() - first_at) / (step - first_step)

    def seconds_taken(self) -> float:
        """Time since the session started."""
        return self._clock() - self._started_at


# --- where it is shown --------------------------------------------------------------------------------


class Display:
    """Shows how far a count has come: here by a log line now and then, for files and pipes."""

    def __init__(self, unit: str, *, total: int | None, every_seconds: float) -> None:
        self._unit = unit
        self._total = total
        self._every_seconds = every_seconds
        self._shown_at = time.monotonic()

    def due(self) -> bool:
        """Whether it is time to `show` again; asked first, it saves the work of preparing the text."""
        return time.monotonic() - self._shown_at >= self._every_seconds

    def show(self, done: int, text: str) -> None:
        """Show the count and the text beside it, due or not."""
        self._draw(done, text)
        self._shown_at = time.monotonic()

    def close(self) -> None:
        """Leave the last state standing and give the terminal back."""

    def _draw(self, done: int, text: str) -> None:
        log.info("%s %d/%s %s", self._unit, done, "?" if self._total is None else self._total, text)


class TerminalBar(Display):
    """One bar, redrawn in place on standard error.

    While it is open, `sys.stderr` and the log handlers that write to the terminal write above it.
    """

    def __init__(self, unit: str, *, total: int | None, initial: int) -> None:
        super().__init__(unit, total=total, every_seconds=REDRAW_SECONDS)
        self._bar = tqdm(
            total=total,
            initial=initial,
            file=sys.stderr,
            bar_format=unit + " {n_fmt}/{total_fmt} |{bar}| {desc}",
            dynamic_ncols=True,
        )
        self._shown_at = -math.inf
        self._restore = ExitStack()
        for handler in _terminal_handlers():
            self._restore.callback(handler.setStream, handler.stream)
            handler.setStream(DummyTqdmFile(handler.stream))
        self._restore.callback(setattr, sys, "stderr", sys.stderr)
        sys.stderr = DummyTqdmFile(sys.stderr)

    def close(self) -> None:
        """End the bar's line and let the log handlers write as before."""
        self._bar.close()
        self._restore.close()

    def _draw(self, done: int, text: str) -> None:
        self._bar.n = done
        self._bar.set_description_str(text, refresh=False)
        self._bar.refresh()


class NotebookBar(Display):
    """One line of a notebook's output, replaced in place: its file keeps the last state alone."""

    def __init__(self, unit: str, *, total: int | None) -> None:
        from IPython.display import display  # type: ignore[import-not-found, unused-ignore]  # a notebook's kernel has it

        super().__init__(unit, total=total, every_seconds=REDRAW_SECONDS)
        self._shown_at = -math.inf
        self._handle = display({"text/plain": ""}, raw=True, display_id=True)  # type: ignore[no-untyped-call, unused-ignore]

    def _draw(self, done: int, text: str) -> None:
        bar_format = self._unit + " {n_fmt}/{total_fmt} |{bar:24}| {desc}"
        total = math.inf if self._total is None else self._total  # which tqdm writes as "?"
        line = tqdm.format_meter(done, total, 0.0, prefix=text, bar_format=bar_format)
        self._handle.update({"text/plain": line}, raw=True)


def open_display(unit: str, *, total: int | None, initial: int = 0, log_every_seconds: float) -> Display:
    """The display that suits the process: a notebook's kernel, a terminal at standard error, or neither.

    Args:
        unit: what is counted, such as "step".
        total: how far the count goes, None where it is not known.
        initial: where the count starts.
        log_every_seconds: pause between log lines, where there is no bar.
    """
    if _in_notebook():
        return NotebookBar(unit, total=total)
    if _is_terminal(sys.stderr):
        return TerminalBar(unit, total=total, initial=initial)
    return Display(unit, total=total, every_seconds=log_every_seconds)


def _in_notebook() -> bool:
    """Whether this process is a notebook's kernel, and not IPython in a terminal."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None


def _is_terminal(stream: TextIO) -> bool:
    """Whether a bar can be drawn: some terminals, such as those of build servers, have no width."""
    if not stream.isatty():
        return False
    try:
        return os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError):  # no real file behind it, as in some development environments
        return True


def _terminal_handlers() -> list["logging.StreamHandler[Any]"]:
    """Handlers of any logger that write to this process's standard output or error."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    return [
        handler
        for logger in loggers
        if isinstance(logger, logging.Logger)
        for handler in logger.handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stdout, sys.stderr)
    ]


# --- its words and numbers ----------------------------------------------------------------------------


def training_text(*, epoch: int, metrics: Mapping[str, float | None], end: str) -> str:
    """Such as "(epoch 4) loss 5.12 ppl 167 tok/s 310 time left 1:20"; metrics that are None are left out."""
    parts = [f"(epoch {epoch})"]
    for name, (label, form) in LABELS.items():
        value = metrics.get(name)
        if value is not None:
            parts.append(f"{label} {value:{form}}")
    return " ".join([*parts, end]).rstrip()


def evaluation_text(*, train_loss: float | None, val_loss: float | None, val_perplexity: float | None) -> str:
    """Such as "train loss 4.07, val loss 6.23 (val perplexity 506)"; losses that are None are left out."""
    parts = []
    if train_loss is not None:
        parts.append(f"train loss {train_loss:.2f}")
    if val_loss is not None:
        perplexity = "" if val_perplexity is None else f" (val perplexity {val_perplexity:,.0f})"
        parts.append(f"val loss {val_loss:.2f}{perplexity}")
    return ", ".join(parts)


def _fitting(trainer: L.Trainer) -> bool:
    return trainer.state.fn == TrainerFn.FITTING


def _training_text(trainer: L.Trainer, pl_module: L.LightningModule, end: str) -> str:
    metrics = {name: metric(trainer, name) for name in LABELS}
    metrics["train/tokens_per_second"] = language_module(pl_module).tokens_per_second
    return training_text(epoch=max(math.ceil(epochs_done(trainer)), 1), metrics=metrics, end=end)


def _labelled(label: str, seconds: float | None) -> str:
    return "" if seconds is None else f"{label} {duration_text(seconds)}"
