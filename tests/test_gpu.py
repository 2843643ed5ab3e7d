"""What is different on a CUDA device: kernels, compiled parts, graphs, and what "auto" measures there."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import gptpl
from gptpl.generation import SamplingRules, generate
from gptpl.model import CachedGPT, GPTConfig, GPTModel, inference
from gptpl.model.loss import head_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
C, V = 64, 211
MODERN = {"position": "rope", "norm": "rmsnorm", "feed_forward": "swiglu", "linear_bias": False}


def build(**changes: Any) -> GPTModel:
    torch.manual_seed(1)
    config = GPTConfig(
        vocab_size=V, context_length=C, emb_dim=64, n_heads=4, n_layers=2, qkv_bias=True, tie_weights=True,
        **changes,
    )  # fmt: skip
    model = GPTModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.cuda().eval()


# --- decoding -----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("architecture", [{}, MODERN], ids=["gpt2", "modern"])
@pytest.mark.parametrize("rows", [[[1, 2, 3]], [[1, 2, 3], [4], [5, 6, 7, 8, 9]]], ids=["one", "uneven"])
def test_replayed_steps_are_those_of_the_whole_model(
    architecture: dict[str, Any], rows: list[list[int]]
) -> None:
    model = build(**architecture)
    cached = CachedGPT(model, rows=len(rows))
    cache = cached.new_cache(rows=len(rows), capacity=C)
    cached.prefill(rows, cache)
    for turn in range(12):
        if turn == 8:  # a graph belongs to its rows: these need another one
            keep = [len(rows) - 1, 0]
            cache.select(keep)
            assert cache.graph is None
            rows = [rows[row] for row in keep]
        logits = cached.step(torch.arange(len(rows), device="cuda") + turn, cache)
        rows = [[*row, place + turn] for place, row in enumerate(rows)]
        for row, ours in zip(rows, logits, strict=True):
            expected = model(torch.tensor([row], device="cuda"))[0, -1]
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    assert cache.graph is not None


def test_the_same_text_with_and_without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = build(), torch.tensor([[1, 2, 3]] * 2, device="cuda")
    rules = SamplingRules(temperature=0.8, top_k=20)
    texts = []
    for steps in (inference._STEPS_BEFORE_GRAPH, 10**9):
        monkeypatch.setattr(inference, "_STEPS_BEFORE_GRAPH", steps)
        generator = torch.Generator("cuda").manual_seed(5)
        texts.append(generate(model, prompt, max_new_tokens=C, rules=rules, generator=generator))
    assert torch.equal(*texts)


# --- training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("low", "error"), [(False, 1e-5), (True, 2e-2)], ids=["fp32", "bf16"])
def test_the_fused_head_is_the_definition(compiled: bool, low: bool, error: float) -> None:
    torch.manual_seed(2)
    hidden = torch.randn(3, 700, 64, device="cuda", requires_grad=True)
    weight = (0.3 * torch.randn(V, 64, device="cuda")).requires_grad_()
    targets = torch.randint(V, (3, 700), device="cuda")
    targets[0, :50] = -100
    with torch.autocast("cuda", torch.bfloat16, enabled=low):
        loss = head_loss(hidden, weight, targets, compiled=compiled)
    ours = torch.autograd.grad(loss, (hidden, weight))
    logits = hidden.double() @ weight.double().t()
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    theirs = torch.autograd.grad(expected, (hidden, weight))
    assert loss.item() == pytest.approx(expected.item(), rel=error / 10)
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() < error * other.norm()


SETTINGS = (
    "model=tiny", "data=text_file", "data.batch_size=4", "data.max_length=32", "trainer.max_epochs=null",
    "trainer.max_steps=8", "eval_every_n_steps=4", "~callbacks.sample_text", "~callbacks.progress_bar",
)  # fmt: skip


def train(folder: Path, *overrides: str) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """The metrics of a run in this folder, and its weights."""
    text = folder.parent / "text.txt"
    text.write_text("".join(f"{n} is not {n + 1}, and {n * n} is its square. " for n in range(400)))
    metrics = gptpl.build(*SETTINGS, f"data.path={text}", f"run_dir={folder}", *overrides).fit()
    return metrics, gptpl.load(folder, device="cpu").net.state_dict()


def test_losses_are_those_of_a_cpu(tmp_path: Path) -> None:
    precise = ("trainer.precision=32-true", "model.drop_rate=0")
    on_gpu, _ = train(tmp_path / "gpu", "trainer=gpu", *precise)
    on_cpu, _ = train(tmp_path / "cpu", "trainer=cpu", *precise)
    assert on_gpu["val/loss"] == pytest.approx(on_cpu["val/loss"], rel=1e-4)


@pytest.mark.parametrize("compile", ["off", "on"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, compile: str) -> None:
    chosen = ("trainer=gpu", "deterministic=true", f"trainer.compile={compile}")
    _, expected = train(tmp_path / "whole", *chosen)
    train(tmp_path / "parts", *chosen, "trainer.stop_at_step=3")
    resumed = gptpl.resume(tmp_path / "parts", "trainer.stop_at_step=null")
    assert resumed.start_step == 3
    resumed.fit()
    weights = gptpl.load(tmp_path / "parts", device="cpu").net.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_auto_is_measured_here(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run = gptpl.build(
            *SETTINGS, "data=python_stdlib", "model=gpt2_small", "data.max_length=256", "trainer=gpu",
            f"run_dir={tmp_path / 'run'}",
        )  # fmt: skip
    run.close()
    expected = "bf16-mixed" if torch.cuda.get_device_capability() >= (8, 0) else "32-true"
    assert run.trainer.precision == expected
    assert "products at" in caplog.text
