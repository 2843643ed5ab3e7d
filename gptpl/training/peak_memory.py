"""The most memory that this process, or its device, has had in use."""

import sys
from pathlib import Path

import psutil
import torch

_STATUS = Path("/proc/self/status")


def peak_memory_bytes(device: torch.device) -> int:
    """Bytes: of a CUDA device what torch had allocated since `forget_peak`, else all that is resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.is_file():
        # What `getrusage` says of a process begins with the size of the one that started it.
        return int(_STATUS.read_text(encoding="utf-8").split("VmHWM:")[1].split()[0]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak(device: torch.device) -> None:
    """Begins anew where that is possible, on CUDA devices."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
