"""What makes training fast: which parts of it are used, and why."""

import ctypes
import platform
from dataclasses import dataclass, replace

import torch
from torch import nn

from gptpl.errors import InputError
from gptpl.model.attention_kernels import Kernel, chosen_kernel
from gptpl.model.gpt import MultiHeadAttention
from gptpl.model.protocol import class_path, has_fused_head
from gptpl.training.compilation import CompileChoice, choose_compile, compile_blocks
from gptpl.training.head_loss import Head, check_fused_head
from gptpl.training.precision import product_dtype

ATTENTION = ("auto", "blocked", "sdpa")
HEAD = ("auto", "fused", "plain")
COMPILE = ("auto", "on", "off")


@dataclass(frozen=True, kw_only=True)
class FastPath:
    """The choices for one training.

    Attributes:
        compile: whether the blocks are compiled, and why.
        attention: the kernel, see `gptpl.model.gpt.causal_attention`; None: the model has none of its layers.
        head: "fused" is `gptpl.training.head_loss`; "plain" makes all logits, then the loss.
        recompute: whether a block's activations are made anew in the backward pass instead of kept.
        keep_freed_memory: see `keep_freed_memory`.
        remark: what there is to say of the attention kernel.
        asked: the names of those that were asked for, not chosen here.
    """

    compile: CompileChoice
    attention: Kernel | None
    head: Head
    recompute: bool
    keep_freed_memory: bool
    remark: str = ""
    asked: frozenset[str] = frozenset()

    def fitted_to(self, net: nn.Module) -> "FastPath":
        """What of it this model can do. Raises InputError for what was asked for and it cannot."""
        head, attention = self.head, self.attention
        if head == "fused" and not has_fused_head(net):
            if "head" in self.asked:
                check_fused_head(net)
            head = "plain"
        if not any(isinstance(module, MultiHeadAttention) for module in net.modules()):
            if "attention" in self.asked:
                raise InputError(
                    f"trainer.attention={attention} is a kernel of gptpl's MultiHeadAttention,"
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
        """Sets up a model that it is fitted to, in place: its parameters keep their names."""
        for module in net.modules():
            if isinstance(module, MultiHeadAttention) and self.attention is not None:
                module.kernel = self.attention
        if hasattr(net, "recompute_blocks"):
            net.recompute_blocks = self.recompute  # type: ignore[assignment]  # mypy: a parameter or a module
        if self.compile.compiled:
            compile_blocks(net)

    def __str__(self) -> str:
        compiled = "on" if self.compile.compiled else "off"
        parts = [f"compile {compiled} ({self.compile.reason})"]
        if self.attention is not None:
            parts.append(f"attention {self.attention}{self.remark and f' ({self.remark})'}")
        parts.append(f"head {self.head}")
        if self.recompute:
            parts.append("activations recomputed")
        if self.keep_freed_memory:
            parts.append("freed memory kept")
        return ", ".join(parts)


def choose_fast_path(
    *,
    device_type: str,
    precision: str,
    drop_rate: float = 0.0,
    total_steps: int,
    compile: str = "auto",
    attention: str = "auto",
    head: str = "auto",
    recompute: bool = False,
    keep_freed_memory: bool | None = None,
) -> FastPath:
    """Decides what is "auto" or None.

    Args:
        device_type: "cpu", "cuda" or "mps".
        precision: Lightning's name of it, such as "bf16-mixed".
        drop_rate: of the attention weights.
        total_steps: optimizer steps the run is planned for.
        compile: "auto", "on" or "off".
        attention: "auto", "blocked" or "sdpa".
        head: "auto", "fused" or "plain".
        recompute: see `FastPath`.
        keep_freed_memory: None: where that is possible and the model is trained on a CPU.

    Raises InputError for an unknown choice and for one that cannot be.
    """
    for key, value, known in (
        ("compile", compile, COMPILE), ("attention", attention, ATTENTION), ("head", head, HEAD),
    ):  # fmt: skip
        if value not in known:
            raise InputError(f"trainer.{key}={value} is unknown: choose one of {', '.join(known)}")
    if attention == "blocked" and device_type != "cpu":
        raise InputError(
            f"trainer.attention=blocked is for CPUs, not {device_type}: use trainer.attention=sdpa"
        )
    dtype = product_dtype(precision)
    half = dtype == torch.float16
    if head == "fused" and half:
        raise InputError(
            f"trainer.head=fused would lose small gradients in trainer.precision={precision}:"
            " use trainer.head=plain or a bf16 precision"
        )
    if keep_freed_memory and not can_keep_freed_memory():
        raise InputError("trainer.keep_freed_memory=true needs glibc's malloc: leave it null")
    kernel = chosen_kernel(device_type, dtype, drop_rate) if attention == "auto" else _kernel(attention)
    asked = {"attention": attention, "head": head}
    no_flash = device_type == "cpu" and kernel == "sdpa" and drop_rate
    return FastPath(
        compile=choose_compile(wanted=compile, device_type=device_type, total_steps=total_steps),
        attention=kernel,
        remark="dropout keeps it from flash attention on a CPU" if no_flash else "",
        head="plain" if head == "plain" or half else "fused",
        asked=frozenset(name for name, value in asked.items() if value != "auto"),
        recompute=recompute,
        keep_freed_memory=(device_type == "cpu" and can_keep_freed_memory())
        if keep_freed_memory is None
        else keep_freed_memory,
    )


def _kernel(name: str) -> Kernel:
    return "blocked" if name == "blocked" else "sdpa"


# --- memory ---------------------------------------------------------------------------------------------

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h


def can_keep_freed_memory() -> bool:
    """Whether this process's malloc is glibc's."""
    return platform.system() == "Linux" and platform.libc_ver()[0] == "glibc"


def keep_freed_memory() -> None:
    """Tells glibc's malloc to give no memory back to the system, for the rest of this process.

    A training step frees its large tensors and asks for as many again. malloc would return them and fetch
    them anew each time, and the system clears every page it hands out: on 2 cores that is a tenth to a
    quarter of a step (experiments/benchmarks). Peak memory stays what it was, but is held until the end.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)
