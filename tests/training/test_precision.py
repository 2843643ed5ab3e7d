"""Which precision is chosen on which hardware, with the hardware made up."""

import platform

import pytest
import torch

from gptpl.training.performance import choose_precision, cpu_bf16_units


@pytest.fixture
def cpu(monkeypatch):
    """Gives the machine a CPU with these capabilities."""

    def give(**capabilities: bool) -> None:
        # raising=False: torch before 2.12 has no such function.
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)

    return give


@pytest.mark.parametrize(
    ("capabilities", "units"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, ["AVX512-BF16"]),
        ({"avx512_bf16": False, "amx_bf16": True}, ["AMX"]),
        ({"avx512_bf16": True, "amx_bf16": True, "avx2": True}, ["AMX", "AVX512-BF16"]),
    ],
)
def test_a_cpu_that_multiplies_bf16_gets_bf16(cpu, capabilities, units):
    cpu(**capabilities)
    assert cpu_bf16_units() == units
    choice = choose_precision("cpu")
    assert choice.precision == "bf16-mixed"
    assert ", ".join(units) in choice.reason


@pytest.mark.parametrize(
    "capabilities",
    # AMX and AVX-512 also come without bf16; an ARM machine reports other names altogether.
    [{}, {"avx512_bf16": False}, {"avx512_f": True, "amx_tile": True, "amx_int8": True}, {"neon": True}],
)
def test_any_other_cpu_gets_fp32(cpu, capabilities):
    cpu(**capabilities)
    assert cpu_bf16_units() == []
    choice = choose_precision("cpu")
    assert choice.precision == "32-true"
    assert platform.machine() in choice.reason


def test_a_torch_too_old_to_tell_means_fp32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert cpu_bf16_units() == []
    assert choose_precision("cpu").precision == "32-true"


@pytest.mark.parametrize(
    ("name", "capability", "precision"),
    [
        ("Tesla V100", (7, 0), "32-true"),
        ("Tesla T4", (7, 5), "32-true"),
        ("A100", (8, 0), "bf16-mixed"),
        ("RTX 4090", (8, 9), "bf16-mixed"),
        ("H200", (9, 0), "bf16-mixed"),
        ("B200", (10, 0), "bf16-mixed"),
    ],
)
def test_cuda_gets_bf16_from_ampere_on(monkeypatch, name, capability, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    choice = choose_precision("cuda")
    assert choice.precision == precision
    assert name in choice.reason
    assert f"{capability[0]}.{capability[1]}" in choice.reason


def test_mps_gets_fp32():
    choice = choose_precision("mps")
    assert choice.precision == "32-true"
    assert "mps" in choice.reason


def test_this_machine_gets_a_precision_that_lightning_knows(pretraining):
    choice = choose_precision("cpu")
    assert pretraining.trainer(precision=choice.precision, logger=False).precision == choice.precision
