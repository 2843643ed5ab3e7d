"""Making a rename last."""

import os
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Let a rename survive a power cut; Windows has no such call for folders."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
