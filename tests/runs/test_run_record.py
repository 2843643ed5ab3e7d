"""A run read back from its folder: one made by hand, and damaged ones."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptpl.errors import InputError
from gptpl.files.run_record import find_runs, parse_yaml, read_run

CONFIG = (
    "name: mine\nseed: 1\noptimizer: {_target_: gptpl.training.optimizers.adamw, lr: 0.001}\nrun_dir: /x\n"
)
METRICS = """\
step,eval/train_loss,val/loss,train/loss,train/tokens_seen
0,5.5,5.6,,
1,,,5.4,100
2,4.0,4.5,5.0,200
3,,,4.2,300
4,3.0,,4.1,
5,2.0,nan,4.0,500
6,1.0,4.7,,
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "mine" / "first"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "metrics.csv").write_text(METRICS)
    (folder / "run.json").write_text(json.dumps({"finished": "2026-01-01T00:00:00+00:00", "seconds": 3}))
    (folder / "samples.jsonl").write_text(
        '{"step": 6, "prompt": "a", "continuation": "b\\u2028c"}\n{"step": 7, "pro'
    )
    return folder


def test_settings_evaluations_and_samples_are_those_of_the_files(folder):
    run = read_run(folder)
    assert run.name == "mine/first"
    assert run.settings == {"name": "mine", "seed": 1, "optimizer": "adamw", "optimizer.lr": 0.001}
    # Step 6 logged no tokens: 100 a step.
    assert [(each.step, each.tokens_seen) for each in run.evaluations] == [
        (0, 0),
        (2, 200),
        (5, 500),
        (6, 600),
    ]
    assert [each.train_loss for each in run.evaluations] == [5.5, 4.0, 2.0, 1.0]
    assert run.best is not None
    assert (run.best.step, run.best.val_loss) == (2, 4.5)
    assert run.last is not None
    assert run.last.val_loss == 4.7
    assert run.metric("train/loss") == 4.0
    assert math.isnan(run.metric("val/perplexity"))
    assert [sample["continuation"] for sample in run.samples()] == ["b\u2028c"]


def test_evaluations_need_no_metrics_csv_and_their_best_is_by_any_metric(folder):
    """Three lines and a torn one; the one before the first step is no merit."""
    measured = [(0, 9.0, 0.99), (3, 4.0, 0.5), (6, 5.0, 0.75)]
    lines = [
        json.dumps({"step": step, "tokens_seen": 10 * step, "metrics": {"val/loss": loss, "val/f1": f1}})
        for step, loss, f1 in measured
    ]
    (folder / "evaluations.jsonl").write_text("\n".join([*lines, '{"step": 9, "tok']))
    (folder / "metrics.csv").unlink()
    run = read_run(folder)
    assert [(each.step, each.tokens_seen, each.val_loss) for each in run.evaluations] == [
        (0, 0, 9.0),
        (3, 30, 4.0),
        (6, 60, 5.0),
    ]
    best = {mode: run.best_by("val/f1", mode) for mode in ("min", "max")}
    assert {mode: each.step for mode, each in best.items() if each} == {"min": 3, "max": 6}
    assert run.best_by("val/accuracy", "max") is None
    assert run.metric("val/f1") == 0.75
    assert (run.steps, run.tokens_seen) == (6, 60)


def test_a_run_of_before_that_was_resumed_has_the_evaluations_of_both_files(folder):
    line = {"step": 5, "tokens_seen": 500, "metrics": {"val/loss": 4.6}}
    (folder / "evaluations.jsonl").write_text(json.dumps(line) + "\n")
    assert [(each.step, each.val_loss) for each in read_run(folder).evaluations] == [
        (0, 5.6),
        (2, 4.5),
        (5, 4.6),
        (6, 4.7),
    ]


@pytest.mark.parametrize(
    ("record", "state"),
    [
        ({"finished": "now"}, "finished"),
        ({"failed": {"error": "E"}}, "failed"),
        ({"stopped": {"reason": "SIGTERM"}}, "stopped"),
        ({}, "unfinished"),
    ],
)
def test_the_record_tells_how_a_run_ended(folder, record, state):
    (folder / "run.json").write_text(json.dumps(record))
    assert read_run(folder).state == state


def test_a_run_that_has_just_begun_has_no_losses(folder):
    for name in ("metrics.csv", "run.json", "samples.jsonl"):
        (folder / name).unlink()
    run = read_run(folder)
    assert (run.state, run.evaluations, run.best, run.last, run.samples()) == (
        "unfinished",
        [],
        None,
        None,
        [],
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.yaml", ""),
        ("config.yaml", "a: [1"),
        ("run.json", '{"finished": '),
        ("run.json", "[]"),
        ("metrics.csv", "step,val/loss\n1,3.0\n2,3.x\n"),
        ("metrics.csv", "stop,val/loss\n1,3.0\n"),
        ("metrics.csv", "step,val/loss\n1,3.0,4.0\n"),
        ("metrics.csv", 'step,val/loss\n1,"3.0\n'),
        ("evaluations.jsonl", '{"step": 1}\n'),
        ("evaluations.jsonl", '{"st\n{"step": 1, "tokens_seen": 1, "metrics": {}}\n'),
    ],
)
def test_a_damaged_file_is_named(folder, name, text):
    (folder / name).write_text(text)
    with pytest.raises(InputError, match=rf"{name} is .*: restore it, or leave this run out"):
        read_run(folder)


@pytest.mark.parametrize(
    "text", ["- " * 200_000, "[" * 50_000 + "]" * 50_000, "{a: " * 50_000 + "}" * 50_000]
)
def test_yaml_that_nests_too_deep_does_not_end_the_process(text):
    """As libyaml's loader would, out of stack."""
    with pytest.raises(ValueError, match="nests deeper than 40 levels"):
        parse_yaml(text)


def test_bytes_that_are_no_text_are_damage(folder):
    (folder / "metrics.csv").write_bytes(b"step,val/loss\n1,\xff\n")
    with pytest.raises(InputError, match=r"metrics\.csv is damaged"):
        read_run(folder)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"is not a run folder \(it has no config\.yaml\)"):
        read_run(tmp_path)


def test_the_checkpoint_of_a_run_is_no_run_but_names_it(folder):
    with pytest.raises(InputError, match=rf"last\.ckpt is a checkpoint, not a run folder: give {folder}$"):
        read_run(folder / "checkpoints/last.ckpt")


def test_runs_are_found_below_a_folder_but_not_in_a_run_or_behind_a_link(folder):
    second = folder.parent / "second"
    second.mkdir()
    (second / "config.yaml").write_text(CONFIG)
    inner = folder / "checkpoints"
    inner.mkdir()
    (inner / "config.yaml").write_text(CONFIG)
    (folder.parent / "latest").symlink_to(second)
    root = folder.parent.parent
    assert find_runs(root) == [folder, second]
    assert find_runs(folder) == [folder]


@pytest.mark.parametrize(
    ("entries", "steps", "tokens"),
    [
        ({"finished": "now", "steps": 9, "tokens_seen": 900}, 9, 900),
        ({"steps": 9, "tokens_seen": 900}, 6, 500),  # of the part before it was resumed
        ({"stopped": {"step": 5}}, 5, 500),
        ({"failed": {"step": 3}}, 3, 500),
        ({"stopped": "yes", "planned_steps": "many"}, 6, 500),
    ],
)
def test_how_far_a_run_came(folder, entries, steps, tokens):
    (folder / "run.json").write_text(json.dumps(entries))
    run = read_run(folder)
    assert (run.steps, run.tokens_seen, run.planned_steps) == (steps, tokens, None)


def test_when_it_was_started_is_in_local_time(folder):
    (folder / "run.json").write_text('{"started": "2026-01-01T10:00:00+00:00", "planned_steps": 9}')
    run = read_run(folder)
    assert run.started.timestamp() == 1767261600
    assert run.started.tzinfo is not None
    assert run.planned_steps == 9
    (folder / "run.json").write_text('{"started": "once"}')
    assert read_run(folder).started.timestamp() == pytest.approx((folder / "config.yaml").stat().st_mtime)


def test_a_folder_that_may_not_be_read_is_left_out_with_a_warning(folder, monkeypatch, caplog):
    second = folder.parent.parent / "others"
    second.mkdir()
    allowed = Path.iterdir

    def iterdir(path: Path) -> Iterator[Path]:
        if path == second:
            raise PermissionError(13, "Permission denied")
        return allowed(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert find_runs(folder.parent.parent) == [folder]
    assert f"{second} is left out: Permission denied" in caplog.text


def test_hidden_folders_are_not_searched(folder):
    folder.rename(folder.with_name(".first.removed"))
    assert find_runs(folder.parent.parent) == []
