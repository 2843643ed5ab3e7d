"""Work on several things at once that Ctrl-C and errors end without waiting for what is under way."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Thing = TypeVar("Thing")
Result = TypeVar("Result")


def in_threads(
    things: Sequence[Thing], work: Callable[[Thing], Result], *, threads: int
) -> Iterator[tuple[int, Result]]:
    """Yields (place, `work(thing)`) as they are ready, with so many under way at a time.

    The first error of `work` is raised here, and no new thing is begun after it, nor after the iterator is
    closed. The threads are daemons: the program ends though a server keeps one of them waiting, which
    `concurrent.futures` would not allow.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    ready: queue.SimpleQueue[tuple[int, Result | None, BaseException | None]] = queue.SimpleQueue()
    stopped = threading.Event()
    for place in range(len(things)):
        waiting.put(place)

    def run() -> None:
        while not stopped.is_set():
            try:
                place = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                ready.put((place, work(things[place]), None))
            except BaseException as error:  # noqa: BLE001 - it is raised below, in the thread that waits for it
                stopped.set()  # here, before another thing is begun
                ready.put((place, None, error))

    for _ in range(min(threads, len(things))):
        threading.Thread(target=run, daemon=True).start()
    try:
        for _ in things:
            place, result, error = ready.get()
            if error is not None:
                raise error
            yield place, result  # type: ignore[misc]
    finally:
        stopped.set()
