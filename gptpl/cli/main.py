"""`gptpl COMMAND [overrides]`: runs the command; errors become a line and an exit status."""

import logging
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import wraps
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import FunctionType, ModuleType
from typing import Any

from gptpl import __version__
from gptpl.cli.help import command_help, commands, completion, module_of, program_help
from gptpl.errors import InputError, one_line, os_error_text
from gptpl.text import nearest

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
SPIN_COUNT = "1000"
"""How often an idle thread of GNU OpenMP, torch's on Linux, looks for work before it sleeps: for about 30 us.

By default it looks for milliseconds: next to another busy process the threads of a small model then spend
their time on waiting for each other. GOMP_SPINCOUNT and OMP_WAIT_POLICY overrule it.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit status: 0, 1 (failed), 2 (bad input) or 130 (Ctrl-C).

    An error is one line on standard error; `--debug`, or HYDRA_FULL_ERROR=1, shows its traceback too.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    debug = "--debug" in arguments or os.environ.get("HYDRA_FULL_ERROR") == "1"
    arguments = [argument for argument in arguments if argument != "--debug"]
    if "torch" not in sys.modules:
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
        sys.meta_path.insert(0, _Postponing())
    try:
        status = _run(arguments)
        sys.stdout.flush()  # here, where a closed pipe can be handled
        return status
    except InputError as error:
        return _fail(error, str(error), EXIT_BAD_INPUT, debug=debug)
    except KeyboardInterrupt as error:
        return _fail(error, "interrupted", EXIT_INTERRUPTED, debug=debug)
    except BrokenPipeError:
        # The reader of our output, such as `head`, has ended: nothing is wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except OSError as error:
        return _fail(error, os_error_text(error), EXIT_FAILED, debug=debug)


def _fail(error: BaseException, message: str, status: int, *, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    print(f"gptpl: error: {one_line(message)}", file=sys.stderr)
    return status


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(program_help(commands()))
        return 0
    if arguments[0] == "--version":
        print(f"gptpl {__version__}")
        return 0
    if arguments[0] == "completion":
        print(completion(arguments[1:]))
        return 0
    command, overrides = arguments[0], arguments[1:]
    group = {name: text for name, text in commands().items() if name.startswith(f"{command} ")}
    if group:
        if not overrides or overrides[0] in ("-h", "--help"):
            print(program_help(group))
            return 0
        command, overrides = f"{command} {overrides[0]}", overrides[1:]
    if command not in commands():
        offered = ", ".join(group or commands())
        raise InputError(
            f"gptpl has no command {command!r}: choose one of {offered}{nearest(command, commands())}"
        )
    if "-h" in overrides or "--help" in overrides:
        print(command_help(command, _config_dir(overrides)))
        return 0
    # Only the command that runs is imported: `generate` need not wait for what `train` imports.
    return int(import_module(f"gptpl.cli.commands.{module_of(command)}").run(overrides))


def _config_dir(arguments: list[str]) -> str | None:
    """The folder of `--config-dir`, whose choices `--help` lists, too."""
    for number, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag in ("-cd", "--config-dir"):
            return value if equals else next(iter(arguments[number + 1 :]), None)
    return None


# --- libraries that Lightning imports, and a run hardly uses ---------------------------------------------
#
# `import lightning` also imports torch's compiler with sympy, all metrics of torchmetrics, matplotlib and,
# where it is installed, transformers: two thirds of its time. Here these modules come when something of them
# is asked for, apart from the few names that Lightning and torch's optimizers ask for in every run. This is
# `importlib.util.LazyLoader` with such names. Read in torch 2.13, lightning 2.6.6 and torchmetrics 1.9.


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


class _Postponing(MetaPathFinder):
    """Finds the modules of `_AT_HAND`, and for those in them runs their package first, as always."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name in _AT_HAND:
            spec = PathFinder.find_spec(name, path)
            if spec is not None and spec.loader is not None:
                spec.loader = _PostponedLoader(spec.loader)
            return spec
        package = name.rpartition(".")[0]
        while package:
            if package in _AT_HAND and not name.startswith(_WITHOUT_THEIR_PACKAGE):
                _loaded(package)
                if name in sys.modules:
                    return ModuleSpec(name, _AlreadyLoader(sys.modules[name]))
            package = package.rpartition(".")[0]
        return None


if __name__ == "__main__":
    sys.exit(main())
