"""`gptpl find-batch-size`: what it tries, and what it leaves to be."""

import csv

import pytest
from matplotlib.image import imread

from gptpl.runs import finders, trial
from gptpl.runs.finders import Measured, suggestion

FIND = ("find-batch-size", "trainer=cpu", "trainer.precision=32-true", "experiment=quick", "model.n_layers=1")
ONCE = "find.timed_steps=1"


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_sizes_up_to_the_most_that_is_asked_for_are_measured(gptpl, monkeypatch, tmp_path):
    monkeypatch.setattr(finders, "GAIN", 0.0)  # speed is not what is tested
    outcome = gptpl(*FIND, ONCE, "find.max_batch_size=6", "find.output=out")
    assert outcome.status == 0, outcome.err
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")} == {
        "out", "out/batch_size_finder.png", "out/batch_size_finder.csv"
    }  # fmt: skip
    table = rows(tmp_path / "out/batch_size_finder.csv")
    assert [int(row["batch_size"]) for row in table] == [1, 2, 4, 6]
    for row in table:
        speed = int(row["batch_size"]) * 64 / float(row["step_seconds"])
        assert float(row["tokens_per_second"]) == pytest.approx(speed)
    assert imread(tmp_path / "out/batch_size_finder.png").std() > 0
    assert "suggestion  data.batch_size=" in outcome.out


def test_a_size_that_does_not_fit_is_never_tried(gptpl, monkeypatch, tmp_path):
    tried = []
    real = trial.train_a_little

    def note(settled, *args, **options):
        tried.append(settled.datamodule.batch_size)
        real(settled, *args, **options)

    monkeypatch.setattr(finders, "GAIN", 0.0)
    monkeypatch.setattr(finders, "train_a_little", note)
    monkeypatch.setattr(trial, "step_memory", lambda *args, batch_size, **more: Needed(100 * batch_size))
    monkeypatch.setattr(trial, "free_memory", lambda device: 600)  # of which 480 are used
    outcome = gptpl(*FIND, ONCE)
    assert outcome.status == 0, outcome.err
    assert tried == [1, 2, 4]
    assert "ended       8 sequences would need about" in outcome.out


class Needed:
    def __init__(self, peak: int) -> None:
        self.peak = peak


def test_not_one_window_fits(refused, monkeypatch):
    monkeypatch.setattr(trial, "free_memory", lambda device: 1000)
    assert "data.batch_size=1: a step needs about" in refused(*FIND)


def test_the_text_is_the_limit(gptpl, monkeypatch, tmp_path):
    """Of 418 characters four fifths make 5 training windows of 64 bytes."""
    monkeypatch.setattr(finders, "GAIN", 0.0)
    (tmp_path / "my.txt").write_text("The sea was still. " * 22)
    data = ("data=text_file", "data.path=my.txt", "data.train_ratio=0.8")
    outcome = gptpl(*FIND, ONCE, *data, "find.max_batch_size=1000")
    assert outcome.status == 0, outcome.err
    sizes = [int(row["batch_size"]) for row in rows(tmp_path / "batch_size_finder.csv")]
    assert sizes == [1, 2, 4, 5]


def test_the_smallest_of_nearly_the_same_speed_is_suggested():
    measured = [
        Measured(
            batch_size=2**i, tokens_per_second=speed, step_seconds=1, peak_bytes=1, estimated_step_bytes=1
        )
        for i, speed in enumerate([100, 180, 240, 250, 249])
    ]
    assert suggestion(measured).batch_size == 4
    assert suggestion(measured[:1]).batch_size == 1


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("find.max_batch_size=0",), "find.max_batch_size must be 1 or more, got 0"),
        (("data.batch_size=4",), "data.batch_size is what gptpl find-batch-size looks for: leave it out"),
        (
            ("find.steps=4",),
            "gptpl find-batch-size has no setting find.steps: did you mean find.timed_steps?",
        ),
        (("-m",), "-m sweeps over settings of gptpl train"),
        (("data.train_ratio=0.9999",), "too short for one sequence"),
    ],
)
def test_bad_input_is_refused(refused, overrides, says):
    assert says in refused(*FIND, *overrides)
