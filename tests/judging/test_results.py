"""Judging from Python: what the command does, in one call."""

import json
from pathlib import Path

import pytest

from gptpl.errors import InputError
from gptpl.judging import JudgeModel, NoJudge, compare, score

ROWS = [
    {"instruction": "Name a colour.", "output": "Red.", "model_response": "red"},
    {"instruction": "Add.", "input": "2 and 3", "output": "5", "model_response": "It is 5."},
]
QUESTION = (
    "Score how well a model's answer follows an instruction.\n\nInstruction:\nAdd.\n\nInput:\n2 and 3\n\n"
    "Correct answer:\n5\n\nModel's answer:\nIt is 5.\n\nThe best score is for an answer that is right, does"
    " all that is asked, and nothing else; half of it for one\nthat is partly right; the lowest for one that"
    " is wrong, empty, off the subject or unreadable. An answer may be\nworded otherwise than the reference."
    " Length is no merit.\n\nReply with one line and nothing else; N is a whole number from 0 to 100:"
    "\nScore: N"
)


def answered(*answers):
    return [row | {"model_response": answer} for row, answer in zip(ROWS, answers, strict=True)]


def test_rows_are_scored_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scores = score(ROWS)
    assert (len(scores.entries), scores.means["exact_match"].value) == (2, 0.5)
    assert scores.means["token_f1"].value == pytest.approx((1 + 0.5) / 2)  # 2 * 1/3 * 1 / (1/3 + 1)
    assert scores.lines()[1].split()[:3] == ["exact", "match", "0.500"]
    assert score(ROWS, judge=NoJudge()) == scores
    assert list(tmp_path.iterdir()) == []


def test_a_judge_needs_no_more_than_its_name_and_address(judge_server, tmp_path):
    scores = score(ROWS, judge=JudgeModel(model="llama3", address=judge_server.address))
    assert judge_server.bodies[1]["messages"] == [{"role": "user", "content": QUESTION}]
    assert judge_server.bodies[1]["options"] == {"temperature": 0, "seed": 123}
    assert scores.means["judge"].value == 85
    assert scores.lines()[-1].split() == ["judge's", "score", "85.0", "85.0", "to", "85.0", "2"]


def test_an_output_is_what_write_writes_and_keeps_the_replies(judge_server, tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(ROWS))
    judge = JudgeModel(model="llama3", address=judge_server.address)
    seen = []

    def progress(things, *, desc, **totals):
        seen.append((desc, totals))
        return things

    scores = score(str(tmp_path / "r.json"), judge=judge, output=tmp_path / "a.json", progress=progress)
    scores.write(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {
        *("r.json", "a.json", "a.png", "b.json", "b.png", "judgements.jsonl"),
    }
    assert seen == [("against the references", {}), ("judging", {"total": 2})]
    again = score(tmp_path / "r.json", judge=judge, output=tmp_path / "c.json")
    assert again.judge is not None
    assert (again.judge.asked, again.judge.remembered, len(judge_server.bodies)) == (0, 2, 2)


def test_two_models_are_compared(judge_server):
    judge_server.reply = lambda prompt: "Winner: A"
    judge = JudgeModel(model="llama3", address=judge_server.address)
    found = compare(answered("red", "5"), answered("blue", "5"), judge=judge, both_orders=True)
    assert found.means["exact_match"].value == 0.5
    assert (found.means["win_rate"].value, found.contradictory, found.p_value()) == (0.5, 2, 1.0)
    assert [entry["second_shown_first"] for entry in found.entries] == [[False, True]] * 2


def test_replies_that_cannot_be_read_are_left_to_the_caller(judge_server, caplog):
    judge = JudgeModel(model="llama3", address=judge_server.address, asks=1)
    judge_server.reply = lambda prompt: "Hm." if "Add" in prompt else "Score: 3"
    some = score(ROWS, judge=judge)
    assert some.failures == {1: "Hm."}
    some.check_readable()
    assert "1 of 2 judgements could not be read" in caplog.text
    judge_server.reply = lambda prompt: "Hm."
    none = score(ROWS, judge=judge)
    assert none.means["exact_match"].value == 0.5
    with pytest.raises(InputError, match="no reply of the judge could be read, the first was 'Hm"):
        none.check_readable()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"output": "none/x.json"}, "must be a .json file in an existing folder, got none/x.json"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"bootstrap_samples": 99}, "bootstrap_samples must be at least 100, got 99"),
        ({"markers": ["a", ""]}, "markers contains an empty text"),
    ],
)
def test_what_is_wrong_is_found_before_the_judge_is_asked(changes, words, judge_server):
    with pytest.raises(InputError, match=words):
        score(ROWS, judge=JudgeModel(model="m", address=judge_server.address), **changes)
    assert judge_server.bodies == []
    with pytest.raises(InputError, match="responses must be a list with at least one entry"):
        score([])
    assert not Path("none").exists()
