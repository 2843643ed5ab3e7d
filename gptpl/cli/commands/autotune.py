"""Measure what is fastest on this machine: precision, attention kernel, loss head.

examples:
  gptpl autotune                                             # for the model and batch of the default run
  gptpl autotune model=gpt2_small data.batch_size=8          # for another
  gptpl autotune model=tiny tokenizer=bytes trainer=cpu      # on the CPU, where there is a GPU

Takes the settings of gptpl train, which measures the same when it begins with a model, batch and machine for
the first time; here it is measured again, and all ways are shown. Writes nothing but GPTPL_CACHE.
"""

from gptpl.cli.arguments import Arguments, configured
from gptpl.runs.finders import autotune


@configured("autotune")
def run(given: Arguments) -> None:
    """Prints a table of the ways, the fastest first."""
    print("\n".join(autotune(given.config)))
