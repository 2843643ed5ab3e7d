"""The commands that check this machine: what it offers, and whether runs resume exactly on it."""

import io
import json
import logging
import os
import sys
from functools import partial

from gptpl.cli.arguments import Arguments, configured
from gptpl.config.compose import plain
from gptpl.config.overrides import key_of

EXIT_FAILED = EXIT_DIFFERENT = 1


@configured("doctor", flags=["--json"])
def doctor(given: Arguments) -> int:
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


@configured("verify-resume")
def verify_resume(given: Arguments) -> int:
    """Check that stopping and resuming changes no bit on this machine.

    examples:
      gptpl verify-resume experiment=quick                                              # 12 steps, 3 random stops
      gptpl verify-resume experiment=quick verify.steps=80 verify.stops=[5,39,40]       # stops of your choice
      gptpl verify-resume experiment=quick verify.kill=process                          # by kill -9
      gptpl verify-resume experiment=quick trainer=ddp trainer.accelerator=cpu trainer.devices=2  # two processes
      srun gptpl verify-resume verify.kill=node verify.keep=SHARED_FOLDER ...           # on several machines

    Trains once without a stop and once with interruptions, each part in its own process, and compares: for each
    step the batches and both losses, then the hashes of weights, optimizer, schedule, random states, position
    and callbacks. Takes the settings of gptpl train. Leaves nothing behind unless verify.keep is set.
    Exit status: 0 all the same, 1 a difference (or a part failed), 2 bad input.
    """
    from gptpl.runs.verify import report, verify_resume
    from gptpl.training.run_log import is_first_process

    of_runs = [each for each in given.overrides if not key_of(each).startswith("verify.")]
    own = plain(given.config.verify)
    say = partial(print, file=sys.stderr if is_first_process() else io.StringIO(), flush=True)
    comparison = verify_resume(*of_runs, **own, config_dir=given.config_dir, say=say)
    if comparison is None:
        return EXIT_DIFFERENT
    if is_first_process():
        print("\n".join(report(comparison)))
    if own["keep"]:
        say(f"both runs: {own['keep']}")
    return 0 if comparison.same else EXIT_DIFFERENT
