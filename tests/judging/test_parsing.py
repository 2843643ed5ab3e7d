"""A table of replies as judges write them, and what each says."""

import pytest

from gptpl.judging.settings import parse_score, parse_winner

SCORES = [
    ("Score: 85", 85),
    ("score: 85.", 85),
    ("Score: 85/100", 85),
    ("Score: 85 / 100.", 85),
    ("Score: 85 out of 100", 85),
    ("Score = 85 points", 85),
    ("**Score:** 85", 85),
    ("**Score: 85**", 85),
    ("### Final score: 85", 85),
    ("Score: [85]", 85),
    ("Score: 85%", 85),
    ("Score: 85.5", 85.5),
    ("Score: 0", 0),
    ("Score: 100", 100),
    ("85", 85),
    (" 85\n", 85),
    ("85/100", 85),
    ("100/100", 100),
    ("`85`", 85),
    ("The answer names 2 of the 3 cities.\n\nScore: 60", 60),
    ("Score: 60\nA score of 100 would need all 3 cities.", 60),
    ("On a scale of 0-100, I give it 85 out of 100.", 85),
    ("On a scale from 0 to 100 the score is 85.", 85),
    ("The score (0-100) is 85", 85),
    ("Score (0\N{EN DASH}100): 85", 85),
    ("Score (out of 100): 85", 85),
    ("I'd score this response as 0 out of 100.", 0),
    ("I would give the model response a rating of 85.", 85),
    ('{"score": 85, "reason": "2 of 3"}', 85),
    ('```json\n{"Score": 85}\n```', 85),
    ("<think>100 is too much, 40 too little. Score: 90?</think>\nScore: 70", 70),
    ("85\n\nThe answer is right but for its 2 commas.", 85),
    ("Score: 85\nFinal score: 85", 85),
    # nothing that could be relied on
    ("", None),
    ("A fine answer.", None),
    ("Score: eighty-five", None),
    ("Score: N", None),
    ("Score: NaN", None),
    ("Score: 0-100", None),
    ("From 0 to 100.", None),
    ("100 is the best score, 0 the worst.", None),
    ("The answer names 2 of the 3 cities.", None),
    ("Score: 80-90", None),
    ("Score: 80 to 90", None),
    ("Score: 8/10", None),
    ("I give it 8 out of 10.", None),
    ("Score: 85/1000", None),
    ("Score: 101", None),
    ("Score: -5", None),
    ("Score: 1e2", None),
    ("Score: 85,5", None),
    ("Score: 1,000", None),
    ("Score: 60\nScore: 80", None),
    ("The score is 60. No: the score is 80.", None),
    ("80 100", None),
    ('{"score": true}', None),
    ('{"score": "high"}', None),
    ('{"score": [85]}', None),
    ("version 85a", None),
]


@pytest.mark.parametrize(("reply", "score"), SCORES)
def test_a_score_is_read_or_not_read_but_never_wrong(reply, score):
    assert parse_score(reply, low=0, high=100) == score


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Score: 4", 4),
        ("Score: 4/5", 4),
        ("4 out of 5", 4),
        ("On a scale of 1-5: 4/5", 4),
        ("Score: 0", None),
        ("Score: 6", None),
        ("Score: 80/100", None),
        ("Score: 80%", None),
    ],
)
def test_another_scale(reply, score):
    assert parse_score(reply, low=1, high=5) == score


@pytest.mark.parametrize(
    ("reply", "winner"),
    [
        ("Winner: A", "A"),
        ("winner: b.", "B"),
        ("**Winner:** tie", "tie"),
        ("Winner: Answer B", "B"),
        ("Answer A names more.\nWinner: B", "B"),
        ("A", "A"),
        ("Answer B.", "B"),
        ("[[A]]", "A"),
        ("Both are right.\n[[C]]", "tie"),
        ("Tie", "tie"),
        ('{"winner": "B"}', "B"),
        ('{"winner": "Answer A"}', "A"),
        ("Answer A is better, for it is shorter.", "A"),
        ("The better answer is B.", "B"),
        ("<think>Winner: A</think>Winner: B", "B"),
        ("", None),
        ("A fine pair of answers.", None),
        ("Winner: A or B", None),
        ("Winner: A\nWinner: B", None),
        ("Answer A is better than it looks, but answer B is better.", None),
        ("Answer A is not better.", None),
        ("Winner: X", None),
        ('{"winner": 1}', None),
        ('{"winner": null}', None),
    ],
)
def test_a_winner_is_read_or_not(reply, winner):
    assert parse_winner(reply) == winner


def test_every_whole_score_is_read_in_every_usual_form():
    for score in range(101):
        for form in ("{}", "Score: {}", "Score: {}/100", "{} out of 100", "I give a score of {}."):
            assert parse_score(form.format(score), low=0, high=100) == score


@pytest.mark.parametrize(
    "text", ["(" * 5000, "[" * 100_000, "1" * 5000, "Score: " * 2000, "- 1 " * 5000, '{"a":' * 5000]
)
def test_nonsense_takes_no_time(text):
    assert parse_score(text, low=0, high=100) is None
    assert parse_winner(text) is None
