"""Progress over the whole training, in optimizer steps: a bar in a terminal or notebook, else log lines."""

import io
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
from tqdm import tqdm
from tqdm.contrib import DummyTqdmFile

from gptpl.callbacks.after_step import epochs_done, language_module, metric
from gptpl.errors import InputError
from gptpl.text import duration_text

log = logging.getLogger(__name__)

REDRAW_SECONDS = 0.2

TRAINED = {
    "train/loss": " loss {:.2f}",
    "train/perplexity": " ppl {:,.0f}",
    "train/tokens_per_second": " tok/s {:,.0f}",
}
"""What each metric is called beside the bar, and how its value is written."""
EVALUATED = {
    "eval/train_loss": ", train loss {:.2f}",
    "val/loss": ", val loss {:.2f}",
    "val/perplexity": " (val perplexity {:,.0f})",
}


class ProgressBar(LightningProgressBar):
    """One bar for the whole training: optimizer steps, epoch, loss, perplexity, tokens per second, time left.

    Where there is neither a terminal nor a notebook, a line is logged every `log_every_seconds` instead.
    Every evaluation of a training run is one log line. The time left follows from the pace of all steps of
    this session but the first, evaluations and samples included; a resumed run starts at its step.

    `trainer.validate`, `test` and `predict` show their batches in the same way.

    Lightning's own bars count batches, start again with every epoch and tear where something is logged.
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
        self._started = (0, 0.0)  # the step that this session starts from, and when
        self._first: tuple[int, float] | None = None  # its first step, and when it was done
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

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._open(trainer)
        self._started, self._first = (trainer.global_step, time.monotonic()), None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Show the step before: when it ended, the module had not logged its loss yet."""
        step = trainer.global_step
        if self._first is None and step > self._started[0]:
            self._first = step, time.monotonic()
        if self._display is not None and self._display.due():
            total = language_module(pl_module).total_steps
            left = seconds_left(self._first, step, total=total, now=time.monotonic())
            self._show_step(trainer, "" if left is None else f" time left {duration_text(left)}")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the last step, and how long it all took."""
        self._show_step(trainer, f" took {duration_text(time.monotonic() - self._started[1])}")
        self._close()

    def _show_step(self, trainer: L.Trainer, end: str) -> None:
        if self._display is not None:
            metrics = {name: metric(trainer, name) for name in TRAINED}
            metrics["train/tokens_per_second"] = language_module(trainer.lightning_module).tokens_per_second
            epoch = max(math.ceil(epochs_done(trainer)), 1)
            self._display.show(trainer.global_step, f"(epoch {epoch}){words(metrics, TRAINED)}{end}")

    # --- evaluation, in a training run or alone -------------------------------------------------------

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count this evaluation's batches; the one before the first step belongs to the training."""
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
        if trainer.state.fn != "fit":
            if self._display.due() or self._evaluated == self._to_evaluate:
                self._display.show(self._evaluated, "")
        elif self._display.due():
            total = "?" if self._to_evaluate is None else self._to_evaluate
            self._show_step(trainer, f" evaluating {self._evaluated}/{total}")

    on_test_batch_end = on_validation_batch_end
    on_predict_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log what an evaluation in a training run found."""
        if trainer.state.fn != "fit":
            self._close()
        elif self.is_enabled:
            text = words({name: metric(trainer, name) for name in EVALUATED}, EVALUATED)
            log.info("step %d: %s", trainer.global_step, text.removeprefix(", "))

    def _start_evaluation(self, trainer: L.Trainer, batches: Sequence[int | float]) -> None:
        self._evaluated, total = 0, sum(batches)
        self._to_evaluate = None if math.isinf(total) else int(total)
        self._open(trainer)

    # --- the display's life ---------------------------------------------------------------------------

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Give the terminal back before the error is reported."""
        self._close()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the terminal back in any case."""
        self._close()

    def _open(self, trainer: L.Trainer) -> None:
        if not self.is_enabled or self._display is not None:
            return
        if trainer.state.fn == "fit":
            total = language_module(trainer.lightning_module).total_steps
            self._display = Display("step", trainer.global_step, total, self.log_every_seconds)
        else:
            self._display = Display("batch", 0, self._to_evaluate, self.log_every_seconds)

    def _close(self) -> None:
        if self._display is not None:
            self._display.close()
            self._display = None


def words(metrics: Mapping[str, float | None], forms: Mapping[str, str]) -> str:
    """The metrics that there are in their forms: " loss 5.12 ppl 167 tok/s 310"."""
    found = {name: metrics.get(name) for name in forms}
    return "".join(forms[name].format(value) for name, value in found.items() if value is not None)


def seconds_left(first: tuple[int, float] | None, step: int, *, total: int, now: float) -> float | None:
    """Time from `step` to `total` at the mean pace since the session's first step, None before the second.

    That first one, `first` with the moment of its end, may compile the model and fill caches.
    """
    if first is None or step <= first[0]:
        return None
    return max(total - step, 0) * (now - first[1]) / (step - first[0])


# --- where it is shown --------------------------------------------------------------------------------


class Display:
    """Shows how far a count has come: a bar in a notebook or a terminal, else a log line now and then.

    A notebook's file keeps the last state alone. A bar in a terminal is redrawn in place on standard error;
    while it is open, `sys.stderr` and the log handlers that write to the terminal write above it.
    """

    def __init__(self, unit: str, initial: int, total: int | None, log_every_seconds: float) -> None:
        self._unit, self._total = unit, total
        self._shown_at, self._every_seconds = -math.inf, REDRAW_SECONDS
        self._stack = ExitStack()
        self._bar: tqdm[Any] | None = None
        form = unit + " {n_fmt}/{total_fmt} |{bar}| {desc}"
        options: dict[str, Any]
        if _in_notebook():
            from IPython.display import display  # type: ignore[import-not-found, unused-ignore]  # a notebook's kernel has it

            handle = display({"text/plain": ""}, raw=True, display_id=True)  # type: ignore[no-untyped-call, unused-ignore]
            sink = _Sink(lambda line: handle.update({"text/plain": line}, raw=True))
            # Nothing by itself, all that it is asked for, whatever TQDM_DISABLE says.
            options = {"file": sink, "ascii": False, "delay": math.inf, "disable": False}
            form = form.replace("{bar}", "{bar:24}")
        elif _is_terminal(sys.stderr):
            options = {"file": sys.stderr, "dynamic_ncols": True}
            for handler in _terminal_handlers():
                self._stack.callback(handler.setStream, handler.stream)
                handler.setStream(DummyTqdmFile(handler.stream))
            self._stack.callback(setattr, sys, "stderr", sys.stderr)
            sys.stderr = DummyTqdmFile(sys.stderr)
        else:
            self._shown_at, self._every_seconds = time.monotonic(), log_every_seconds
            return
        self._bar = tqdm(total=total, initial=initial, bar_format=form, **options)

    def due(self) -> bool:
        """Whether it is time to `show` again; asked first, it saves the work of preparing the text."""
        return time.monotonic() - self._shown_at >= self._every_seconds

    def show(self, done: int, text: str) -> None:
        """Show the count and the text beside it, due or not."""
        if self._bar is None:
            # Not by way of tqdm, which would hold its lock while it waits for a log handler's.
            log.info("%s %d/%s %s", self._unit, done, "?" if self._total is None else self._total, text)
        else:
            self._bar.n = done
            self._bar.set_description_str(text, refresh=False)
            self._bar.refresh()
        self._shown_at = time.monotonic()

    def close(self) -> None:
        """Leave the last state standing and give the terminal back."""
        if self._bar is not None:
            self._bar.close()
        self._stack.close()


class _Sink(io.StringIO):
    """What takes the place of a terminal for tqdm: the lines that it draws go elsewhere."""

    def __init__(self, send: Callable[[str], object]) -> None:
        super().__init__()
        self._send = send

    def write(self, text: str) -> int:
        if line := text.strip():
            self._send(line)
        return len(text)


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
    return [
        handler
        for logger in (logging.root, *logging.root.manager.loggerDict.values())
        for handler in getattr(logger, "handlers", ())  # a placeholder has none
        if isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stdout, sys.stderr)
    ]
