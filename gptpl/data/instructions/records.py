"""Instructions with their answers: read from JSON or JSON Lines, split, kept in a run, put into a prompt."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self

from gptpl.data.sources.base import read_utf8
from gptpl.data.sources.records import Record, read_records
from gptpl.data.splits import SPLITS, Duplicates, Split, check_choice, check_ratios, homes
from gptpl.errors import InputError
from gptpl.files.template import SafeTemplate

Precedence = Literal["test", "train"]
_ORDERS: dict[Precedence, tuple[Split, ...]] = {
    "test": ("test", "val", "train"),
    "train": ("train", "test", "val"),
}


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """What is asked, what it is asked about (may be empty), and the reference answer."""

    instruction: str
    input: str
    output: str

    @property
    def question(self) -> tuple[str, str]:
        """Instruction and input, with single spaces for all white space: by these duplicates are found."""
        return " ".join(self.instruction.split()), " ".join(self.input.split())


def read_instructions(
    path: Path, *, instruction: str = "instruction", input: str | None = "input", output: str = "output"
) -> list[Instruction]:
    """Every record of a file, in order, by the keys of its parts; no input is read where that is None.

    Raises InputError as `read_records`, for a missing key, a value that is not a text, an empty instruction
    and an empty answer.
    """
    return [
        Instruction(
            **question_of(record, instruction=instruction, input=input, keys="data."),
            output=record.text(output, "set data.output_column to the key of the answer"),
        )
        for record in read_records(path)
    ]


def question_of(record: Record, *, instruction: str, input: str | None, keys: str = "") -> dict[str, str]:
    """A record's `instruction` and `input` ("" where its key is None), as `read_instructions` reads them.

    `keys` stands before the names of the settings in messages.
    """
    remedy = f"set {keys}instruction_column to the key of the question"
    no_input = f"set {keys}input_column to another key, or to null where there is none"
    return {
        "instruction": record.text(instruction, remedy),
        "input": "" if input is None else record.text(input, no_input, may_be_empty=True),
    }


@dataclass(frozen=True, kw_only=True)
class InstructionSplits:
    """The instructions of each split, in order; `shared` of them have the question of a preceding split."""

    train: list[Instruction]
    val: list[Instruction]
    test: list[Instruction]
    shared: int
    read: int

    def of(self, split: Split) -> list[Instruction]:
        """The instructions of one split."""
        return {"train": self.train, "val": self.val, "test": self.test}[split]


def split_instructions(
    instructions: Sequence[Instruction],
    *,
    train_ratio: float = 0.85,
    test_ratio: float = 0.1,
    shuffle_seed: int | None = None,
    duplicates: Duplicates = "remove",
    precedence: Precedence = "test",
) -> InstructionSplits:
    """Cut instructions in three: the first to train on, the next for the test, the rest for validation.

    This is the book's split; counts are rounded down. `shuffle_seed` decides the order before the cut; None:
    that of the file. With `duplicates` "remove", training loses the questions of validation and test, and
    validation those of the test, which stays as it was cut; "group" moves them there; "keep" leaves them,
    and validation and test are a little too easy. `precedence` "train" is the order of older runs: training,
    test, validation.

    Raises InputError for ratios or instructions that leave a split empty, and for an unknown choice.
    """
    check_ratios(train_ratio=train_ratio, test_ratio=test_ratio)
    check_choice("data.duplicates", duplicates, Duplicates)
    check_choice("data.precedence", precedence, Precedence)
    order = list(instructions)
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(order)
    # int() of the product, as in the book: its 1,100 entries are 935, 110 and 55.
    n_train, n_test = int(len(order) * train_ratio), int(len(order) * test_ratio)
    cut: dict[Split, list[Instruction]] = {
        "train": order[:n_train],
        "test": order[n_train : n_train + n_test],
        "val": order[n_train + n_test :],
    }
    splits: dict[Split, list[Instruction]] = {name: [] for name in cut}
    shared = 0
    for name, home in homes(cut, lambda each: each.question, _ORDERS[precedence]).items():
        for each, where in zip(cut[name], home, strict=True):
            shared += where != name
            if where == name or duplicates != "remove":
                splits[name if duplicates == "keep" else where].append(each)
    for split in ("train", "val"):
        if not splits[split]:
            raise InputError(
                f"{len(order)} instructions leave none for {SPLITS[split]}: give more, or change"
                f" data.train_ratio={train_ratio}, data.test_ratio={test_ratio} or"
                f" data.duplicates={duplicates}"
            )
    return InstructionSplits(**splits, shared=shared, read=len(order))


# --- prompts --------------------------------------------------------------------------------------------

FIELDS = ("instruction", "input")
RESPONSE_MARKER = "\n\n### Response:\n"
"""Alpaca's, and the default of a user's own template."""


@lru_cache(maxsize=16)
def _filler(name: str, source: str) -> SafeTemplate:
    return SafeTemplate(source, name=f"data.template={name}", fields=FIELDS, needed=["instruction"])


@dataclass(frozen=True)
class PromptTemplate:
    """A Jinja template of the prompt, and the text between prompt and answer.

    `name` is "alpaca", "phi3", or the origin of the user's own; `source` uses `instruction` and optionally
    `input`, which may be empty. Raises InputError as `SafeTemplate`, and for an empty marker.
    """

    name: str
    source: str
    response_marker: str = RESPONSE_MARKER

    def __post_init__(self) -> None:
        _filler(self.name, self.source)
        if not self.response_marker.strip():
            raise InputError(
                f"data.response_marker={self.response_marker!r} is empty: give the text before an answer,"
                " such as '### Response:'"
            )

    def prompt(self, instruction: str, input: str = "") -> str:
        """What the model is given: the prompt and the marker, after which it answers."""
        filled = _filler(self.name, self.source).filled({"instruction": instruction, "input": input})
        return filled + self.response_marker

    def whole(self, example: Instruction) -> str:
        """The text to learn: prompt, marker and answer."""
        return self.prompt(example.instruction, example.input) + example.output

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint, from which `from_state` makes the same template."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The template of a checkpoint. Raises InputError as the class, and for an invalid state."""
        names = ("name", "source", "response_marker")
        if not isinstance(state, Mapping) or not all(isinstance(state.get(name), str) for name in names):
            raise InputError("the stored template is damaged: use another checkpoint, or give template=")
        name, source, marker = (state[name] for name in names)
        return cls("".join(filter(str.isprintable, name))[:200], source, marker)

    @classmethod
    def named(cls, template: str, response_marker: str | None = None) -> Self:
        r"""The template of that name, in that file, or of that Jinja text (which holds `{{`).

        `response_marker` None is the named one's own, and `\n\n### Response:\n` for a user's. Raises
        InputError as the class, for an unknown name and for a file that cannot be read.
        """
        name, marker = template, RESPONSE_MARKER
        if template in NAMED:
            source, marker = NAMED[template]
        elif "{{" in template or "{%" in template:
            name, source = "own", template
        elif (path := Path(template).expanduser()).is_file():
            source = read_utf8(path)
        else:
            raise InputError(
                f"data.template={template} is neither {' nor '.join(NAMED)} nor a file: give one of them, or"
                " a Jinja text with {{ instruction }}"
            )
        return cls(name, source, marker if response_marker is None else response_marker)


NAMED = {
    # Taori et al. 2023, as the book has it.
    "alpaca": (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\n{{ instruction }}"
        "{% if input %}\n\n### Input:\n{{ input }}{% endif %}",
        RESPONSE_MARKER,
    ),
    # Abdin et al. 2024, as the book has it (exercise 7.1).
    "phi3": (
        "<|user|>\n{{ instruction }}{% if input %}\n{{ input }}{% endif %}",
        "\n<|assistant|>:\n",
    ),
}
"""Source and response marker of the templates that have a name."""
