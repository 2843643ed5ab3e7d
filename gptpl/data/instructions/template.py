"""How an instruction becomes a prompt, and where the answer begins."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

from gptpl.data.instructions.splits import Instruction
from gptpl.data.sources.base import read_utf8
from gptpl.errors import InputError
from gptpl.files.template import SafeTemplate

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
        if template in NAMED:
            source, own_marker = NAMED[template]
            return cls(template, source, own_marker if response_marker is None else response_marker)
        marker = RESPONSE_MARKER if response_marker is None else response_marker
        if "{{" in template or "{%" in template:
            return cls("own", template, marker)
        path = Path(template).expanduser()
        if not path.is_file():
            raise InputError(
                f"data.template={template} is neither {' nor '.join(NAMED)} nor a file: give one of them, or"
                " a Jinja text with {{ instruction }}"
            )
        return cls(str(template), read_utf8(path), marker)


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
