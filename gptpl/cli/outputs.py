"""Where a command is to write: checked before the work begins."""

import tempfile
from pathlib import Path

from gptpl.errors import InputError


def checked_picture(key: str, given: str) -> Path:
    """A PNG file that can be written; raises InputError otherwise."""
    path = Path(given).expanduser()
    if path.suffix.lower() != ".png":
        raise InputError(f"{key}={path} is no picture: give a name that ends in .png")
    if path.is_dir():
        raise InputError(f"{key}={path} is a folder: give a file, such as {path / 'picture.png'}")
    _check_writable(key, path, path.parent)
    return path


def checked_folder(key: str, given: str) -> Path:
    """A folder that can be written into; raises InputError otherwise."""
    folder = Path(given).expanduser()
    _check_writable(key, folder, folder)
    return folder


def _check_writable(key: str, path: Path, folder: Path) -> None:
    """The folder, or the nearest one above it, is one, and can be written into."""
    existing = next(f for f in (folder.absolute(), *folder.absolute().parents) if f.exists())
    if not existing.is_dir():
        raise InputError(f"{key}={path} cannot be written: {existing} is a file")
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise InputError(
            f"{key}={path} cannot be written ({error.strerror}): choose a folder you may write to"
        ) from error
