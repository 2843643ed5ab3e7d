"""TensorBoard event files for runs that are interrupted and resumed: in order by name, of known size.

torch's own SummaryWriter does not tell how far it has written without flushing, which would be once a step.
"""

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

    # torch sets both to None at first, and declares no type.
    file_writer: Any
    all_writers: Any

    def _get_file_writer(self) -> FileWriter:
        # Private, read in torch 2.13: there is no other way to choose the file.
        if self.all_writers is None or self.file_writer is None:
            self.file_writer = _EventFileWriter(Path(self.log_dir))
            self.all_writers = {self.log_dir: self.file_writer}
        return self.file_writer


class _EventFileWriter(FileWriter):
    def __init__(self, log_dir: Path) -> None:
        self.event_writer = EventFile(log_dir)  # the rest of torch's FileWriter knows only this


class EventFile:
    """A new event file in `log_dir`, with a name that sorts after those of all event files there.

    TensorBoard reads a folder's files in the order of their names, and an event of step s makes its fast
    server drop what it has read of the same tag at step s and beyond. TensorBoard's own writer names a file
    by the second: if the clock was set back, or the run resumed at once, the older file would come last and
    the newer points would be gone. It also writes in a thread; here `size` is known at any time.
    """

    def __init__(self, log_dir: Path) -> None:
        log_dir.mkdir(parents=True, exist_ok=True)
        stamps = [int(found[1]) for path in log_dir.iterdir() if (found := _NAME.match(path.name))]
        stamp = max([int(time.time()), *(stamp + 1 for stamp in stamps)])
        name = f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}.0"  # TensorBoard's
        self.path = log_dir / name
        self._file = self.path.open("xb")
        self._records = RecordWriter(self._file)
        # A SummaryWriter need not be closed: no warning about an open file.
        weakref.finalize(self, self._file.close)
        self.add_event(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def get_logdir(self) -> str:
        """The folder of the file."""
        return str(self.path.parent)

    def add_event(self, event: Event) -> None:
        """Append one event, which stays in memory until `flush`."""
        self._records.write(event.SerializeToString())

    @property
    def size(self) -> int:
        """Bytes of all events so far, flushed or not."""
        return self._file.tell()

    def flush(self) -> None:
        """Hand all events to the operating system, where they survive the end of this process."""
        if not self._file.closed:
            self._file.flush()

    def close(self) -> None:
        """Close the file; it may be closed already."""
        self._file.close()
