"""What makes training fast: device, precision, compilation, kernels; what is chosen, and why.

"auto" is what `gptpl.training.autotune` measured; where nothing can be measured, a rule by the hardware.
"""

import ctypes
import math
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import cast, get_args

import torch
from torch import nn

from gptpl.errors import InputError
from gptpl.model.attention_kernels import Kernel, chosen_kernel
from gptpl.model.gpt import MultiHeadAttention
from gptpl.model.loss import Head, check_fused_head
from gptpl.model.protocol import blocks_of, class_path, has_fused_head
from gptpl.training.autotune import MARGIN, Timings, with_compiled

AUTO = "auto"
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
WORTHWHILE_STEPS = 1_000
"""Steps below which compiling, about a minute, costs more than it saves on CUDA."""
TRIED_SECONDS, TRIED_FRACTION = 20, 0.01
"""About what trying to compile takes, and the most of a run's time that it may take."""

# --- device and precision -------------------------------------------------------------------------------


def device_type(accelerator: str, *, key: str = "trainer.accelerator") -> str:
    """One of "cuda", "mps" and "cpu". Raises InputError, naming `key`, for one that is not there."""
    if accelerator not in ACCELERATORS:
        raise InputError(f"{key} must be one of {', '.join(ACCELERATORS)}, got {accelerator}")
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    wanted = {"auto": ("cuda", "mps", "cpu"), "gpu": ("cuda", "mps")}.get(accelerator, (accelerator,))
    found = next((device for device in wanted if there[device]), None)
    if found is None:
        device = "Apple GPU" if accelerator == "mps" else "CUDA device"
        raise InputError(
            f"{key}={accelerator}, but torch {torch.__version__} finds no {device}: use {key}=cpu or"
            f" {key}=auto"
        )
    return found


@dataclass(frozen=True)
class PrecisionChoice:
    """Lightning's name of the precision, and why it was chosen, for the log."""

    precision: str
    reason: str


def choose_precision(device_type: str) -> PrecisionChoice:
    """bf16 mixed where the hardware says that it multiplies bf16 natively, else fp32."""
    if device_type == "cuda":
        major, minor = torch.cuda.get_device_capability()
        name = f"{torch.cuda.get_device_name()} (compute capability {major}.{minor})"
        if major >= 8:  # Ampere is the first generation with bf16 tensor cores
            return PrecisionChoice("bf16-mixed", f"{name} multiplies bf16 natively")
        return PrecisionChoice("32-true", f"{name} is older than Ampere and has no bf16 units")
    if device_type == "cpu" and (units := cpu_bf16_units()):
        return PrecisionChoice("bf16-mixed", f"this CPU multiplies bf16 natively ({', '.join(units)})")
    device = f"this CPU ({platform.machine()})" if device_type == "cpu" else device_type
    return PrecisionChoice("32-true", f"{device} has no bf16 units that torch knows of")


def cpu_bf16_units() -> list[str]:
    """Names of the CPU's bf16 matrix instructions; empty where it has none or torch is too old to tell."""
    if not hasattr(torch.cpu, "get_capabilities"):  # torch 2.11 lacks it
        return []
    found = torch.cpu.get_capabilities()
    return [name for name, key in (("AMX", "amx_bf16"), ("AVX512-BF16", "avx512_bf16")) if found.get(key)]


def product_dtype(precision: str) -> torch.dtype:
    """The type of matrix products in a precision that is named as Lightning does, such as "bf16-mixed"."""
    if "bf16" in precision:
        return torch.bfloat16
    return torch.float16 if "16" in precision else torch.float32


# --- compilation ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CompileChoice:
    """Whether the model is compiled, and why, for the log."""

    compiled: bool
    reason: str


def choose_compile(
    *,
    wanted: str,
    device_type: str,
    total_steps: int,
    timings: Timings | None = None,
    tries: bool = False,
    precision: str = "32-true",
    kernel: str = "sdpa",
) -> CompileChoice:
    """Decide "auto": whether the steps gain more than compiling takes.

    If it `tries`, a block is compiled and timed, where that takes a hundredth of the run's time at most. What
    is not measured is compiled on CUDA alone, from `WORTHWHILE_STEPS` on. Raises InputError for "on" without
    the tools.
    """
    missing = None if wanted == "off" else missing_tool(device_type)
    if wanted == "on" and missing:
        raise InputError(
            f"trainer.compile=on needs {missing}, which was not found: install it or set trainer.compile=off"
        )
    if wanted != "auto":
        return CompileChoice(wanted == "on", "as asked")
    if missing:
        return CompileChoice(False, f"{missing} was not found")
    if device_type == "mps":
        return CompileChoice(False, "torch compiles for mps only experimentally")
    if timings is not None and timings.work.is_model and total_steps:
        plain = timings.step_seconds(precision, kernel)
        pays_to_try = math.inf > total_steps * plain > TRIED_SECONDS / TRIED_FRACTION
        if tries and pays_to_try:
            timings = with_compiled(timings, precision, kernel)
        step, compiling = timings.compiled_seconds(precision, kernel)
        if math.isfinite(step) and math.isfinite(compiling):
            pays = step * MARGIN < plain and total_steps * (plain - step) > compiling
            return CompileChoice(
                pays, f"measured {step:.3g} s a batch, {plain:.3g} s without, {compiling:.0f} s to compile"
            )
        if tries and pays_to_try:
            return CompileChoice(False, "torch could not compile it")
    if device_type == "cpu":
        return CompileChoice(False, "not measured, which takes a long run")
    if total_steps < WORTHWHILE_STEPS:
        return CompileChoice(False, f"{total_steps} steps are too few to pay for it")
    return CompileChoice(True, f"{total_steps} steps pay for it")


def missing_tool(device_type: str) -> str | None:
    """A program or library that torch's inductor needs and would not find here; None: it has all."""
    if device_type == "mps":
        return None
    if device_type == "cuda" and find_spec("triton") is None:
        return "Triton"
    if device_type == "cuda":  # Triton tries several, inductor exactly one for a CPU
        compilers = [os.environ["CC"]] if "CC" in os.environ else ["cc", "gcc", "clang", "cl"]
    else:
        default = {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
        compilers = [os.environ.get("CXX", default)]
    if not any(map(shutil.which, compilers)):
        return "a C++ compiler"
    # Compiled kernels are Python modules; Debian's Python, for one, comes without the headers.
    if sys.platform == "linux" and not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python.h (of python3-dev)"
    return None


# --- all choices together -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FastPath:
    """The choices for one training."""

    precision: PrecisionChoice = PrecisionChoice("32-true", "as asked")
    compile: CompileChoice
    attention: Kernel | None
    """See `gptpl.model.gpt.causal_attention`; None: the model has no such layers."""
    head: Head
    """See `gptpl.model.loss.training_loss`."""
    recompute: bool
    """Whether a block's activations are recomputed in the backward pass instead of kept."""
    keep_freed_memory: bool
    """See `keep_freed_memory`."""
    remark: str = ""
    """A remark on the attention kernel, for the log."""
    asked: frozenset[str] = frozenset()
    """The names of the choices that the user made."""

    def fitted_to(self, net: nn.Module) -> "FastPath":
        """The choices that this model can use. Raises InputError for one that the user made and it cannot."""
        head, attention = self.head, self.attention
        if head == "fused" and not has_fused_head(net):
            if "head" in self.asked:
                check_fused_head(net)
            head = "plain"
        if not any(isinstance(module, MultiHeadAttention) for module in net.modules()):
            if "attention" in self.asked:
                raise InputError(
                    f"trainer.attention={attention} is for models with gptpl's MultiHeadAttention,"
                    f" {class_path(net)} has none: leave trainer.attention=auto"
                )
            attention = None
        if self.recompute and not hasattr(net, "recompute_blocks"):
            raise InputError(
                f"trainer.recompute_activations=true needs a model with a flag recompute_blocks,"
                f" {class_path(net)} has none: leave it false"
            )
        return replace(self, head=head, attention=attention)

    def apply(self, net: nn.Module) -> None:
        """Set up a model that it is fitted to, in place; its parameters keep their names.

        What is compiled are its blocks: all share the code of the first, so depth takes no time.
        """
        for module in net.modules():
            if isinstance(module, MultiHeadAttention) and self.attention is not None:
                module.kernel = self.attention
        if hasattr(net, "recompute_blocks"):
            net.recompute_blocks = self.recompute  # type: ignore[assignment]  # mypy: a parameter or a module
        if self.compile.compiled:
            for block in blocks_of(net) or [net]:
                block.compile()

    def record(self) -> dict[str, str | None]:
        """What decides the bits of a training, as plain data: `kept` of `choose_fast_path`."""
        return {
            "precision": self.precision.precision,
            "attention": self.attention,
            "head": self.head,
            "compile": "on" if self.compile.compiled else "off",
        }

    def __str__(self) -> str:
        parts = {
            f"precision {self.precision.precision} ({self.precision.reason})": True,
            f"compile {'on' if self.compile.compiled else 'off'} ({self.compile.reason})": True,
            f"attention {self.attention}{self.remark and f' ({self.remark})'}": self.attention is not None,
            f"head {self.head}": True,
            "activations recomputed": self.recompute,
            "freed memory kept": self.keep_freed_memory,
        }
        return ", ".join(part for part, is_said in parts.items() if is_said)


REASON = "reason"
"""In choices that are kept: why they are so."""


def choose_fast_path(
    *,
    device_type: str,
    precision: str,
    drop_rate: float = 0.0,
    total_steps: int,
    compile: str = AUTO,
    attention: str = AUTO,
    head: str = AUTO,
    recompute: bool = False,
    keep_freed_memory: bool | None = None,
    timings: Timings | None = None,
    tries_compiling: bool = False,
    kept: Mapping[str, str | None] | None = None,
) -> FastPath:
    """Decide what is "auto" or None, for dropout `drop_rate` of the attention weights.

    `timings` are those of the model on this device; None: decide by the hardware. `tries_compiling` as
    `choose_compile` does. `kept` are choices that are made, by name: the `record` of the run that is resumed,
    or, with a REASON, another process's. `keep_freed_memory` None: on a CPU, where it is possible. Raises
    InputError for an unknown or impossible choice.
    """
    for key, value, known in (
        ("compile", compile, (AUTO, "on", "off")),
        ("attention", attention, get_args(Kernel)),
        ("head", head, (AUTO, *get_args(Head))),
    ):
        if value not in known:
            raise InputError(f"trainer.{key} must be one of {', '.join(known)}, got {value}")
    if attention == "blocked" and device_type != "cpu":
        raise InputError(
            f"trainer.attention=blocked is for CPUs, not {device_type}: use trainer.attention=sdpa"
        )
    before = {name: value for name, value in (kept or {}).items() if value is not None}
    chosen = PrecisionChoice(precision, "as asked")
    if precision == AUTO and "precision" in before:
        chosen = PrecisionChoice(before["precision"], before.get(REASON, "as the run began"))
    elif precision == AUTO:
        chosen = choose_precision(device_type)
        if timings is not None and math.isfinite(timings.step_seconds(timings.precision())):
            chosen = PrecisionChoice(timings.precision(), timings.reason(timings.precision()))
    if chosen.precision != before.get("precision"):
        before = {}  # kernels suit a precision
    dtype = product_dtype(chosen.precision)
    half = dtype == torch.float16
    if head == "fused" and half:
        raise InputError(
            f"trainer.head=fused would lose small gradients in trainer.precision={precision}:"
            " use trainer.head=plain or a bf16 precision"
        )
    can_keep = can_keep_freed_memory()
    if keep_freed_memory and not can_keep:
        raise InputError("trainer.keep_freed_memory=true needs glibc's malloc: leave it null")
    if keep_freed_memory is None:
        keep_freed_memory = device_type == "cpu" and can_keep
    asked = frozenset(name for name, value in (("attention", attention), ("head", head)) if value != AUTO)
    if attention == AUTO:
        attention = chosen_kernel(device_type, dtype, drop_rate)
        if timings is not None:
            attention = timings.kernel(chosen.precision, safe=attention)
        attention = before.get("attention", attention)
    if head == AUTO:
        head = "fused" if timings is None else timings.head(chosen.precision)
        head = "plain" if half else before.get("head", head)
    no_flash = device_type == "cpu" and attention == "sdpa" and drop_rate
    compiled = choose_compile(
        wanted=compile,
        device_type=device_type,
        total_steps=total_steps,
        timings=timings,
        tries=tries_compiling,
        precision=chosen.precision,
        kernel=attention,
    )
    if compile == AUTO and "compile" in before and missing_tool(device_type) is None:
        compiled = CompileChoice(before["compile"] == "on", "as the run began")
    return FastPath(
        precision=chosen,
        compile=compiled,
        attention=cast(Kernel, attention),
        remark="dropout keeps it from flash attention on a CPU" if no_flash else "",
        head=cast(Head, head),
        asked=asked,
        recompute=recompute,
        keep_freed_memory=keep_freed_memory,
    )


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h


def can_keep_freed_memory() -> bool:
    """Whether this process's malloc is glibc's."""
    return platform.system() == "Linux" and platform.libc_ver()[0] == "glibc"


def keep_freed_memory() -> None:
    """Have glibc's malloc give no memory back to the system, for the rest of this process.

    A training step frees its large tensors and allocates as many again. malloc would return the memory each
    time, and the system clears every page it hands out: on 2 cores that is a tenth to a quarter of a step
    (experiments/benchmarks). Peak memory stays the same, but is held until the end.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)
