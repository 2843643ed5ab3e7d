"""The peak of a process's memory, in a copy of this process."""

import mmap
import multiprocessing
import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from gptpl.training.costs import peak_memory_bytes


def growth() -> int:
    """By how much the peak grows with 200 MB that are freed at once."""
    if sys.platform == "linux":  # begins with the size of the process that started this one: a terabyte
        resource.getrusage = lambda who: SimpleNamespace(ru_maxrss=10**9)  # type: ignore[assignment, return-value]
    before = peak_memory_bytes(torch.device("cpu"))
    with mmap.mmap(-1, 200_000_000) as memory:  # not from what malloc has kept
        for start in range(0, len(memory), mmap.PAGESIZE):
            memory[start] = 1
    return peak_memory_bytes(torch.device("cpu")) - before


def test_memory_that_was_freed_counts():
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        assert pool.submit(growth).result() == pytest.approx(200e6, rel=0.1)
