"""Classes by dotted name, and their settings: types, which are required, which a resume may change.

They are looked up in the class, or read in its source file without importing it, as torch and Lightning take
seconds to import: what a class or function takes stands in its file, whoever wrote it, so a wrong setting is
found before they are imported. What a file does not say plainly (a metaclass, several bases, a decorator of
the user's) is left to the class itself.
"""

import ast
import builtins
import dataclasses
import inspect
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from gptpl.errors import InputError
from gptpl.files.run_settings import current_name
from gptpl.settings import Resume

OWN_PACKAGES = frozenset({"gptpl", "torch", "lightning"})
_PLAIN = (bool, int, float, str, type(None))


def locate(name: str, key: str) -> Any:
    """The class or function with a dotted name, also a nested class; `key` names the setting in messages."""
    parts = name.split(".")
    if not all(part.isidentifier() for part in parts) or len(parts) < 2:
        raise InputError(f"{key}={name} is not a class: give package.module.Class")
    if (now := current_name(name)) != name:
        raise InputError(f"{key}={name} has moved: give {now}")
    for end in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:end])
        try:
            found: Any = import_module(module)
        except ImportError as error:
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            if missing is not None and f"{module}.".startswith(f"{missing}."):
                continue  # the module may be a class
            raise InputError(f"{key}={name} cannot be imported: {error}") from error
        for part in parts[end:]:
            found = getattr(found, part, None)
            if found is None:
                raise InputError(f"{key}={name} cannot be imported: {module} has no {part}")
        return found
    raise InputError(
        f"{key}={name} cannot be imported: install the package {parts[0]}, or run gptpl in the folder that"
        " holds it"
    )


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A setting that a class takes by name."""

    annotation: Any
    """Its type; `Any` where it has none, or one that cannot be resolved."""
    required: bool
    default: Any = None
    """Where it is not required."""
    positional: bool
    """Whether it may be given without its name."""

    @property
    def resume(self) -> Resume | None:
        """Whether a resume may change it; None: the signature does not say."""
        marks = getattr(self.annotation, "__metadata__", ())
        return next((mark for mark in marks if mark in get_args(Resume)), None)


@dataclass(frozen=True, kw_only=True)
class Signature:
    """All settings of a class or function; `open`: it takes any others, too."""

    parameters: Mapping[str, Parameter]
    open: bool


@lru_cache(maxsize=256)
def signature_of(target: Callable[..., Any]) -> Signature:
    """The settings of a function or of a class, with those of the base classes that get its `**kwargs`."""
    if not inspect.isclass(target):
        return _of_function(target, target)
    if dataclasses.is_dataclass(target):
        return _of_function(target.__init__, target)
    classes = (each for each in target.__mro__ if "__init__" in vars(each) and each is not object)
    return merged(_of_function(vars(each)["__init__"], each) for each in classes)


def merged(inits: Iterable[Signature]) -> Signature:
    """The settings of a class by those of each `__init__`, its own and, while these are open, its bases'."""
    found: dict[str, Parameter] = {}
    for each in inits:
        found = {**each.parameters, **found}
        if not each.open:
            return Signature(parameters=found, open=False)
    return Signature(parameters=found, open=bool(found))


def _of_function(function: Callable[..., Any], owner: Any) -> Signature:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C
        return Signature(parameters={}, open=True)
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError, AttributeError):  # a name imported for type checkers alone
        hints = {}
    if dataclasses.is_dataclass(owner):
        hints = typing.get_type_hints(owner, include_extras=True) | hints
    parameters: dict[str, Parameter] = {}
    for name, each in list(signature.parameters.items())[1 if inspect.isclass(owner) else 0 :]:
        if each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD):
            continue
        parameters[name] = Parameter(
            annotation=hints.get(name, Any),
            required=each.default is each.empty,
            default=each.default,
            positional=each.kind is not each.KEYWORD_ONLY,
        )
    kinds = [each.kind for each in signature.parameters.values()]
    return Signature(parameters=parameters, open=inspect.Parameter.VAR_KEYWORD in kinds)


def typed(value: Any, annotation: Any) -> Any:
    """The plain value as its type has it (1 for a float becomes 1.0), with lists as lists.

    A mapping with `_target_`, which becomes an object later, is left as it is. Raises ValueError saying what
    the value must be.
    """
    adapter = None if annotation is Any or _has_target(value) else _adapter(annotation)
    if adapter is None:
        return value
    try:
        return _plain(value, adapter.validate_python(value))
    except ValidationError as error:
        raise ValueError(_wanted(error)) from error


@lru_cache(maxsize=1024)
def _adapter(annotation: Any) -> TypeAdapter[Any] | None:
    config = ConfigDict(arbitrary_types_allowed=True, coerce_numbers_to_str=True)
    for given in (config, None):  # a type that has a configuration of its own takes no other
        try:
            return TypeAdapter(annotation, config=given)
        except (PydanticUserError, PydanticSchemaGenerationError, TypeError, NameError):
            continue
    return None


def _plain(value: Any, found: Any) -> Any:
    if isinstance(value, list) and isinstance(found, list | tuple) and len(value) == len(found):
        return [_plain(one, other) for one, other in zip(value, found, strict=True)]
    return found if isinstance(value, _PLAIN) and isinstance(found, _PLAIN) else value


def _wanted(error: ValidationError) -> str:
    """What the value, or the first wrong member of a list, must be: `must be a valid integer or 'auto'`."""
    wanted: dict[str, list[str]] = {}
    for each in error.errors():
        text = each["msg"].removeprefix("Input should be ").partition(", ")[0]
        if each["type"] == "literal_error":
            text = each["ctx"]["expected"]
        elif each["type"] == "is_instance_of" and "Sequence" in text:
            text = "a list, such as [1,2]"
        elif each["type"] == "sequence_str":
            text = f"a list, such as [{each['input']}]"
        elif each["type"] in ("is_instance_of", "none_required"):
            continue
        place = "".join(f"[{part}] " for part in each["loc"] if isinstance(part, int))
        wanted.setdefault(place, []).append(text)
    for place, texts in wanted.items():
        return f"{place}must be {' or '.join(dict.fromkeys(texts))}"
    return "must be of another type"


def dataclass_in(annotation: Any) -> type | None:
    """The dataclass in a type, such as that of the members of a list, if there is one."""
    if inspect.isclass(annotation) and dataclasses.is_dataclass(annotation):
        return annotation
    return next(filter(None, map(dataclass_in, get_args(annotation))), None)


def _has_target(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "_target_" in value or any(_has_target(each) for each in value.values())
    return isinstance(value, list) and any(_has_target(each) for each in value)


# --- read in a source file ------------------------------------------------------------------------------

Definition = ast.ClassDef | ast.FunctionDef
_WITHOUT_INIT = ("object", "ABC", "Protocol", "Generic")
"""Bases that take no settings."""


class UnclearError(Exception):
    """The source does not say it plainly."""


def read_signature(name: str) -> Signature | None:
    """The settings of the class or function with a dotted name; None where its source does not say them.

    An annotation with a type of a library that is not imported yet is `Any`.
    """
    module, _, last = name.rpartition(".")
    source = source_of(module) if current_name(name) == name else None
    try:
        return None if source is None else source.signature(last)
    except (UnclearError, RecursionError):  # types and bases that name themselves
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
        self.names = {name: statement for statement in tree.body for name in _bound(statement)}

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
        if decorator := _decorator(found):
            if "init=False" in decorator or any("__init__" in _bound(each) for each in found.body):
                raise UnclearError
            fields = sorted(self._fields(found).items(), key=lambda field: not field[1].positional)
            yield Signature(parameters=dict(fields), open=False)
            return
        for each in found.body:
            if isinstance(each, ast.FunctionDef) and each.name == "__init__":
                yield self._of_function(each, is_method=True)
            elif "__init__" in _bound(each):
                raise UnclearError
        for source, above in self._bases(found):
            yield from source._inits(above)

    def _bases(self, found: ast.ClassDef) -> "Iterator[tuple[_Source, ast.ClassDef]]":
        """The class that takes settings among the bases, if there is one."""
        bases = [each for each in map(_name_of, found.bases) if each not in _WITHOUT_INIT]
        if len(bases) > 1:
            raise UnclearError
        for base in bases:
            source, above = self.definition(base)
            if not isinstance(above, ast.ClassDef):
                raise UnclearError
            yield source, above

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
            each.arg: Parameter(
                annotation=hints[each.arg], required=default is None, positional=each in named
            )
            for each, default in (*given, *keywords)
        }
        return Signature(parameters=found, open=arguments.kwarg is not None)

    def _fields(self, found: ast.ClassDef) -> dict[str, Parameter]:
        """The settings of a dataclass, those of its bases first."""
        fields: dict[str, Parameter] = {}
        for source, above in self._bases(found):
            fields |= source._fields(above)
        decorator = _decorator(found)
        own = [each for each in found.body if isinstance(each, ast.AnnAssign) and decorator]
        for each in own:
            special = any(word in ast.unparse(each.annotation) for word in ("ClassVar", "KW_ONLY"))
            if special or isinstance(each.value, ast.Call):
                raise UnclearError
        hints = self._types({ast.unparse(each.target): each.annotation for each in own})
        by_position = "kw_only=True" not in decorator
        for each in own:
            name, required = ast.unparse(each.target), each.value is None
            fields[name] = Parameter(annotation=hints[name], required=required, positional=by_position)
        return fields

    # -------------------------------------------------------------------------------------------- types

    def _types(self, annotations: dict[str, ast.expr | None]) -> dict[str, Any]:
        """The types of annotations; `Any` for all of them where one names what is imported for checkers."""
        try:
            return {name: Any if each is None else self._type(each) for name, each in annotations.items()}
        except NameError:
            return dict.fromkeys(annotations, Any)

    def _type(self, annotation: ast.expr) -> Any:
        holder = SimpleNamespace(__annotations__={"it": ast.unparse(annotation)})
        names: dict[str, Any] = {"__builtins__": {}}
        try:
            while True:
                try:
                    return typing.get_type_hints(holder, names, include_extras=True)["it"]
                except NameError as missing:
                    name = str(missing.name)
                    names[name] = self._value(name)
        except (UnclearError, TypeError, AttributeError, SyntaxError):
            return Any

    def _value(self, name: str) -> Any:
        """What a name stands for: a builtin, something of an imported module, or a type defined here."""
        statement = self.names.get(name)
        if statement is None:
            if not hasattr(builtins, name):
                raise NameError(name)
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


def _decorator(found: ast.ClassDef) -> str:
    """The source of the decorator that makes a class a dataclass; empty without one."""
    decorators = found.decorator_list
    if found.keywords or len(decorators) > 1 or any(_name_of(each) != "dataclass" for each in decorators):
        raise UnclearError
    return "".join(map(ast.unparse, decorators))


def _imported(statement: ast.ImportFrom, name: str) -> str:
    """The name that an import gives another one."""
    return next(each.name for each in statement.names if name in (each.name, each.asname))


def _name_of(expression: ast.expr) -> str:
    """`Base` of `Base`, of `Base[int]` and of `base(...)`; `L.Callback` as it is."""
    if isinstance(expression, ast.Subscript):
        return _name_of(expression.value)
    return _name_of(expression.func) if isinstance(expression, ast.Call) else ast.unparse(expression)
