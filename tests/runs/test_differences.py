"""In what runs differ."""

from gptpl.files.run_record import read_run
from gptpl.files.run_settings import differing_beside, differing_settings


def test_settings_that_differ_and_no_others(tmp_path, make_run):
    folders = [
        make_run(tmp_path / "a"),
        make_run(tmp_path / "b", lr=0.5),
        make_run(tmp_path / "c", patience=9),
    ]
    assert differing_settings([read_run(folder) for folder in folders]) == {
        "optimizer.lr": [0.001, 0.5, 0.001],
        "callbacks.early_stopping.patience": [3, 3, 9],
    }


def test_a_path_in_the_runs_own_folder_is_no_difference_but_one_beside_it_is(tmp_path, make_run):
    runs = [make_run(tmp_path / name) for name in ("a", "ab")]
    assert differing_settings([read_run(run) for run in runs]) == {}
    config = runs[1] / "config.yaml"
    config.write_text(config.read_text().replace("ab/loss.png", "ab2/loss.png"))
    found = differing_settings([read_run(run) for run in runs])
    assert found == {"callbacks.loss_curve.path": ["RUN/loss.png", f"{tmp_path}/ab2/loss.png"]}


def test_what_differs_beside_the_settings(tmp_path, make_run):
    start = {"init": "run", "checkpoint": "/x/last.ckpt", "crop_context": False, "parent": {"step": 3}}
    other = make_run(
        tmp_path / "b",
        git_commit="c" * 40,
        data={"name": "tale", "sha256": "d" * 64},
        versions={"torch": "2.0", "numpy": "2"},
        hardware={"cpu_threads": 2, "gpus": ["H200"]},
        start=start,
        resumed=[{"step": 1}, {"step": 3}],
        seconds=1,
        command="gptpl train seed=1",
    )
    found = differing_beside([read_run(make_run(tmp_path / "a")), read_run(other)])
    assert found == {
        "data.sha256": ["b" * 64, "d" * 64],
        "versions.numpy": [None, "2"],
        "git_commit": ["a" * 40, "c" * 40],
        "hardware.gpus": ["[]", "['H200']"],
        "start.init": ["random", "run"],
        "start.checkpoint": [None, "/x/last.ckpt"],
        "resumed": [None, "1, 3"],
    }
