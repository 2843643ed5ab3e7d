"""What training with several processes costs: two of them measured here, a model of what lies beyond.

    python experiments/data_parallel/study.py [--steps 8] [--rounds 3]

`gptpl train` runs in every arrangement below, in turn; the time of a sum over both processes is measured by
itself. Writes result.json next to this file, or into --output, and prints the tables of the README.
"""

import argparse
import csv
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from gptpl.model import GPTConfig, count_parameters

HERE = Path(__file__).parent
BATCH, CONTEXT = 2, 256
MODEL = (
    "model=gpt2_small", f"model.context_length={CONTEXT}", "model.drop_rate=0", "data=python_stdlib",
    "scheduler=constant",
)  # fmt: skip
DDP = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
GPT2 = GPTConfig(
    vocab_size=50257, context_length=CONTEXT, emb_dim=768, n_heads=12, n_layers=12, drop_rate=0.0,
    qkv_bias=True, tie_weights=True,
)  # fmt: skip
BUCKET_BYTES = 25e6  # DDP's default
SIZES_MB = (1, 4, 16, 25, 64, 256)


@dataclass(frozen=True)
class Arrangement:
    """Some commands at the same time: the threads and overrides of each."""

    threads: int
    commands: tuple[tuple[str, ...], ...]


ARRANGEMENTS = {
    "one process, one thread": Arrangement(1, ((),)),
    "two processes apart, one thread each": Arrangement(1, ((), ())),
    "two processes, DDP": Arrangement(1, (DDP,)),
    "two processes, DDP, 4 batches a step": Arrangement(1, ((*DDP, "trainer.accumulate_grad_batches=4"),)),
    "one process, two threads": Arrangement(2, ((f"data.batch_size={2 * BATCH}",),)),
}


def main() -> None:
    """Measures, writes the record, prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of a run (default 8)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each arrangement (default 3)")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of result.json (default: here)")
    parser.add_argument(
        "--all-reduce", nargs=2, help=argparse.SUPPRESS
    )  # rank and port: one of two processes
    options = parser.parse_args()
    if options.all_reduce:
        measure_all_reduce(*map(int, options.all_reduce))
        return
    sums = all_reduce_seconds()
    speeds: dict[str, list[float]] = {name: [] for name in ARRANGEMENTS}
    with tqdm(total=options.rounds * len(ARRANGEMENTS), unit="run") as bar:
        for _ in range(options.rounds):
            for name, arrangement in ARRANGEMENTS.items():
                bar.set_description(name)
                speeds[name].append(tokens_per_second(arrangement, options.steps))
                bar.update()
    result = {
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"),
        "tokens_per_second": speeds,
        "all_reduce_seconds": sums,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(tables(result))


# --- training ---------------------------------------------------------------------------------------------


def tokens_per_second(arrangement: Arrangement, steps: int) -> float:
    """Of all its commands together, by the runs' own records, without the first batch."""
    with tempfile.TemporaryDirectory() as folder:
        runs = [Path(folder) / str(number) for number in range(len(arrangement.commands))]
        started = [
            subprocess.Popen(
                [sys.executable, "-m", "gptpl", "train", *MODEL, f"data.batch_size={BATCH}",
                 f"trainer.max_steps={steps}", "callbacks=[throughput]",
                 "eval_train_batches=1", "eval_val_batches=1", f"eval_every_n_steps={10**6}",
                 f"run_dir={run}", *overrides],
                env={**os.environ, "OMP_NUM_THREADS": str(arrangement.threads)},
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            )
            for run, overrides in zip(runs, arrangement.commands, strict=True)
        ]  # fmt: skip
        for process in started:
            _, words = process.communicate()
            if process.returncode:
                raise SystemExit(f"gptpl train ended with status {process.returncode}:\n{words}")
        return sum(last_speed(run / "metrics.csv") for run in runs)


def last_speed(metrics: Path) -> float:
    """The last average that a run has noted."""
    with metrics.open(newline="", encoding="utf-8") as file:
        column = [row["train/tokens_per_second"] for row in csv.DictReader(file)]
    return float([value for value in column if value][-1])


# --- sums over the processes ------------------------------------------------------------------------------


def all_reduce_seconds() -> dict[str, float]:
    """Median seconds to sum this many MB over two processes with gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--all-reduce", str(rank), str(port)],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("the two processes could not sum: their own words are above")
    found: dict[str, float] = json.loads(outputs[0])
    return found


def measure_all_reduce(rank: int, port: int) -> None:
    """One of the two processes; the first one says what it measured."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    seconds = {}
    for size in SIZES_MB:
        data = torch.ones(size * 10**6 // 4)
        times = []
        for _ in range(8):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(data)
            times.append(time.perf_counter() - began)
        seconds[str(size)] = statistics.median(times[1:])
    if rank == 0:
        print(json.dumps(seconds))
    dist.destroy_process_group()


# --- the model of what lies beyond ------------------------------------------------------------------------


@dataclass(frozen=True)
class Link:
    """What connects processes: the bytes a second that each sends while it receives; a message's start."""

    bytes_per_second: float
    seconds_a_message: float


def step_seconds(
    *,
    processes: int,
    link: Link,
    forward: float,
    backward: float,
    model: GPTConfig,
) -> float:
    """Of an optimizer step under DDP without the optimizer, by the model that the README states."""
    sizes = count_parameters(model)
    embeddings = 4.0 * model.emb_dim * (model.vocab_size + model.context_length)
    blocks = sizes.fp32_bytes - embeddings
    hidden = ring_seconds(blocks, processes=processes, link=link, messages=blocks / BUCKET_BYTES)
    last = ring_seconds(embeddings, processes=processes, link=link, messages=embeddings / BUCKET_BYTES)
    return forward + max(backward, hidden) + last


def ring_seconds(size: float, *, processes: int, link: Link, messages: float) -> float:
    """Of summing over a ring: each of n processes sends 2 (n - 1) / n of the bytes, in 2 (n - 1) turns."""
    share = 2 * (processes - 1) / processes
    return share * size / link.bytes_per_second + messages * 2 * (processes - 1) * link.seconds_a_message


def fitted(sums: dict[str, float]) -> Link:
    """The link that two processes here have: a straight line through the largest and the smallest size."""
    small, large = min(SIZES_MB), max(SIZES_MB)
    rate = (large - small) * 1e6 / (sums[str(large)] - sums[str(small)])  # n = 2: each byte is sent once
    start = max(0.0, sums[str(small)] - small * 1e6 / rate) / 2
    return Link(rate, start)


LINKS = {
    "NVLink 4 (450 GB/s)": Link(450e9, 5e-6),
    "PCIe 5 x16 (64 GB/s)": Link(64e9, 10e-6),
    "InfiniBand NDR (50 GB/s)": Link(50e9, 10e-6),
    "100 Gbit Ethernet": Link(12.5e9, 30e-6),
    "10 Gbit Ethernet": Link(1.25e9, 50e-6),
    "1 Gbit Ethernet": Link(0.125e9, 100e-6),
}
GPU_TOKENS_PER_SECOND = 475_000  # an H100, published for llm.c
GPU_BATCHES = (16 * 1024, 64 * 1024)


def tables(result: dict[str, Any]) -> str:
    """Markdown of what was measured, and of what the model says of it and of links one may have."""
    speeds = {name: statistics.median(found) for name, found in result["tokens_per_second"].items()}
    base = speeds["one process, one thread"]
    lines = ["| | tokens/s: median (min - max) | against one process |", "|---|---|---|"]
    for name, found in result["tokens_per_second"].items():
        lines.append(
            f"| {name} | {speeds[name]:.0f} ({min(found):.0f} - {max(found):.0f}) |"
            f" {speeds[name] / base:.2f} |"
        )
    link = fitted(result["all_reduce_seconds"])
    lines += ["", "| MB summed over two processes | ms | MB/s |", "|---|---|---|"]
    for size, seconds in result["all_reduce_seconds"].items():
        lines.append(f"| {size} | {seconds * 1000:.1f} | {float(size) / seconds:.0f} |")
    apart = 2 * BATCH * CONTEXT / speeds["two processes apart, one thread each"]
    lines += [
        "",
        f"Here {link.bytes_per_second / 1e9:.2f} GB/s, {link.seconds_a_message * 1e3:.2f} ms a message.",
    ]
    for name, times in (("two processes, DDP", 1), ("two processes, DDP, 4 batches a step", 4)):
        seconds = times * 2 * BATCH * CONTEXT / speeds[name]
        predicted = (times - 1) * apart + step_seconds(
            processes=2, link=link, forward=apart / 3, backward=apart * 2 / 3, model=GPT2
        )
        lines.append(f"{name}: a step took {seconds:.2f} s, the model predicts {predicted:.2f} s.")
    lines += ["", *beyond()]
    return "\n".join(lines)


def beyond() -> list[str]:
    """Share of the processes' speed that is left, for links and numbers of GPUs."""
    counts = (2, 8, 64)
    heads = [f"{count} x {batch // 1024}k" for batch in GPU_BATCHES for count in counts]
    lines = ["| link | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for name, link in LINKS.items():
        cells = []
        for batch in GPU_BATCHES:
            compute = batch / GPU_TOKENS_PER_SECOND
            for count in counts:
                seconds = step_seconds(
                    processes=count, link=link, forward=compute / 3, backward=compute * 2 / 3, model=GPT2
                )
                cells.append(f"{compute / seconds:.0%}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
