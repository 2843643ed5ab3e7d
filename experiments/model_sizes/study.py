"""GPT-2's sizes on this machine: loss, tokens per second of prefill and decoding, and peak memory.

python experiments/model_sizes/study.py                    # random weights of the real shapes
python experiments/model_sizes/study.py --weights gpt2     # the published weights, with a meaningful loss

Time and memory do not depend on the values of the weights. Each size and data type is measured in a process
of its own, for its peak memory; a size that does not fit into the free memory is left out with a message.
"""

import argparse
import json
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from gptpl.checkpoints.loading import load_published
from gptpl.data.sources import Tale
from gptpl.model import CachedGPT, count_parameters, empty_model
from gptpl.model.gpt import draw_gpt2
from gptpl.tokenizers import GPT2Tokenizer
from gptpl.weights.published import SIZES
from gptpl.weights.starting import PublishedWeights

HERE = Path(__file__).parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROMPT, NEW, ROUNDS = 512, 32, 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", choices=("random", "gpt2"), default="random")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--one", nargs=2, metavar=("SIZE", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured(*options.one, options.weights, options.device)))
        return
    rows = []
    for size in SIZES.values():
        for dtype in DTYPES:
            # The weights, a second copy as decoding packs them, and a gigabyte for the rest.
            need = count_parameters(size.config).total * DTYPES[dtype].itemsize * 2.2 + 1e9
            if need > free_memory(options.device):
                print(f"{size.name} {dtype}: left out, it needs about {need / 1e9:.1f} GB", file=sys.stderr)
                continue
            command = [sys.executable, __file__, "--one", size.name, dtype, "--weights", options.weights]
            done = subprocess.run(
                [*command, "--device", options.device], check=True, capture_output=True, text=True
            )
            rows.append(json.loads(done.stdout))
            print(rows[-1], file=sys.stderr)
    record = {"machine": machine(options.device), "weights": options.weights, "rows": rows}
    (HERE / f"{options.weights}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(table(rows))


def measured(name: str, dtype: str, weights: str, device: str) -> dict[str, Any]:
    size = SIZES[name]
    if weights == "random":
        torch.manual_seed(0)
        net = empty_model(size.config, device=device, dtype=DTYPES[dtype]).eval()
        draw_gpt2(net, size.n_layers)  # in place: a model in fp32 first would be the peak of memory
    else:
        published = PublishedWeights(source="hf", size=name)
        net = load_published(published, device=device, dtype=DTYPES[dtype]).net
    tokens = [int(token) for token in GPT2Tokenizer().encode(Tale().read(Tale().files()[0]))]
    sequence = torch.tensor([tokens[: 1024 + 1]], device=device)
    with torch.inference_mode():
        logits = net(sequence[:, :-1]).float()
        loss = torch.nn.functional.cross_entropy(logits[0], sequence[0, 1:]).item()
    del logits
    cached = CachedGPT(net, rows=1)
    prefill = [PROMPT / seconds(cached, tokens[:PROMPT], 0) for _ in range(ROUNDS + 1)]
    decode = [NEW / seconds(cached, tokens[:32], NEW) for _ in range(ROUNDS + 1)]
    return {
        "size": name,
        "dtype": dtype,
        "parameters": count_parameters(size.config).total,
        "loss_on_1024_tokens_of_the_tale": round(loss, 3),
        "prefill_tokens_per_second": round(statistics.median(prefill[1:]), 1),
        "decode_tokens_per_second": round(statistics.median(decode[1:]), 2),
        "peak_memory_gb": round(peak_memory(device) / 1e9, 2),
    }


def seconds(cached: CachedGPT, prompt: list[int], new_tokens: int) -> float:
    """The time to read the prompt, or, if there are any, the time of the new tokens after it."""
    cache = cached.new_cache(rows=1, capacity=len(prompt) + new_tokens)
    with torch.inference_mode():
        began = now(cached.model.device)
        logits = cached.prefill([prompt], cache)
        if new_tokens:
            began = now(cached.model.device)
        for _ in range(new_tokens):
            logits = cached.step(logits.argmax(dim=-1), cache)
        return now(cached.model.device) - began


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(device: str) -> float:
    """Bytes of the whole process on a CPU, of torch's tensors on a GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_memory(device: str) -> float:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) * 1024 if found else float("inf")


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    name = found[1] if found else platform.processor()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| " + " | ".join(name.replace("_", " ") for name in rows[0]) + " |",
        "|---" * len(rows[0]) + "|",
    ]
    return "\n".join(
        [*lines, *("| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows)]
    )


if __name__ == "__main__":
    main()
