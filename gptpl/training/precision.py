"""Which device is used, and which floating-point precision training has when nobody says."""

import platform
from dataclasses import dataclass

import torch

from gptpl.errors import InputError

ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")


@dataclass(frozen=True)
class PrecisionChoice:
    """Lightning's name of the precision, and why it was taken, in words for the log."""

    precision: str
    reason: str


def device_type(accelerator: str, *, key: str = "trainer.accelerator") -> str:
    """One of "cuda", "mps" and "cpu"; raises InputError, naming `key`, if the one asked for is not there."""
    if accelerator not in ACCELERATORS:
        raise InputError(f"{key}={accelerator} is unknown: choose one of {', '.join(ACCELERATORS)}")
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    instead = f"use {key}=cpu or {key}=auto"
    if accelerator in ("gpu", "cuda") and not cuda and not (accelerator == "gpu" and mps):
        raise InputError(
            f"{key}={accelerator}, but torch {torch.__version__} finds no CUDA device: {instead}"
        )
    if accelerator == "mps" and not mps:
        raise InputError(f"{key}=mps, but there is no Apple GPU here: {instead}")
    if accelerator == "cpu":
        return "cpu"
    if cuda and accelerator != "mps":
        return "cuda"
    return "mps" if mps else "cpu"


def choose_precision(device_type: str) -> PrecisionChoice:
    """bf16 mixed where the hardware multiplies bf16 natively, else fp32.

    Args:
        device_type: "cuda", "mps" or "cpu".
    """
    if device_type == "cuda":
        major, minor = torch.cuda.get_device_capability()
        name = f"{torch.cuda.get_device_name()} (compute capability {major}.{minor})"
        if major >= 8:  # Ampere is the first generation with bf16 tensor cores
            return PrecisionChoice("bf16-mixed", f"{name} multiplies bf16 natively")
        return PrecisionChoice("32-true", f"{name} is older than Ampere and has no bf16 units")
    if device_type == "cpu":
        units = cpu_bf16_units()
        if units:
            return PrecisionChoice("bf16-mixed", f"this CPU multiplies bf16 natively ({', '.join(units)})")
        return PrecisionChoice(
            "32-true", f"this CPU ({platform.machine()}) has no bf16 units that torch knows of"
        )
    return PrecisionChoice("32-true", f"{device_type} has no bf16 units that torch promises to use")


def product_dtype(precision: str) -> torch.dtype:
    """The type of matrix products under Lightning's name of a precision, such as "bf16-mixed"."""
    if "bf16" in precision:
        return torch.bfloat16
    return torch.float16 if "16" in precision else torch.float32


def cpu_bf16_units() -> list[str]:
    """Names of the CPU's bf16 matrix instructions, empty where there are none or torch is too old to tell."""
    if not hasattr(torch.cpu, "get_capabilities"):  # torch 2.11 lacks it
        return []
    capabilities = torch.cpu.get_capabilities()
    return [
        name for name, key in (("AMX", "amx_bf16"), ("AVX512-BF16", "avx512_bf16")) if capabilities.get(key)
    ]
