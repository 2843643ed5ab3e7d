"""What is gptpl's."""

import pytest

from gptpl.runs.listing import disk_use, is_sweep, trials
from gptpl.runs.removal import foreign_files, is_gptpls

FOREIGN = ["notes.txt", "checkpoints/mine.pt", "tensorboard/profile.json", "paper/figure.png", "config.yml"]


def foreign(folder):
    return set(foreign_files(folder, disk_use(folder)))


def test_files_of_others_are_told_from_those_of_a_run(tmp_path, make_run):
    run = make_run(tmp_path / "run")
    (run / "checkpoints/.step-00000005.ckpt.77.tmp").touch()
    for name in ("scores.json", "scores.png", "comparison.json", "comparison.png", "judgements.jsonl"):
        (run / name).touch()
    assert foreign(run) == set()
    for name in FOREIGN:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).touch()
    (run / "link").symlink_to(tmp_path)
    assert foreign(run) == {*FOREIGN, "link"}


def test_a_sweep_has_its_own_files_and_those_of_its_trials(tmp_path, make_run):
    for name in ("10", "2", "lr=1"):
        make_run(tmp_path / name)
    (tmp_path / "results.csv").write_text("trial,overrides\n")
    assert is_sweep(tmp_path)
    for name in ("sweep.yaml", "sweep.db", "report.html", "report-curves.png", ".results.csv.7-1.tmp"):
        (tmp_path / name).touch()
    for name in ("output/0.log", ".workers/study.lock", ".slurm/1/log"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    assert [run.name for run in trials(tmp_path)] == ["2", "10", "lr=1"]
    assert foreign(tmp_path) == set()
    (tmp_path / "2/notes.txt").touch()
    (tmp_path / "3").mkdir()
    (tmp_path / "3/config.yml").touch()
    (tmp_path / "loss.png").touch()
    assert foreign(tmp_path) == {"2/notes.txt", "3/config.yml", "loss.png"}


RUN = "run_dir: x\nmodel: {}\ntrainer: {}\n"


@pytest.mark.parametrize(
    ("files", "ours"),
    [
        ({"config.yaml": RUN}, True),
        ({"config.yaml": "a: [1", "run.json": '{"command": "x", "versions": {}}'}, True),
        ({"config.yaml": "model: x\nport: 80\n"}, False),
        ({"config.yaml": "a: [1", "run.json": "{"}, False),
        ({"run.json": '{"command": "x", "versions": {}}'}, False),
        ({"results.csv": "trial,overrides,best_val_loss\n"}, True),
        ({"results.csv": "name,score\n"}, False),
        ({"results.csv": "model,accuracy\n", "0/config.yaml": RUN}, False),  # a project with a run in it
        ({"sweep.yaml": "swept: {}\nsampler: grid\nversions: {}\n"}, True),
        ({"sweep.yaml": "method: bayes\n", "0/config.yaml": RUN}, False),
        ({"sweep.yaml": "method: [\n"}, False),
        ({"multirun.yaml": "", "0/config.yaml": RUN}, False),
        ({}, False),
    ],
)
def test_many_programs_have_a_config_yaml(tmp_path, files, ours):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert is_gptpls(tmp_path) is ours
