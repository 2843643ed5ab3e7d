"""What the judge is asked: Jinja templates, filled in a sandbox."""

from collections.abc import Collection, Mapping

from jinja2 import StrictUndefined, Template, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gptpl.errors import InputError

Message = dict[str, str]
"""`role` (system, user or assistant) and `content`."""

SCORE_FIELDS = ("instruction", "input", "output", "model_response", "rubric", "min_score", "max_score")
COMPARISON_FIELDS = ("instruction", "input", "output", "answer_a", "answer_b", "rubric")


class Prompt:
    """A template that is checked when it is made.

    Args:
        template: Jinja source.
        key: the setting that holds it, for messages.
        fields: names that it may use.
        needed: those that it must use, for without them the judge would not see what it judges.

    Raises:
        InputError: no Jinja, another field, or a needed one left out.
    """

    def __init__(
        self, template: str, *, key: str, fields: Collection[str], needed: Collection[str] = ()
    ) -> None:
        # Strict: a field that is missing must not become an empty text.
        environment = ImmutableSandboxedEnvironment(
            undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        try:
            used = meta.find_undeclared_variables(environment.parse(template))
            self._template: Template = environment.from_string(template)
        except TemplateError as error:
            raise InputError(f"{key} is no Jinja template ({error}): mend it") from error
        if unknown := sorted(used - set(fields)):
            raise InputError(f"{key} uses {{{{ {unknown[0]} }}}}: the fields are {', '.join(fields)}")
        if left_out := [name for name in needed if name not in used]:
            raise InputError(f"{key} leaves {{{{ {left_out[0]} }}}} out: the judge would not see it, add it")
        self._key = key

    def filled(self, values: Mapping[str, object]) -> str:
        """The text with every field in its place. Raises InputError where that fails."""
        try:
            return self._template.render(values)
        except (TemplateError, TypeError, ArithmeticError) as error:
            raise InputError(f"{self._key} cannot be filled in ({error}): mend it") from error


def conversation(system: str, prompt: str) -> list[Message]:
    """The messages of one question; an empty `system` is left out."""
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": prompt}]


def asked_again(messages: list[Message], reply: str, reminder: str) -> list[Message]:
    """The conversation with a reply that could not be read, and the reminder of the form."""
    return [*messages, {"role": "assistant", "content": reply}, {"role": "user", "content": reminder}]
