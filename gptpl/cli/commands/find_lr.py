"""Find the learning rate: where the loss falls fastest, and where it diverges.

examples:
  gptpl find-lr experiment=quick                                              # 100 steps, a table, a picture
  gptpl find-lr model=gpt_18m data=python_stdlib optimizer=muon               # of both learning rates of Muon
  gptpl find-lr init=gpt2_hf model=gpt2_small data=text_file data.path=F find.max_lr=1e-2  # for fine-tuning

The range test of Smith (2017) on the run's own model, data, optimizer and precision: the learning rates of
all parameter groups grow together, by the same factor each step. Takes the settings of gptpl train. Writes
lr_finder.png and lr_finder.csv into find.output (older ones are replaced), and nothing else.
"""

from gptpl.cli.arguments import checked_folder, read
from gptpl.cli.console import console
from gptpl.runs.finders import find_lr

NAME = "lr_finder"


def run(arguments: list[str]) -> int:
    """Prints a table and the suggestion, writes plot and numbers; returns the exit status."""
    found, _ = read("find-lr", arguments)
    if found is None:
        return 0
    own = found.cfg.find
    folder = checked_folder("find.output", own.output)
    with console():
        result = find_lr(found.cfg, min_lr=own.min_lr, max_lr=own.max_lr, steps=own.steps)
    result.write(folder, NAME)
    print("\n".join([*result.lines, f"written     {folder / NAME}.png, .csv"]))
    return 0
