"""One of two processes for all runs of the tests on two devices: to import torch takes longer than a run.

A line of standard input is a job: the folder to be in, the run's folder, and the arguments of `gptpl`. The
answer is a line with the exit status. The environment has the ranks, as torchrun sets them.
"""

import json
import os
import sys
from unittest.mock import patch

import numpy as np

from gptpl.cli.main import main
from gptpl.runs.claims import PROCESS_RUN_DIR

answers = os.fdopen(os.dup(1), "w")
sys.stdout = sys.stderr
blank = np.full((4, 6, 3), 255, dtype=np.uint8)
patch("gptpl.callbacks.after_step.figure_pixels", lambda figure: blank).start()  # as in tests/conftest.py
patch("os.fsync", lambda descriptor: None).start()
for line in sys.stdin:
    job = json.loads(line)
    os.chdir(job["folder"])
    os.environ |= {"GPTPL_CACHE": job["cache"], PROCESS_RUN_DIR: job["run_dir"]}
    os.environ["WORLD_SIZE"] = "2"  # which Lightning removes after a run
    print(main(job["arguments"]), file=answers, flush=True)
