"""gptpl's training step compared with other libraries', and with the machine's matrix products alone.

Every contestant trains GPT-2, small unless --size is given, in a process of its own; they take turns, step by
step, so that a machine whose speed drifts slows all of them. As many run next to gptpl at a time as fit into
memory.

    pip install --no-deps litgpt llms-from-scratch && pip install transformers accelerate
    python experiments/benchmarks/benchmark.py [--shapes 2x256 8x256 4x1024] [--steps 5] [--all]
    python experiments/benchmarks/benchmark.py --size 1558M --shapes 16x1024 --output gpu_1558M   # a GPU's

Writes result.json, table.md and speed.png next to this file, or into --output.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from contestants import SIZES, C, V
from matplotlib.figure import Figure
from tqdm import tqdm

from gptpl.data.pretraining.encoding import encode_corpus
from gptpl.data.sources import PythonStdlib
from gptpl.model import GPTConfig, count_parameters
from gptpl.tokenizers import GPT2Tokenizer
from gptpl.training.flops import training_flops_per_token

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HERE = Path(__file__).parent
OWN = ("gptpl", "gptpl bare")
BEST = (
    "transformers Trainer", "transformers bf16 compiled", "litgpt bf16 compiled", "plain bf16 compiled",
    "book bf16 compiled", "book loop fp32",
)  # fmt: skip
PEERS = tuple(
    f"{model} {precision}{how}"
    for model in ("transformers", "litgpt", "plain", "book")
    for precision in ("fp32", "bf16")
    for how in ("", " compiled")
)
ALL = (*dict.fromkeys((*BEST, *PEERS, "transformers Trainer compiled")),)
NEEDS = {"transformers": "transformers", "litgpt": "litgpt", "book": "llms_from_scratch"}
GB_OF_LIBRARIES = 1.5
GB_A_CONTESTANT = 0.85  # a thousand tokens of GPT-2 small; on top of libraries, weights and optimizer
Shape = tuple[int, int]


@dataclass(frozen=True)
class Contest:
    """What does not change from shape to shape: the model's size, who takes part, on which tokens."""

    size: str
    peers: tuple[str, ...]
    tokens: Path
    steps: int
    dropout: float


def main() -> None:
    """Measures, writes the record, prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=["2x256", "8x256", "4x1024"], help="batch x context")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each (default 5)")
    parser.add_argument("--dropout", type=float, default=0.0, help="of all, litgpt's apart (default 0)")
    parser.add_argument("--size", choices=SIZES, default="124M", help="of the model")
    parser.add_argument("--all", action="store_true", help="every peer, compiled and not, fp32 and bf16")
    parser.add_argument("--contestants", nargs="+", help="these peers instead")
    parser.add_argument("--add", action="store_true", help="keep what else the record has of these shapes")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the record (default: here)")
    options = parser.parse_args()
    peers = options.contestants or (ALL if options.all else BEST)
    missing = {
        need for peer in peers if not importlib.util.find_spec(need := NEEDS.get(peer.split()[0], "torch"))
    }
    if missing:
        parser.error(f"not installed: {', '.join(sorted(missing))} (see above)")
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "result.json"
    result = json.loads(path.read_text()) if path.exists() else {"size": options.size, "shapes": {}}
    if result["size"] != options.size:
        parser.error(f"{path} is a record of {result['size']}: give another --output")
    result["machine"] = machine()
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens.npy"
        np.save(tokens, some_tokens())
        for name in options.shapes:
            batch, context = map(int, name.split("x"))
            contest = Contest(options.size, tuple(peers), tokens, options.steps, options.dropout)
            measured = measure((batch, context), contest)
            if options.add and name in result["shapes"]:
                measured = together(result["shapes"][name], measured)
            result["shapes"][name] = measured
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = table(result)
    (options.output / "table.md").write_text(text, encoding="utf-8")
    plot(result).savefig(options.output / "speed.png", dpi=150)
    print(text)


def machine() -> dict[str, Any]:
    """What was measured on."""
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else cpu_name()
    names = ("torch", "lightning", "transformers", "litgpt", "llms-from-scratch")
    versions = {name: version(name) for name in names}
    return {
        "device": device,
        "driver": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "versions": {name: found for name, found in versions.items() if found},
        "date": time.strftime("%Y-%m-%d"),
    }


def version(package: str) -> str | None:
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """With its bf16 units, by which such machines differ most."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    names = [line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")]
    units = [unit for unit in ("amx_bf16", "avx512_bf16") if unit in text]
    return f"{names[0] if names else platform.processor()} ({', '.join(units) or 'no bf16 units'})"


def some_tokens() -> np.ndarray[Any, Any]:
    """Real text: the standard library of the running Python."""
    encoded = encode_corpus(PythonStdlib(), GPT2Tokenizer(), train_ratio=0.9)
    return np.asarray(encoded.train[: 2**21])


# --- measuring ----------------------------------------------------------------------------------------------


def measure(shape: Shape, contest: Contest) -> dict[str, Any]:
    """All contestants at one shape, and the matrix products before and after them."""
    rows = shape[0] * shape[1]
    products = [product_seconds(rows, config_of(contest.size))]
    contestants: dict[str, dict[str, Any]] = {}
    heats = list(heats_of(contest, rows))
    for number, heat in enumerate(heats, start=1):
        label = f"{shape[0]} x {shape[1]}, heat {number}/{len(heats)}"
        add(contestants, run_heat(heat, shape, contest, label))
        products.append(product_seconds(rows, config_of(contest.size)))
    return {"products_seconds": products, "contestants": contestants}


def together(*records: dict[str, Any]) -> dict[str, Any]:
    """Two measurements of a shape as one."""
    contestants: dict[str, dict[str, Any]] = {}
    for record in records:
        add(contestants, record["contestants"])
    products = [seconds for record in records for seconds in record["products_seconds"]]
    return {"products_seconds": products, "contestants": contestants}


def add(contestants: dict[str, dict[str, Any]], heat: dict[str, dict[str, Any]]) -> None:
    """Adds a heat's steps; gptpl is in every heat."""
    for name, measured in heat.items():
        known = contestants.setdefault(name, measured)
        if known is not measured:
            known["steps"] += measured["steps"]
            known["ratios"] += measured["ratios"]


def config_of(size: str) -> GPTConfig:
    """gptpl's configuration of that GPT-2."""
    shape = SIZES[size]
    return GPTConfig(
        vocab_size=V, context_length=C, emb_dim=shape.D, n_heads=shape.H,
        n_layers=shape.L, drop_rate=0.0, qkv_bias=True, tie_weights=True,
    )  # fmt: skip


def heats_of(contest: Contest, rows: int) -> Iterator[list[str]]:
    """Groups that fit into memory: gptpl and some peers; gptpl's bare loop is in the first."""
    free = (torch.cuda.mem_get_info()[0] if DEVICE == "cuda" else psutil.virtual_memory().available) / 2**30
    small, model = (config_of(size) for size in ("124M", contest.size))
    activations = model.n_layers * model.emb_dim / (small.n_layers * small.emb_dim)
    weights = 4 * count_parameters(model).fp32_bytes / 2**30  # their gradients, and AdamW's two averages
    fit = int(free / (GB_OF_LIBRARIES + weights + GB_A_CONTESTANT * activations * rows / 1000)) - 1
    if fit < 1:
        raise SystemExit(f"{free:.1f} GB of free memory are too few for two contestants")
    others = ("gptpl bare", *contest.peers)
    for first in range(0, len(others), fit):
        yield ["gptpl", *others[first : first + fit]]


def run_heat(names: list[str], shape: Shape, contest: Contest, label: str) -> dict[str, dict[str, Any]]:
    """Every contestant's steps, and its seconds over gptpl's in the same turn."""
    processes: dict[str, subprocess.Popen[str]] = {}
    measured: dict[str, dict[str, Any]] = {}
    bar = tqdm(total=len(names) * (1 + contest.steps), desc=label, unit="turn")
    try:
        for name in names:  # one after the other: the time to the first step is a time alone on the machine
            command = [sys.executable, "-W", "ignore", str(HERE / "contestants.py"), name]
            processes[name] = subprocess.Popen(
                [*command, *map(str, (contest.tokens, *shape, contest.dropout, contest.size))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            ready = answer(name, processes[name])
            measured[name] = {
                "first_step_seconds": ready["first_step_seconds"],
                "steps": [],
            }
            bar.update()
        for _ in range(contest.steps):
            for name, process in processes.items():
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
                measured[name]["steps"].append(answer(name, process))
                bar.update()
    finally:
        bar.close()
        for process in processes.values():
            process.communicate()
    own = [one["seconds"] for one in measured["gptpl"]["steps"]]
    for one in measured.values():
        one["ratios"] = [a["seconds"] / b for a, b in zip(one["steps"], own, strict=True)]
    return measured


def answer(name: str, process: "subprocess.Popen[str]") -> dict[str, Any]:
    """The next line of a contestant."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"{name} ended with status {process.wait()}: its own words are above")
    found: dict[str, Any] = json.loads(line)
    return found


def product_seconds(rows: int, model: GPTConfig) -> dict[str, float]:
    """Seconds of the matrix products of the linear layers alone, for a step of this many tokens.

    Each layer costs three of the same size: the output, the gradient of its input and that of its weight.
    Attention's own products are left out: with 256 tokens of context they are 4 % of these, with 1024 15 %.
    """
    D, V, L = model.emb_dim, model.vocab_size, model.n_layers
    layers = {(3 * D, D): L, (D, D): L, (4 * D, D): L, (D, 4 * D): L, (V, D): 1}
    seconds = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        total = 0.0
        for (outputs, inputs), count in layers.items():
            x, weight, grad = (
                torch.randn(shape, device=DEVICE).to(dtype)
                for shape in ((rows, inputs), (outputs, inputs), (rows, outputs))
            )
            pairs = ((x, weight.t()), (grad, weight), (grad.t(), x))
            total += count * sum(median_seconds(partial(torch.mm, *pair)) for pair in pairs)
        seconds[name] = total
    return seconds


def median_seconds(call: Any, repeats: int = 3) -> float:
    """Median time of a call, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


# --- the record ---------------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    """A table for each shape, with the sentences that the reach asks for."""
    about = result["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    lines = [
        f"GPT-2 {result['size']}; {about['device']}, {about['threads']} threads, {versions};"
        f" {about['date']}.",
        "",
    ]
    for name, measured in result["shapes"].items():
        batch, context = map(int, name.split("x"))
        lines += shape_table(batch, context, measured, config_of(result["size"]))
    return "\n".join(lines) + "\n"


def shape_table(batch: int, context: int, measured: dict[str, Any], model: GPTConfig) -> list[str]:
    """The contestants of one shape, the fastest first."""
    tokens = batch * context
    lines = [
        f"**Batch {batch} x {context}**",
        "",
        "| | seconds per step: median (min - max) | tokens/s | speed-up of gptpl | peak GB |"
        " first step after |",
        "|---|---|---|---|---|---|",
    ]
    contestants = measured["contestants"]
    for name in sorted(contestants, key=lambda name: statistics.median(contestants[name]["ratios"])):
        one = contestants[name]
        seconds = [step["seconds"] for step in one["steps"]]
        middle = statistics.median(seconds)
        lines.append(
            f"| {name} | {middle:.2f} ({min(seconds):.2f} - {max(seconds):.2f}) | {tokens / middle:.0f} |"
            f" {statistics.median(one['ratios']):.2f} | {peak_gb(one):.2f} |"
            f" {one['first_step_seconds']:.0f} s |"
        )
    own = contestants["gptpl"]
    middle = statistics.median(step["seconds"] for step in own["steps"])
    bound = statistics.median(one["bf16"] for one in measured["products_seconds"])
    full = statistics.median(one["fp32"] for one in measured["products_seconds"])
    flops = tokens * training_flops_per_token(model, context)
    names = own["steps"][0]["parts"]
    parts = {part: statistics.median(step["parts"][part] for step in own["steps"]) for part in names}
    leanest = min(peak_gb(one) for name, one in contestants.items() if name not in OWN)
    lines += [
        "",
        f"Matrix products of the linear layers alone: {bound:.2f} s in bf16, {full:.2f} s in fp32;"
        f" gptpl's step runs at {bound / middle:.0%} of the bf16 bound,"
        f" {flops / middle / 1e9:.0f} GFLOP/s by 6 N + 12 L T D."
        f" Peak memory {peak_gb(own) / leanest:.2f} of the smallest of the peers. A step of gptpl: "
        + ", ".join(f"{part} {seconds:.3f} s" for part, seconds in parts.items())
        + ".",
        "",
    ]
    return lines


def peak_gb(one: dict[str, Any]) -> float:
    """Most memory of a contestant's process."""
    return max(step["peak_mb"] for step in one["steps"]) / 1024


def plot(result: dict[str, Any]) -> Figure:
    """Tokens per second of every contestant, and the bound, a panel a shape."""
    shapes = result["shapes"]
    figure = Figure(figsize=(4.2 * len(shapes), 4), layout="constrained")
    for axes, (name, measured) in zip(
        figure.subplots(1, len(shapes), squeeze=False)[0], shapes.items(), strict=True
    ):
        batch, context = map(int, name.split("x"))
        speeds = {
            who: [batch * context / step["seconds"] for step in one["steps"]]
            for who, one in measured["contestants"].items()
        }
        order = sorted(speeds, key=lambda who: statistics.median(speeds[who]))
        middles = [statistics.median(speeds[who]) for who in order]
        spread = [
            [m - min(speeds[who]) for who, m in zip(order, middles, strict=True)],
            [max(speeds[who]) - m for who, m in zip(order, middles, strict=True)],
        ]
        colours = ["tab:blue" if who in OWN else "tab:gray" for who in order]
        axes.barh(order, middles, xerr=spread, color=colours, ecolor="black", capsize=2)
        bound = batch * context / statistics.median(one["bf16"] for one in measured["products_seconds"])
        axes.axvline(bound, color="tab:red", linestyle="--", label="bf16 matrix products alone")
        axes.set_title(f"batch {batch} x {context}")
        axes.set_xlabel("training tokens per second")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower right", fontsize="small")
    return figure


if __name__ == "__main__":
    main()
