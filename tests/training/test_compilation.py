"""When the model is compiled. Nothing is compiled for real: that takes a minute."""

import shutil
import sys
import sysconfig
from functools import partial

import pytest
import torch

from gptpl.callbacks.samples import SampleText
from gptpl.errors import InputError
from gptpl.model import GPTModel
from gptpl.training import performance
from gptpl.training.performance import (
    WORTHWHILE_STEPS,
    CompileChoice,
    FastPath,
    choose_compile,
    missing_tool,
)

COMPILED = FastPath(
    compile=CompileChoice(True, "as asked"),
    attention=None,
    head="plain",
    recompute=False,
    keep_freed_memory=False,
)
LONG, SHORT = WORTHWHILE_STEPS, WORTHWHILE_STEPS - 1


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Gives the machine compilers, Python's headers, and Triton, or takes them away."""

    def give(*programs: str, headers: bool = True, triton: bool = True, platform: str = "linux") -> None:
        if headers:
            (tmp_path / "Python.h").touch()
        for variable in ("CC", "CXX"):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setattr(sys, "platform", platform)
        monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if name in programs else None)
        monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
        monkeypatch.setattr(performance, "find_spec", lambda name: object() if triton else None)

    return give


def compiled(wanted: str, device_type: str = "cpu", total_steps: int = LONG) -> bool:
    return choose_compile(wanted=wanted, device_type=device_type, total_steps=total_steps).compiled


# --- the decision ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("device_type", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("total_steps", [SHORT, LONG])
def test_off_and_on_are_obeyed(machine, device_type, total_steps):
    machine("g++", "gcc")
    assert not compiled("off", device_type, total_steps)
    assert compiled("on", device_type, total_steps)


@pytest.mark.parametrize(
    ("device_type", "total_steps", "expected"),
    [
        ("cpu", LONG, False),
        ("cpu", SHORT, False),
        ("cuda", LONG, True),
        ("cuda", SHORT, False),
        ("mps", LONG, False),
    ],
)
def test_auto_compiles_long_runs_on_cuda(machine, device_type, total_steps, expected):
    machine("g++", "gcc")
    assert compiled("auto", device_type, total_steps) == expected


@pytest.mark.parametrize(
    ("programs", "device_type", "total_steps", "reason"),
    [
        (("gcc",), "cuda", SHORT, f"{SHORT} steps are too few"),
        ((), "cuda", LONG, "C++ compiler was not found"),
        (("g++",), "cpu", LONG, "not measured"),
        (("g++",), "mps", LONG, "mps"),
        (("gcc",), "cuda", LONG, f"{LONG} steps pay"),
    ],
)
def test_the_reason_is_given(machine, programs, device_type, total_steps, reason):
    machine(*programs)
    assert reason in choose_compile(wanted="auto", device_type=device_type, total_steps=total_steps).reason


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_on_without_the_tools_is_refused(machine, device_type):
    machine()
    with pytest.raises(InputError, match=r"^trainer.compile=on needs a C\+\+ compiler[^\n]*compile=off$"):
        compiled("on", device_type)


# --- the tools ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("platform", "programs", "found"),
    [
        ("linux", ("g++",), True),
        ("linux", ("clang++",), False),  # torch's inductor tries g++ alone, unless CXX names another
        ("darwin", ("clang++",), True),
        ("win32", ("cl",), True),
        ("win32", ("g++",), False),
    ],
)
def test_the_compiler_that_inductor_uses_on_a_cpu(machine, platform, programs, found):
    machine(*programs, platform=platform)
    assert (missing_tool("cpu") is None) == found


def test_the_compiler_that_the_environment_names(machine, monkeypatch):
    machine("clang++")
    monkeypatch.setenv("CXX", "clang++")
    assert missing_tool("cpu") is None
    monkeypatch.setenv("CXX", "icpx")
    assert missing_tool("cpu") is not None


def test_cuda_needs_triton_and_any_c_compiler(machine):
    machine("clang")
    assert missing_tool("cuda") is None
    machine("g++", triton=False)
    assert missing_tool("cuda") == "Triton"
    machine()
    assert missing_tool("cuda") == "a C++ compiler"


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_a_python_without_headers_cannot_load_what_is_compiled(machine, device_type):
    machine("g++", "gcc", headers=False)
    missing = missing_tool(device_type)
    assert missing is not None
    assert "Python.h" in missing


# --- in place -------------------------------------------------------------------------------------------


def test_parameters_keep_their_names_and_the_model_its_class(pretraining, monkeypatch):
    """`torch.compile(net)` would put `_orig_mod.` before every name; compiling in place does not."""
    compiled_calls = []

    def compile_nothing(function, *args, **kwargs):
        compiled_calls.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compile_nothing)
    net = pretraining.net()
    names = list(net.state_dict())
    COMPILED.apply(net)
    assert len(compiled_calls) == len(net.blocks)
    assert list(net.state_dict()) == names
    assert type(net) is GPTModel
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    assert net(tokens).equal(pretraining.net()(tokens))


@pytest.mark.filterwarnings("ignore")  # torch warns of its own doings while it compiles
def test_a_run_compiles_its_training_step_and_nothing_else(pretraining, monkeypatch):
    """Not the evaluations, whose last batch is smaller, and not the samples, which grow token by token."""
    graphs = []

    def kept_as_it_is(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=kept_as_it_is))
    net = pretraining.net(n_layers=2)
    COMPILED.apply(net)
    samples = SampleText(path=pretraining.folder / "samples.jsonl", prompts=["a"], max_new_tokens=20)
    module = pretraining.module(net)
    module.compiled = True
    pretraining.fit(samples, module=module)
    torch._dynamo.reset()
    assert len(graphs) == 1
    assert (pretraining.folder / "samples.jsonl").read_text(encoding="utf-8")
