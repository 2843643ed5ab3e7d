"""The most memory that this process has had."""

import re
from pathlib import Path

import psutil
import torch

_STATUS = Path("/proc/self/status")


def peak_memory_bytes(device: torch.device) -> int | None:
    """Bytes at the peak: of a CUDA device what torch had allocated, else the process's resident memory.

    None where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.is_file():
        # `ru_maxrss` of a process begins with the size of the one that started it.
        found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
        return int(found[1]) * 1024 if found else None
    memory = psutil.Process().memory_info()
    peak = getattr(memory, "peak_wset", None)  # Windows
    return None if peak is None else int(peak)
