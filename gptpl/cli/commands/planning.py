"""The commands before a run: what it will cost, and which learning rate, batch size and kernels suit it."""

import json
import logging

from gptpl.cli.arguments import Arguments, checked_output, configured
from gptpl.config.overrides import key_of
from gptpl.errors import InputError


@configured("plan", flags=["--json"])
def plan(given: Arguments) -> None:
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
    from gptpl.runs import plan as planning
    from gptpl.runs.parallel_plan import cluster_of

    picture = checked_output("plan.output", given.config.plan.output, suffix=".png")
    logging.getLogger().setLevel(logging.WARNING)  # the plan contains what a run would log
    settings = given.config.plan
    planned = planning.plan(
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


@configured("find-lr")
def find_lr(given: Arguments) -> None:
    """Find the learning rate: where the loss falls fastest, and where it diverges.

    examples:
      gptpl find-lr experiment=quick                                              # 100 steps: a table and a plot
      gptpl find-lr model=gpt_18m data=python_stdlib optimizer=muon               # both learning rates of Muon
      gptpl find-lr init=gpt2_hf model=gpt2_small data=text_file data.path=F find.max_lr=1e-2  # for fine-tuning

    The range test of Smith (2017) on the run's own model, data, optimizer and precision: the learning rates of
    all parameter groups grow together, by the same factor each step. Takes the settings of gptpl train. Writes
    lr_finder.png and lr_finder.csv into find.output (older ones are replaced), and nothing else.
    """
    from gptpl.runs import finders

    own = given.config.find
    folder = checked_output("find.output", own.output)
    result = finders.find_lr(given.config, min_lr=own.min_lr, max_lr=own.max_lr, steps=own.steps)
    result.write(folder, "lr_finder")
    print("\n".join([*result.lines, f"written     {folder / 'lr_finder'}.png, .csv"]))


@configured("find-batch-size")
def find_batch_size(given: Arguments) -> None:
    """Find the batch size: speed and memory of each that fits.

    examples:
      gptpl find-batch-size model=gpt_18m                                              # until memory is full
      gptpl find-batch-size model=gpt2_small data=python_stdlib find.max_batch_size=8  # no more than 8
      gptpl find-batch-size experiment=quick trainer.recompute_activations=true        # using less memory

    Tries 1, 2, 4, ... sequences, each only if its estimated memory is free. Takes the settings of gptpl train.
    On a CPU, memory is the peak of the whole process. Writes batch_size_finder.png and
    batch_size_finder.csv into find.output (older ones are replaced), and nothing else.
    """
    from gptpl.runs import finders

    for override in given.overrides:
        if (key := key_of(override)) in finders.SETTLED_BY_FINDER:
            raise InputError(f"{key} is what gptpl find-batch-size looks for: leave it out")
    own = given.config.find
    folder = checked_output("find.output", own.output)
    result = finders.find_batch_size(
        given.config, max_batch_size=own.max_batch_size, timed_steps=own.timed_steps
    )
    result.write(folder, "batch_size_finder")
    print("\n".join([*result.lines, f"written     {folder / 'batch_size_finder'}.png, .csv"]))


@configured("autotune")
def autotune(given: Arguments) -> None:
    """Measure what is fastest on this machine: precision, attention kernel, loss head.

    examples:
      gptpl autotune                                             # for the model and batch of the default run
      gptpl autotune model=gpt2_small data.batch_size=8          # for another
      gptpl autotune model=tiny tokenizer=bytes trainer=cpu      # on the CPU, where there is a GPU

    Takes the settings of gptpl train, which measures the same when it begins with a model, batch and machine for
    the first time; here it is measured again, and all ways are shown. Writes nothing but GPTPL_CACHE.
    """
    from gptpl.runs import finders

    print("\n".join(finders.autotune(given.config)))
