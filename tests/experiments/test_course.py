"""The notebooks of experiments/course: they run, and their outputs are whole, of no one machine."""

import json
import logging
import re
import warnings
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch

COURSE = Path(__file__).parents[2] / "experiments/course"
QUICK: dict[str, dict[str, str]] = {
    "chapter_2": {"MERGES": "20", "SAMPLES": "3"},
    "chapter_3": {"DRAWS": "200", "STEPS": "3"},
    "chapter_4": {"DEPTH": "4", "STEPS": "2", "WIDTH, LAYERS": "48, 2"},
}
"""The sizes in the first code cell of each notebook, and what the test puts in their places."""


def code_cells(name: str) -> list[Any]:
    notebook = json.loads((COURSE / f"{name}.ipynb").read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def with_sizes(source: str, sizes: dict[str, str]) -> str:
    assert re.findall(r"^(\w[\w, ]*) = ", source, re.MULTILINE) == list(sizes)
    for name, value in sizes.items():
        source = re.sub(rf"^{name} = .*$", f"{name} = {value}", source, flags=re.MULTILINE)
    return source


def test_every_notebook_is_tested() -> None:
    assert sorted(path.stem for path in COURSE.glob("*.ipynb")) == sorted(QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_the_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cell by cell in this process, with small sizes: a kernel would import everything once more."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.INFO)
    plt.switch_backend("agg")
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    sizes, *cells = ["".join(cell["source"]) for cell in code_cells(name)]
    names = dict[str, Any]()
    try:
        with plt.rc_context(), warnings.catch_warnings(), torch.random.fork_rng():
            for source in (with_sizes(sizes, QUICK[name]), *cells):
                exec(source, names)
        assert not plt.get_fignums()
    finally:
        plt.close("all")
        torch.set_printoptions(profile="default")


@pytest.mark.parametrize("name", QUICK)
def test_the_outputs_kept_are_whole_and_of_no_certain_machine(name: str) -> None:
    path = COURSE / f"{name}.ipynb"
    text, cells = path.read_text(encoding="utf-8"), code_cells(name)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    shown = ["image/png" in str(cell["outputs"]) for cell in cells]
    assert shown == ["plt.show()" in "".join(cell["source"]) for cell in cells]
    for cell in cells:
        if "print(" in "".join(cell["source"]):
            assert cell["outputs"], f"a cell that prints has no output: {''.join(cell['source'])[:80]}"
    for output in outputs:
        if picture := output.get("data", {}).get("image/png"):
            text = text.replace(json.dumps(picture)[1:-1], "")
    assert not re.search(r"/(home|tmp|root|work|Users|usr)/|[A-Z]:\\\\", text)
    assert path.stat().st_size < 300_000
