"""A judge that is asked again, that remembers, and that several threads ask."""

import json
import subprocess
import sys
import threading

import pytest

from gptpl.errors import InputError
from gptpl.judging.judge import ReplyCache, Verdict, compared, in_threads, judged, question_key

PROMPT = "Score this."
MESSAGES = [{"role": "user", "content": PROMPT}]


def number(reply):
    return int(reply) if reply.isdecimal() else None


def say(text):
    return lambda handler: handler.say(text)


# --- asked again ----------------------------------------------------------------------------------------


def test_a_reply_that_cannot_be_read_is_asked_for_again_in_its_conversation(judge, judge_server):
    judge_server.script = [say("Good!"), say("Very."), say("70")]
    verdict = judge(asks=3).verdict(PROMPT, number, reminder="A number!")
    assert verdict == Verdict(70, ("Good!", "Very.", "70"))
    reminded = [{"role": "assistant", "content": "Good!"}, {"role": "user", "content": "A number!"}]
    again = [{"role": "assistant", "content": "Very."}, {"role": "user", "content": "A number!"}]
    sent = [body["messages"] for body in judge_server.bodies]
    assert sent == [MESSAGES, MESSAGES + reminded, MESSAGES + reminded + again]


def test_a_judge_that_talks_nonsense_is_given_up(judge, judge_server):
    judge_server.reply = lambda prompt: "Hm."
    assert judge(asks=2).verdict(PROMPT, number, reminder="!") == Verdict(None, ("Hm.", "Hm."))
    assert len(judge_server.bodies) == 2


def test_what_is_no_reply_is_neither_kept_nor_part_of_the_conversation(judge, judge_server, tmp_path):
    judge_server.script = [lambda handler: handler.send(200, "<html>Log in</html>"), say("70")]
    verdict = judge().verdict(PROMPT, number, reminder="!")
    assert verdict == Verdict(70, ("(not JSON: <html>Log in</html>)", "70"))
    assert [body["messages"] for body in judge_server.bodies] == [MESSAGES] * 2
    assert len((tmp_path / "judgements.jsonl").read_text().splitlines()) == 1


# --- the cache ------------------------------------------------------------------------------------------


def test_an_answered_question_is_not_put_again(judge, judge_server):
    judge_server.script = [say("Good!"), say("70")]
    first, second = judge(), judge()
    verdict = first.verdict(PROMPT, number, reminder="!")
    assert judge().verdict(PROMPT, number, reminder="!") == verdict
    assert len(judge_server.bodies) == 2
    assert (first.asked, first.remembered, second.asked) == (2, 0, 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "other"},
        {"protocol": "openai"},
        {"temperature": 0.5},
        {"system": "You are fair."},
    ],
)
def test_another_question_is_put(changes, judge, judge_server):
    judge_server.reply = lambda prompt: "70"
    judge().verdict(PROMPT, number, reminder="!")
    judge(**changes).verdict(PROMPT, number, reminder="!")
    assert len(judge_server.bodies) == 2


def test_the_key_is_the_hash_of_protocol_and_body():
    # printf '%s' '["ollama", {"a": "\u00e9", "b": 1}]' | sha256sum
    expected = "a5d3be98f33ec69eb2d22862bfe7292c070e442f331eb8af26ba4143cb8bbcd7"
    assert question_key("ollama", {"b": 1, "a": "é"}) == expected


@pytest.mark.parametrize(
    "rest",
    [
        b'{"key": "b", "re',
        b"\xff\xfe",
        b'{"key": "b"}\n',
        b'{"key": "b", "reply": 7}\n',
        b'{"key": "b", "reply": null}\n',
        b"[]\n",
        b"[" * 99_999,
    ],
)
def test_a_damaged_line_is_dropped_and_said(rest, tmp_path, caplog):
    path = tmp_path / "judgements.jsonl"
    ReplyCache(path).add("a", "Score: 1 \u2028 é")
    with path.open("ab") as file:
        file.write(rest)
    again = ReplyCache(path)
    assert "judgements.jsonl: 1 damaged line dropped" in caplog.text
    assert (again.get("a"), again.get("b"), len(again)) == ("Score: 1 \u2028 é", None, 1)
    again.add("b", "2")
    assert (ReplyCache(path).get("a"), ReplyCache(path).get("b")) == ("Score: 1 \u2028 é", "2")


def test_every_cut_leaves_whole_replies_only(tmp_path):
    path = tmp_path / "judgements.jsonl"
    cache = ReplyCache(path)
    for number in range(3):
        cache.add(str(number), f"Score: {number}")
    whole = path.read_bytes()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        left = ReplyCache(path)
        assert len(left) == whole[:length].count(b"\n")
        left.add("new", "x")
        assert len(path.read_bytes().splitlines()) == len(left) == len(ReplyCache(path))


# --- threads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3, 50])
def test_so_many_at_once(threads):
    together = threading.Barrier(min(threads, 6), timeout=60)  # passed only by that many at once

    def double(number):
        together.wait()
        return 2 * number

    assert sorted(in_threads(range(6), double, threads=threads)) == [(n, 2 * n) for n in range(6)]


def test_an_error_ends_the_work():
    begun = []

    def work(number):
        begun.append(number)
        if number == 2:
            raise InputError("the third")
        return number

    found = in_threads(range(1000), work, threads=1)
    with pytest.raises(InputError, match="the third"):
        list(found)
    assert begun == [0, 1, 2]


def test_nothing_at_all():
    assert list(in_threads([], number, threads=3)) == []


def test_the_program_ends_though_a_server_keeps_a_thread_waiting():
    program = (
        "import time\n"
        "from gptpl.judging.judge import in_threads\n"
        "for _ in in_threads([0, 60], time.sleep, threads=2):\n"
        "    raise SystemExit(7)"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=30).returncode == 7


# --- scores and comparisons -----------------------------------------------------------------------------


PROMPTED = ("instruction", "input", "output", "model_response", "rubric", "max_score")


@pytest.fixture
def own_judge(judge):
    """A judge with prompts that are easily taken apart: `own_judge(max_concurrent=2)`."""

    def make(**changes):
        given = {
            "num_ctx": 4096,
            "system": "You are fair.",
            "rubric": "Be strict.",
            "prompt": "|".join(f"{{{{ {name} }}}}" for name in PROMPTED),
            "reminder": "{{ min_score }}!",
            "comparison_prompt": "{{ instruction }}|{{ answer_a }}|{{ answer_b }}",
            "comparison_reminder": "!",
            "max_score": 10,
            "asks": 2,
            "max_concurrent": 4,
        }
        return judge(**(given | changes))

    return make


def test_every_answer_gets_its_own_score(own_judge, judge_server, answer):
    judge_server.reply = lambda prompt: f"Score: {prompt.split('|')[3]}"
    answers = [answer(n, str(n), input="in") for n in range(10)]
    verdicts = dict(judged(answers, own_judge()))
    assert {place: verdict.value for place, verdict in verdicts.items()} == {n: n for n in range(10)}
    body = next(body for body in judge_server.bodies if "Task 3" in body["messages"][1]["content"])
    assert body["messages"] == [
        {"role": "system", "content": "You are fair."},
        {"role": "user", "content": "Task 3.|in|yes|3|Be strict.|10"},
    ]
    assert body["options"] == {"temperature": 0.0, "seed": 123, "num_ctx": 4096}
    assert 1 <= judge_server.most_at_once <= 4


def test_a_score_off_the_scale_is_a_failure(own_judge, judge_server, answer):
    judge_server.reply = lambda prompt: "Score: 11"
    [(_, verdict)] = judged([answer(0, "a")], own_judge())
    assert verdict == Verdict(None, ("Score: 11", "Score: 11"))
    assert judge_server.bodies[1]["messages"][-1] == {"role": "user", "content": "0!"}


def preferences(judge, answer, *, count=40, **changes):
    pairs = [(answer(n, "mine"), answer(n, "yours")) for n in range(count)]
    found = dict(compared(pairs, judge, **changes))
    return [found[place] for place in range(count)]


@pytest.mark.parametrize("both_orders", [False, True])
@pytest.mark.parametrize(("better", "result"), [("mine", "win"), ("yours", "loss"), (None, "tie")])
def test_the_order_does_not_matter_to_a_judge_who_reads(
    both_orders, better, result, own_judge, judge_server, answer
):
    def decide(prompt):
        _, first, second = prompt.split("|")
        return f"Winner: {'A' if first == better else 'B' if second == better else 'tie'}"

    judge_server.reply = decide
    found = preferences(own_judge(), answer, seed=1, both_orders=both_orders)
    assert {each.result for each in found} == {result}
    assert not any(each.contradictory for each in found)


def test_a_judge_who_prefers_the_first_place_is_found_out(own_judge, judge_server, answer):
    judge_server.reply = lambda prompt: "Winner: A"
    both = preferences(own_judge(), answer, seed=1, both_orders=True)
    assert all(each.result == "tie" and each.contradictory for each in both)
    assert {each.swapped for each in both} == {(False, True)}
    once = preferences(own_judge(), answer, seed=1, both_orders=False)
    assert 8 < sum(each.result == "win" for each in once) < 32
    assert all((each.result == "loss") == each.swapped[0] for each in once)
    again = preferences(own_judge(), answer, seed=1, both_orders=False)
    other = preferences(own_judge(), answer, seed=2, both_orders=False)
    assert once == again != other


def test_a_preference_that_cannot_be_read_counts_for_nobody(own_judge, judge_server, answer):
    judge_server.reply = lambda prompt: "Winner: A" if prompt.endswith("yours") else "Hm."
    [found] = preferences(own_judge(), answer, count=1, seed=1, both_orders=True)
    assert (found.result, found.failure, found.contradictory) == (None, "Hm.", False)
    assert found.verdicts[0].value == "A"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"protocol": "smoke"}, "judge.protocol must be ollama or openai, got smoke"),
        ({"model": " "}, "judge.model is empty"),
        ({"min_score": 10, "max_score": 10}, "judge.min_score=10 must be below judge.max_score=10"),
        ({"max_score": float("nan")}, "must be below"),
        ({"asks": 0}, "judge.asks must be 1 or more, got 0"),
        ({"retries": -1}, "judge.retries must be 0 or more, got -1"),
        ({"max_concurrent": 0}, "judge.max_concurrent must be 1 or more"),
        ({"timeout_seconds": 0}, "judge.timeout_seconds must be positive, got 0"),
        ({"backoff_seconds": float("inf")}, "judge.backoff_seconds must be 0 or more, got inf"),
        ({"prompt": "{{ answer }}"}, "judge.prompt uses {{ answer }}: the fields are instruction, input"),
        ({"prompt": "{{ output }}"}, "judge.prompt does not use {{ model_response }}"),
        ({"prompt": "{% if %}"}, "judge.prompt is not a Jinja template"),
        ({"comparison_prompt": "{{ answer_a }}"}, "judge.comparison_prompt does not use {{ answer_b }}"),
        ({"protocol": "openai", "num_ctx": 4096}, "judge.num_ctx is for Ollama only"),
    ],
)
def test_settings_are_checked_when_they_are_made(changes, words, settings):
    with pytest.raises(InputError) as raised:
        settings(**changes)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ model_response.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}{{ model_response }}",
        "{{ model_response }}{{ 1 / 0 }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(attack, own_judge, answer):
    with pytest.raises(InputError, match=r"judge\.prompt (uses|cannot be filled in)"):
        list(judged([answer(0, "a")], own_judge(prompt=attack)))


def test_an_answer_is_no_template(own_judge, judge_server, answer, tmp_path):
    list(judged([answer(0, "{{ rubric }}")], own_judge()))
    assert "|{{ rubric }}|" in judge_server.bodies[0]["messages"][1]["content"]
    lines = (tmp_path / "judgements.jsonl").read_text().splitlines()
    assert all(set(json.loads(line)) == {"key", "reply"} for line in lines)
