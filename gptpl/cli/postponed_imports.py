"""Libraries that Lightning imports and a run hardly uses: they come when something of them is asked for.

`import lightning` also imports torch's compiler with sympy, all metrics of torchmetrics, matplotlib and,
where it is installed, transformers: two thirds of its time. Commands postpone these modules, apart from the
few names that Lightning and torch's optimizers ask for in every run. This is `importlib.util.LazyLoader`
with such names. Read in torch 2.13, lightning 2.6.6 and torchmetrics 1.9.
"""

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import wraps
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import FunctionType, ModuleType
from typing import Any


class _CompiledModule(type):
    """The class of `_OptimizedModule`: its instances are those of torch's class, once there can be some."""

    def __instancecheck__(cls, instance: object) -> bool:
        compiler = sys.modules.get("torch._dynamo.eval_frame")
        return compiler is not None and isinstance(instance, compiler.OptimizedModule)


class _OptimizedModule(metaclass=_CompiledModule):
    """Stands for the class of compiled modules, in `isinstance`."""


def _disable(function: Any = None, recursive: bool = True, **settings: Any) -> Any:
    """Keep the compiler out of a function: nothing is to be done until there is a compiler."""
    if not isinstance(function, FunctionType):
        return _loaded("torch._dynamo").disable(function, recursive, **settings)
    made: list[Callable[..., Any]] = []

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        compiler: Any = sys.modules["torch._dynamo"]
        if isinstance(compiler, _Postponed):
            return function(*arguments, **named)
        if not made:
            made.append(compiler.disable(function, recursive, **settings))
        return made[0](*arguments, **named)

    return call


def _metric() -> Any:
    import_module("torchmetrics.utilities")  # which imports torchmetrics.metric, and not the other way around
    return import_module("torchmetrics.metric").Metric


_AT_HAND: Mapping[str, Mapping[str, Callable[[], Any]]] = {
    "torch._dynamo": {
        "OptimizedModule": lambda: _OptimizedModule,
        "disable": lambda: _disable,
        "graph_break": lambda: lambda: None,  # of a compiled function
        "set_stance": lambda: lambda *stance, **settings: nullcontext(),  # how compiled functions run
    },
    "torchmetrics": {
        "Metric": _metric,
        "MetricCollection": lambda: import_module("torchmetrics.collections").MetricCollection,
        "__version__": lambda: import_module("importlib.metadata").version("torchmetrics"),
        "_logger": lambda: logging.getLogger("torchmetrics"),
    },
    # The types of its plots, in annotations.
    "torchmetrics.utilities.plot": {
        "_AX_TYPE": lambda: Any,
        "_PLOT_OUT_TYPE": lambda: Any,
        "plot_single_or_multi_val": lambda: _plot,
    },
}
_WITHOUT_THEIR_PACKAGE = ("torchmetrics.collections", "torchmetrics.metric", "torchmetrics.utilities")


def _plot(*arguments: Any, **settings: Any) -> Any:
    return _loaded("torchmetrics.utilities.plot").plot_single_or_multi_val(*arguments, **settings)


class _Postponed(ModuleType):
    """A module whose file is run when a name is asked for that is not at hand."""

    def __getattr__(self, name: str) -> Any:
        if name == "__path__":
            raise AttributeError(name)
        if name in (at_hand := _AT_HAND[self.__name__]):
            return at_hand[name]()
        return getattr(_loaded(self.__name__), name)


def _loaded(name: str) -> Any:
    """A postponed module after running its file."""
    module = sys.modules[name]
    if isinstance(module, _Postponed):
        module.__class__ = ModuleType  # type: ignore[assignment]  # it is one
        assert module.__spec__ is not None
        assert isinstance(module.__spec__.loader, _PostponedLoader)
        module.__spec__.loader = module.__loader__ = module.__spec__.loader.loader
        module.__loader__.exec_module(module)
    return module


class _PostponedLoader(Loader):
    """Makes a module and does not run its file."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def exec_module(self, module: ModuleType) -> None:
        module.__class__ = _Postponed


class _AlreadyLoader(Loader):
    """Finds the module that running its package has imported."""

    def __init__(self, module: ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec


class Postponing(MetaPathFinder):
    """Finds the modules of `_AT_HAND`, and for those in them runs their package first, as always."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        if name in _AT_HAND:
            spec = PathFinder.find_spec(name, path)
            if spec is not None and spec.loader is not None:
                spec.loader = _PostponedLoader(spec.loader)
            return spec
        for package in _AT_HAND:
            if name.startswith(f"{package}.") and not name.startswith(_WITHOUT_THEIR_PACKAGE):
                _loaded(package)
                if name in sys.modules:
                    return ModuleSpec(name, _AlreadyLoader(sys.modules[name]))
        return None
