"""Settings on one level, and which of them differ."""

from gptpl.files.run_settings import Setting, differing, flat_settings


def test_settings_are_flattened_to_what_tensorboard_takes():
    config = {
        "seed": 1,
        "model": {"n_layers": 2, "deep": {"er": 0.5}, "empty": {}},
        "flag": True,
        "name": None,
        "betas": [0.9, 0.95],
    }
    assert flat_settings(config) == {
        "seed": 1,
        "model.n_layers": 2,
        "model.deep.er": 0.5,
        "flag": True,
        "name": "None",
        "betas": "[0.9, 0.95]",
    }


def test_what_says_only_where_a_run_writes_is_left_out():
    config = {"run_dir": "a", "logger": {"csv": {"save_dir": "a"}}, "seed": 1, "data": {"run_dir": "kept"}}
    assert flat_settings(config) == {"seed": 1, "data.run_dir": "kept"}


def test_a_setting_that_an_inner_part_repeats_is_there_once():
    config = {
        "data": {
            "path": "a.txt",
            "size": 1,
            "corpus": {"path": "a.txt", "size": 2, "deep": {"path": "a.txt"}},
        },
        "path": "a.txt",
        "model": {"path": "b.txt"},
    }
    assert flat_settings(config) == {
        "data.path": "a.txt",
        "data.size": 1,
        "data.corpus.size": 2,
        "path": "a.txt",
        "model.path": "b.txt",
    }


def test_a_class_is_its_last_name():
    config = {"scheduler": {"_target_": "gptpl.training.schedules.CosineSchedule", "_partial_": True}}
    assert flat_settings(config) == {"scheduler": "CosineSchedule"}


def test_settings_differ_by_value_type_and_presence():
    settings: list[dict[str, Setting]] = [
        {"a": 1, "b": 2, "c": 1.0},
        {"a": 1, "b": 3, "c": 1},
        {"a": 1, "b": 2, "c": 1, "d": 0},
    ]
    assert differing(settings) == {"b": [2, 3, 2], "c": [1.0, 1, 1], "d": [None, None, 0]}
    assert differing(settings[:1]) == {}
