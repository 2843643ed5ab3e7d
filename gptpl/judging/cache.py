"""Replies of a judge on disk, so that no question is put twice and an interrupted judging goes on."""

import hashlib
import json
import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def question_key(protocol: str, body: Mapping[str, Any]) -> str:
    """SHA-256 of all that a reply depends on: protocol, model, options and the full prompt."""
    text = json.dumps([protocol, body], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


class ReplyCache:
    """Replies by the keys of their questions: a line of JSON each, on disk before `add` returns.

    Lines that cannot be read, such as the last one of a process that was killed, are dropped and said; the
    questions are then put again. Threads may share an object.

    Args:
        path: the file; made by the first reply.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._replies: dict[str, str] = {}
        if path.exists():
            self._read()

    def __len__(self) -> int:
        return len(self._replies)

    def get(self, key: str) -> str | None:
        """The reply; None where the question was never answered."""
        return self._replies.get(key)

    def add(self, key: str, reply: str) -> None:
        """Records a reply; another thread's earlier one to the same question stays."""
        line = json.dumps({"key": key, "reply": reply}) + "\n"
        with self._lock:
            if key in self._replies:
                return
            with self.path.open("ab") as file:  # appending, so that two processes do not overwrite each other
                file.write(line.encode("ascii"))
                file.flush()
                os.fsync(file.fileno())
            self._replies[key] = reply

    def _read(self) -> None:
        data = self.path.read_bytes()
        whole, _, rest = data.rpartition(b"\n")
        damaged = 0
        for line in whole.split(b"\n") if whole else []:
            key, reply = _parsed(line)
            if key is None:
                damaged += 1
            else:
                self._replies.setdefault(key, reply)
        if rest:
            os.truncate(self.path, len(data) - len(rest))  # the next line must not be glued to it
        if damaged := damaged + bool(rest):
            lines = "1 damaged line is" if damaged == 1 else f"{damaged} damaged lines are"
            log.warning("%s: %s dropped, and asked for again", self.path, lines)


def _parsed(line: bytes) -> tuple[str | None, str]:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        return None, ""
    if isinstance(data, dict) and isinstance(data.get("key"), str) and isinstance(data.get("reply"), str):
        return data["key"], data["reply"]
    return None, ""
