"""What the parts of the benchmark share: the machine, its matrix products, the text, processes in turn."""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from contestants import DEVICE, HERE, SIZES, C, V, Work, gptpl_command

from gptpl.data.sources import PythonStdlib
from gptpl.model import GPTConfig
from gptpl.tokenizers import GPT2Tokenizer

CHARACTERS = 4_000_000
ISA = ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY")


# --- the machine --------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What is measured on."""
    names = ("torch", "lightning", "transformers", "litgpt", "llms-from-scratch")
    versions = {name: version(name) for name in names}
    return {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else cpu_name(),
        "driver": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "environment": {name: os.environ[name] for name in ISA if name in os.environ},
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


def others_load(seconds: float = 1.0) -> float:
    """Processors that other processes keep busy, 0 on a quiet machine."""
    return psutil.cpu_percent(seconds) / 100 * (psutil.cpu_count() or 1)


def free_gb() -> float:
    """Memory of the device that is free."""
    return (torch.cuda.mem_get_info()[0] if DEVICE == "cuda" else psutil.virtual_memory().available) / 2**30


# --- matrix products ----------------------------------------------------------------------------------------


def config_of(size: str) -> GPTConfig:
    """gptpl's configuration of that GPT-2."""
    shape = SIZES[size]
    return GPTConfig(
        vocab_size=V, context_length=C, emb_dim=shape.D, n_heads=shape.H,
        n_layers=shape.L, drop_rate=0.0, qkv_bias=True, tie_weights=True,
    )  # fmt: skip


def product_flops(rows: int, model: GPTConfig) -> int:
    """Floating-point operations of the linear layers in a step of this many tokens: 6 for each weight."""
    D, L = model.emb_dim, model.n_layers
    return 6 * rows * (12 * D * D * L + model.vocab_size * D)


def product_seconds(rows: int, model: GPTConfig, *, repeats: int = 3) -> dict[str, float]:
    """Seconds of the matrix products of the linear layers alone, for a step of this many tokens.

    Each layer costs three of the same size: the output, the gradient of its input and that of its weight.
    Attention's own products are left out: with 256 tokens of context they are 4 % of these, with 1024 15 %.
    The fastest of `repeats` counts, fp32 and bf16 in turn.
    """
    D, L = model.emb_dim, model.n_layers
    layers = {(3 * D, D): L, (D, D): L, (4 * D, D): L, (D, 4 * D): L, (model.vocab_size, D): 1}
    seconds = {"fp32": 0.0, "bf16": 0.0}
    for (outputs, inputs), count in layers.items():
        calls: dict[str, list[Callable[[], Any]]] = {}
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            x, weight, grad = (
                torch.randn(shape, device=DEVICE).to(dtype)
                for shape in ((rows, inputs), (outputs, inputs), (rows, outputs))
            )
            pairs = ((x, weight.t()), (grad, weight), (grad.t(), x))
            calls[name] = [partial(torch.mm, *pair) for pair in pairs]
        timed: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(repeats + 1):
            for name, products in calls.items():
                timed[name].append(seconds_of(products))
        for name in calls:
            seconds[name] += count * min(timed[name][1:])
    return seconds


def seconds_of(calls: list[Callable[[], Any]]) -> float:
    """Time of these calls, one after the other."""
    started = time.perf_counter()
    for call in calls:
        call()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


# --- contestants --------------------------------------------------------------------------------------------


def prepare_text(folder: Path) -> dict[str, str]:
    """Real text, the running Python's standard library, and its tokens: the files, as `Work` wants them."""
    text, tokens = folder / "text.txt", folder / "tokens.npy"
    content, length = [], 0
    for document in PythonStdlib().documents():
        content.append(document)
        length += len(document)
        if length > CHARACTERS:
            break
    text.write_text("\n".join(content), encoding="utf-8")
    np.save(tokens, np.asarray(GPT2Tokenizer().encode(text.read_text(encoding="utf-8")), dtype=np.uint16))
    return {"text": str(text), "tokens": str(tokens)}


class Contestant:
    """A process of contestants.py; `environment` is added to this process's own."""

    def __init__(self, name: str, work: Work, environment: Mapping[str, str] | None = None) -> None:
        self.name = name
        self._folder = tempfile.TemporaryDirectory()
        command = [
            sys.executable,
            "-W",
            "ignore",
            str(HERE / "contestants.py"),
            name,
            json.dumps(asdict(work)),
        ]
        if name == "gptpl":
            command = gptpl_command(work, self._folder.name)
        reading, writing = os.pipe()
        own = {"BENCHMARK_OUT": str(writing), "BENCHMARK_STARTED": str(time.perf_counter())}
        own["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, pass_fds=[writing],
            env=os.environ | own | (environment or {}),
        )  # fmt: skip
        os.close(writing)
        self._answers = os.fdopen(reading)

    def answer(self) -> dict[str, Any]:
        """What the process says next; the first time, when it has warmed up."""
        line = self._answers.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with status {self._process.wait()}: its own words are above")
        found: dict[str, Any] = json.loads(line)
        return found

    def turn(self) -> dict[str, Any]:
        """Has the process take its next turn."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        """Ends the process."""
        self._process.communicate()
        self._answers.close()
        self._folder.cleanup()


@contextmanager
def processes() -> Iterator[list[Contestant]]:
    """A list of contestants to fill, which end with the block."""
    started: list[Contestant] = []
    try:
        yield started
    finally:
        for each in started:
            each.end()


def noise(series: list[list[float]]) -> float:
    """By how much two measurements of the same thing, one turn apart, differ in the median."""
    steps = [abs(b / a - 1) for seconds in series for a, b in pairwise(seconds)]
    return statistics.median(steps) if steps else float("nan")
