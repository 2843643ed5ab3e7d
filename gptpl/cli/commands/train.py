"""Train a model, resume a run, or sweep over settings.

examples:
  gptpl train experiment=quick                                # see in seconds that everything works
  gptpl train                                                 # the default: 124M parameters, a short tale
  gptpl train model=tiny data=text_file data.path=F           # a small model on your own text
  gptpl train experiment=debug data=text_file data.path=F     # a few steps, no checkpoints, NaNs reported
  gptpl train init=gpt2_hf model=gpt2_small data=text_file data.path=F  # start from GPT-2's weights
  gptpl train resume=latest trainer.max_epochs=20             # resume the newest run, and train longer
  gptpl train model=tiny run_dir=F resume=auto                # begin in F, or continue what F holds
  gptpl train -m experiment=quick optimizer.lr=1e-3,3e-3      # a sweep: one run for each value, then a table
  gptpl train --config-dir my_conf 'callbacks=[default,mine]'  # your own class, by your own YAML

flags:
  -m, --multirun         sweep over every setting with several values: the same as gptpl sweep
  --cfg job|hydra|all    print the config instead of training; --resolve fills in ${...}, --package PART
  --info [defaults|...]  print where the config comes from, as Hydra sees it
  --config-name NAME, --config-dir FOLDER   your own root config, and your own folder of configs

Writes runs/NAME/DATE_TIME, or run_dir=FOLDER: config, checkpoints, metrics, samples, log. Ctrl-C finishes
the step and saves; the log ends with the command that resumes. Exit status: 0 finished, 1 failed, 2 bad
input; 128 + the number of a signal that stopped it (130: Ctrl-C).
"""

import shlex

from gptpl.cli.arguments import parse, shown
from gptpl.cli.console import collector_paused, console
from gptpl.config.compose import composed
from gptpl.config.overrides import resumed_run
from gptpl.runs.claims import AUTO, run_to_continue
from gptpl.training.run_log import RunLogFile

EXIT_FAILED = 1


def run(arguments: list[str]) -> int:
    """Trains; returns the exit status."""
    given = parse("train", arguments, sweeps=True)
    if given.multirun:
        from gptpl.cli.commands import sweep  # imports Optuna, which a single run does not need

        return sweep.run(arguments)
    if shown(given):
        return 0
    every, asked = resumed_run(given.overrides)
    overrides, earlier = run_to_continue(every, asked)
    with collector_paused():
        if earlier is None:  # first, to refuse what it can before torch is imported
            found = composed(overrides, given.config_name, config_dir=given.config_dir)
        from gptpl.callbacks.stopping import RunStopped
        from gptpl.runs.build import build, resume
        from gptpl.runs.fit import train
        from gptpl.training.module import NonFiniteError

    with console():
        log_file = RunLogFile(whole_process=True)
        if earlier is None:
            made = build(
                found.cfg,
                config_dir=given.config_dir,
                log_file=log_file,
                trusted=found.trusted,
                again=asked == AUTO,
            )
        else:
            made = resume(earlier, *overrides, config_dir=given.config_dir, log_file=log_file)
        made.overrides = every
        made.command = shlex.join(["gptpl", "train", *arguments])
        try:
            train(made)
        except RunStopped as stop:
            return stop.status
        except NonFiniteError:  # it has been logged
            return EXIT_FAILED
    return 0
