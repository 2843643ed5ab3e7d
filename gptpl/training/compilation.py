"""`torch.compile` of the model, where it pays."""

import logging
import os
import shutil
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from gptpl.errors import InputError
from gptpl.model import GPTModel

log = logging.getLogger(__name__)

WORTHWHILE_STEPS = 1_000
"""Steps below which compiling, about a minute, costs more than it saves."""


def compile_for_training(net: GPTModel, *, wanted: str, device_type: str, total_steps: int) -> bool:
    """Compiles the model in place, so that its parameters keep their names in checkpoints.

    Args:
        net: the model.
        wanted: "on", "off", or "auto": only for runs of `WORTHWHILE_STEPS` steps and more on "cuda", where
            the tools for it are installed.
        device_type: "cpu", "cuda" or "mps".
        total_steps: optimizer steps the run is planned for.

    Returns:
        Whether it was compiled. Raises InputError for "on" where a tool is missing.
    """
    if wanted == "off":
        return False
    missing = missing_tool(device_type)
    if wanted == "on" and missing:
        raise InputError(
            f"trainer.compile=on needs {missing}, which was not found: install it or set trainer.compile=off"
        )
    against = None if wanted == "on" else _reason_against(device_type, missing, total_steps)
    if against:
        log.info("compile: no (%s)", against)
        return False
    log.info("compile: yes, the first steps take about a minute longer")
    net.compile()
    return True


def _reason_against(device_type: str, missing: str | None, total_steps: int) -> str | None:
    if missing:
        return f"{missing} was not found"
    if device_type == "cpu":
        # experiments/train_step: on 2 cores with AVX512-BF16 a compiled step took as long as a plain one.
        return "measured on a CPU it gained nothing; trainer.compile=on compiles all the same"
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
