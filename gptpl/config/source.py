"""Settings of classes as their source files declare them: read, not imported.

torch and Lightning take seconds to import. What a class or function takes stands in its file, whoever wrote
it; so a wrong setting is found before they are imported. What a file does not say plainly (a metaclass,
several bases, a decorator of the user's) is left to `gptpl.config.signatures`, which looks at the class.
"""

import ast
import builtins
import sys
import typing
from collections.abc import Iterator
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from gptpl.config.signatures import OWN_PACKAGES, Parameter, Signature, merged, parameter
from gptpl.files.run_settings import current_name

Definition = ast.ClassDef | ast.FunctionDef
_WITHOUT_INIT = ("object", "ABC", "Protocol", "Generic")
"""Bases that take no settings."""


class UnclearError(Exception):
    """The source does not say it plainly."""


def read_signature(name: str) -> Signature | None:
    """The settings of the class or function with a dotted name; None where its source does not say them.

    An annotation with a type of a library that is not imported yet is `Any`.
    """
    parts = name.split(".")
    if current_name(name) != name:
        return None
    for end in range(len(parts) - 1, 0, -1):
        if (source := source_of(".".join(parts[:end]))) is not None:
            try:
                return source.signature(parts[-1]) if end == len(parts) - 1 else None
            except (UnclearError, RecursionError, SyntaxError):  # types and bases that name themselves; prose
                return None
    return None


@lru_cache(maxsize=256)
def source_of(module: str) -> "_Source | None":
    """The source file of a module, found without importing it or its packages."""
    first, *rest = module.split(".")
    try:
        spec = find_spec(first)
    except ValueError:  # a module without a file of its own, such as __main__
        return None
    if spec is None or spec.origin is None or (rest and spec.submodule_search_locations is None):
        return None
    path = Path(spec.origin)
    for part in rest:
        folder = path.parent / part
        path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    try:
        return _Source(module, ast.parse(path.read_text(encoding="utf-8")))
    except (OSError, SyntaxError, ValueError):
        return None


class _Source:
    """The top-level definitions and imports of a module."""

    def __init__(self, module: str, tree: ast.Module) -> None:
        self.module = module
        self.names: dict[str, ast.stmt] = {}
        for statement in tree.body:
            for name in _bound(statement):
                self.names[name] = statement

    def definition(self, name: str) -> "tuple[_Source, Definition]":
        """The class or function of that name, here or where it is imported from."""
        statement = self.names.get(name)
        if isinstance(statement, ast.ClassDef | ast.FunctionDef):
            return self, statement
        if isinstance(statement, ast.ImportFrom):
            return self._origin(statement).definition(_imported(statement, name))
        raise UnclearError

    def _origin(self, statement: ast.ImportFrom) -> "_Source":
        """The module that names are imported from."""
        source = source_of(str(statement.module)) if statement.level == 0 else None
        if source is None or source is self:  # a package's own submodule
            raise UnclearError
        return source

    def signature(self, name: str) -> Signature:
        """The settings of a class or function, as `gptpl.config.signatures.signature_of` has them."""
        source, found = self.definition(name)
        if isinstance(found, ast.FunctionDef):
            return source._of_function(found, is_method=False)
        return merged(source._inits(found))

    def _inits(self, found: ast.ClassDef) -> Iterator[Signature]:
        """The settings of each `__init__` of a class and its bases."""
        decorators = {_name_of(each) for each in found.decorator_list}
        if found.keywords or decorators - {"dataclass"}:
            raise UnclearError
        has_init = any("__init__" in _bound(each) for each in found.body)
        if decorators and (has_init or "init=False" in "".join(map(ast.unparse, found.decorator_list))):
            raise UnclearError
        if decorators:
            fields = sorted(self._fields(found).items(), key=lambda field: not field[1].positional)
            yield Signature(parameters=dict(fields), open=False)
            return
        for each in found.body:
            if isinstance(each, ast.FunctionDef) and each.name == "__init__":
                yield self._of_function(each, is_method=True)
            elif "__init__" in _bound(each):
                raise UnclearError
        bases = [each for each in map(_name_of, found.bases) if each not in _WITHOUT_INIT]
        if len(bases) > 1:
            raise UnclearError
        for base in bases:
            source, above = self.definition(base)
            if not isinstance(above, ast.ClassDef):
                raise UnclearError
            yield from source._inits(above)

    def _of_function(self, function: ast.FunctionDef, *, is_method: bool) -> Signature:
        if function.decorator_list and self.module.partition(".")[0] not in OWN_PACKAGES:
            raise UnclearError  # it may take other settings
        arguments = function.args
        named = [*arguments.posonlyargs, *arguments.args]
        defaults = [*(None for _ in named[len(arguments.defaults) :]), *arguments.defaults]
        given = [*zip(named, defaults, strict=True)][1 if is_method else 0 :]
        keywords = [*zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
        annotated = {each.arg: each.annotation for each, _ in (*given, *keywords)}
        hints = self._types({**annotated, "return": function.returns})
        found = {
            each.arg: parameter(hints[each.arg], required=default is None, positional=each in named)
            for each, default in (*given, *keywords)
        }
        return Signature(parameters=found, open=arguments.kwarg is not None)

    def _fields(self, found: ast.ClassDef) -> dict[str, Parameter]:
        """The settings of a dataclass, those of its bases first."""
        above: dict[str, Parameter] = {}
        for base in map(_name_of, found.bases):
            if base not in _WITHOUT_INIT:
                source, definition = self.definition(base)
                assert isinstance(definition, ast.ClassDef)
                above |= source._fields(definition)
        if not found.decorator_list:
            return above
        if len(found.decorator_list) > 1:
            raise UnclearError
        [decorator] = found.decorator_list
        by_name = isinstance(decorator, ast.Call) and "kw_only=True" in ast.unparse(decorator)
        own = [each for each in found.body if isinstance(each, ast.AnnAssign)]
        for each in own:
            special = any(word in ast.unparse(each.annotation) for word in ("ClassVar", "KW_ONLY"))
            if special or isinstance(each.value, ast.Call):
                raise UnclearError
        hints = self._types({ast.unparse(each.target): each.annotation for each in own})
        required = {ast.unparse(each.target): each.value is None for each in own}
        return above | {
            name: parameter(hint, required=required[name], positional=not by_name)
            for name, hint in hints.items()
        }

    # -------------------------------------------------------------------------------------------- types

    def _types(self, annotations: dict[str, ast.expr | None]) -> dict[str, Any]:
        """The types of annotations; `Any` for all of them where one names what is imported for checkers."""
        for each in annotations.values():
            if each is not None and not all(
                name in self.names or hasattr(builtins, name) for name in _names(each)
            ):
                return dict.fromkeys(annotations, Any)
        return {name: Any if each is None else self._type(each) for name, each in annotations.items()}

    def _type(self, annotation: ast.expr) -> Any:
        try:
            known = {name: self._value(name) for name in _names(annotation)}
            holder = SimpleNamespace(__annotations__={"it": ast.unparse(annotation)})
            return typing.get_type_hints(holder, localns=known, include_extras=True)["it"]
        except (UnclearError, NameError, TypeError, AttributeError, SyntaxError):
            return Any

    def _value(self, name: str) -> Any:
        """What a name stands for: a builtin, something of an imported module, or a type defined here."""
        statement = self.names.get(name)
        if statement is None and hasattr(builtins, name):
            return getattr(builtins, name)
        if isinstance(statement, ast.Assign):
            return self._type(statement.value)
        if isinstance(statement, ast.ImportFrom) and statement.level == 0:
            module = str(statement.module)
            if module in sys.modules or module.partition(".")[0] in sys.stdlib_module_names:
                return getattr(import_module(module), _imported(statement, name))
            if module.partition(".")[0] in OWN_PACKAGES:
                return self._origin(statement)._value(_imported(statement, name))
        raise UnclearError


def _bound(statement: ast.stmt) -> list[str]:
    """The names that a statement of a module binds, other than for type checkers alone."""
    if isinstance(statement, ast.ClassDef | ast.FunctionDef):
        return [statement.name]
    if isinstance(statement, ast.ImportFrom | ast.Import):
        return [each.asname or each.name.partition(".")[0] for each in statement.names]
    if isinstance(statement, ast.Assign):
        return [each.id for each in statement.targets if isinstance(each, ast.Name)]
    if isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING":
        return []
    inner = [each for each in ast.iter_child_nodes(statement) if isinstance(each, ast.stmt)]
    return [name for each in inner for name in _bound(each)]


def _imported(statement: ast.ImportFrom, name: str) -> str:
    """The name that an import gives another one."""
    return next(each.name for each in statement.names if name in (each.name, each.asname))


def _names(annotation: ast.AST) -> set[str]:
    """The names in an annotation, also in its strings, apart from the words of a Literal."""
    if isinstance(annotation, ast.Name):
        return {annotation.id}
    if isinstance(annotation, ast.Subscript) and _name_of(annotation).rpartition(".")[2] == "Literal":
        return _names(annotation.value)
    if isinstance(annotation, ast.Subscript) and _name_of(annotation).rpartition(".")[2] == "Annotated":
        of_type, *marks = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else []
        words = [each for each in marks if not isinstance(each, ast.Constant)]
        return _names(annotation.value).union(*map(_names, [of_type, *words]))
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return _names(ast.parse(annotation.value, mode="eval"))
    return {name for each in ast.iter_child_nodes(annotation) for name in _names(each)}


def _name_of(expression: ast.expr) -> str:
    """`Base` of `Base`, of `Base[int]` and of `base(...)`; `L.Callback` as it is."""
    if isinstance(expression, ast.Subscript):
        return _name_of(expression.value)
    return _name_of(expression.func) if isinstance(expression, ast.Call) else ast.unparse(expression)
