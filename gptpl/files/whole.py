"""Files that a reader sees as they were or as they are, never half-written."""

from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes beside the file and renames; text as UTF-8, its line ends as they are."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    temporary.replace(path)
