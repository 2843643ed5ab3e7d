"""What a run will cost before it starts: memory, steps, time.

examples:
  gptpl plan                                                   # of the default run
  gptpl plan model=gpt2_xl data=text_file data.path=my.txt     # of a model that may not even fit here
  gptpl plan experiment=fast_recipe plan.timed_steps=0 --json  # without timing, for a program

flags:
  --json    print a JSON object instead of a table

Takes the settings of gptpl train. Shows parameters, memory by part, sequences, steps, tokens, arithmetic,
learning rate, time, and the largest batch that fits. Weights are made for the timed steps only, so a model
larger than this machine can be planned. Writes the picture plan.output and nothing else.
"""

import json
import logging
from pathlib import Path

from gptpl.cli.arguments import parse, shown
from gptpl.cli.console import Console
from gptpl.cli.outputs import checked_picture
from gptpl.config.compose import composed
from gptpl.runs.plan import plan


def run(arguments: list[str]) -> int:
    """Prints the plan to standard output and draws the learning rate; returns the exit status."""
    given = parse("plan", arguments, flags={"--json": "json"})
    if shown(given):
        return 0
    cfg = composed(given.overrides, given.config_name, config_dir=given.config_dir).cfg
    own = cfg.plan
    picture = checked_picture("plan.output", own.output)
    with Console():
        logging.getLogger().setLevel(logging.WARNING)  # the plan says what the log of a run would
        found = plan(cfg, timed_steps=own.timed_steps)
        found.draw(picture)
    if "json" in given.flags:
        print(json.dumps(found.record() | {"picture": str(Path(picture).absolute())}, indent=2))
    else:
        print("\n".join([*found.lines(), f"{'picture':<11} {picture}"]))
    return 0
