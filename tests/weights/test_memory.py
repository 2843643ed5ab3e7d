"""What loading costs: the model itself, and no second copy of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptpl.model import GPTConfig, GPTModel
from gptpl.tokenizers import BytesTokenizer
from gptpl.weights.formats import FORMATS

SHAPE = {
    "vocab_size": 4_000, "context_length": 64, "emb_dim": 512, "n_heads": 8, "n_layers": 4,
    "drop_rate": 0.0, "qkv_bias": True, "tie_weights": True,
}  # fmt: skip
SMALL = SHAPE | {"vocab_size": 8, "context_length": 8, "emb_dim": 8, "n_heads": 1, "n_layers": 1}
FILES = {"hf": "", "book": "model.pth", "nanogpt": "ckpt.pt"}
PROGRAM = """
import re, sys
from pathlib import Path
import torch
from gptpl.model import GPTConfig, empty_model
from gptpl.weights.formats import open_model
from gptpl.weights.transfer import load_tensors

def kilobytes(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

def load(files, shape):
    load_tensors(net := empty_model(GPTConfig(**shape)), files.tensors, files.table)
    return net

shape, small, files = eval(sys.argv[1])
for folder, file in files.items():
    load(open_model(Path(folder, "small", file)), small)  # whatever is imported and set up at the first time
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts over
    before, before_own = kilobytes("VmRSS"), kilobytes("RssAnon")
    opened = open_model(Path(folder, "large", file))
    net = load(opened, shape)
    weights = sum(4 * parameter.numel() for parameter in net.parameters()) / 1024
    print((kilobytes("VmHWM") - before) / weights, (kilobytes("RssAnon") - before_own) / weights)
    del opened, net
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").is_file(), reason="/proc/self/clear_refs is Linux's")
def test_loading_peaks_below_2_2_times_the_weights(tmp_path):
    """The file is mapped: its pages count here, but are not memory of the process's own."""
    for kind, shape in (("large", SHAPE), ("small", SMALL)):
        net = GPTModel(GPTConfig(**shape))  # type: ignore[arg-type]
        for name in FILES:
            folder = tmp_path / name / kind
            folder.mkdir(parents=True)
            FORMATS[name].write(net, folder, tokenizer=BytesTokenizer(), dtype="float32")
    given = repr((SHAPE, SMALL, {str(tmp_path / name): file for name, file in FILES.items()}))
    command = [sys.executable, "-c", PROGRAM, given]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    for name, line in zip(FILES, done.stdout.splitlines(), strict=True):
        peak, own = map(float, line.split())
        assert 1.0 < peak < 2.2, name
        assert 0.9 < own < 1.2, name
