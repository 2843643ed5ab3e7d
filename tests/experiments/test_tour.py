"""The notebook of experiments/tour: it runs, and the outputs kept in it are its own, of no one machine."""

import contextlib
import io
import json
import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[2] / "experiments/tour/tour.ipynb"
SWEEP = 'gptpl.sweep("experiment=quick", '
SHORT_SWEEP = f'{SWEEP}"trainer.max_epochs=1", '


def code_cells() -> list[Any]:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.mark.studies
def test_the_notebook_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    forked_trials: Callable[[], contextlib.AbstractContextManager[None]],
) -> None:
    """Cell by cell in this process: a kernel would import everything once more."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.INFO)
    kept, printed, names = [], [], dict[str, Any]()
    for cell in code_cells():
        out = io.StringIO()
        with contextlib.redirect_stdout(out), warnings.catch_warnings(), forked_trials():
            exec("".join(cell["source"]).replace(SWEEP, SHORT_SWEEP), names)
        printed.append(out.getvalue())
        kept.append("".join(line for output in cell["outputs"] for line in output.get("text", [])))
    assert [len(text.splitlines()) for text in printed] == [len(text.splitlines()) for text in kept]
    losses = [re.findall(r"validation loss (\d\.\d+)", "".join(texts)) for texts in (kept, printed)]
    assert [float(loss) for loss in losses[1]] == pytest.approx([float(loss) for loss in losses[0]], abs=0.05)
    assert len(losses[0]) == 2
    assert sum("".join(cell["source"]).count(SWEEP) for cell in code_cells()) == 1
    assert len(list((tmp_path / "runs").rglob("run.json"))) == 3
    assert (tmp_path / "report/report.html").is_file()


def test_the_outputs_kept_are_whole_and_of_no_certain_machine() -> None:
    text, cells = NOTEBOOK.read_text(encoding="utf-8"), code_cells()
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2
    for picture in pictures:
        text = text.replace(json.dumps(picture)[1:-1], "")
    assert not re.search(r"/(home|tmp|root|work|Users|usr)/|[A-Z]:\\\\", text)
    assert len(text) < 30_000
