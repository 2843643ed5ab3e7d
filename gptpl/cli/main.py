"""`gptpl COMMAND [overrides]`: runs the command; errors become a line and an exit status."""

import os
import sys
import traceback

from gptpl import __version__
from gptpl.cli.help import command_help, commands, completion, function_of, program_help
from gptpl.cli.postponed_imports import Postponing
from gptpl.errors import InputError, ProcessError, os_error_text
from gptpl.text import closest, shortened
from gptpl.training.run_log import further_process

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
        sys.meta_path.insert(0, Postponing())
    try:
        status = _run(arguments)
        sys.stdout.flush()  # here, where a closed pipe can be handled
        return status
    except InputError as error:
        return _fail(error, str(error), EXIT_BAD_INPUT, debug=debug)
    except ProcessError as error:
        return _fail(error, str(error), EXIT_FAILED, debug=debug)
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
    which = further_process()
    # Messages quote names from files that anybody may have made.
    print(f"gptpl: error: {f'{which}: ' if which else ''}{shortened(message, 2_000)}", file=sys.stderr)
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
        meant = _meant(command, overrides)
        raise InputError(
            f"gptpl has no command {command!r}: choose one of {offered}"
            f"{f': did you mean {meant}?' if meant else ''}"
        )
    if "-h" in overrides or "--help" in overrides:
        print(command_help(command, _config_dir(overrides)))
        return 0
    # Only the command that runs is imported: `generate` need not wait for what `train` imports.
    return function_of(command)(overrides)


def _meant(command: str, arguments: list[str]) -> str:
    """The command, or family of commands, that is most like a misspelt one; "" if none is.

    It is compared with whole names and with each of their words: `run` is meant to be `runs`, not `runs rm`,
    `run list` is `runs list`, and `convert` is `weights convert`.
    """
    names: dict[str, str] = {}
    for name in commands():
        first, *rest = name.split()
        names.setdefault(first, first)
        for part in (name, *rest):
            names.setdefault(part, name)
    found = names.get(closest(command, names), "")
    whole = " ".join([found, *arguments[:1]])
    return whole if whole in commands() else found


def _config_dir(arguments: list[str]) -> str | None:
    """The folder of `--config-dir`, whose choices `--help` lists, too."""
    for number, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag in ("-cd", "--config-dir"):
            return value if equals else next(iter(arguments[number + 1 :]), None)
    return None
