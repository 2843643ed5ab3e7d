"""`gptpl find-lr`: on a model whose rates are known roughly, and what it leaves."""

import csv
import math

import pytest
from matplotlib.image import imread

from gptpl.training import language_model
from gptpl.training.module import NonFiniteError

FIND = ("find-lr", "trainer=cpu", "trainer.precision=32-true", "experiment=quick", "model.n_layers=1")


def numbers(path):
    with path.open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def found(command, tmp_path_factory):
    outcome = command(*FIND, "find.steps=40", "find.max_lr=10", cwd=tmp_path_factory.mktemp("found"))
    assert outcome.status == 0, outcome.err
    return outcome


def test_the_suggestion_lies_where_this_model_learns_and_below_divergence(found):
    """experiment=quick learns well at 3e-3 (its recipe), hardly at 1e-5, and not at 10."""
    lines = dict(line.split(maxsplit=1) for line in found.out.splitlines() if line.startswith(("div", "sug")))
    suggested = float(lines["suggestion"].split()[0].removeprefix("optimizer.lr="))
    diverges = float(lines["diverges"].removeprefix("at "))
    assert 3e-4 < suggested < 3e-2
    assert 10 * suggested < diverges <= 10


def test_nothing_is_left_but_the_plot_and_the_numbers(found):
    assert {path.name for path in found.folder.rglob("*")} == {"lr_finder.png", "lr_finder.csv"}
    assert imread(found.folder / "lr_finder.png").std() > 0
    rows = numbers(found.folder / "lr_finder.csv")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert rows[0]["lr"] == pytest.approx(1e-6)
    assert rows[1]["lr"] / rows[0]["lr"] == pytest.approx(1e7 ** (1 / 39))
    assert rows[0]["loss"] == pytest.approx(math.log(257), rel=0.05)  # as good as a guess


def test_all_groups_grow_together(gptpl, monkeypatch, tmp_path):
    rates = []
    real = language_model.LanguageModelingModule.on_before_optimizer_step

    def note(module, optimizer):
        rates.append({group.get("name", "rest"): group["lr"] for group in optimizer.param_groups})
        real(module, optimizer)

    monkeypatch.setattr(language_model.LanguageModelingModule, "on_before_optimizer_step", note)
    outcome = gptpl(
        *FIND, "optimizer=muon", "optimizer.lr=1e-3", "optimizer.muon_lr=2e-2", "find.steps=10",
        "find.min_lr=1e-5", "find.max_lr=1e-2", "find.output=out",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    given = [row["lr"] for row in numbers(tmp_path / "out/lr_finder.csv")]
    assert [rate["rest"] for rate in rates[: len(given)]] == pytest.approx(given)
    assert all(rate["muon"] == pytest.approx(20 * rate["rest"]) for rate in rates)
    assert len(given) == 10
    assert "optimizer.muon_lr=" in outcome.out or "suggestion  none" in outcome.out


def test_a_loss_that_is_no_number_ends_the_ramp(gptpl, monkeypatch, tmp_path):
    real = language_model.LanguageModelingModule.configure_gradient_clipping

    def break_down(self, *arguments, **settings):
        if self.trainer.global_step == 12:
            raise NonFiniteError(13, ["report"])
        real(self, *arguments, **settings)

    monkeypatch.setattr(language_model.LanguageModelingModule, "configure_gradient_clipping", break_down)
    outcome = gptpl(*FIND, "find.steps=20", "find.max_lr=1e-2")
    assert outcome.status == 0, outcome.err
    rows = numbers(tmp_path / "lr_finder.csv")
    assert len(rows) == 13
    assert math.isnan(rows[-1]["loss"])
    assert f"diverges    at {rows[-1]['lr']:.2g}" in outcome.out


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("find.min_lr=1", "find.max_lr=0.1"), "find.min_lr=1 must be positive and below find.max_lr=0.1"),
        (("find.min_lr=0",), "find.min_lr=0 must be positive and below find.max_lr=1"),
        (("find.max_lr=much",), "find.max_lr=much: must be a valid number"),
        (("find.steps=5",), "find.steps must be 10 or more, got 5"),
        (("find.minlr=1e-3",), "gptpl find-lr has no setting find.minlr: did you mean find.min_lr?"),
        (("find.output=/proc/no",), "find.output=/proc/no cannot be written"),
        (("resume=runs/x",), "resume=runs/x is for gptpl train"),
    ],
)
def test_bad_input_is_refused(refused, overrides, says):
    assert says in refused(*FIND, *overrides)
