"""The notebooks of experiments/course: they run, and their outputs are whole, of no one machine."""

import contextlib
import io
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch

COURSE = Path(__file__).parents[2] / "experiments/course"
QUICK = {
    "chapter_2": {"MERGES": "20", "SAMPLES": "3"},
    "chapter_3": {"DRAWS": "200", "STEPS": "3"},
    "chapter_4": {"DEPTH": "4", "STEPS": "2", "WIDTH, LAYERS": "48, 2"},
    "chapter_5": {"STEPS": "2", "SHORT_STEPS": "2", "RESUME_STEPS": "4"},
    "chapter_6": {"PRETRAINING_STEPS": "2", "EPOCHS": "1", "MESSAGES": "90"},
    "chapter_7": {"STEPS": "3", "EXAMPLES": "60"},
    "exercises_1_to_5": {"SEED": "1"},
}
"""Sizes in the first code cell of each notebook, and what the test puts in their places."""
WRONG = {
    "2.1": "answer_2_1 = [5, 0, 4]",
    "2.2": "answer_2_2 = 10",
    "2.3": "windows = lambda t, n, s: [(t[i:][:n], t[i + 1 :][:n]) for i in range(0, len(t) - n + 1, s)]",
    "3.1": "answer_3_1 = torch.softmax(queries @ keys.T, dim=-1)",
    "3.2": "answer_3_2 = torch.softmax(queries @ keys.T / 2**0.5, dim=-1).tril()",
    "3.3": "answer_3_3 = [768, 3 * 768]",
    "4.1": "layer_norm = lambda x: (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)",
    "4.2": "answer_4_2 = sum(p.numel() for p in GPTModel(small).parameters()) - 8",
    "4.3": "answer_4_3 = 162_419_712",
    "5.1": "answer_5_1 = math.log2(257)",
    "5.2": "answer_5_2 = sum(1 / p for p in of_targets) / 4",
    "5.3": "next_probabilities = lambda logits, temperature, k: torch.softmax(logits / temperature, dim=-1)",
    "5.4": "answer_5_4 = [0.5e-3, 0.75e-3]",
    "6.1": "answer_6_1 = [0.2, 0.8]",
    "6.2": "answer_6_2 = [3, 5]",
    "6.3": "answer_6_3 = [0.85, 35 / 45]",
}
"""Common mistakes, one for each exercise."""


def cells_of(name: str) -> list[Any]:
    cells: list[Any] = json.loads((COURSE / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    return cells


def code_of(name: str) -> list[Any]:
    return [cell for cell in cells_of(name) if cell["cell_type"] == "code"]


def made_quick(source: str, sizes: Mapping[str, str]) -> str:
    for size, value in sizes.items():
        source, count = re.subn(rf"(?m)^{size} = [\d_, ]+", f"{size} = {value}", source)
        assert count == 1, size
    return source


def run(source: str, names: dict[str, Any]) -> str:
    """Run the source as a cell; returns what it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), warnings.catch_warnings():
        exec(source, names)
    return out.getvalue()


@pytest.fixture
def as_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs in a temporary folder and pictures without a display; what a notebook sets for all is undone."""
    plt.switch_backend("agg")
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPTPL_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.INFO)
    with plt.rc_context(), torch.random.fork_rng():
        yield
    plt.close("all")
    torch.set_printoptions(profile="default")


def test_every_notebook_is_tested() -> None:
    assert sorted(path.stem for path in COURSE.glob("*.ipynb")) == list(QUICK)


@pytest.mark.slow
@pytest.mark.usefixtures("as_notebook")
@pytest.mark.parametrize("name", QUICK)
def test_a_notebook_runs_with_small_sizes(name: str) -> None:
    """Cell by cell in this process, with its own assertions."""
    first, *others = ["".join(cell["source"]) for cell in code_of(name)]
    names = dict[str, Any]()
    printed = [run(source, names) for source in (made_quick(first, QUICK[name]), *others)]
    kept = [[each for each in cell["outputs"] if each["output_type"] == "stream"] for cell in code_of(name)]
    assert [bool(text) for text in printed] == [bool(streams) for streams in kept]


@pytest.mark.usefixtures("as_notebook")
def test_exercises_accept_their_solutions_and_refuse_mistakes() -> None:
    names, checked = dict[str, Any](), []
    solutions = [
        re.findall(r"Solution (\S+)</summary>.*?```python\n(.*?)```", "".join(cell["source"]), re.DOTALL)
        for cell in cells_of("exercises_1_to_5")
        if cell["cell_type"] == "markdown"
    ]
    solved = dict(each for found in solutions for each in found)
    for cell in code_of("exercises_1_to_5"):
        source = "".join(cell["source"])
        said = run(source, names)
        if (exercise := re.search(r"check\(\s*\"(.*?)\"", source)) and "def check" not in source:
            number = exercise.group(1)
            checked.append(number)
            assert said == f"{number}: not answered yet\n"
            run(WRONG[number], names)
            assert run(source, names).startswith(f"{number}: not yet: ")
            run(solved[number], names)
            assert run(source, names) == f"{number}: right\n"
    assert checked == list(solved) == list(WRONG)
    assert said == f"{len(WRONG)} of {len(WRONG)} are right\n"


@pytest.mark.parametrize("name", QUICK)
def test_the_outputs_kept_are_whole_and_of_no_certain_machine(name: str) -> None:
    path = COURSE / f"{name}.ipynb"
    text, cells = path.read_text(encoding="utf-8"), code_of(name)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert len({cell["id"] for cell in cells_of(name)}) == len(cells_of(name))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [
        output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"
    ]
    pictures = []
    for cell in cells:
        source = "".join(cell["source"])
        found = [each["data"]["image/png"] for each in cell["outputs"] if "image/png" in each.get("data", {})]
        assert ("plt.show(" in source) <= len(found) <= ("plt." in source), source[:80]
        assert cell["outputs"] or not re.search(r"(?m)^print\(", source), source[:80]
        pictures += found
    for picture in pictures:
        text = text.replace(json.dumps(picture)[1:-1], "")
    assert not re.search(r"/(home|tmp|root|work|Users|usr)/|[A-Z]:\\\\", text)
    assert path.stat().st_size < 300_000
