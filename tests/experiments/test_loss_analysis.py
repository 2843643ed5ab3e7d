"""The study of the loss by hand, against torch and the published numbers."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

RECORDED = Path(__file__).parents[2] / "experiments/loss_analysis/result.json"


@pytest.fixture(scope="module")
def loss_analysis(study: Callable[[str], Any]) -> Any:
    return study("loss_analysis")


def test_the_loss_by_hand_is_that_of_torch(loss_analysis: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 7, 11, generator=generator)
    targets = torch.randint(11, (4, 7), generator=generator)
    by_hand = loss_analysis.module.loss_by_hand(logits, targets)
    assert by_hand.item() == pytest.approx(F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item())


def test_from_guessing_to_perfect(loss_analysis: Any) -> None:
    losses = [row["loss_by_hand"] for row in loss_analysis.result["predictions"]]
    assert losses[0] == pytest.approx(10.8249, abs=5e-5)
    assert losses[0] == pytest.approx(math.log(50257))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(0, abs=1e-8)
    for row in loss_analysis.result["predictions"]:
        assert row["loss_of_torch"] == pytest.approx(row["loss_by_hand"], abs=1e-9)


@pytest.mark.parametrize("p, loss, misprint", [(0.9, 0.105, 0.046), (0.1, 2.303, 1.0)])
def test_confidence(loss_analysis: Any, p: float, loss: float, misprint: float) -> None:
    [row] = [row for row in loss_analysis.result["confidences"] if row["probability"] == p]
    assert row["loss"] == pytest.approx(loss, abs=5e-4)
    assert row["in_base_10"] == pytest.approx(misprint, abs=5e-4)


def test_the_gradient_at_the_right_logit_is_the_probability_less_one(loss_analysis: Any) -> None:
    logits = torch.tensor([[0.3, -1.0, 2.0]], requires_grad=True)
    F.cross_entropy(logits, torch.tensor([2])).backward()
    p = logits.detach().softmax(dim=-1)[0, 2].item()
    assert logits.grad is not None
    assert loss_analysis.module.confidence(p)["gradient"] == pytest.approx(logits.grad[0, 2].item())


@pytest.mark.parametrize("loss, perplexity", [(10.7940, 48_728), (5.0, 148), (2.0, 7.4), (0.5, 1.65)])
def test_perplexities(loss_analysis: Any, loss: float, perplexity: float) -> None:
    [row] = [row for row in loss_analysis.result["perplexities"] if row["loss"] == loss]
    assert row["perplexity"] == pytest.approx(perplexity, rel=0.003)


def test_large_logits_need_the_care_that_torch_takes(loss_analysis: Any) -> None:
    huge = loss_analysis.result["huge_logits"]
    assert huge["loss_by_hand_is_nan"]
    assert huge["loss_of_torch"] == pytest.approx(math.log(1 + math.e))


def test_the_recorded_first_loss_is_the_published_one() -> None:
    model = json.loads(RECORDED.read_text(encoding="utf-8"))["model"]
    assert model["loss_by_hand"] == pytest.approx(10.7940, abs=5e-5)
    assert model["loss_of_torch"] == pytest.approx(model["loss_by_hand"], abs=1e-5)
    assert model["perplexity"] == pytest.approx(48_725, abs=2)
    mean = sum(row["log_probability"] for row in model["targets"]) / 6
    assert -mean == pytest.approx(model["loss_by_hand"], abs=1e-5)


def test_the_picture_is_there(loss_analysis: Any) -> None:
    assert (loss_analysis.folder / "confidence.png").stat().st_size > 10_000
