"""A class by its name, and what it takes: names, types, what must be given, what a resume may change."""

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any, Literal, get_args, get_origin

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from gptpl.errors import InputError
from gptpl.files.run_settings import current_name
from gptpl.resuming import KINDS, Resume

_PLAIN = (bool, int, float, str, type(None))


def locate(name: str, key: str) -> Any:
    """The class or function of a dotted name, also a nested class. Raises InputError where there is none."""
    parts = name.split(".")
    if not all(part.isidentifier() for part in parts) or len(parts) < 2:
        raise InputError(f"{key}={name} is no class: give package.module.Class")
    if (now := current_name(name)) != name:
        raise InputError(f"{key}={name} has moved: write {now}")
    for end in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:end])
        try:
            found: Any = import_module(module)
        except ModuleNotFoundError as error:
            if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
                continue
            raise InputError(f"{key}={name} cannot be imported: {error}") from error
        except ImportError as error:
            raise InputError(f"{key}={name} cannot be imported: {error}") from error
        for part in parts[end:]:
            found = getattr(found, part, None)
            if found is None:
                raise InputError(f"{key}={name} cannot be imported: {module} has no {part}")
        return found
    raise InputError(
        f"{key}={name} cannot be imported: there is no package {parts[0]} (it must be installed, or lie in"
        " the folder that you are in)"
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


@dataclass(frozen=True, kw_only=True)
class Signature:
    """All settings of a class or function, `open` where it takes any others, too."""

    parameters: Mapping[str, Parameter]
    open: bool


@lru_cache(maxsize=256)
def signature_of(target: Callable[..., Any]) -> Signature:
    """The settings of a function or of a class, with those of the classes that it hands `**kwargs` on to."""
    if not inspect.isclass(target):
        return _of_function(target, target)
    if dataclasses.is_dataclass(target):
        return _of_function(target.__init__, target)
    found: dict[str, Parameter] = {}
    for each in target.__mro__:
        if "__init__" not in vars(each) or each is object:
            continue
        of_class = _of_function(vars(each)["__init__"], each)
        found = {**of_class.parameters, **found}
        if not of_class.open:
            return Signature(parameters=found, open=False)
    return Signature(parameters=found, open=bool(found))


def _of_function(function: Callable[..., Any], owner: Any) -> Signature:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C
        return Signature(parameters={}, open=True)
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError, AttributeError):  # a name that is there for type checkers alone
        hints = {}
    if dataclasses.is_dataclass(owner):
        hints = typing.get_type_hints(owner, include_extras=True) | hints
    parameters: dict[str, Parameter] = {}
    for name, each in list(signature.parameters.items())[1 if inspect.isclass(owner) else 0 :]:
        if each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD):
            continue
        annotation = hints.get(name, Any)
        parameters[name] = Parameter(
            annotation=annotation,
            required=each.default is each.empty,
            default=each.default,
            positional=each.kind is not each.KEYWORD_ONLY,
            resume=next((mark for mark in getattr(annotation, "__metadata__", ()) if mark in KINDS), None),
        )
    kinds = [each.kind for each in signature.parameters.values()]
    return Signature(parameters=parameters, open=inspect.Parameter.VAR_KEYWORD in kinds)


def typed(value: Any, annotation: Any) -> Any:
    """The plain value as the type wants it: 1 for a float is 1.0. Raises ValueError saying what it should be.

    What is to become an object (a mapping with `_target_`) is left as it is.
    """
    adapter = None if annotation is Any or _has_target(value) else _adapter(annotation)
    if adapter is None:
        return value
    try:
        found = adapter.validate_python(value)
    except ValidationError as error:
        raise ValueError(_said(error, annotation)) from error
    return _as_before(value, found)


@lru_cache(maxsize=1024)
def _adapter(annotation: Any) -> TypeAdapter[Any] | None:
    config = ConfigDict(arbitrary_types_allowed=True, coerce_numbers_to_str=True)
    for given in (config, None):  # a type that has a configuration of its own takes no other
        try:
            return TypeAdapter(annotation, config=given)
        except (PydanticUserError, PydanticSchemaGenerationError, TypeError, NameError):
            continue
    return None


def _as_before(value: Any, found: Any) -> Any:
    """What was found, where it is plain, in the containers that a YAML has."""
    if isinstance(value, list) and isinstance(found, list | tuple) and len(value) == len(found):
        return [_as_before(one, other) for one, other in zip(value, found, strict=True)]
    return found if isinstance(value, _PLAIN) and isinstance(found, _PLAIN) else value


def _said(error: ValidationError, annotation: Any) -> str:
    """What the value should be, in a few words."""
    choices = _literals(annotation)
    errors = error.errors()
    texts: list[str] = []
    for each in errors:
        if each["type"] == "literal_error" and choices:
            continue
        place = "".join(f"[{part}]" for part in each["loc"] if isinstance(part, int))
        text = f"{place or 'it'} {each['msg'].removeprefix('Input ').partition(', ')[0]}"
        if text not in texts and each["type"] not in ("none_required", "is_instance_of"):
            texts.append(text)
    if any("Sequence" in each["msg"] for each in errors):
        texts.append("it should be a list, such as [1,2]")
    if choices and not texts:
        return f"choose one of {', '.join(choices)}"
    if choices:
        return f"{', '.join(texts)}, or {' or '.join(choices)}"
    return ", ".join(texts) or "it should be of another type"


def _literals(annotation: Any) -> list[str]:
    """The words that a type names."""
    if get_origin(annotation) is Literal:
        return [str(each) for each in get_args(annotation)]
    inner = get_args(annotation)
    return [word for each in inner for word in _literals(each)] if get_origin(annotation) is not dict else []


def dataclass_in(annotation: Any) -> type | None:
    """The dataclass that a type names, if it names one."""
    if inspect.isclass(annotation) and dataclasses.is_dataclass(annotation):
        return annotation
    return next(filter(None, map(dataclass_in, get_args(annotation))), None)


def _has_target(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "_target_" in value or any(_has_target(each) for each in value.values())
    return isinstance(value, list) and any(_has_target(each) for each in value)
