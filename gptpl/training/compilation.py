"""`torch.compile` of the model, where it pays."""

import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from torch import nn

from gptpl.errors import InputError
from gptpl.model.protocol import blocks_of

WORTHWHILE_STEPS = 1_000
"""Steps below which compiling, about a minute, costs more than it saves."""


@dataclass(frozen=True)
class CompileChoice:
    """Whether the model is compiled, and why, in words for the log."""

    compiled: bool
    reason: str


def choose_compile(*, wanted: str, device_type: str, total_steps: int) -> CompileChoice:
    """Decides whether to compile.

    Args:
        wanted: "on", "off", or "auto": only for runs of `WORTHWHILE_STEPS` steps and more on "cuda", where
            the tools for it are installed.
        device_type: "cpu", "cuda" or "mps".
        total_steps: optimizer steps the run is planned for.

    Raises InputError for "on" where a tool is missing.
    """
    if wanted == "off":
        return CompileChoice(False, "as asked")
    missing = missing_tool(device_type)
    if wanted == "on":
        if missing:
            raise InputError(
                f"trainer.compile=on needs {missing}, which was not found:"
                " install it or set trainer.compile=off"
            )
        return CompileChoice(True, "as asked")
    against = _reason_against(device_type, missing, total_steps)
    if against:
        return CompileChoice(False, against)
    return CompileChoice(True, f"{total_steps} steps pay for it")


def compile_blocks(net: nn.Module) -> None:
    """Compiles the model's blocks in place, so that its parameters keep their names in checkpoints.

    A model without `blocks` is compiled as a whole.

    All blocks share the code that is compiled for the first one: the model's depth costs no more time, and
    torch keeps the code on disk for the next start.
    """
    for block in blocks_of(net) or [net]:
        block.compile()


def _reason_against(device_type: str, missing: str | None, total_steps: int) -> str | None:
    if missing:
        return f"{missing} was not found"
    if device_type == "cpu":
        # experiments/benchmarks: on 2 cores with AVX512-BF16 a compiled step is within 4 % of a plain one.
        return "on a CPU it gains next to nothing"
    if device_type == "mps":
        return "torch compiles for mps only experimentally"
    if total_steps < WORTHWHILE_STEPS:
        return f"{total_steps} steps are too few to pay for it"
    return None


def missing_tool(device_type: str) -> str | None:
    """What torch's inductor needs on this machine for that device and would not find; None: it has all."""
    if device_type == "mps":
        return None
    if device_type == "cuda" and find_spec("triton") is None:
        return "Triton"
    if not any(shutil.which(name) for name in _compilers(device_type)):
        return "a C++ compiler"
    # Compiled kernels are Python modules; Debian's Python, for one, comes without the headers.
    if sys.platform == "linux" and not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python.h (of python3-dev)"
    return None


def _compilers(device_type: str) -> list[str]:
    """The compilers of which one is enough: inductor tries exactly one for a CPU, Triton several."""
    if device_type == "cuda":
        return [os.environ["CC"]] if "CC" in os.environ else ["cc", "gcc", "clang", "cl"]
    default = {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
    return [os.environ.get("CXX", default)]
