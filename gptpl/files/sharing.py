"""The usual permissions for what a library or a temporary folder made for its owner alone."""

import os
from pathlib import Path


def share(folder: Path) -> None:
    """Gives a folder and its files the permissions that this process gives new ones."""
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~umask)
