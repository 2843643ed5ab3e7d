"""Find the learning rate: where the loss falls fastest, and where it diverges.

examples:
  gptpl find-lr experiment=quick                                              # 100 steps: a table and a plot
  gptpl find-lr model=gpt_18m data=python_stdlib optimizer=muon               # both learning rates of Muon
  gptpl find-lr init=gpt2_hf model=gpt2_small data=text_file data.path=F find.max_lr=1e-2  # for fine-tuning

The range test of Smith (2017) on the run's own model, data, optimizer and precision: the learning rates of
all parameter groups grow together, by the same factor each step. Takes the settings of gptpl train. Writes
lr_finder.png and lr_finder.csv into find.output (older ones are replaced), and nothing else.
"""

from gptpl.cli.arguments import Arguments, checked_output, configured


@configured("find-lr")
def run(given: Arguments) -> None:
    """Prints a table and the suggestion, writes plot and numbers."""
    from gptpl.runs.finders import find_lr

    own = given.config.find
    folder = checked_output("find.output", own.output)
    result = find_lr(given.config, min_lr=own.min_lr, max_lr=own.max_lr, steps=own.steps)
    result.write(folder, "lr_finder")
    print("\n".join([*result.lines, f"written     {folder / 'lr_finder'}.png, .csv"]))
