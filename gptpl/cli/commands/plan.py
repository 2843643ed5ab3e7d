"""Estimate what a run will cost: memory, steps, time.

examples:
  gptpl plan                                                   # the default run
  gptpl plan model=gpt2_xl data=text_file data.path=my.txt     # a model that may not even fit here
  gptpl plan experiment=fast_recipe plan.timed_steps=0 --json  # for a program, without timed steps

flags:
  --json    print a JSON object instead of a table

Takes the settings of gptpl train. Shows parameters, memory by part, sequences, steps, tokens, FLOPs,
learning rate, time, and the largest batch that fits. Weights are created for the timed steps only, so a model
larger than this machine can be planned. Writes the picture plan.output and nothing else.
"""

import json
import logging

from gptpl.cli.arguments import Arguments, checked_output, configured


@configured("plan", flags=["--json"])
def run(given: Arguments) -> None:
    """Prints the plan to standard output and draws the learning rate."""
    from gptpl.runs.plan import plan

    picture = checked_output("plan.output", given.config.plan.output, suffix=".png")
    logging.getLogger().setLevel(logging.WARNING)  # the plan contains what a run would log
    planned = plan(given.config, timed_steps=given.config.plan.timed_steps)
    planned.draw(picture)
    if given.flags:
        print(json.dumps(planned.record() | {"picture": str(picture.absolute())}, indent=2))
    else:
        print("\n".join([*planned.lines(), f"{'picture':<11} {picture}"]))
