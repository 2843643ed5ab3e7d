"""Results that come one by one and make up a file in the end: kept as they come, so that work goes on."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gptpl.errors import InputError
from gptpl.files.durable import sync_folder
from gptpl.files.whole import write_atomically


class PartialResults:
    """A list of JSON values that becomes `output` when it is complete.

    Until then the values stand in `<output>.partial`, JSON Lines, after a line that says what they are made
    with; what has been added is on disk, also after a power cut. A last line that was torn is made anew.

    Args:
        output: the file to be; its folder must be there.
        settings: what the values depend on, as plain data.

    Raises InputError where `output` is there already, for a `.partial` of other settings, naming the first
    that differs, and for one that is something else.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any]) -> None:
        self.output = output
        self.path = output.with_name(output.name + ".partial")
        if output.exists():
            raise InputError(f"output={output} is there already: remove it, or give another output=")
        if not output.parent.is_dir():
            raise InputError(f"output={output} lies in no folder that there is: make {output.parent} first")
        self._settings = json.loads(json.dumps(settings))
        self.values: list[Any] = self._found() if self.path.exists() else self._begun()

    def _begun(self) -> list[Any]:
        write_atomically(self.path, _line({"settings": self._settings}))
        sync_folder(self.path.parent)
        return []

    def _found(self) -> list[Any]:
        """What is there already; the file is cut behind the last whole line."""
        whole = self.path.read_bytes().rpartition(b"\n")[0]
        try:
            header, *values = map(json.loads, whole.decode("utf-8").split("\n"))
            settings = header["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.path} is damaged: remove it, and the work begins anew") from error
        for name in sorted(settings.keys() | self._settings.keys()):
            old, new = settings.get(name), self._settings.get(name)
            if old != new:
                raise InputError(
                    f"{self.path} was begun with another {name} ({_shown(old)}, not {_shown(new)}):"
                    " remove it, or give another output="
                )
        os.truncate(self.path, len(whole) + 1)
        return values

    def add(self, values: Sequence[Any]) -> None:
        """Appends values; they are on disk when it returns."""
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.write("".join(map(_line, values)))
            file.flush()
            os.fsync(file.fileno())
        self.values += values

    def finish(self) -> None:
        """Writes all values into the output, a JSON list, and removes the partial file."""
        text = json.dumps(self.values, ensure_ascii=False, indent=4) + "\n"
        write_atomically(self.output, text)
        with self.output.open("rb+") as file:
            os.fsync(file.fileno())
        sync_folder(self.output.parent)
        self.path.unlink()


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."
