"""Runs found by name, and listed."""

import json
import os
from pathlib import Path

import pytest

from gptpl.errors import InputError
from gptpl.files.run_record import change_tags, read_run
from gptpl.runs.build import planned_config
from gptpl.runs.claims import claim_new_run
from gptpl.runs.listing import find_run, list_runs

RUNS = {
    "quick/2026-11-24_10-00-00": "2026-11-24T10:00:00+00:00",
    "quick/2026-11-26_02-14-00": "2026-11-26T02:14:00+00:00",
    "quick/2026-11-26_02-14-00_2": "2026-11-26T02:14:00+00:00",
    "tale/2026-11-25_08-30-00": "2026-11-25T08:30:00+00:00",
    "sweeps/quick_1a2b/1": "2026-11-20T10:00:00+00:00",
    "sweeps/quick_1a2b/10": "2026-11-20T10:01:00+00:00",
    "ctrlc": "2026-11-21T10:00:00+00:00",
}


@pytest.fixture
def root(tmp_path, make_run, monkeypatch):
    """`runs/` in the present folder."""
    for name, started in RUNS.items():
        make_run(tmp_path / "runs" / name, started=started)
    monkeypatch.chdir(tmp_path)
    return Path("runs")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("runs/tale/2026-11-25_08-30-00", "tale/2026-11-25_08-30-00"),
        ("tale/2026-11-25_08-30-00/", "tale/2026-11-25_08-30-00"),
        ("ctrlc", "ctrlc"),
        ("tale", "tale/2026-11-25_08-30-00"),
        ("runs/tale", "tale/2026-11-25_08-30-00"),
        ("sweeps/quick_1a2b/1", "sweeps/quick_1a2b/1"),
        ("quick_1a2b/1", "sweeps/quick_1a2b/1"),
        ("10", "sweeps/quick_1a2b/10"),
        ("2026-11-25", "tale/2026-11-25_08-30-00"),
        ("quick/2026-11-24", "quick/2026-11-24_10-00-00"),
        ("runs/quick/2026-11-24", "quick/2026-11-24_10-00-00"),
        ("ta", "tale/2026-11-25_08-30-00"),
        ("quick/2026-11-26_02-14-00", "quick/2026-11-26_02-14-00"),
        ("latest", "quick/2026-11-26_02-14-00_2"),
        ("runs/latest", "quick/2026-11-26_02-14-00_2"),
        ("tale/latest", "tale/2026-11-25_08-30-00"),
        ("sweeps/latest", "sweeps/quick_1a2b/10"),
        ("quick_1a2b/latest", "sweeps/quick_1a2b/10"),
    ],
)
def test_a_run_has_many_names(root, name, found, monkeypatch):
    assert find_run(name) == root / found
    monkeypatch.setenv("GPTPL_RUNS", str(root.absolute()))
    assert find_run(Path(name)).resolve() == (root / found).resolve()


def test_all_runs_may_be_elsewhere(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setenv("GPTPL_RUNS", str(tmp_path / "runs"))
    assert find_run("latest") == tmp_path / "runs/quick/2026-11-26_02-14-00_2"
    assert {run.path for run in list_runs()} == {tmp_path / "runs" / name for name in RUNS}
    with claim_new_run(None, name="quick") as claim:
        assert claim.path.parent == tmp_path / "runs/quick"
    assert Path(planned_config(["experiment=quick"])[0].run_dir).parent == tmp_path / "runs/quick"
    with pytest.raises(InputError, match=f"gptpl runs list shows all in .*{tmp_path.name}/runs"):
        find_run("tael")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "quick",
            "quick could be any of 3 runs: give one of runs/quick/2026-11-26_02-14-00_2,"
            " runs/quick/2026-11-26_02-14-00, runs/quick/2026-11-24_10-00-00,"
            " or quick/latest for the first of them",
        ),
        ("2026-11-26", "could be any of 2 runs"),
        ("runs", "runs could be any of 7 runs: give one of .* and 2 more, or runs/latest"),
        (
            "tael",
            r"resume=tael is not a run: did you mean tale\? \(gptpl runs list shows all",
        ),
        ("quik/latest", "did you mean quick"),
        ("/nowhere/run", "resume=/nowhere/run does not exist: give a run's folder"),
        ("../tale", "does not exist"),
    ],
)
def test_what_is_no_run_or_more_than_one_says_what_there_is(root, name, words):
    with pytest.raises(InputError, match=words):
        find_run(name, key="resume")


def test_a_path_that_is_there_is_meant(root, tmp_path):
    (tmp_path / "tale").mkdir()
    (tmp_path / "model.pth").touch()
    assert find_run("tale") == Path("tale")
    assert find_run("model.pth") == Path("model.pth")
    (root / "latest").symlink_to("ctrlc")
    assert find_run("runs/latest") == root / "latest"


def test_where_there_are_no_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="latest does not exist, and there are no runs in runs"):
        find_run("latest")


def test_finding_reads_neither_metrics_nor_settings(root):
    for name in RUNS:
        (root / name / "metrics.csv").unlink()
        (root / name / "config.yaml").write_text("[")
    (root / "tale/2026-11-25_08-30-00/run.json").write_text("{")
    os.utime(root / "tale/2026-11-25_08-30-00/config.yaml", (2e9, 2e9))
    assert find_run("latest") == root / "tale/2026-11-25_08-30-00", "damaged: by the time of its settings"


def test_runs_are_listed_by_date_with_a_sweep_as_one(root):
    (root / "sweeps/quick_1a2b/results.csv").write_text("trial,overrides\n")
    names = [each.path.relative_to(root).as_posix() for each in list_runs()]
    assert names == [
        "quick/2026-11-26_02-14-00",
        "quick/2026-11-26_02-14-00_2",
        "tale/2026-11-25_08-30-00",
        "quick/2026-11-24_10-00-00",
        "ctrlc",
        "sweeps/quick_1a2b/1",
        "sweeps/quick_1a2b/10",
    ]
    assert [each.sweep for each in list_runs([root / "sweeps"])] == [root / "sweeps/quick_1a2b"] * 2


def test_tags_and_notes_of_the_settings_can_be_changed_afterwards(root):
    run = root / "ctrlc"
    with (run / "config.yaml").open("a") as config:
        config.write("tags: [baseline, 3]\nnotes: for the book\n")
    before = (run / "config.yaml").read_bytes()
    assert (read_run(run).tags, read_run(run).notes) == (["baseline"], "for the book")
    assert change_tags(run, add=["good", "baseline"]) == ["baseline", "good"]
    assert change_tags(run, remove=["baseline"], add=["v1.2"]) == ["good", "v1.2"]
    record = json.loads((run / "run.json").read_text())
    assert record["tags"] == ["good", "v1.2"]
    assert record["data"] == {"name": "tale", "sha256": "b" * 64}, "the rest stays"
    assert (run / "config.yaml").read_bytes() == before
    assert [each.path for each in list_runs(tags=["good", "v1.2"])] == [run]
    assert list_runs(tags=["good", "baseline"]) == []
    for change in ({"add": ["two words"]}, {"add": [""]}, {"add": ["-x"]}, {"remove": ["baseline"]}):
        with pytest.raises(InputError, match=r"(not a|no) tag"):
            change_tags(run, **change)
    assert change_tags(run, remove=["good", "v1.2"]) == []
    assert read_run(run).tags == [], "those of the settings do not come back"
