"""Train with several settings and compare them: the same as gptpl train -m.

examples:
  gptpl sweep experiment=quick optimizer.lr=1e-3,3e-3 tokenizer=bytes,words      # every combination
  gptpl sweep experiment=quick sweep=learning_rate                               # a ready-made search
  gptpl sweep experiment=quick sweep=tpe 'optimizer.lr=tag(log,interval(1e-4,1e-1))'  # your own search
  gptpl sweep experiment=quick seed=1,2,3 hydra.launcher.n_jobs=2                # two trials at a time
  gptpl sweep experiment=quick seed=1,2,3 hydra/launcher=slurm hydra.launcher.timeout_min=120  # as SLURM jobs
  gptpl sweep experiment=quick seed=1,2,3 sweep.retry_failed=true                # try the failed trials again

The same command again skips what has finished and continues what was interrupted. Writes
runs/sweeps/NAME_HASH, or hydra.sweep.dir=FOLDER: a run folder for each trial (0/, 1/, ...), results.csv,
report.html, report.md. Exit status: 0 all trials finished or pruned, 1 some failed or are left, 2 bad
input; 128 + the number of a signal that stopped it.
"""

from gptpl.cli.arguments import parse
from gptpl.cli.sweep_progress import Progress, say
from gptpl.errors import InputError
from gptpl.reports import Criterion, report
from gptpl.sweeps.sweep import sweep
from gptpl.text import table


def run(arguments: list[str]) -> int:
    """Runs the trials that are left; returns the exit status."""
    given = parse("train", arguments, sweeps=True)
    for flag, is_given in (("--cfg", given.cfg), ("--info", given.info)):
        if is_given:
            raise InputError(f"{flag} shows the settings of one run: leave -m out")
    result = sweep(
        *given.overrides,
        config_dir=given.config_dir,
        config_name=given.config_name,
        watch=Progress,
        say=say,
    )
    print("\n".join(table(result.rows())))
    print(f"\ntable   {result.table}")
    if result.trials:
        by = Criterion(metric=result.search.metric, mode=result.search.mode)
        print(f"report  {report(result.folder, by=by).page}")
    return result.status(say)
