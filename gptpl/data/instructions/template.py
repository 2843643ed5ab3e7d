"""How an instruction becomes a prompt, and where the answer begins."""

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import jinja2
from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gptpl.data.corpora.reading import read_utf8
from gptpl.data.instructions.entries import Entry
from gptpl.errors import InputError

FIELDS = ("instruction", "input")
RESPONSE_MARKER = "\n\n### Response:\n"
"""Alpaca's; also of a user's own template that gives none."""

# A template may come with a checkpoint from anywhere: the sandbox keeps it from everything but its texts.
_JINJA = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, autoescape=False)


@dataclass(frozen=True)
class PromptTemplate:
    """A Jinja template of the prompt, and the text between prompt and answer.

    Attributes:
        name: "alpaca", "phi3", or where the user's own came from.
        source: Jinja, with `instruction` and, if wanted, `input`, which may be empty.
        response_marker: what stands after the prompt; the answer follows it.

    Raises InputError for what is no Jinja, for an unknown field, for a template without `instruction`, and
    for an empty marker.
    """

    name: str
    source: str
    response_marker: str = RESPONSE_MARKER

    def __post_init__(self) -> None:
        try:
            used = meta.find_undeclared_variables(_JINJA.parse(self.source))
        except jinja2.TemplateSyntaxError as error:
            raise InputError(
                f"data.template={self.name}, line {error.lineno}, is no Jinja template ({error.message}):"
                " mend it, or choose alpaca or phi3"
            ) from error
        for field in sorted(used - set(FIELDS)):
            raise InputError(
                f"data.template={self.name} uses {field!r}, which no entry has: use {{{{ instruction }}}} and"
                " {{ input }}"
            )
        if "instruction" not in used:
            raise InputError(
                f"data.template={self.name} leaves the instruction out: write {{{{ instruction }}}} where it"
                " belongs"
            )
        if not self.response_marker.strip():
            raise InputError(
                f"data.response_marker={self.response_marker!r} is empty: give what stands before the answer,"
                " such as '### Response:'"
            )

    @cached_property
    def _template(self) -> jinja2.Template:
        return _JINJA.from_string(self.source)

    def prompt(self, instruction: str, input: str = "") -> str:
        """What is given to the model: the prompt and the marker; the answer is to follow."""
        try:
            text = self._template.render(instruction=instruction, input=input)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as error:
            raise InputError(f"data.template={self.name} cannot be filled in ({error}): mend it") from error
        return text + self.response_marker

    def whole(self, entry: Entry) -> str:
        """What is learned: prompt, marker and answer."""
        return self.prompt(entry.instruction, entry.input) + entry.output

    def state(self) -> dict[str, Any]:
        """Plain data for a checkpoint; `PromptTemplate(**state)` is the same template."""
        return asdict(self)

    @classmethod
    def named(cls, template: str, response_marker: str | None = None) -> Self:
        r"""The template of a name, a file, or a Jinja text (which holds `{{`).

        `response_marker` None is the named one's own, and `\n\n### Response:\n` for a user's.

        Raises InputError as the class, for an unknown name and for a file that cannot be read.
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
