"""Which runs are compared, in which order, under which names."""

import math
from pathlib import Path

from gptpl.files.figures import COLOURS, GREY
from gptpl.reports.ranking import COLUMNS, Criterion, Failure, groups, measures


def test_the_lowest_validation_loss_comes_first_and_no_loss_last(make_run):
    runs = [
        make_run("late", [5.5, 3.0, 4.0]),
        make_run("none", [], record={"finished": None}),
        make_run("best", [5.5, 2.0]),
        make_run("worse", [1.0, 9.5]),  # than before it began, which is no merit of its own
        make_run("nan", [math.nan, math.nan]),
        make_run("first", [5.5, 2.5, 9.0]),
    ]
    [group] = groups(runs, [])
    assert [entry.name for entry in group.entries] == ["best", "first", "late", "worse", "nan", "none"]
    assert [entry.label for entry in group.entries] == ["1", "2", "3", "4", "", ""]
    assert [entry.value for entry in group.ranked] == [2.0, 2.5, 3.0, 9.5]
    assert [entry.state for entry in group.entries] == [*["finished"] * 5, "unfinished"]


def test_the_best_have_colours_and_the_others_are_grey(make_run):
    [group] = groups([make_run(str(i), [5.0, 3.0 + i]) for i in range(10)], [])
    assert [entry.colour for entry in group.entries] == [*COLOURS, GREY, GREY]


def test_other_text_split_or_tokenizer_is_another_ranking(make_run):
    other_data = {"data": {"name": "mine", "sha256": "c" * 64}}
    other_tokens = {"tokenizer": {"name": "gpt2", "vocab_size": 50257, "sha256": "d" * 64}}
    runs = [
        make_run("a", [9.0, 3.0], {"data.train_ratio": 0.9}),
        make_run("b", [9.0, 2.0], {"data.train_ratio": 0.9}),
        make_run("text", [9.0, 1.0], {"data.train_ratio": 0.9}, record=other_data),
        make_run("tokens", [9.0, 0.5], {"data.train_ratio": 0.9}, record=other_tokens),
        make_run("split", [9.0, 0.1], {"data.train_ratio": 0.8}),
        make_run("masked", [9.0, 0.05], {"data.train_ratio": 0.85, "data.mask_instruction": True}),
        make_run("whole", [9.0, 0.04], {"data.train_ratio": 0.85, "data.mask_instruction": False}),
    ]
    found = groups(runs, [])
    assert [[entry.label for entry in group.entries] for group in found] == [
        *(["A1", "A2"], ["B1"], ["C1"], ["D1"], ["E1"], ["F1"])
    ]
    assert [entry.name for entry in found[0].entries] == ["b", "a"]
    assert "tokenizer gpt2 of 50257 tokens" in found[2].title
    assert found[4].title.endswith(", train_ratio 0.85, mask_instruction True")
    # Within a group nothing differs, although much does between them.
    assert not any(group.settings for group in found)


def test_the_loss_of_labels_is_no_perplexity(make_run):
    runs = [
        make_run("text", [2.0, 1.0]),
        make_run("labels", [2.0, 1.0], record={"use": ["classify", "text=a"]}),
    ]
    assert [measures(run)[COLUMNS.index("perplexity")] for run in runs] == ["2.72", "-"]


def test_bits_per_byte_rank_tokenizers_together(make_run):
    other_tokens = {"tokenizer": {"name": "gpt2", "vocab_size": 50257, "sha256": "d" * 64}}
    other_data = {"data": {"name": "mine", "sha256": "c" * 64}}
    runs = [
        make_run("bytes", [9.0, 1.2], bits=[9.0, 1.7]),
        make_run("gpt2", [9.0, 4.0], record=other_tokens, bits=[9.0, 1.4]),
        make_run("text", [9.0, 1.0], record=other_data, bits=[9.0, 1.0]),
    ]
    by = Criterion(metric="val/bits_per_byte")
    found = groups(runs, [], by)
    assert [[entry.name for entry in group.entries] for group in found] == [["gpt2", "bytes"], ["text"]]
    assert [entry.value for entry in found[0].entries] == [1.4, 1.7]
    assert found[0].title == "Group A: text tale (aaaaaaaa), train_ratio ?"
    assert by.title == "bits per byte"
    assert [measures(run)[COLUMNS.index("bits per byte")] for run in runs] == ["1.7000", "1.4000", "1.0000"]


def test_only_settings_that_differ_are_shown_what_is_learned_before_how_long(make_run):
    same = {"model.n_layers": 2, "scheduler.warmup_steps": 1}
    runs = [
        make_run("a", [9.0, 3.0], {**same, "trainer.max_steps": 1, "optimizer.lr": 1e-3, "name": "x"}),
        make_run("b", [9.0, 2.0], {**same, "trainer.max_steps": 2, "optimizer.lr": 3e-3, "name": "y"}),
        make_run("c", [9.0, 1.0], {**same, "trainer.max_steps": 2, "optimizer.eps": 1.0}),
    ]
    [group] = groups(runs, [])
    assert group.settings == ["optimizer.eps", "optimizer.lr", "trainer.max_steps"]
    assert group.differing_settings(group.entries[0])["optimizer.lr"] is None


def test_a_failed_trial_is_a_row_once(make_run, tmp_path):
    killed = make_run("sweep/trial-1", [5.0, 4.0], record={"finished": None})
    broken = make_run(
        "sweep/trial-2", [5.0], record={"finished": None, "failed": {"error": "E: x", "step": 7}}
    )
    failures = [
        Failure(folder=killed.path, overrides="lr=1", error="killed by signal 9"),
        Failure(folder=broken.path, overrides="lr=2", error="other words"),
        Failure(folder=tmp_path / "sweep" / "trial-3", overrides="lr=3", error="ValueError: no"),
    ]
    [group] = groups([broken, killed], failures)
    assert [(entry.name, entry.state, entry.error) for entry in group.entries] == [
        ("trial-1", "failed", "killed by signal 9"),
        ("trial-2", "failed", "E: x (after step 7)"),
        ("trial-3", "failed", "ValueError: no"),
    ]
    assert math.isnan(group.entries[2].value)
    assert group.entries[2].overrides == "lr=3"


def test_what_failed_has_a_place_of_its_own_beside_several_groups(make_run):
    runs = [make_run("a", [3.0]), make_run("b", [2.0], record={"data": {"name": "mine", "sha256": "c" * 64}})]
    found = groups(runs, [Failure(folder=Path("gone"), overrides="", error="E")])
    assert [group.title.split(":")[0] for group in found] == ["Group A", "Group B", "Data not known"]


def test_a_loss_on_unknown_data_is_not_ranked_among_the_known(make_run):
    unknown = {"data": None, "tokenizer": None}
    known, lost = make_run("a", [9.0, 3.0]), make_run("b", [9.0, 1.0], record=unknown)
    assert [[entry.label for entry in group.entries] for group in groups([known, lost], [])] == [
        ["A1"],
        ["?1"],
    ]
    begun = make_run("c", [], record=unknown)  # no loss: it can stand with the others
    assert [[entry.name for entry in group.entries] for group in groups([known, begun], [])] == [["a", "c"]]


def test_names_leave_out_what_is_common(make_run):
    runs = [make_run("x/0", [1.0]), make_run("x/1", [2.0])]
    assert [entry.name for entry in groups(runs, [])[0].entries] == ["run 0", "run 1"]
    assert [entry.name for entry in groups(runs[:1], [])[0].entries] == ["x/0"]


def test_nothing_at_all_is_no_group():
    assert groups([], []) == []
