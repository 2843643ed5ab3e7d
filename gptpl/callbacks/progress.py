"""Progress over the whole training, in optimizer steps: a bar in a terminal or notebook, else log lines."""

import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, TextIO

import lightning as L
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar
from tqdm import tqdm
from tqdm.contrib import DummyTqdmFile

from gptpl.callbacks.after_step import AfterStep, epochs_done, language_module, metric
from gptpl.errors import InputError
from gptpl.text import duration_text

log = logging.getLogger(__name__)

REDRAW_SECONDS = 0.2
FORM = "step {n_fmt}/{total_fmt} |{bar}| {desc}"

TRAINED = {
    "train/loss": " loss {:.2f}",
    "train/perplexity": " ppl {:,.0f}",
    "train/tokens_per_second": " tok/s {:,.0f}",
}
"""How each metric is written next to the bar."""
EVALUATED = {
    "eval/train_loss": ", train loss {:.2f}",
    "val/loss": ", val loss {:.2f}",
    "val/perplexity": " (val perplexity {:,.0f})",
    "val/bits_per_byte": ", {:.3f} bits per byte",
}


class ProgressBar(AfterStep, LightningProgressBar):
    """One bar for the whole training: optimizer steps, epoch, loss, perplexity, tokens per second, time left.

    Without a terminal or notebook, a line is logged every `log_every_seconds` instead. Every evaluation is
    one log line. The time left follows from the pace of this session's steps but the first, evaluations and
    samples included; a resumed run starts at its step.

    Lightning's own bars count batches, restart with every epoch, and tear where something is logged.
    """

    def __init__(self, *, log_every_seconds: float = 15.0) -> None:
        super().__init__()
        if not log_every_seconds > 0:
            raise InputError(f"log_every_seconds must be positive, got {log_every_seconds!r}")
        self.log_every_seconds = log_every_seconds
        self.is_enabled = True
        self._display: Display | None = None
        self._started_seconds = 0.0
        self._first: tuple[int, float] | None = None  # the session's first step, and when it was done
        self._evaluated = 0

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

    # --- steps ----------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self._open(trainer)
        self._started_seconds, self._first = time.monotonic(), None

    def due(self, trainer: L.Trainer, pl_module: L.LightningModule) -> bool:
        """Whether it is time to draw again."""
        if self._first is None:
            self._first = trainer.global_step, time.monotonic()
        return self._display is not None and self._display.due()

    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the step."""
        total, now = language_module(pl_module).total_steps, time.monotonic()
        left = seconds_left(self._first, trainer.global_step, total=total, now=now)
        self._show_step(trainer, "" if left is None else f" time left {duration_text(left)}")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the last step, and how long training took."""
        self._show_step(trainer, f" took {duration_text(time.monotonic() - self._started_seconds)}")
        self._close()
        super().on_train_end(trainer, pl_module)

    def _show_step(self, trainer: L.Trainer, end: str) -> None:
        if self._display is not None:
            metrics = {name: metric(trainer, name) for name in TRAINED}
            metrics["train/tokens_per_second"] = language_module(trainer.lightning_module).tokens_per_second
            epoch = max(math.ceil(epochs_done(trainer)), 1)
            self._display.show(trainer.global_step, f"(epoch {epoch}){words(metrics, TRAINED)}{end}")

    # --- evaluations ----------------------------------------------------------------------------------

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count this evaluation's batches."""
        super().on_validation_start(trainer, pl_module)
        self._evaluated = 0
        if trainer.state.fn == "fit":
            self._open(trainer)  # the evaluation before the first step comes before training starts

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Count one batch."""
        self._evaluated += 1
        if self._display is not None and self._display.due():
            sanity = trainer.sanity_checking
            total = sum(trainer.num_sanity_val_batches if sanity else trainer.num_val_batches)
            of = "?" if math.isinf(total) else total
            self._show_step(trainer, f" evaluating {self._evaluated}/{of}")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the losses."""
        if trainer.state.fn == "fit" and self.is_enabled:
            names = [name for name in trainer.callback_metrics if name.startswith("val/loss/")]
            sources = {name: f"; {name.removeprefix('val/loss/')} {{:.2f}}" for name in names}
            forms = EVALUATED | sources
            text = words({name: metric(trainer, name) for name in forms}, forms)
            log.info("step %d: %s", trainer.global_step, text.removeprefix(", "))

    # --- the display ----------------------------------------------------------------------------------

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Release the terminal before the error is reported."""
        self._close()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Release the terminal in any case."""
        self._close()

    def _open(self, trainer: L.Trainer) -> None:
        if self.is_enabled and self._display is None:
            total = language_module(trainer.lightning_module).total_steps
            self._display = Display(trainer.global_step, total, self.log_every_seconds)

    def _close(self) -> None:
        if self._display is not None:
            self._display.close()
            self._display = None


def words(metrics: Mapping[str, float | None], forms: Mapping[str, str]) -> str:
    """The known metrics in their forms: " loss 5.12 ppl 167 tok/s 310"."""
    found = {name: metrics.get(name) for name in forms}
    return "".join(forms[name].format(value) for name, value in found.items() if value is not None)


def seconds_left(first: tuple[int, float] | None, step: int, *, total: int, now: float) -> float | None:
    """Time from `step` to `total` at the mean pace since the session's first step; None before the second.

    `first` is that step and the moment of its end: it may compile the model and fill caches.
    """
    if first is None or step <= first[0]:
        return None
    return max(total - step, 0) * (now - first[1]) / (step - first[0])


# --- where it is shown ----------------------------------------------------------------------------------


class Display:
    """A count of steps: a bar in a notebook or a terminal, else a log line now and then.

    In a notebook's file only the last state remains. A bar in a terminal is redrawn in place on standard
    error; while it is open, `sys.stderr` and the log handlers that write to the terminal write above it.
    """

    def __init__(self, initial: int, total: int, log_every_seconds: float) -> None:
        self._total, self._every_seconds, self._shown_at = total, REDRAW_SECONDS, -math.inf
        self._stack = ExitStack()
        self._bar: tqdm[Any] | None = None
        self._handle: Any = None
        if _in_notebook():
            from IPython.display import display  # type: ignore[import-not-found, unused-ignore]  # in a kernel

            self._handle = display({"text/plain": ""}, raw=True, display_id=True)  # type: ignore[no-untyped-call, unused-ignore]
        elif _is_terminal(sys.stderr):
            self._bar = tqdm(
                total=total, initial=initial, bar_format=FORM, file=sys.stderr, dynamic_ncols=True
            )
            for handler in _terminal_handlers():
                self._stack.callback(handler.setStream, handler.stream)
                handler.setStream(DummyTqdmFile(handler.stream))
            self._stack.callback(setattr, sys, "stderr", sys.stderr)
            sys.stderr = DummyTqdmFile(sys.stderr)
        else:
            self._shown_at, self._every_seconds = time.monotonic(), log_every_seconds

    def due(self) -> bool:
        """Whether it is time to `show` again; asking first saves the work of preparing the text."""
        return time.monotonic() - self._shown_at >= self._every_seconds

    def show(self, step: int, text: str) -> None:
        """Show the step and the text next to it, due or not."""
        if self._handle is not None:
            form = FORM.replace("{bar}", "{bar:24}")
            line = tqdm.format_meter(step, self._total, 0, prefix=text, bar_format=form)
            self._handle.update({"text/plain": line}, raw=True)
        elif self._bar is not None:
            self._bar.n = step
            self._bar.set_description_str(text, refresh=False)
            self._bar.refresh()
        else:
            # Not through tqdm, which would hold its lock while it waits for a log handler's.
            log.info("step %d/%d %s", step, self._total, text)
        self._shown_at = time.monotonic()

    def close(self) -> None:
        """Leave the last state, and release the terminal."""
        if self._bar is not None:
            self._bar.close()
        self._stack.close()


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
    except (OSError, ValueError):  # not a real file, as in some development environments
        return True


def _terminal_handlers() -> list["logging.StreamHandler[Any]"]:
    """Handlers of any logger that write to this process's standard output or error."""
    return [
        handler
        for logger in (logging.root, *logging.root.manager.loggerDict.values())
        for handler in getattr(logger, "handlers", ())  # a placeholder has none
        # One of `logging.lastResort`'s class has no stream of its own: it writes to whatever sys.stderr is.
        if isinstance(handler, logging.StreamHandler) and "stream" in vars(handler)
        if handler.stream in (sys.stdout, sys.stderr)
    ]
