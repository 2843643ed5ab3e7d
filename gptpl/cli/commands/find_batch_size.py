"""Find the batch size: speed and memory of each that fits.

examples:
  gptpl find-batch-size model=gpt_18m                                              # until memory is full
  gptpl find-batch-size model=gpt2_small data=python_stdlib find.max_batch_size=8  # no more than 8
  gptpl find-batch-size experiment=quick trainer.recompute_activations=true        # using less memory

Tries 1, 2, 4, ... sequences, each only if its estimated memory is free. Takes the settings of gptpl train.
On a CPU, memory is the peak of the whole process. Writes batch_size_finder.png and
batch_size_finder.csv into find.output (older ones are replaced), and nothing else.
"""

from gptpl.cli.arguments import Arguments, checked_output, configured
from gptpl.config.overrides import key_of
from gptpl.errors import InputError

NAME = "batch_size_finder"


@configured("find-batch-size")
def run(given: Arguments) -> None:
    """Prints a table and the suggestion, writes plot and numbers."""
    from gptpl.runs.finders import SETTLED_BY_FINDER, find_batch_size

    for override in given.overrides:
        if (key := key_of(override)) in SETTLED_BY_FINDER:
            raise InputError(f"{key} is what gptpl find-batch-size looks for: leave it out")
    own = given.config.find
    folder = checked_output("find.output", own.output)
    result = find_batch_size(given.config, max_batch_size=own.max_batch_size, timed_steps=own.timed_steps)
    result.write(folder, NAME)
    print("\n".join([*result.lines, f"written     {folder / NAME}.png, .csv"]))
