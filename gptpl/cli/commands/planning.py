"""The commands before a run: its cost, what suits it, its job, its text, and what this machine offers."""

import io
import json
import logging
import os
import sys
from functools import partial

from gptpl.cli.arguments import Arguments, checked_output, configured
from gptpl.config.compose import plain
from gptpl.config.overrides import key_of
from gptpl.errors import InputError

EXIT_FAILED = EXIT_DIFFERENT = 1


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


@configured("submit")
def submit(given: Arguments) -> None:
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
    if given.config_name != "submit":
        raise InputError(
            f"--config-name {given.config_name}: gptpl submit starts gptpl train, which has no such root:"
            " give an experiment of --config-dir instead"
        )
    from gptpl.runs.submission import submit

    submission = submit(*given.overrides, config_dir=given.config_dir)
    if submission.job is None:
        print(submission.script, end="")
    else:
        print(f"script  {submission.path}")
        print(f"job     {submission.job}")
        print(f"log     {submission.log.replace('%j', submission.job)}")


@configured("data encode")
def data_encode(given: Arguments) -> None:
    """Encode the text of a training run ahead of it, with all cores.

    examples:
      gptpl data encode data=corpus data.path=books              # a folder of text, JSON Lines or Parquet
      gptpl data encode data=corpus data.path='web/*.jsonl.zst' data.field=content   # of many compressed files
      gptpl data encode data=corpus data.path=books data.check_text=true   # has any text changed since?

    Takes the settings of gptpl train, which does the same when it meets a text for the first time. The tokens go
    to GPTPL_CACHE. Stopped at any moment, it continues with the shards that are missing.
    """
    from gptpl.runs.parts import encode, is_gpt, model_config

    data = encode(given.config)
    parameters = None
    if is_gpt(given.config):
        parameters = model_config(given.config, data.tokenizer.vocab_size).n_parameters
    print("\n".join(data.report(parameters=parameters, world_size=1)))


@configured("data show")
def data_show(given: Arguments) -> None:
    """Show what a text holds before training on it, in the terminal and as a web page.

    examples:
      gptpl data show data=text_file data.path=my.txt                # a book; writes data.html
      gptpl data show data=corpus data.path=books sequences=3        # also the first sequences of training
      gptpl data show data=corpus data.path=books sample_bytes=null  # all of it, however large

    Takes the settings of gptpl train. Shows documents, tokens, lengths, scripts, the most frequent tokens,
    duplicates, and odd documents: empty, enormous, binary, not UTF-8, damaged, not JSON. What cannot be read is
    listed and left out. The page needs no network.
    """
    from gptpl.runs.texts import data_report

    cfg = given.config
    page = None if cfg.output is None else checked_output("output", cfg.output, suffix=".html")
    report = data_report(cfg, sequences=cfg.sequences, sample_bytes=cfg.sample_bytes)
    print("\n".join(report.lines()))
    if page is not None:
        report.write(page)
        print(f"\npage  {page}")


@configured("tokenizer train")
def tokenizer_train(given: Arguments) -> None:
    """Make a tokenizer from a text: byte-level byte-pair encoding, as GPT-2's.

    examples:
      gptpl tokenizer train data=corpus data.path=books                    # 8,192 tokens, into tokenizer.json
      gptpl tokenizer train data=text_file data.path=poems.txt tokenizer.vocab_size=512  # a small one
      gptpl tokenizer train data=python_stdlib tokenizer.output=code.json        # another name

    Then: gptpl train tokenizer=file tokenizer.path=tokenizer.json data=corpus data.path=books

    Prints how many bytes of text a token stands for, compared with GPT-2's. Every checkpoint and export carries
    its tokenizer.
    """
    from gptpl.runs.texts import train_tokenizer

    trained = train_tokenizer(given.config)
    trained.tokenizer.save(given.config.tokenizer.output)
    print("\n".join(trained.lines))
    print(given.config.tokenizer.output)


@configured("doctor", flags=["--json"])
def doctor(given: Arguments) -> int:
    """Show what this machine and its launcher offer, and what looks wrong.

    examples:
      gptpl doctor                                                # this machine: a page to paste into an issue
      torchrun --nproc-per-node 4 -m gptpl doctor                 # also the connection between four processes
      srun gptpl doctor doctor.seconds=60                         # the tasks of a SLURM job
      torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m gptpl doctor  # on each machine

    flags:
      --json    print a JSON object instead of the page

    Rank 0 prints the page. Nothing is left on disk.
    Exit status: 0 also with warnings, 1 if the ranks did not find one another, 2 bad input.
    """
    if "torch" not in sys.modules:  # which logs what the report says
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    from gptpl.runs.doctor import doctor

    logging.getLogger().setLevel(logging.ERROR)  # the page contains what would be logged
    report = doctor(**given.config.doctor)
    if report.rank == 0:
        print(json.dumps(report.record(), indent=2) if given.flags else "\n".join(report.lines()))
    if report.failure is not None:
        print(f"gptpl: error: {report.failure}", file=sys.stderr)
    return EXIT_FAILED if report.failure else 0


@configured("verify-resume")
def verify_resume(given: Arguments) -> int:
    """Check that stopping and resuming changes no bit on this machine.

    examples:
      gptpl verify-resume experiment=quick                                              # 12 steps, 3 random stops
      gptpl verify-resume experiment=quick verify.steps=80 verify.stops=[5,39,40]       # stops of your choice
      gptpl verify-resume experiment=quick verify.kill=process                          # by kill -9
      gptpl verify-resume experiment=quick trainer=ddp trainer.accelerator=cpu trainer.devices=2  # two processes
      srun gptpl verify-resume verify.kill=node verify.keep=SHARED_FOLDER ...           # on several machines

    Trains once without a stop and once with interruptions, each part in its own process, and compares: for each
    step the batches and both losses, then the hashes of weights, optimizer, schedule, random states, position
    and callbacks. Takes the settings of gptpl train. Leaves nothing behind unless verify.keep is set.
    Exit status: 0 all the same, 1 a difference (or a part failed), 2 bad input.
    """
    from gptpl.runs.verify import report, verify_resume
    from gptpl.training.run_log import is_first_process

    of_runs = [each for each in given.overrides if not key_of(each).startswith("verify.")]
    own = plain(given.config.verify)
    say = partial(print, file=sys.stderr if is_first_process() else io.StringIO(), flush=True)
    comparison = verify_resume(*of_runs, **own, config_dir=given.config_dir, say=say)
    if comparison is None:
        return EXIT_DIFFERENT
    if is_first_process():
        print("\n".join(report(comparison)))
    if own["keep"]:
        say(f"both runs: {own['keep']}")
    return 0 if comparison.same else EXIT_DIFFERENT
