"""SHA-256 of files, and where it stands beside one."""

import hashlib
from pathlib import Path


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, read in parts."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record_file(path: Path) -> Path:
    """Where the hash of a file stands, in the form that `sha256sum --check` reads."""
    return path.with_name(f"{path.name}.sha256")


def recorded_sha256(path: Path) -> str | None:
    """The hash that is recorded beside a file; None: there is none."""
    try:
        words = record_file(path).read_text(encoding="ascii", errors="replace").split()
    except FileNotFoundError:
        return None
    return words[0] if words else None
