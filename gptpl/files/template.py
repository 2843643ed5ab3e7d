"""Templates: those of the package's pages, and prompts that anybody may have written.

Jinja's sandbox bounds neither time nor memory. So a prompt's template may use only what makes little more of
a text than the text: nothing that runs code, no loops, variables, products, or filters that repeat.
"""

from collections.abc import Collection, Mapping
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gptpl.errors import InputError
from gptpl.text import shortened


def package_templates(**settings: Any) -> jinja2.Environment:
    """The package's own templates, by their paths in it; HTML displays values and never interprets them."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("gptpl", "."),
        autoescape=jinja2.select_autoescape(),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **settings,
    )


# --- prompts that anybody may have written --------------------------------------------------------------

MOST_CHARACTERS = 50_000
"""Of a template."""
MOST_USES = 100
"""How often a template may name its fields: so much longer than them can its text be."""

_NODES = frozenset(
    (
        *("Template", "Output", "TemplateData", "Name", "Const", "If", "CondExpr", "And", "Or", "Not"),
        *("Compare", "Operand", "Test", "Filter", "Keyword", "Concat", "Getitem", "Slice", "Getattr", "Call"),
        *("Add", "Sub", "Div", "FloorDiv", "Neg", "Pos"),
    )
)
_FILTERS = ("trim", "upper", "lower", "title", "capitalize", "length", "default", "d", "int", "float")
_METHODS = (
    *("strip", "lstrip", "rstrip", "removeprefix", "removesuffix", "startswith", "endswith"),
    *("upper", "lower", "title", "capitalize"),
)


class SafeTemplate:
    """A Jinja template of named fields, checked when it is made.

    It may use `if`, comparisons, sums, `~`, slices (`input[:80]`), the filters in `_FILTERS`, and methods of
    texts such as `strip` and `startswith`.

    Args:
        source: the template.
        name: what messages call it, such as "judge.prompt".
        fields: what it may name.
        needed: what it must name.
        trim_blocks: whether a block on a line of its own leaves no line behind.

    Raises InputError for a template that is not Jinja, too long, or uses anything else.
    """

    def __init__(
        self,
        source: str,
        *,
        name: str,
        fields: Collection[str],
        needed: Collection[str] = (),
        trim_blocks: bool = False,
    ) -> None:
        self._name = name
        if len(source) > MOST_CHARACTERS:
            raise InputError(f"{name} must have at most {MOST_CHARACTERS:,} characters, got {len(source):,}")
        environment = ImmutableSandboxedEnvironment(
            undefined=jinja2.StrictUndefined, trim_blocks=trim_blocks, lstrip_blocks=trim_blocks
        )
        try:
            tree = environment.parse(source)
            problem = _problem(tree, fields, needed)
            if not problem:  # Jinja computes constants when it compiles: what may grow is refused before
                self._template = environment.from_string(tree)
        except (jinja2.TemplateError, ValueError, RecursionError, SyntaxError, MemoryError) as error:
            line = f"line {error.lineno}: " if isinstance(error, jinja2.TemplateSyntaxError) else ""
            reason = shortened(str(error) or type(error).__name__, 200)
            problem = f"is not a Jinja template ({line}{reason}): correct it"
        if problem:
            raise InputError(f"{name} {problem}")

    def filled(self, values: Mapping[str, object]) -> str:
        """The text with every field in its place. Raises InputError where an operation fails."""
        try:
            return self._template.render(values)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            reason = shortened(str(error), 200)
            raise InputError(f"{self._name} cannot be filled in ({reason}): correct it") from error


def _problem(tree: nodes.Template, fields: Collection[str], needed: Collection[str]) -> str:
    """What is wrong with a template, after its name; empty if nothing is."""
    methods = {id(call.node) for call in tree.find_all(nodes.Call) if isinstance(call.node, nodes.Getattr)}
    for node in tree.find_all(nodes.Node):
        what = ""
        if type(node).__name__ not in _NODES:
            what = type(node).__name__
        elif isinstance(node, nodes.Filter) and node.name not in _FILTERS:
            what = f"the filter {node.name!r}"
        elif isinstance(node, nodes.Getattr) and (id(node) not in methods or node.attr not in _METHODS):
            what = f".{node.attr}"
        elif isinstance(node, nodes.Call) and id(node.node) not in methods:
            what = "a call"
        if what:
            return (
                f"uses {what} in line {node.lineno}: use its fields with if, comparisons, ~, slices, and the"
                f" filters {', '.join(_FILTERS)}"
            )
    used = [node.name for node in tree.find_all(nodes.Name)]
    if unknown := sorted(set(used) - set(fields)):
        return f"uses {{{{ {unknown[0]} }}}}: the fields are {', '.join(fields)}"
    if missing := [field for field in needed if field not in used]:
        return f"does not use {{{{ {missing[0]} }}}}: add it where it belongs"
    if len(used) > MOST_USES:
        return f"must use its fields at most {MOST_USES} times, got {len(used)}"
    return ""
