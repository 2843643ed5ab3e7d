"""Classes by dotted name, and their settings: types, which are required, which a resume may change."""

import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any, get_args

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from gptpl.errors import InputError
from gptpl.files.run_settings import current_name
from gptpl.settings import KINDS, Limit, Resume, limit_of

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
    default: Any
    """Where it is not required."""
    positional: bool
    """Whether it may be given without its name."""
    resume: Resume | None
    """None: the signature does not say."""
    limit: Limit | None
    """Which values it takes, where the signature says more than the type."""


def parameter(annotation: Any, *, required: bool, positional: bool, default: Any = None) -> Parameter:
    """A setting, with the marks that its annotation holds."""
    marks = getattr(annotation, "__metadata__", ())
    return Parameter(
        annotation=annotation,
        required=required,
        default=default,
        positional=positional,
        resume=next((mark for mark in marks if mark in KINDS), None),
        limit=limit_of(annotation),
    )


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
        parameters[name] = parameter(
            hints.get(name, Any),
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
