"""A report's files, read back as browsers and Markdown readers do, and compared with the runs' own."""

import csv
import html.parser
import json
import math
import re

import pytest

from gptpl.errors import InputError
from gptpl.files.figures import COLOURS
from gptpl.reports import Criterion, Failure, write_report
from gptpl.reports import report as report_on

VOID = {"meta", "br", "wbr", "img", "hr", "input", "link"}
EVIL = "<script>alert(1)</script> | `x` $y$ ![a](http://evil.example/x.png) \x1b[31m \u202e &amp;"
PROMPT = "Every effort"


class Page(html.parser.HTMLParser):
    """The document's tables, texts and attributes; raises where tags are not balanced."""

    def __init__(self, text):
        super().__init__()
        self.open: list[str] = []
        self.names: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.rows: list[list[str]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


def sample(text, *, step=30, strategy=None):
    return {
        "step": step,
        "prompt": PROMPT,
        "strategy": strategy or {"temperature": 0.0, "top_k": None},
        "continuation": text,
    }


@pytest.fixture(autouse=True)
def _few_dots(monkeypatch):
    """Of a PNG only its beginning is looked at here."""
    monkeypatch.setattr("gptpl.reports.pictures.DOTS_PER_INCH", 20)


@pytest.fixture
def report(make_run, tmp_path):
    """Writes a report; returns the page and the Markdown."""

    def write(runs, failures=(), **more):
        written = write_report(runs, failures, tmp_path / "out", "my runs", **more)
        assert not list((tmp_path / "out").glob(".*"))  # nothing is left of the writing
        page, markdown = (path.read_text(encoding="utf-8") for path in (written.page, written.markdown))
        return Page(page), markdown

    return write


def markdown_table(text):
    """Cells of the first table, with what is escaped unescaped."""
    lines = [line for line in text.split("\n") if line.startswith("|")]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    return [[re.sub(r"\\(.)", r"\1", cell.strip()) for cell in row] for row in cells if "---" not in row[0]]


def test_the_table_has_the_numbers_of_the_files_and_what_differs(make_run, report):
    runs = [
        make_run("slow", [5.5, 4.0, 4.2], {"optimizer.lr": 1e-4, "model.n_layers": 2}),
        make_run("fast", [5.5, 3.0], {"optimizer.lr": 3e-3, "model.n_layers": 2}),
    ]
    page, markdown = report(runs)
    by_hand = {}
    for run in runs:
        with (run.path / "metrics.csv").open() as file:
            losses = [float(row["val/loss"]) for row in csv.DictReader(file)]
        record = json.loads((run.path / "run.json").read_text())
        by_hand[run.path.name] = (min(losses), losses[-1], record["parameters"])
    head, first, second = markdown_table(markdown)
    for row, label, name, lr in ((first, "1", "fast", "0.003"), (second, "2", "slow", "0.0001")):
        cells = dict(zip(head, row, strict=True))
        best, last, parameters = by_hand[name]
        assert (cells["#"], cells["run"], cells["optimizer.lr"]) == (label, name, lr)
        assert float(cells["validation loss"]) == pytest.approx(best, rel=1e-3)
        assert float(cells["perplexity"]) == pytest.approx(math.exp(best), rel=1e-3)
        assert float(cells["last loss"]) == pytest.approx(last, rel=1e-3)
        assert cells["parameters"] == f"{parameters:,}" == "120,256"
        assert [cells[key] for key in ("tokens", "time", "tokens/s", "peak memory", "state")] == [
            *("15,360", "1:05", "2,000", "512.3 MB", "finished")
        ]
    assert not {"model.n_layers", "seed", "error", "overrides"} & set(head)
    assert page.rows == [[*head[1:]], *([f"{row[0]} {row[1]}", *row[2:]] for row in (first, second))]


def test_the_page_needs_nothing_else(make_run, report):
    page, _ = report([make_run("a", [5.0, 3.0]), make_run("b", [5.0, 4.0], {"optimizer.lr": 1})])
    assert not {"script", "img", "link", "iframe", "object"} & set(page.names)
    for tag, name, value in page.attributes:
        if not name.startswith("xmlns"):
            assert "://" not in value, (tag, name, value)
        if name.endswith("href"):
            assert value.startswith("#")
    assert any("default-src 'none'" in value for _, _, value in page.attributes)


def test_whatever_runs_say_is_shown_and_does_not_act(make_run, report):
    runs = [
        make_run(
            name, [5.0, loss], {"data.path": f"{EVIL}{name}"}, samples=[sample(f"{EVIL}\n    more\n```")]
        )
        for name, loss in (("a", 3.0), ("b|<b>", 4.0))
    ]
    failure = Failure(folder=runs[0].path.parent / "c", overrides=EVIL, error=EVIL)
    page, markdown = report([*runs], [failure], problems=[EVIL])
    assert "script" not in page.names
    assert "b" in page.names  # the rank
    shown = "".join(page.texts)
    assert shown.count("<script>alert(1)</script> | `x` $y$") >= 6
    assert "\x1b" not in shown + markdown
    assert "\u202e" not in shown + markdown
    head, *rows = markdown_table(markdown)
    assert {len(row) for row in rows} == {len(head)}
    for line in markdown.split("\n"):
        assert "<script" not in line or line.startswith("    ")  # only in blocks of code
        assert "![a](http" not in line or line.startswith("    ")


def test_samples_of_shared_prompts_are_the_last_ones(make_run, report):
    creative = {"temperature": 0.8, "top_k": 40}
    runs = [
        make_run(
            "a", [5.0, 3.0], samples=[sample("old", step=10), sample("new a"), sample("x", strategy=creative)]
        ),
        make_run("b", [5.0, 4.0], samples=[sample("new b"), {"step": 1, "prompt": 7}]),
        make_run("c", [5.0, 4.5], samples=[sample("new c")]),
    ]
    page, markdown = report(runs)
    shown = "".join(page.texts)
    assert shown.index("new a") < shown.index("new b") < shown.index("new c")
    assert "old" not in shown
    assert "temperature 0.8" not in shown  # one run alone has it
    assert "### Prompt (greedy)\n\n    Every effort\n\n**1 a**, step 30\n\n    new a\n" in markdown


def test_a_run_has_one_colour_everywhere(make_run, report):
    runs = [
        make_run(f"r{i}", [5.0, 3.0 + 0.1 * i], {"optimizer.lr": i}, samples=[sample("x")]) for i in range(9)
    ]
    page, markdown = report(runs)
    swatches = [value for tag, name, value in page.attributes if tag == "i" and name == "style"]
    best = [f"background:{colour}" for colour in COLOURS]
    assert swatches == [*best, "background:#8c8c90", *best]  # the table's, the samples'
    styles = " ".join(value for tag, name, value in page.attributes if (tag, name) == ("path", "style"))
    for colour in COLOURS:  # two panels and the legend
        assert len(re.findall(rf"stroke: {colour};? ?stroke-width: 1.7", styles, re.IGNORECASE)) == 3
    assert "The best 8 have a colour" in markdown
    assert "Left out: 1 of lower rank." in markdown


def test_the_pictures_of_the_markdown_are_beside_it(make_run, report, tmp_path):
    runs = [make_run(f"r{i}", [5.0, 3.0 + 0.1 * i], {"optimizer.lr": 10.0**-i}) for i in range(1, 12)]
    page, markdown = report(runs)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))  # three SVGs
    names = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", markdown)
    assert names == ["report-curves.png", "report-settings.png", "report-importance.png"]
    for name in names:
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_groups_that_cannot_be_compared_are_told_apart(make_run, report):
    other = {"data": {"name": "mine", "sha256": "c" * 64}}
    _, markdown = report([make_run("a", [5.0, 3.0]), make_run("b", [5.0, 1.0], record=other)])
    assert "cannot be compared" in markdown
    assert "## Group A: text tale" in markdown
    assert "## Group B: text mine" in markdown


def test_other_sequences_of_the_same_text_are_mentioned(make_run, report):
    runs = [make_run(f"r{n}", [5.0, 3.0], {"data.max_length": n}) for n in (64, 128)]
    assert "The runs differ in data.max\\_length" in report(runs)[1]


def test_failures_alone_make_a_report_too(report, tmp_path):
    failures = [Failure(folder=tmp_path / "s" / str(i), overrides=f"lr={i}", error="E: x") for i in range(2)]
    page, markdown = report([], failures)
    assert "No run has finished" in markdown
    assert [row[-2:] for row in markdown_table(markdown)] == [
        *(["overrides", "error"], ["lr=0", "E: x"], ["lr=1", "E: x"])
    ]
    assert page.rows[1:] == [[" run 0", "-", "-", "-", "failed", *["-"] * 6], ["lr=0: E: x"], *page.rows[3:]]
    assert len(page.rows) == 5


@pytest.mark.parametrize("losses", [[], [5.0], [math.nan], [5.0, math.nan, math.inf], [3.0, 3.0]])
def test_a_run_with_hardly_a_loss_is_reported(make_run, report, losses):
    run = make_run("a", losses, record={"seconds": "x", "failed": 3, "finished": None, "tokens_seen": None})
    page, markdown = report([run])
    assert len(page.rows) == 2
    assert "failed" in markdown


def test_nothing_at_all_is_said(report):
    assert "No run has finished" in report([])[1]


def test_curves_are_labelled_by_the_settings_that_matter_first(make_run, report):
    runs = [
        make_run(f"r{i}", [5.0, 3.0 + 0.1 * i], {"model.a": i % 2, "model.b": i % 3, "optimizer.lr": 2.0**i})
        for i in range(12)
    ]
    page, _ = report(runs)
    assert "1  lr 1," in "".join(page.texts).replace("\xa0", " ")


# --- of folders, and by any metric ----------------------------------------------------------------------


def test_folders_are_reported_with_what_was_written_and_found(make_run, tmp_path):
    make_run("runs/a", [5.5, 3.0], csv=False)
    make_run("runs/b", [5.5, 2.0], csv=False)
    make_run("runs/c", [5.5, 2.5])
    (tmp_path / "runs/c/run.json").write_text("{")
    written = report_on(tmp_path / "runs", tmp_path / "runs/a", output=tmp_path / "out")
    assert written.page == tmp_path / "out/report.html"
    assert [entry.name for entry, _ in written.contents.sections[0].rows] == ["b", "a"]
    assert (tmp_path / "out/report-curves.png").exists()
    [problem] = written.contents.problems
    assert "c/run.json is damaged" in problem
    alone = report_on(tmp_path / "runs/a")
    assert alone.page == tmp_path / "runs/a/report.html"


@pytest.mark.parametrize(
    ("folders", "output", "words"),
    [([], None, "no run is given"), (["x"], None, "x does not exist"), (["."], None, "holds no run")],
)
def test_folders_without_runs_are_refused(folders, output, words, tmp_path):
    with pytest.raises(InputError, match=words):
        report_on(*(tmp_path / name for name in folders), output=output)


@pytest.mark.parametrize("given", [True, False])
def test_runs_are_ranked_by_any_metric_as_asked_or_as_their_sweep_says(make_run, tmp_path, given):
    """val/f1 is a tenth of the loss: by its highest value the order is the other way round."""
    for name, loss in (("a", 3.0), ("b", 2.0), ("c", 4.0)):
        make_run(f"s/{name}", [5.5, loss], {"seed": loss}, csv=False)
    by = Criterion(metric="val/f1", mode="max") if given else None
    if not given:
        (tmp_path / "s/sweep.yaml").write_text("metric: val/f1\nmode: max\n")
    written = report_on(tmp_path / "s", by=by)
    [section] = written.contents.sections
    assert [(entry.label, entry.name) for entry, _ in section.rows] == [("1", "c"), ("2", "a"), ("3", "b")]
    assert [entry.value for entry, _ in section.rows] == pytest.approx([0.4, 0.3, 0.2])
    assert list(section.columns[:2]) == ["val/f1", "validation loss"]
    assert list(section.rows[0][1][:2]) == ["0.4000", "4.0000"]
    assert section.notes[0].startswith("Ranked by the highest val/f1 after the first step; with")
    curves, parallel, _ = (picture for _, picture, _ in section.parts)
    assert parallel is not None
    assert curves is not None
    assert parallel.alt.endswith("and the val/f1")
    assert "val/f1" in curves.svg
