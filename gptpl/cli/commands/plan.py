"""Estimate what a run will cost: memory, steps, time.

examples:
  gptpl plan                                                   # the default run
  gptpl plan model=gpt2_xl data=text_file data.path=my.txt     # a model that may not even fit here
  gptpl plan experiment=fast_recipe plan.timed_steps=0 --json  # for a program, without timed steps
  gptpl plan trainer.num_nodes=8 trainer.devices=8 model=gpt2_xl data=python_stdlib   # 64 GPUs: DDP or FSDP?

flags:
  --json    print a JSON object instead of a table

Takes the settings of gptpl train. Shows parameters, memory by part, sequences, steps, tokens, FLOPs,
learning rate, time, and the largest batch that fits. Weights are created for the timed steps only, so a model
larger than this machine can be planned. For GPUs that need not be here (more than there are, or plan.nodes,
plan.devices_per_node and the others of conf/plan.yaml) it compares strategies, and allocates nothing.
Writes the picture plan.output and nothing else.
"""

import json
import logging

from gptpl.cli.arguments import Arguments, checked_output, configured


@configured("plan", flags=["--json"])
def run(given: Arguments) -> None:
    """Prints the plan to standard output and draws the learning rate."""
    from gptpl.runs.parallel_plan import cluster_of
    from gptpl.runs.plan import plan

    picture = checked_output("plan.output", given.config.plan.output, suffix=".png")
    logging.getLogger().setLevel(logging.WARNING)  # the plan contains what a run would log
    settings = given.config.plan
    planned = plan(
        given.config,
        timed_steps=settings.timed_steps,
        cluster=cluster_of(given.config),
        dry_run=settings.dry_run,
    )
    planned.draw(picture)
    if given.flags:
        print(json.dumps(planned.record() | {"picture": str(picture.absolute())}, indent=2))
    else:
        print("\n".join([*planned.lines(), f"{'picture':<11} {picture}"]))
