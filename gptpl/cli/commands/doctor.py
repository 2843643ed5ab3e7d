"""Show what this machine and its launcher offer, and what looks wrong.

examples:
  gptpl doctor                                                # this machine: a page to paste into an issue
  torchrun --nproc-per-node 4 -m gptpl doctor                 # also the connection between four processes
  srun gptpl doctor doctor.seconds=60                         # the tasks of a SLURM job
  torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m gptpl doctor  # on each machine

flags:
  --json    print a JSON object instead of the page

Rank 0 prints the page. Nothing is left on disk.
Exit status: 0 also with warnings, 1 if the ranks did not find one another, 2 bad input.
"""

import json
import logging
import os
import sys

from gptpl.cli.arguments import Arguments, configured

EXIT_FAILED = 1


@configured("doctor", flags=["--json"])
def run(given: Arguments) -> int:
    """Prints the page on rank 0, and on every rank the line that says why the ranks are not connected."""
    if "torch" not in sys.modules:  # which logs what the report says
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    from gptpl.runs.doctor import doctor

    logging.getLogger().setLevel(logging.ERROR)  # the page contains what would be logged
    report = doctor(**given.config.doctor)
    if report.rank == 0:
        print(json.dumps(report.record(), indent=2) if given.flags else "\n".join(report.lines()))
    if report.failure is not None:
        print(f"gptpl: error: {report.failure}", file=sys.stderr)
    return EXIT_FAILED if report.failure else 0
