"""What is chosen, and that every choice trains to the same losses as the plain way."""

import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch._inductor.config

from gptpl.errors import InputError
from gptpl.model import GPTModel, MultiHeadAttention
from gptpl.training import performance as module
from gptpl.training.performance import (
    CompileChoice,
    FastPath,
    can_keep_freed_memory,
    choose_fast_path,
    missing_tool,
)

PLAIN: dict[str, Any] = {
    "compile": CompileChoice(False, ""),
    "attention": "sdpa",
    "head": "plain",
    "recompute": False,
    "keep_freed_memory": False,
}
COMPILED = CompileChoice(True, "")


@pytest.fixture
def losses(pretraining):
    """Training losses of 20 steps on a fast path, and the validation loss after them."""

    def train(*, drop_rate: float = 0.0, precision: str = "32-true", n_layers: int = 4, **choices):
        net = pretraining.net(drop_rate=drop_rate, n_layers=n_layers, vocab_size=300, init="gpt2")
        path = FastPath(**(PLAIN | choices))
        path.apply(net)
        torch.manual_seed(7)
        shutil.rmtree(pretraining.folder, ignore_errors=True)
        run = pretraining.module(net, head=path.head, eval_every_n_steps=20)
        run.compiled = path.compile.compiled
        pretraining.fit(module=run, precision=precision)
        column = pretraining.column("train/loss")
        assert list(column) == list(range(1, 21))
        return torch.tensor([*column.values(), pretraining.column("val/loss")[20]])

    return train


FAST: dict[str, dict[str, Any]] = {
    "attention": {"attention": "blocked"},
    "attention written out": {"attention": "explicit"},
    "head": {"head": "fused"},
    "recompute": {"recompute": True},
    "all": {"attention": "blocked", "head": "fused", "recompute": True},
}


def test_20_steps_have_the_same_losses(losses):
    """In fp32, and in bf16 as close to fp32 as the plain ones."""
    exact, plain = losses(), losses(precision="bf16-mixed")
    assert exact[0] - exact[-2] > 0.5  # it learns: equal losses say something
    noise = (plain - exact).abs().max()
    assert 0 < noise < 0.05
    for name, choices in FAST.items():
        torch.testing.assert_close(losses(**choices), exact, rtol=0, atol=1e-5, msg=name)
        if name in ("attention written out", "all"):
            assert (losses(precision="bf16-mixed", **choices) - exact).abs().max() < 2 * noise, name


@pytest.mark.skipif(missing_tool("cpu") is not None, reason=f"torch.compile needs {missing_tool('cpu')}")
@pytest.mark.filterwarnings("ignore")  # torch warns of its own doings while it compiles
def test_compiled_20_steps_have_the_same_losses(losses):
    # Without trying each kind of vector instructions, and without processes that compile beside this one.
    with torch._inductor.config.patch({"cpp.vec_isa_ok": True, "compile_threads": 1}):
        fast = losses(n_layers=1, compile=COMPILED, attention="blocked", head="fused")
    torch.testing.assert_close(fast, losses(n_layers=1), rtol=0, atol=1e-5)


def test_recomputing_drops_the_same_again(losses):
    """The backward pass makes the activations anew: with other random numbers its gradient would be wrong."""
    plain = losses(drop_rate=0.2, n_layers=2)
    torch.testing.assert_close(losses(drop_rate=0.2, n_layers=2, recompute=True), plain, rtol=0, atol=1e-5)
    assert (losses(drop_rate=0.0, n_layers=2) - plain).abs().max() > 1e-3


def test_recomputing_keeps_less(pretraining):
    def kept(recompute: bool) -> int:
        net = pretraining.net(n_layers=4)
        net.recompute_blocks = recompute
        sizes: list[int] = []

        def note(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            net(torch.zeros(4, 16, dtype=torch.int64))
        return sum(sizes)

    assert kept(True) < 0.5 * kept(False)


def test_gradients_are_freed_when_the_step_is_done(pretraining):
    """They would lie beside the activations of the next step, where memory is short."""
    run = pretraining.module()
    seen = []
    forward = run.net.hidden

    def hidden(*given):
        if run.training:
            seen.append([p.grad is None for p in run.net.parameters()])
        return forward(*given)

    run.net.hidden = hidden
    run.head = "fused"
    pretraining.fit(module=run)
    assert len(seen) == 20
    assert all(all(none) for none in seen)


# --- the choice -----------------------------------------------------------------------------------------

DEFAULT: dict[str, Any] = {
    "device_type": "cpu",
    "precision": "bf16-mixed",
    "drop_rate": 0.1,
    "total_steps": 10,
}


@pytest.mark.parametrize(
    ("settings", "attention", "head"),
    [
        ({}, "blocked", "fused"),
        ({"precision": "32-true"}, "blocked", "fused"),
        ({"precision": "32-true", "drop_rate": 0.0}, "sdpa", "fused"),
        ({"device_type": "cuda"}, "sdpa", "fused"),
        ({"device_type": "cuda", "precision": "16-mixed"}, "sdpa", "plain"),
        ({"attention": "sdpa", "head": "plain"}, "sdpa", "plain"),
        ({"attention": "blocked", "precision": "32-true", "drop_rate": 0.0}, "blocked", "fused"),
    ],
)
def test_what_is_chosen(settings, attention, head):
    path = choose_fast_path(**(DEFAULT | settings))
    assert (path.attention, path.head) == (attention, head)


def test_it_says_when_dropout_keeps_it_from_flash_attention():
    words = "attention sdpa (dropout keeps it from flash attention on a CPU),"
    assert words in str(choose_fast_path(**DEFAULT, attention="sdpa"))
    for settings in ({}, {"attention": "sdpa", "drop_rate": 0.0}, {"device_type": "cuda"}):
        assert "flash" not in str(choose_fast_path(**(DEFAULT | settings)))


def test_memory_is_kept_on_a_cpu_where_malloc_can(monkeypatch):
    for can in (True, False):
        monkeypatch.setattr(module, "can_keep_freed_memory", lambda can=can: can)
        assert choose_fast_path(**DEFAULT).keep_freed_memory == can
        assert not choose_fast_path(**(DEFAULT | {"device_type": "cuda"})).keep_freed_memory
        assert not choose_fast_path(**DEFAULT, keep_freed_memory=False).keep_freed_memory


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"compile": "perhaps"}, r"trainer.compile must be one of auto, on, off, got perhaps"),
        (
            {"attention": "flash"},
            r"trainer.attention must be one of auto, blocked, sdpa, explicit, got flash",
        ),
        ({"head": "liger"}, r"trainer.head must be one of auto, fused, plain, got liger"),
        ({"attention": "blocked", "device_type": "cuda"}, r"trainer.attention=blocked .*cuda.*sdpa"),
        ({"head": "fused", "precision": "16-mixed"}, r"trainer.head=fused .*16-mixed.*head=plain"),
    ],
)
def test_what_cannot_be_is_refused(settings, words):
    with pytest.raises(InputError, match=words):
        choose_fast_path(**(DEFAULT | settings))


def test_keeping_memory_is_refused_without_glibc(monkeypatch):
    monkeypatch.setattr(module, "can_keep_freed_memory", lambda: False)
    with pytest.raises(InputError, match="keep_freed_memory=true needs glibc"):
        choose_fast_path(**DEFAULT, keep_freed_memory=True)


def test_it_says_what_it_is():
    path = FastPath(
        **PLAIN | {"recompute": True, "keep_freed_memory": True, "compile": CompileChoice(False, "why")}
    )
    assert (
        str(path) == "precision 32-true (as asked), compile off (why), attention sdpa, head plain,"
        " activations recomputed, freed memory kept"
    )


def test_the_model_keeps_its_names(pretraining):
    net = pretraining.net()
    names = list(net.state_dict())
    FastPath(**PLAIN | {"attention": "blocked", "recompute": True}).apply(net)
    assert type(net) is GPTModel
    assert list(net.state_dict()) == names
    assert {m.kernel for m in net.modules() if isinstance(m, MultiHeadAttention)} == {"blocked"}


@pytest.mark.skipif(not can_keep_freed_memory(), reason="malloc is not glibc's")
def test_freed_memory_is_used_again_and_not_fetched_anew():
    """Page faults of touching 64 MB ten times, freed in between: once what must be, not ten times."""
    program = """
import resource, torch
from gptpl.training.performance import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
torch.set_num_threads(1)
before = faults()
keep_freed_memory()
faults()
print(before, faults())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before > 10 * after
