"""What a sweep's table says of trials without a run."""

import pytest

from gptpl.errors import InputError
from gptpl.reports.ranking import find_failures

HEADER = "trial,overrides,state,best_val_loss,val_loss,error\n"


def test_failed_trials_and_those_without_a_run_are_found(make_run, tmp_path):
    sweep = make_run("all/sweep/0", [1.0]).path.parent
    (sweep / "results.csv").write_text(
        HEADER
        + '0,lr=1,finished,1.0,1.0,\n1,lr=2,failed,,,"ValueError: a, b"\n'
        + "2,lr=3,pruned,,,\n3,lr=4,finished,,,E"
    )
    found = find_failures(tmp_path)
    assert [(each.folder.name, each.overrides, each.state, each.error) for each in found] == [
        ("1", "lr=2", "failed", "ValueError: a, b"),
        ("2", "lr=3", "pruned", f"it has no run in {sweep / '2'}"),
        ("3", "lr=4", "finished", "E"),
    ]


def test_the_table_of_earlier_sweeps_has_no_states(tmp_path):
    (tmp_path / "results.csv").write_text("trial,overrides,best_val_loss,val_loss,error\n0,lr=2,,,E\n")
    assert [(each.state, each.error) for each in find_failures(tmp_path)] == [("failed", "E")]


def test_another_table_of_that_name_is_no_sweep(tmp_path):
    (tmp_path / "results.csv").write_text("name,value\na,1\n")
    assert find_failures(tmp_path) == []


@pytest.mark.parametrize("text", [b"\xff\xfe", HEADER.encode() + b'0,"lr=2,,,E\n'])
def test_a_damaged_table_is_named(tmp_path, text):
    (tmp_path / "results.csv").write_bytes(text)
    with pytest.raises(InputError, match=r"results\.csv is damaged"):
        find_failures(tmp_path)
