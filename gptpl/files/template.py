"""Templates from anywhere: they put texts together, in a sandbox, not without end and not without measure.

Jinja's sandbox keeps a template from all but what it is given; it bounds neither time nor memory. So only
what is named here may be used, and whatever could grow (a loop, a text made of others) is charged to a budget
as it is filled in.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.filters import FILTERS
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gptpl.errors import InputError

MOST_SOURCE = 50_000
"""Characters of a template."""
MOST_MADE = 1_000_000
"""Characters that a template may make, and steps of its loops, beside ten times what it is given."""

_NODES = frozenset(
    (
        *("Template", "Output", "TemplateData", "Name", "Const", "List", "Tuple", "If", "For", "Assign"),
        *("CondExpr", "And", "Or", "Not", "Compare", "Operand", "Test", "Filter", "Keyword", "Concat"),
        *("Getitem", "Slice", "Getattr", "Call", "Add", "Sub", "Mul", "Div", "FloorDiv", "Mod", "Neg", "Pos"),
    )
)
_METHODS = frozenset(
    (
        *("strip", "lstrip", "rstrip", "removeprefix", "removesuffix", "split", "rsplit", "splitlines"),
        *("startswith", "endswith", "upper", "lower", "title", "capitalize"),
    )
)
_LOOP = frozenset(("index", "index0", "revindex", "revindex0", "first", "last", "length"))
_LARGEST_NUMBER = 2**64
_BUDGET = "_budget"
"""In the template's context, where no template can name it."""
_NOT_FILLED = (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError)


class SafeTemplate:
    """A Jinja template of named fields; checked when it is made.

    It may use `if`, `for`, `set`, comparisons, arithmetic, `~`, parts of texts (`input[:80]`), methods such
    as `strip` and `splitlines`, and the filters of `FILTER_NAMES`.

    `name` is what messages call it, such as "judge.prompt". With `trim_blocks` a block on a line of its own
    leaves no line behind.

    Raises InputError for what is no Jinja, too long, uses another field than `fields`, leaves one of `needed`
    out, or uses what templates may not.
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
        if len(source) > MOST_SOURCE:
            raise InputError(
                f"{name} has {len(source):,} characters: give a template of {MOST_SOURCE:,} at most"
            )
        environment = _Environment(trim_blocks=trim_blocks, lstrip_blocks=trim_blocks)
        try:
            tree = environment.parse(source)
            used = meta.find_undeclared_variables(tree)
            if not (unknown := sorted(used - set(fields))):
                self._template = environment.from_string(_bounded(tree).set_environment(environment))
        except (jinja2.TemplateError, ValueError, RecursionError, SyntaxError, MemoryError) as error:
            line = f"line {error.lineno}: " if isinstance(error, jinja2.TemplateSyntaxError) else ""
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(f"{name} is no Jinja template ({line}{reason}): mend it") from error
        except _RefusedError as error:
            raise InputError(f"{name}{error}: write it with if, for, set, ~ and {FILTER_NAMES}") from error
        if unknown:
            raise InputError(f"{name} uses {{{{ {unknown[0]} }}}}: the fields are {', '.join(fields)}")
        if left_out := [field for field in needed if field not in used]:
            raise InputError(f"{name} leaves {{{{ {left_out[0]} }}}} out: add it where it belongs")

    def filled(self, values: Mapping[str, object]) -> str:
        """The text with every field in its place. Raises InputError where that fails, or grows too large."""
        given = sum(len(value) for value in values.values() if isinstance(value, str))
        budget = _Budget(MOST_MADE + 10 * given)
        pieces = []
        try:
            for piece in self._template.generate({**values, _BUDGET: budget}):
                budget.spend(len(piece))
                pieces.append(piece)
        except _NOT_FILLED as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{self._name} cannot be filled in ({reason}): mend it") from error
        return "".join(pieces)


class _RefusedError(Exception):
    """What a template may not use; the message follows its name."""


class _Budget:
    """Characters and steps that a template has left."""

    def __init__(self, left: int) -> None:
        self._left = left

    def spend(self, amount: int) -> None:
        self._left -= amount
        if self._left < 0:
            raise jinja2.TemplateRuntimeError(
                f"it makes more than {MOST_MADE:,} characters, or loops too long"
            )


def _spend(context: Context, amount: int) -> None:
    context[_BUDGET].spend(amount)


def _length(value: object) -> int:
    """What it costs to look at a value. Lists hold nothing but texts and numbers."""
    if isinstance(value, list | tuple):
        return len(value) + sum(map(_length, value))
    return len(value) if isinstance(value, str) else 1


def _plain(value: Any) -> Any:
    """The value, to be shown or kept in a list: a list shown would be as long as all that it refers to."""
    if not isinstance(value, str | int | float | None | jinja2.Undefined):
        raise jinja2.TemplateRuntimeError(f"a {type(value).__name__} is not shown: use join or length")
    return value


class _Environment(ImmutableSandboxedEnvironment):
    """A field that is missing must not become an empty text, and what grows is paid for."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%"))

    def __init__(self, **options: Any) -> None:
        super().__init__(undefined=jinja2.StrictUndefined, autoescape=False, finalize=_plain, **options)
        self.globals = {}
        ours = (_plain, _weighed, _counted, _concatenated)
        self.filters = {**_ALLOWED, **{function.__name__: function for function in ours}}

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and isinstance(left, str | list) and isinstance(right, str | list):
            _spend(context, _length(left) + _length(right))
        else:
            for number in (left, right):
                if not isinstance(number, int | float) or abs(number) > _LARGEST_NUMBER:
                    raise TypeError(f"{operator} is for numbers, and not for large ones")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, method: Any, *values: Any, **options: Any) -> Any:
        # A method of a text costs what the text does, times what it looks for in it.
        _spend(context, _length(getattr(method, "__self__", None)) * (1 + _length(values)))
        return super().call(context, method, *values, **options)


# --- filters: the ones that templates may use, and those that _bounded puts in -----------------------------


def _charged(function: Callable[..., Any]) -> Callable[..., Any]:
    @jinja2.pass_context
    def charged(context: Context, value: Any, *values: Any, **options: Any) -> Any:
        _spend(context, _length(value) * (1 + _length((*values, *options.values()))))
        return function(value, *values, **options)

    return charged


@jinja2.pass_context
def _join(context: Context, values: Any, between: str = "") -> str:
    texts = [str(_plain(value)) for value in values]
    _spend(context, _length(texts) + len(texts) * len(between))
    return between.join(texts)


@jinja2.pass_context
def _replace(context: Context, text: str, old: str, new: str) -> str:
    _spend(context, len(text) + text.count(old) * len(new))
    return text.replace(old, new)


@jinja2.pass_context
def _weighed(context: Context, value: Any) -> Any:
    _spend(context, _length(value))
    return value


@jinja2.pass_context
def _counted(context: Context, values: Any, cost: int) -> Iterator[Any]:
    for value in values:
        _spend(context, cost)
        yield value


@jinja2.pass_context
def _concatenated(context: Context, values: list[Any]) -> str:
    _spend(context, _length(values))
    return "".join(map(str, values))


_ALLOWED: dict[str, Callable[..., Any]] = {
    **{name: _charged(FILTERS[name]) for name in ("trim", "upper", "lower", "title", "capitalize")},
    **{name: _charged(FILTERS[name]) for name in ("length", "count", "default", "d", "int", "float", "list")},
    "join": _join,
    "replace": _replace,
}
FILTER_NAMES = ", ".join(_ALLOWED)


# --- the template's tree -----------------------------------------------------------------------------------


def _bounded(node: Any) -> Any:
    """A node in which all that may grow pays for it. Raises _RefusedError for what templates may not use."""
    if not isinstance(node, nodes.Node):
        return node
    if (kind := type(node).__name__) not in _NODES:
        raise _refused(node, f"uses {kind}")
    for name, value in node.iter_fields():
        setattr(node, name, list(map(_bounded, value)) if isinstance(value, list) else _bounded(value))
    match node:
        case nodes.Filter() if node.name not in _ALLOWED:
            raise _refused(node, f"uses the filter {node.name!r}")
        case nodes.Getattr(node=nodes.Name(name="loop")) if node.attr in _LOOP:
            pass
        case nodes.Getattr() if node.attr not in _METHODS:
            raise _refused(node, f"uses .{node.attr}")
        case nodes.Call() if not (isinstance(node.node, nodes.Getattr) and node.node.attr in _METHODS):
            raise _refused(node, "calls what is no method of a text")
        case nodes.Tuple() if node.ctx != "load":
            raise _refused(node, "sets several names at once")
        case nodes.For() if node.recursive:
            raise _refused(node, "loops within itself")
        case nodes.For():  # a step costs what is in the loop
            node.iter = _filter(node.iter, _counted, sum(1 for _ in node.find_all(nodes.Node)))
        case nodes.Concat():  # as a filter, for Jinja lets nobody look at it
            texts = nodes.List([_filter(text, _plain) for text in node.nodes], lineno=node.lineno)
            return _filter(texts, _concatenated)
        case nodes.List() | nodes.Tuple():  # no lists in lists, which a short template could make endless
            node.items = [_filter(item, _plain) for item in node.items]
        case nodes.Compare():
            node.expr = _filter(node.expr, _weighed)
            for operand in node.ops:
                operand.expr = _filter(operand.expr, _weighed)
        case nodes.Test() | nodes.Getitem():
            node.node = _filter(node.node, _weighed)
    return node


def _filter(node: nodes.Node, function: Callable[..., Any], *values: int) -> nodes.Filter:
    given: list[nodes.Expr] = [nodes.Const(value) for value in values]
    return nodes.Filter(node, function.__name__, given, [], None, None, lineno=node.lineno)


def _refused(node: nodes.Node, what: str) -> Exception:
    return _RefusedError(f", line {node.lineno}, {what}")
