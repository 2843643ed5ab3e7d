"""TensorBoard event files for runs that are interrupted and resumed: in order by name, and never behind."""

import os
import re
import socket
import time
import weakref
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.writer import FileWriter, SummaryWriter

_NAME = re.compile(r"events\.out\.tfevents\.(\d+)\.")


class OrderedSummaryWriter(SummaryWriter):
    """torch's SummaryWriter on an `EventFile`, a new one each time that it is opened."""

    # torch declares neither, and sets both to None at first.
    file_writer: Any
    all_writers: Any

    def _get_file_writer(self) -> FileWriter:
        # torch gives no other way to choose the file; Lightning calls this method, too.
        if self.all_writers is None or self.file_writer is None:
            self.file_writer = _EventFileWriter(Path(self.log_dir))
            self.all_writers = {self.log_dir: self.file_writer}
        return self.file_writer


class _EventFileWriter(FileWriter):
    def __init__(self, log_dir: Path) -> None:
        self.event_writer = EventFile(log_dir)  # the rest of torch's FileWriter knows only this


class EventFile:
    """A new event file in `log_dir`, whose name sorts behind those of all event files there.

    TensorBoard reads a folder's files in the order of their names, and an event of step s makes its fast
    server drop what it has read of the same tag at step s and beyond. Its own writer names a file for the
    second of its making: after a clock went back, or when a run was resumed at once, the older file would
    come last and the newer points would be gone. It also has a thread for writing, so that nobody knows how
    far the file has come; here `size` does, without asking the operating system.
    """

    def __init__(self, log_dir: Path) -> None:
        log_dir.mkdir(parents=True, exist_ok=True)
        self._log_dir = log_dir
        stamps = [int(found[1]) for path in log_dir.iterdir() if (found := _NAME.match(path.name))]
        stamp = max([int(time.time()), *(stamp + 1 for stamp in stamps)])
        name = f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}.0"  # TensorBoard's
        self.path = log_dir / name
        self._file = self.path.open("xb")
        self._records = RecordWriter(self._file)
        # Nobody has to close a SummaryWriter, so nobody is to be warned that its file was left open.
        weakref.finalize(self, self._file.close)
        self.add_event(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def get_logdir(self) -> str:
        """The folder of the file."""
        return str(self._log_dir)

    def add_event(self, event: Event) -> None:
        """Appends one event, which waits in memory until `flush`."""
        self._records.write(event.SerializeToString())

    @property
    def size(self) -> int:
        """Bytes of all events so far, flushed or not."""
        return self._file.tell()

    def flush(self) -> None:
        """Gives all events to the operating system, where they survive the end of this process."""
        if not self._file.closed:
            self._file.flush()

    def close(self) -> None:
        """Closes the file; more than once does no harm."""
        self._file.close()
