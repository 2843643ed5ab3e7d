"""What loading costs: the model itself, and no second copy of it."""

import subprocess
import sys
from pathlib import Path

import pytest

from gptpl.model import GPTConfig, GPTModel
from gptpl.weights.formats import FORMATS

SHAPE = {
    "vocab_size": 20_000, "context_length": 64, "emb_dim": 768, "n_heads": 12, "n_layers": 4,
    "drop_rate": 0.0, "qkv_bias": True, "tie_weights": True,
}  # fmt: skip
PROGRAM = """
import re, sys
from pathlib import Path
import torch
from gptpl.model import GPTConfig, empty_model
from gptpl.weights.formats import open_model
from gptpl.weights.transfer import load_tensors

def kilobytes(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

def load(files, config):
    load_tensors(net := empty_model(config), files.tensors, files.table)
    return net

config = GPTConfig(**{shape})
small = GPTConfig(**({shape} | dict(vocab_size=8, context_length=8, emb_dim=8, n_heads=1, n_layers=1)))
load(open_model(Path(sys.argv[2])), small)  # whatever is imported and set up at the first time
before, before_own = kilobytes("VmRSS"), kilobytes("RssAnon")
files = open_model(Path(sys.argv[1]))
net = load(files, config)
weights = sum(4 * parameter.numel() for parameter in net.parameters()) / 1024
print((kilobytes("VmHWM") - before) / weights, (kilobytes("RssAnon") - before_own) / weights)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="/proc/self/status is Linux's")
@pytest.mark.parametrize(("name", "file"), [("hf", ""), ("book", "model.pth"), ("nanogpt", "ckpt.pt")])
def test_loading_peaks_below_2_2_times_the_weights(tmp_path, name, file):
    """The file is mapped: its pages count here, but are not memory of the process's own."""
    small = SHAPE | {"vocab_size": 8, "context_length": 8, "emb_dim": 8, "n_heads": 1, "n_layers": 1}
    for folder, shape in (("large", SHAPE), ("small", small)):
        (tmp_path / folder).mkdir()
        net = GPTModel(GPTConfig(**shape))  # type: ignore[arg-type]
        FORMATS[name].write(net, tmp_path / folder, eot_id=0)
    program = PROGRAM.replace("{shape}", repr(SHAPE))
    files = [tmp_path / folder / file for folder in ("large", "small")]
    done = subprocess.run([sys.executable, "-c", program, *files], capture_output=True, text=True, check=True)
    peak, own = map(float, done.stdout.split())
    assert 1.0 < peak < 2.2
    assert 0.9 < own < 1.2
