"""Who may import whom: the contracts of pyproject.toml, and what an import really loads."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

HEAVY = {
    "datasets",
    "hydra",
    "lightning",
    "matplotlib",
    "omegaconf",
    "pytorch_lightning",
    "requests",
    "tensorboard",
    "tensorflow",
    "tiktoken",
    "transformers",
}


def packages_loaded_by(statement: str) -> set[str]:
    """Names of the top-level packages that a fresh interpreter holds after `statement`."""
    program = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    finished = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return {module.partition(".")[0] for module in json.loads(finished.stdout)}


def test_the_contracts_of_pyproject_hold():
    linter = pytest.importorskip("importlinter.cli", reason="import-linter comes with the extra `dev`")
    program = f"from {linter.__name__} import lint_imports_command; lint_imports_command()"
    finished = subprocess.run(
        [sys.executable, "-c", program, "--no-cache", "--no-logo"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_the_package_itself_loads_no_library():
    assert packages_loaded_by("import gptpl, gptpl.errors") & (HEAVY | {"torch"}) == set()


def test_the_lower_rooms_load_torch_at_most():
    assert packages_loaded_by("import gptpl.model, gptpl.generation, gptpl.tokenizers") & HEAVY == set()


def test_the_command_line_starts_without_torch():
    """`gptpl --help` would otherwise wait for seconds."""
    slow_to_load = {"datasets", "lightning", "matplotlib", "tensorboard", "torch", "transformers"}
    assert packages_loaded_by("import gptpl.cli.main") & slow_to_load == set()
