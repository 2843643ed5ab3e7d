"""`gptpl COMMAND [overrides]`: which command was meant, and what is said when something is wrong."""

import os
import sys
import traceback
from importlib import import_module
from pathlib import Path

from gptpl import __version__
from gptpl.cli.help import command_help, program_help
from gptpl.cli.nearest import nearest
from gptpl.errors import InputError

COMMANDS = {
    "train": "train a model, resume a run, or sweep over settings",
    "sweep": "train with several settings and compare them: the same as gptpl train -m",
    "plan": "what a run will cost, before it begins: memory, steps, time",
    "find-lr": "learning rates at which training falls fastest, and diverges",
    "find-batch-size": "speed and memory of every batch size that fits",
    "verify-resume": "check that stopping and resuming changes no bit on this machine",
    "generate": "continue a prompt with a trained model",
    "respond": "answer instructions with a tuned model, one or a whole file",
    "classify": "to which class texts belong, by a classifier that was trained",
    "inspect": "how surprised a trained model is by each token of a text, as a web page",
    "evaluate": "loss of a trained model on any data; of a classifier its accuracy, F1 and calibration",
    "judge": "score a model's answers by their references, a judge model, or another model's",
    "report": "compare runs: ranking, curves, settings and samples, as a web page and Markdown",
    "runs list": "which runs are on disk, with their losses and sizes",
    "runs show": "one run at a glance",
    "runs diff": "in what runs differ, and what came of it",
    "runs rm": "remove runs, or only their checkpoints, after asking",
    "weights fetch": "download GPT-2 ahead of time",
    "weights list": "which GPT-2 weights are in the cache",
    "weights convert": "another program's format into gptpl's, or the other way",
}
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit status: 0, 1 (it failed), 2 (bad input) or 130 (Ctrl-C).

    Bad input is one line on standard error. `--debug`, or HYDRA_FULL_ERROR=1, shows the traceback too.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    debug = "--debug" in arguments or os.environ.get("HYDRA_FULL_ERROR") == "1"
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        status = _run(arguments)
        sys.stdout.flush()  # here, where a reader that has left can be dealt with
        return status
    except InputError as error:
        return _fail(error, str(error), EXIT_BAD_INPUT, debug=debug)
    except KeyboardInterrupt as error:
        return _fail(error, "interrupted", EXIT_INTERRUPTED, debug=debug)
    except BrokenPipeError:
        # The reader of our output, such as `head`, has left: nothing is wrong, and nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except OSError as error:
        return _fail(error, _os_error_text(error), EXIT_FAILED, debug=debug)


def _fail(error: BaseException, message: str, status: int, *, debug: bool) -> int:
    """Says what went wrong, in one line unless the traceback is asked for; returns the exit status."""
    if debug:
        traceback.print_exception(error)
    print(f"gptpl: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(program_help(COMMANDS))
        return 0
    if arguments[0] == "--version":
        print(f"gptpl {__version__}")
        return 0
    command, overrides = arguments[0], arguments[1:]
    group = {name: text for name, text in COMMANDS.items() if name.startswith(f"{command} ")}
    if group:
        if not overrides or overrides[0] in ("-h", "--help"):
            print(program_help(group))
            return 0
        command, overrides = f"{command} {overrides[0]}", overrides[1:]
    if command not in COMMANDS:
        offered = ", ".join(group or COMMANDS)
        raise InputError(
            f"{command!r} is no command of gptpl: choose one of {offered}{nearest(command, COMMANDS)}"
        )
    if "-h" in overrides or "--help" in overrides:
        print(command_help(command, COMMANDS[command]))
        return 0
    # Only the command that runs is imported: `generate` need not wait for what `train` uses.
    module = command.replace("-", "_").replace(" ", "_")
    return int(import_module(f"gptpl.cli.{module}").run(overrides))


def _os_error_text(error: OSError) -> str:
    where = f" ({Path(os.fsdecode(error.filename))})" if error.filename else ""
    return f"{error.strerror or error}{where}: make room or check the permissions, then run the command again"


if __name__ == "__main__":
    sys.exit(main())
