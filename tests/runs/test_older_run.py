"""A run that gptpl 3e127c0 made, before the rooms config and runs: it goes on as it would have there.

`data/older_run.tar.xz` holds such a run of 8 steps, stopped after 4 of them, and the metrics of its twin that
was never stopped. On the machine that made them the rest has the same bits; other processors round otherwise.
"""

import csv
import json
import tarfile
from pathlib import Path

import pytest

import gptpl

ARCHIVE = Path(__file__).parent / "data/older_run.tar.xz"
TIMED = {"train/tokens_per_second", "train/mfu"}


@pytest.fixture
def older(tmp_path, monkeypatch) -> Path:
    """In another folder than the one that its config names."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPTPL_CACHE", str(tmp_path / "cache"))  # without times that were measured here
    return tmp_path


def numbers(path: Path) -> list[dict[str, float]]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: float(text) for name, text in row.items() if text and name not in TIMED} for row in rows]


def test_it_ends_with_the_losses_of_the_run_that_was_not_stopped(older):
    run = gptpl.resume(older / "stopped", "trainer.stop_at_step=null")
    assert run.run_dir == older / "stopped"
    run.fit()
    expected, found = numbers(older / "straight.csv"), numbers(older / "stopped/metrics.csv")
    assert len(found) == len(expected) == 9
    for row, wanted in zip(found, expected, strict=True):
        assert {name: row[name] for name in wanted} == pytest.approx(wanted, rel=1e-4)
    assert (older / "stopped/checkpoints/step-00000008.ckpt").is_file()  # and not where its config says


def test_the_same_command_draws_the_same_numbers(older):
    """Weights, dropout and the order of the batches: a number drawn more anywhere changes all that follow."""
    command = json.loads((older / "stopped/run.json").read_text())["command"]
    overrides = [each for each in command.split()[2:] if not each.startswith(("run_dir", "trainer.stop"))]
    run = gptpl.build(*overrides, "run_dir=anew")
    run.fit()
    for row, wanted in zip(numbers(older / "anew/metrics.csv"), numbers(older / "straight.csv"), strict=True):
        assert {name: row[name] for name in wanted} == pytest.approx(wanted, rel=1e-4)


def test_its_model_is_loaded(older):
    model = gptpl.load(older / "stopped")
    assert model.step == 4
    assert model.evaluate().loss == pytest.approx(5.281, abs=0.01)
