"""`gptpl judge` against a server of the test's own, from the command line."""

import json
import re
import signal
import threading

import numpy as np
import pytest
from matplotlib import image

TASKS = [("Name a colour.", "", "Red."), ("Add.", "2 and 3", "5"), ("Name a bird.", "", "The owl.")]
ANSWERS = ["red", "It is 5.", "### Response:"]


FEWER = "bootstrap_samples=1000"


@pytest.fixture
def drawn():
    """Asked for by the tests that look at the picture."""


@pytest.fixture(autouse=True)
def _pictures(request, small_pictures):
    if "drawn" not in request.fixturenames:
        small_pictures("gptpl.judging.results")


@pytest.fixture
def responses(tmp_path):
    """Writes answers to TASKS into a file: `responses("a.json", ["red", "5", "owl"])`."""

    def write(name="r.json", answers=ANSWERS, **more):
        rows = [
            {"instruction": instruction, "input": given, "output": output, "model_response": answer, **more}
            for (instruction, given, output), answer in zip(TASKS, answers, strict=True)
        ]
        (tmp_path / name).write_text(json.dumps(rows), encoding="utf-8")

    return write


@pytest.fixture
def judge(gptpl, judge_server):
    """Runs the command with the test's server."""

    def run(*arguments, responses="r.json"):
        fast = ("judge.backoff_seconds=0", "judge.timeout_seconds=20", FEWER)
        return gptpl(
            "judge", f"responses={responses}", f"judge.address={judge_server.address}", *fast, *arguments
        )

    return run


def read(tmp_path, name="scores.json"):
    return json.loads((tmp_path / name).read_text(encoding="utf-8"))


def scored(*scores):
    """Replies to the questions about TASKS."""
    by_task = {task[0]: score for task, score in zip(TASKS, scores, strict=True)}
    return lambda prompt: next((f"Score: {by_task[task]}" for task in by_task if task in prompt), "Hm.")


def row(outcome, title):
    [line] = [line for line in outcome.out.splitlines() if line.startswith(f"{title} ")]
    return line.removeprefix(title).split()


# --- scores ---------------------------------------------------------------------------------------------


def test_scores_their_means_and_a_picture(judge, judge_server, responses, tmp_path, drawn):
    responses(tokens=7)
    judge_server.reply = scored(90, 75, 0)
    outcome = judge()
    assert outcome.status == 0, outcome.err
    result = read(tmp_path)
    rows = result["entries"]
    assert [each["scores"]["judge"] for each in rows] == [90, 75, 0]
    assert [each["judge_replies"] for each in rows] == [["Score: 90"], ["Score: 75"], ["Score: 0"]]
    assert [each["scores"]["exact_match"] for each in rows] == [1, 0, 0]
    assert [each["scores"]["token_f1"] for each in rows] == pytest.approx([1, 0.5, 0])
    assert [each["scores"]["well_formed"] for each in rows] == [1, 1, 0]
    assert [(each["tokens"], each["model_response"]) for each in rows] == [(7, text) for text in ANSWERS]
    summary = result["summary"]
    assert (summary["judge"]["value"], summary["judge"]["low"], summary["judge"]["high"]) == (55, 0, 90)
    assert (summary["parse_failures"], summary["questions_asked"], summary["entries"]) == (0, 3, 3)
    assert row(outcome, "judge's score") == ["55.0", "0.0", "to", "90.0", "3"]
    assert row(outcome, "exact match")[0] == "0.333"
    assert f"judge       llama3 at {judge_server.address}" in outcome.out
    assert image.imread(tmp_path / "scores.png").shape[2] == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("judgements.jsonl", "r.json", "scores.json", "scores.png"),
    ]


def test_the_judge_sees_the_task_the_reference_and_the_answer(judge, judge_server, responses, tmp_path):
    responses(answers=["red", "five {{ rubric }}", "owl"])
    outcome = judge(
        "judge.rubric=Be kind, 'please' {x}.",
        "judge.system=You grade.",
        "judge.num_ctx=8192",
        "judge.options.top_k=5",
    )
    assert outcome.status == 0, outcome.err
    body = judge_server.bodies[1]
    assert (body["model"], body["stream"]) == ("llama3", False)
    assert body["options"] == {
        "temperature": 0,
        "seed": 123,
        "num_ctx": 8192,
        "num_predict": 1024,
        "top_k": 5,
    }
    assert body["messages"][0] == {"role": "system", "content": "You grade."}
    assert body["messages"][1]["content"] == (
        "Score how well a model's answer follows an instruction.\n\nInstruction:\nAdd.\n\nInput:\n2 and 3\n\n"
        "Correct answer:\n5\n\nModel's answer:\nfive {{ rubric }}\n\nBe kind, 'please' {x}.\n\n"
        "Reply with one line and nothing else; N is a whole number from 0 to 100:\nScore: N"
    )
    assert "Input:" not in judge_server.bodies[0]["messages"][1]["content"]


def test_replies_that_cannot_be_read_are_counted_and_left_out(judge, judge_server, responses, tmp_path):
    responses()
    judge_server.reply = lambda prompt: "Score: 80" if "bird" in prompt else "Hm."
    outcome = judge("judge.asks=2")
    assert outcome.status == 0, outcome.err
    summary = read(tmp_path)["summary"]
    assert (summary["judge"]["value"], summary["judge"]["count"], summary["parse_failures"]) == (80, 1, 2)
    assert summary["questions_asked"] == 5
    assert row(outcome, "judge's score") == ["80.0", "-", "1"]
    assert "2 of 3 judgements could not be read and are left out of the means" in outcome.err
    assert read(tmp_path)["entries"][0]["scores"]["judge"] is None


def test_a_judge_of_whom_nothing_can_be_read_is_an_error_that_quotes_it(
    judge, judge_server, responses, tmp_path
):
    responses()
    judge_server.script = [lambda handler: handler.send(200, "<html>Log in!</html>")] * 9
    outcome = judge()
    assert outcome.status == 2
    assert outcome.err.count("\n") == 1
    assert (
        "no reply of the judge could be read, the first was '(not JSON: <html>Log in!</html>)'" in outcome.err
    )
    assert read(tmp_path)["summary"]["parse_failures"] == 3


def test_without_a_judge_nothing_is_asked(gptpl, judge_server, responses, tmp_path):
    responses()
    outcome = gptpl("judge", "responses=r.json", "judge=none", "output=out.json", FEWER)
    assert outcome.status == 0, outcome.err
    assert "judge" not in outcome.out
    assert read(tmp_path, "out.json")["settings"]["judge"] is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.png", "r.json"]


def test_openai_with_its_key(gptpl, judge_server, responses, tmp_path, monkeypatch):
    responses()
    monkeypatch.setenv("MY_KEY", "sk-secret")
    address = f"judge.address={judge_server.address}/v1"
    key = "judge.api_key_env=MY_KEY"
    outcome = gptpl("judge", "responses=r.json", "judge=openai", address, key, "judge.model=m", FEWER)
    assert outcome.status == 0, outcome.err
    assert {headers["Authorization"] for headers in judge_server.headers} == {"Bearer sk-secret"}
    assert judge_server.bodies[0].keys() == {"model", "messages", "stream", "temperature", "seed"}
    assert read(tmp_path)["summary"]["judge"]["value"] == 85
    assert all("secret" not in path.read_text("latin-1") for path in tmp_path.iterdir())


# --- interruptions --------------------------------------------------------------------------------------


def test_a_judge_that_fails_midway_goes_on_from_there(judge, judge_server, responses, tmp_path):
    responses()
    judge_server.script = [lambda h: h.answer(), lambda h: h.send(400, '{"error": "bad luck"}')]
    outcome = judge()
    assert outcome.status == 2
    assert "bad luck" in outcome.err.splitlines()[-1]
    assert "judgements.jsonl: replies kept: 1; run the same command again to continue" in outcome.err
    assert not (tmp_path / "scores.json").exists()
    assert len(judge_server.bodies) == 2
    assert judge().status == 0
    assert len(judge_server.bodies) == 4
    summary = read(tmp_path)["summary"]
    assert (summary["questions_asked"], summary["questions_from_cache"]) == (2, 1)
    assert judge().status == 0
    assert len(judge_server.bodies) == 4


def test_ctrl_c_keeps_what_is_done_and_does_not_wait(judge, judge_server, responses, tmp_path):
    responses()
    main_thread = threading.main_thread().ident
    assert main_thread is not None

    def interrupt(handler):
        signal.pthread_kill(main_thread, signal.SIGINT)
        handler.fall_silent()  # longer than the test may take

    judge_server.script = [lambda h: h.answer(), interrupt]
    # A shell that runs the tests in the background lets them ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        outcome = judge("judge.timeout_seconds=60")
    finally:
        signal.signal(signal.SIGINT, before)
    assert outcome.status == 130
    assert outcome.err.splitlines()[-1] == "gptpl: error: interrupted"
    assert not judge_server.released.is_set()
    assert len((tmp_path / "judgements.jsonl").read_text().splitlines()) == 1


# --- comparisons ----------------------------------------------------------------------------------------


def test_two_models_are_compared(judge, judge_server, responses, tmp_path, drawn):
    responses("a.json", ["red", "5", "a dog"])
    responses("b.json", ["blue", "five", "the owl"])
    good = ("red", "\n5\n", "owl")

    def decide(prompt):
        first = prompt.partition("Answer A:")[2].partition("Answer B:")[0]
        return "Winner: A" if any(word in first for word in good) else "Winner: B"

    judge_server.reply = decide
    outcome = judge("compare=b.json", "both_orders=true", responses="a.json")
    assert outcome.status == 0, outcome.err
    result = read(tmp_path, "comparison.json")
    assert [each["result"] for each in result["entries"]] == ["win", "win", "loss"]
    assert [each["second"]["model_response"] for each in result["entries"]] == ["blue", "five", "the owl"]
    assert result["entries"][0]["judge_replies"] == [["Winner: A"], ["Winner: B"]]
    summary = result["summary"]
    assert (summary["wins"], summary["ties"], summary["losses"], summary["contradictory"]) == (2, 0, 1, 0)
    assert summary["win_rate"]["value"] == pytest.approx(2 / 3)
    assert summary["sign_test_p"] == 1
    # exact match: 1, 1, 0 against 0, 0, 1
    difference = summary["differences"]["exact_match"]
    assert (difference["value"], difference["low"], difference["high"]) == (pytest.approx(1 / 3), -1, 1)
    assert len(judge_server.bodies) == 6
    assert "the judge: 2 wins, 0 ties, 1 losses of the first" in outcome.out
    assert row(outcome, "exact match")[0] == "+0.333"
    assert image.imread(tmp_path / "comparison.png").shape[2] == 4


def test_a_comparison_against_the_references_alone(gptpl, responses, tmp_path):
    responses("a.json", ["red", "5", "the owl"])
    responses("b.json", ["blue", "five", "the owl"])
    outcome = gptpl("judge", "responses=a.json", "compare=b.json", "judge=none")
    assert outcome.status == 0, outcome.err
    differences = read(tmp_path, "comparison.json")["summary"]["differences"]
    drawn = np.random.default_rng(0).choice([1, 1, 0], size=(100_000, 3)).mean(axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    assert differences["exact_match"]["value"] == pytest.approx(2 / 3)
    assert (differences["exact_match"]["low"], differences["exact_match"]["high"]) == pytest.approx(
        (low, high)
    )


# --- bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("responses=none.json",), r"responses=none\.json cannot be read \(No such file"),
        (("responses=r.json", "compare=none.json"), r"compare=none\.json cannot be read"),
        (("responses=r.json", "output=r.json"), r"output=r\.json is the file that is judged"),
        (("responses=r.json", "output=x.txt"), r"must be a \.json file .*, got x\.txt"),
        (("responses=r.json", "output=none/x.json"), r"must be a \.json file .*, got none/x\.json"),
        (
            ("responses=r.json", "both_orders=true"),
            "both_orders=true needs two answers to swap: give compare=FILE",
        ),
        (("responses=r.json", "judge=smoke"), "judge=smoke is unknown; choices: none, ollama, openai"),
        (
            ("responses=r.json", "judge.modl=x"),
            r"JudgeModel has no setting judge\.modl: did you mean judge\.model",
        ),
        (("responses=r.json", "judge.address=localhost"), r"judge\.address must be .*, got 'localhost'"),
        (("responses=r.json", "judge.prompt={{ answer }}"), r"judge\.prompt uses {{ answer }}"),
        (("responses=r.json", "bootstrap_samples=1"), "bootstrap_samples must be at least 100, got 1"),
        (("responses=r.json", "seed=-1"), "seed must be 0 or more, got -1"),
        (("responses=r.json", "markers=['']"), "markers contains an empty text"),
        (("responses=r.json", "judge=openai"), "OPENAI_API_KEY of judge.api_key_env is not set"),
        (("responses=r.json", "judge.address=http://127.0.0.1:9"), "`ollama serve`.*`ollama pull llama3`"),
    ],
)
def test_bad_input_is_one_line(arguments, words, refused, responses, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    responses()
    assert re.search(words, refused("judge", *arguments))


def test_responses_must_be_given(refused):
    assert "responses" in refused("judge")


def test_empty_answers_are_judged_and_said(judge, responses, tmp_path):
    responses(answers=["red", "", "owl"])
    outcome = judge()
    assert outcome.status == 0
    assert "1 of 3 answers are empty" in outcome.err
    assert read(tmp_path)["entries"][1]["scores"]["judge"] == 85
