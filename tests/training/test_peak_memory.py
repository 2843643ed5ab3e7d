"""The peak of a process's memory, in a process of its own."""

import subprocess
import sys

import pytest

PROGRAM = """
import torch
from gptpl.training.costs import peak_memory_bytes
cpu = torch.device("cpu")
before = peak_memory_bytes(cpu)
torch.ones(50_000_000)  # 200 MB, freed at once
print(peak_memory_bytes(cpu) - before)
"""


def test_memory_that_was_freed_counts():
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert float(ended.stdout) == pytest.approx(200e6, rel=0.1)
