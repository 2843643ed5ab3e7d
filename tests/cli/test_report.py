"""`gptpl report`, on runs that were trained and on folders made by hand."""

import csv
import shutil
from pathlib import Path

import pytest


@pytest.fixture
def runs(quick, tmp_path) -> Path:
    """A folder with two runs: the trained one, twice."""
    for name in ("one", "two"):
        shutil.copytree(quick.run.path, tmp_path / "runs" / name)
    return tmp_path / "runs"


def test_a_folder_of_runs_is_reported_in_it(gptpl, runs):
    outcome = gptpl("report", str(runs))
    assert (outcome.status, outcome.err) == (0, "")
    best = min(float(row["val/loss"]) for row in read_metrics(runs / "one") if row["val/loss"])
    assert outcome.out.count(f"{best:.4f}") == 2
    assert {path.name for path in runs.iterdir()} == {
        *("one", "two", "report.html", "report.md", "report-curves.png")
    }
    assert str(runs / "report.html") in outcome.out
    assert "Every effort moves you" in (runs / "report.html").read_text()


def test_runs_can_be_ranked_by_another_metric(gptpl, runs):
    outcome = gptpl("report", str(runs), "by=val/bits_per_byte")
    assert outcome.status == 0, outcome.err
    best = min(float(r["val/bits_per_byte"]) for r in read_metrics(runs / "one") if r["val/bits_per_byte"])
    assert outcome.out.count(f"{best:.4f}") >= 2
    markdown = (runs / "report.md").read_text()
    assert "Ranked by the lowest bits per byte" in markdown
    [header] = [line for line in markdown.splitlines() if line.startswith("|") and "perplexity" in line]
    assert header.count("bits per byte") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["by=val/loss", "mode=best"], "mode=best is unknown: choose one of min, max"),
        (["mode=max"], "mode=max has no metric: give by=METRIC, too"),
        (["by=val/losss"], "by=val/losss: no run has it: did you mean val/loss?; they have "),
    ],
)
def test_a_wrong_ranking_is_refused(refused, runs, arguments, message):
    assert refused("report", str(runs), *arguments).startswith(message)


def read_metrics(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_several_folders_are_reported_here_and_each_run_once(gptpl, runs):
    outcome = gptpl("report", str(runs / "one"), str(runs / "two"), str(runs))
    assert outcome.status == 0
    assert (outcome.folder / "report.md").read_text().count("\n| ") == 4  # head, line and two runs
    assert not (runs / "report.md").exists()


def test_one_run_is_reported_in_its_folder_or_where_asked(gptpl, runs, tmp_path):
    assert gptpl("report", str(runs / "one")).status == 0
    assert (runs / "one" / "report.html").exists()
    assert gptpl("report", str(runs / "two"), f"output={tmp_path / 'new' / 'place'}").status == 0
    assert (tmp_path / "new" / "place" / "report.html").exists()


def test_a_damaged_run_is_named_and_the_others_are_reported(gptpl, runs):
    (runs / "two" / "run.json").write_text("{")
    outcome = gptpl("report", str(runs))
    assert outcome.status == 1
    assert f"damaged: {runs / 'two' / 'run.json'} is damaged" in outcome.out
    for name in ("report.html", "report.md"):
        assert "could not be read" in (runs / name).read_text()


def test_trials_that_failed_before_they_began_are_rows(gptpl, runs):
    (runs / "results.csv").write_text(
        "trial,overrides,state,best_val_loss,val_loss,error\n"
        "7,optimizer.lr=-1,failed,,,InputError: negative\n"
    )
    outcome = gptpl("report", str(runs))
    assert outcome.status == 0
    assert "optimizer.lr=-1" in outcome.out
    assert "InputError: negative" in (runs / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no run is given"),
        (["nowhere"], "nowhere does not exist"),
        (["outptu=x", "."], "gptpl report has no setting outptu: did you mean output?"),
        (["empty"], "empty holds no run"),
        (["a file"], "a file is a file"),
        (["--wide"], "gptpl report has no flag --wide: it has no flags, leave it out"),
        (["empty", "output="], "output= is empty"),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(gptpl, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a file").touch()
    outcome = gptpl("report", *arguments)
    assert outcome.status == 2
    assert outcome.err.startswith("gptpl: error: ")
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "a file"}


def test_an_output_that_is_a_file_is_refused(gptpl, runs):
    outcome = gptpl("report", str(runs), f"output={runs / 'one' / 'run.json'}")
    assert outcome.status == 2
    assert "is a file: give a folder" in outcome.err


def test_help_needs_no_run(gptpl):
    outcome = gptpl("report", "--help")
    assert outcome.status == 0
    assert "gptpl report RUN_OR_FOLDER... [output=FOLDER]" in outcome.out
