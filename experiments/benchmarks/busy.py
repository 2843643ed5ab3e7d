"""How much training slows down beside one other busy process, and what the settings of OpenMP change.

    python experiments/benchmarks/busy.py [--sizes tiny 124M] [--threads 1 2] [--rounds 3]

`gptpl train` takes turns alone and beside a process that only computes (Python counting), which is halted and
continued in between. The machine should be quiet otherwise. Prints a table; benchmark.py keeps it.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from contestants import Work
from measuring import Contestant, others_load, prepare_text
from tables import busy_lines

SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "GOMP_SPINCOUNT=0": {"GOMP_SPINCOUNT": "0"},
    "KMP_BLOCKTIME=0": {"KMP_BLOCKTIME": "0"},
}
SHAPES = {"tiny": (2, 64, 40), "124M": (2, 256, 1)}
"""Sequences, their tokens, and steps of a turn."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=3, help="turns alone, and as many beside the other")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GPTPL_CACHE"] = folder
        files = prepare_text(Path(folder))
        rows = measure(options.sizes, options.threads, options.settings, options.rounds, files)
    print(json.dumps(rows))
    print("\n".join(busy_lines(rows)))


def measure(
    sizes: list[str], threads: list[int | None], settings: list[str], rounds: int, files: dict[str, str]
) -> list[dict[str, Any]]:
    """Tokens per second of every combination; None: as many threads as gptpl takes by itself."""
    rows = []
    with Spinner() as other:
        for size in sizes:
            batch, context, steps = SHAPES[size]
            work = Work(**files, batch=batch, context=context, dropout=0.1, size=size, steps_a_turn=steps)
            for count in threads:
                for setting in settings:
                    environment = SETTINGS[setting] | (
                        {} if count is None else {"OMP_NUM_THREADS": str(count)}
                    )
                    contestant = Contestant("gptpl", work, environment)
                    contestant.answer()
                    load = others_load()
                    speeds: dict[bool, list[float]] = {False: [], True: []}
                    for turn in range(2 * rounds):
                        beside = turn % 4 in (1, 2)  # alone, beside, beside, alone: drift cancels
                        other.run(beside)
                        contestant.turn()  # settles
                        speeds[beside].append(batch * context / contestant.turn()["seconds"])
                    other.run(False)
                    contestant.end()
                    row = {"size": size, "threads": count, "setting": setting, "others": round(load, 2)}
                    rows.append(row | {"alone": speeds[False], "beside": speeds[True]})
                    print("\n".join(busy_lines(rows[-1:])[2:]), file=sys.stderr)
    return rows


class Spinner:
    """A process that only computes, halted until it is told to run."""

    def __enter__(self) -> "Spinner":
        self._process = subprocess.Popen([sys.executable, "-c", "while True: sum(range(10**6))"])
        self.run(False)
        return self

    def run(self, on: bool) -> None:
        """Continues or halts it."""
        self._process.send_signal(signal.SIGCONT if on else signal.SIGSTOP)

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()


if __name__ == "__main__":
    main()
