"""Weights of one byte: speed, memory and what the rounding costs, beside bf16, fp32 and llama.cpp.

    python experiments/generation_speed/int8.py                 # GPT-2 small, a CPU: about 3 minutes
    python experiments/generation_speed/int8.py --quality RUN   # what the rounding changes in a trained model

All programs have the same random weights, prompt and threads, and take turns of 128 tokens. llama.cpp opens
what `gptpl weights convert format=gguf` writes; it is left out without `pip install llama-cpp-python`.
"""

import argparse
import copy
import dataclasses
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from benchmark import CONTEXT, HERE, NEW, PROMPT, _cpu, _read_rate, models
from torch import Tensor
from tqdm import tqdm

from gptpl.checkpoints.loading import LoadedCheckpoint
from gptpl.evaluation.likelihood import evaluate
from gptpl.model import CachedGPT, GPTModel, Int8GPT
from gptpl.runs.evaluation_data import language_data
from gptpl.runs.export import export
from gptpl.runs.loaded import load_language_model
from gptpl.tokenizers import GPT2Tokenizer

PRECISIONS = ("32-true", "bf16-true", "int8")
LLAMA = {"float16": "llama.cpp f16", "q8_0": "llama.cpp q8_0"}
BATCHES = 12  # of 8 sequences, for the perplexity


# ---------------------------------------------------------------------------------------------------- speed


def ours(net: GPTModel, prompt: list[int], *, rows: int = 1) -> Callable[[], Iterator[None]]:
    """Greedy decoding, one token at each `next`; the first reads the prompt, too."""
    cached = CachedGPT(net, rows=rows)

    def tokens() -> Iterator[None]:
        with torch.inference_mode():
            cache = cached.new_cache(rows=rows, capacity=PROMPT + NEW)
            logits = cached.prefill([prompt] * rows, cache)
        for _ in range(NEW):
            yield
            with torch.inference_mode():
                logits = cached.step(logits.argmax(-1), cache)

    return tokens


def hugging_face(model: Any, prompt: list[int]) -> Callable[[], Iterator[None]]:
    """The same with transformers' cache, without what its `generate` does besides."""

    def tokens() -> Iterator[None]:
        with torch.inference_mode():
            out = model(torch.tensor([prompt]), use_cache=True)
            for _ in range(NEW):
                yield
                chosen = out.logits[:, -1].argmax(-1, keepdim=True)
                out = model(chosen, past_key_values=out.past_key_values, use_cache=True)

    return tokens


def llama_cpp(folder: Path, prompt: list[int], threads: int) -> Callable[[], Iterator[None]]:
    """The same with llama.cpp's own greedy sampler."""
    from llama_cpp import Llama

    settings = {"n_ctx": CONTEXT, "n_threads": threads, "n_threads_batch": threads, "verbose": False}
    llama = Llama(str(folder / "model.gguf"), **settings)

    def tokens() -> Iterator[None]:
        llama.reset()
        made = llama.generate(prompt, temp=0.0, repeat_penalty=1.0)
        next(made)
        for _ in range(NEW):
            yield
            next(made)

    return tokens


def milliseconds(contestants: dict[str, Callable[[], Iterator[None]]], rounds: int) -> dict[str, list[float]]:
    """Of every token of each; the first round warms up."""
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for number, name in tqdm([*itertools.product(range(rounds + 1), contestants)], unit="text"):
        tokens = contestants[name]()
        next(tokens)  # reads the prompt
        for _ in range(NEW - 1):
            started = time.perf_counter()
            next(tokens)
            if number:
                taken[name].append(1000 * (time.perf_counter() - started))
    return taken


def speed(rounds: int) -> dict[str, Any]:
    """Tokens per second of all, alone and in a batch of eight."""
    theirs, net = models(torch.float32, "cpu")
    prompt = torch.randint(50000, (PROMPT,)).tolist()
    small = Int8GPT(copy.deepcopy(net))
    half = copy.deepcopy(net).bfloat16()
    contestants = {
        "gptpl fp32": ours(net, prompt),
        "gptpl bf16": ours(half, prompt),
        "gptpl int8": ours(small, prompt),
        "Hugging Face fp32": hugging_face(theirs, prompt),
        "Hugging Face bf16": hugging_face(copy.deepcopy(theirs).bfloat16(), prompt),
    }
    with tempfile.TemporaryDirectory() as folder:
        try:
            for dtype, name in LLAMA.items():
                place = export(as_loaded(net), "gguf", Path(folder, dtype), dtype=dtype, verify=False)
                contestants[name] = llama_cpp(place, prompt, torch.get_num_threads())
        except ImportError:
            print("llama.cpp is left out: pip install llama-cpp-python")
        one = {name: rates(each) for name, each in milliseconds(contestants, rounds).items()}
    del contestants, theirs
    batch = {
        name: ours(each, prompt, rows=8) for name, each in (("fp32", net), ("bf16", half), ("int8", small))
    }
    eight = {
        f"gptpl {name}": rates(each, 8) for name, each in milliseconds(batch, max(1, rounds // 2)).items()
    }
    best = max(one[f"gptpl {name}"]["median"] for name in ("fp32", "bf16"))
    ratios = {"int8_over_best_of_fp32_and_bf16": round(one["gptpl int8"]["median"] / best, 2)}
    for name in LLAMA.values():
        if name in one:
            ratios[f"int8_over_{name}"] = round(one["gptpl int8"]["median"] / one[name]["median"], 2)
    return {"batch_1": one, "batch_8": eight, **ratios}


def rates(taken: list[float], rows: int = 1) -> dict[str, float]:
    """Tokens per second: the median, and the middle 80 % of the tokens."""
    each = sorted(1000 * rows / ms for ms in taken)
    cut = len(each) // 10
    return {
        "median": round(statistics.median(each), 1),
        "low": round(each[cut], 1),
        "high": round(each[-1 - cut], 1),
    }


def as_loaded(net: GPTModel) -> LoadedCheckpoint:
    past = {"step": 0, "tokens_seen": 0, "data": {}, "losses": {}, "start": {"init": "random"}}
    return LoadedCheckpoint(
        path=Path("random"), net=net, tokenizer=GPT2Tokenizer(), run_config={}, step=0, lineage=past
    )


# --------------------------------------------------------------------------------------------------- memory

RESIDENT = """
import re, sys, torch
from pathlib import Path
from gptpl.runs.loaded import load_language_model

def megabytes(of):
    return int(re.search(of + r":\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1000

load_language_model(sys.argv[2], device="cpu")  # what loading imports
own = megabytes("VmRSS")
model = load_language_model(sys.argv[1], device="cpu", precision=sys.argv[3])
cached = model.net.cached(rows=1)
with torch.inference_mode():
    cached.prefill([[1, 2, 3]], cached.new_cache(rows=1, capacity=8))
print(megabytes("VmRSS") - own, megabytes("VmHWM") - own)
"""


def memory() -> dict[str, dict[str, int]]:
    """MB of a process that loads GPT-2 small and reads a prompt, above what a tiny model takes (on Linux)."""
    _, net = models(torch.float32, "cpu")
    tiny = GPTModel(dataclasses.replace(net.config, emb_dim=12, n_layers=1))
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        place, first = (
            export(as_loaded(each), "gptpl", Path(folder, name), verify=False) / "model.ckpt"
            for name, each in (("model", net), ("tiny", tiny))
        )
        for precision in PRECISIONS:
            command = [sys.executable, "-c", RESIDENT, str(place), str(first), precision]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            resident, peak = map(float, out.split())
            found[precision] = {"resident": round(resident), "peak": round(peak)}
    return found


# -------------------------------------------------------------------------------------------------- quality


def quality(run: str) -> dict[str, Any]:
    """Perplexity on the run's own validation text, and how often the most likely token is fp32's."""
    exact = load_language_model(run, device="cpu")
    given = language_data(exact, None, split="val", max_length=None, batch_size=8)
    batches = list(itertools.islice(given.batches, BATCHES))
    found: dict[str, Any] = {"tokens": sum(targets.numel() for _, targets, *_ in batches), "data": given.name}
    with tempfile.TemporaryDirectory() as folder:
        sources = {precision: (run, precision) for precision in PRECISIONS}
        for dtype, name in LLAMA.items():
            sources[name] = (str(export(exact, "gguf", Path(folder, dtype), dtype=dtype)), "32-true")
        chosen = most_likely(exact.net, batches)
        for name, (source, precision) in sources.items():
            net = load_language_model(source, device="cpu", precision=precision).net
            same = (most_likely(net, batches) == chosen).float().mean().item()
            found[name] = {"perplexity": round(evaluate(net, batches).perplexity, 3), "same": round(same, 4)}
    base = found["32-true"]["perplexity"]
    for name in sources:
        found[name]["change"] = round(found[name]["perplexity"] / base - 1, 5)
    return found


def most_likely(net: torch.nn.Module, batches: list[Any]) -> Tensor:
    with torch.inference_mode():
        return torch.cat([net(inputs).argmax(-1).flatten() for inputs, *_ in batches])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="measure the memory alone")
    parser.add_argument("--quality", metavar="RUN", help="a run; speed is then left out")
    parser.add_argument("--output", type=Path, default=HERE / "int8.json")
    options = parser.parse_args()
    record = json.loads(options.output.read_text(encoding="utf-8")) if options.output.is_file() else {}
    if options.quality:
        record["quality"] = quality(options.quality)
    elif options.memory:
        record["memory_mb"] = memory()
    else:
        read = round(_read_rate("cpu"), 1)
        record |= {"cpu": _cpu(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        record |= {"read_gb_per_second": read, "speed": speed(options.rounds), "memory_mb": memory()}
    print(json.dumps(record, indent=2))
    options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
