"""The notebook of experiments/tour: it runs, and the outputs kept in it are its own, of no one machine."""

import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "experiments/tour/tour.ipynb"


def texts(notebook: nbformat.NotebookNode) -> list[str]:
    """What each cell of code printed, without its pictures."""
    return [
        "".join(output.get("text", "") for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")  # of the kernel's own packages
    kept = nbformat.read(NOTEBOOK, as_version=4)
    run = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(run, timeout=240, kernel_name="python3", resources=resources).execute()
    assert [len(text.splitlines()) for text in texts(run)] == [len(text.splitlines()) for text in texts(kept)]
    losses = [re.findall(r"validation loss (\d\.\d+)", "".join(texts(each))) for each in (kept, run)]
    assert [float(loss) for loss in losses[1]] == pytest.approx([float(loss) for loss in losses[0]], abs=0.05)
    assert len(losses[0]) == 2
    assert len(list((tmp_path / "runs").rglob("run.json"))) == 3
    assert (tmp_path / "report/report.html").is_file()


def test_the_outputs_kept_are_whole_and_of_no_certain_machine() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    notebook = json.loads(text)
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2
    for picture in pictures:
        text = text.replace(json.dumps(picture)[1:-1], "")
    assert not re.search(r"/(home|tmp|root|work|Users|usr)/|[A-Z]:\\\\", text)
    assert len(text) < 30_000
