"""Seconds and memory for loading GPT-2's sizes from several formats: random weights of the real shapes.

python experiments/pretrained_gpt2/loading.py     # writes up to 6.5 GB at a time into the temporary folder

Every case has a process of its own. What it takes before, imports included, is not counted. The files have
just been written, so they are in the page cache: seconds are those of a second load.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from gptpl.model import GPTModel, empty_model
from gptpl.tokenizers import GPT2Tokenizer
from gptpl.weights.formats import FORMATS, open_model
from gptpl.weights.published import SIZES, Size
from gptpl.weights.transfer import load_tensors

HERE = Path(__file__).parent
CASES = [
    ("124M", "hf", "float32"),
    ("124M", "hf", "bfloat16"),
    ("124M", "openai-tf", "float32"),
    ("124M", "nanogpt", "float32"),
    ("355M", "hf", "float32"),
    ("774M", "hf", "float32"),
    ("1558M", "hf", "float32"),
    ("1558M", "hf", "bfloat16"),
    ("1558M", "openai-tf", "bfloat16"),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--one", nargs=3, metavar=("FOLDER", "SIZE", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured(*options.one)))
        return
    rows = []
    for size, name in dict.fromkeys((size, name) for size, name, _ in CASES):
        with tempfile.TemporaryDirectory() as folder:
            write(SIZES[size], name, Path(folder))
            for dtype in [dtype for *case, dtype in CASES if case == [size, name]]:
                command = [sys.executable, __file__, "--one", folder, size, dtype]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                rows.append({"size": size, "format": name, "model": dtype} | json.loads(done.stdout))
                print(rows[-1], file=sys.stderr)
    (HERE / "loading.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    names = list(rows[0])
    print(
        "| " + " | ".join(name.replace("_", " ") for name in names) + " |",
        "|---" * len(names) + "|",
        sep="\n",
    )
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")


def write(size: Size, name: str, folder: Path) -> None:
    """In this process's child, so that its memory is given back."""
    code = (
        "import sys; from pathlib import Path; from gptpl.model import GPTModel\n"
        "from gptpl.tokenizers import GPT2Tokenizer\n"
        "from gptpl.weights.formats import FORMATS; from gptpl.weights.published import SIZES\n"
        "net = GPTModel(SIZES[sys.argv[1]].config)\n"
        "FORMATS[sys.argv[2]].write(net, Path(sys.argv[3]), tokenizer=GPT2Tokenizer(), dtype='float32')"
    )
    subprocess.run([sys.executable, "-c", code, size.name, name, folder], check=True, capture_output=True)


def measured(folder: str, size: str, dtype: str) -> dict[str, Any]:
    warm_up(Path(folder))
    before = memory()
    peak_own = [0]
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.005):
            peak_own[0] = max(peak_own[0], memory()["RssAnon"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    files = open_model(Path(folder))
    net = empty_model(SIZES[size].config, dtype=getattr(torch, dtype))
    load_tensors(net, files.tensors, files.table)
    seconds = time.perf_counter() - began
    ended.set()
    watcher.join()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in net.parameters())
    return {
        "weights_gb": round(weights / 1e9, 2),
        "seconds": round(seconds, 1),
        "own_memory_times_weights": round((peak_own[0] - before["RssAnon"]) / weights, 2),
        "with_mapped_file_times_weights": round((memory()["VmHWM"] - before["VmRSS"]) / weights, 2),
    }


def warm_up(folder: Path) -> None:
    """Whatever is imported and set up at the first time: it is not the model's."""
    open_model(folder)
    small = SIZES["124M"].config
    fields = {**vars(small), "vocab_size": 8, "context_length": 8, "emb_dim": 8, "n_heads": 1, "n_layers": 1}
    with tempfile.TemporaryDirectory() as other:
        net = GPTModel(type(small)(**fields))
        FORMATS["hf"].write(net, Path(other), tokenizer=GPT2Tokenizer(), dtype="float32")
        files = open_model(Path(other))
        load_tensors(empty_model(net.config), files.tensors, files.table)


def memory() -> dict[str, int]:
    """Bytes, by the names in /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    pairs = (line.split(":") for line in lines if line.endswith("kB"))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


if __name__ == "__main__":
    main()
