"""Write a SLURM script for a run, and submit it.

examples:
  gptpl submit submit.nodes=2 submit.gpus_per_node=8 submit.time=24:00:00 run_dir=F  # 24 hours at a time
  gptpl submit submit.dry_run=true run_dir=F experiment=quick                # print the script
  gptpl submit submit.setup='source env/bin/activate' run_dir=F              # commands before gptpl

Takes the settings of gptpl train, and refuses now what can be told without data and devices. The script is
submit.sh in run_dir, which all nodes must see, as the working folder; the job's output goes to slurm-JOB.out
next to it. Before the time limit the run saves and stops, and the job is put back into the queue, where the
same command continues the run; so it is after the failure of a node, and after a preemption where the
partition requeues (the run then has the partition's GraceTime to save). After an error, without progress,
after its end, and after scancel it is not.
Exit status: 0 submitted, 2 bad input, no sbatch, or refused by it.
"""

from gptpl.cli.arguments import parse, shown
from gptpl.cli.console import collector_paused
from gptpl.errors import InputError


def run(arguments: list[str]) -> int:
    """Prints the script, or the files and the number of the job."""
    given = parse("submit", arguments)
    if shown(given):
        return 0
    if given.config_name != "submit":
        raise InputError(
            f"--config-name {given.config_name}: gptpl submit starts gptpl train, which has no such root:"
            " give an experiment of --config-dir instead"
        )
    with collector_paused():
        from gptpl.config.compose import composed

        composed(given.overrides, "submit", config_dir=given.config_dir)  # before torch is imported
        from gptpl.runs.submission import submit
    submission = submit(*given.overrides, config_dir=given.config_dir)
    if submission.job is None:
        print(submission.script, end="")
    else:
        print(f"script  {submission.path}")
        print(f"job     {submission.job}")
        print(f"log     {submission.log.replace('%j', submission.job)}")
    return 0
