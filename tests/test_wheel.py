"""The wheel: what is in it, and that it works away from the repository."""

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from the repository with the installed build backend: no network is used."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(REPOSITORY)]
    subprocess.run([*PIP, *build], check=True)
    [path] = folder.glob("gptpl-*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    """A folder into which the wheel is installed, alone."""
    folder = tmp_path_factory.mktemp("site")
    install = ["install", "--no-deps", "--no-index", "--no-compile", "--target", str(folder), str(wheel)]
    subprocess.run([*PIP, *install], check=True)
    return folder


@pytest.fixture
def run_installed(site, tmp_path) -> Callable[..., str]:
    """A function that runs Python in an empty folder, with the wheel's gptpl ahead of the repository's."""

    def run(*arguments: str) -> str:
        finished = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(site)},
            capture_output=True,
            text=True,
        )
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    return run


def test_the_wheel_holds_the_package_its_configs_and_its_text(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {path.relative_to(REPOSITORY / "conf").as_posix() for path in REPOSITORY.glob("conf/**/*.yaml")}
    assert "train.yaml" in configs
    assert {f"gptpl/_conf/{config}" for config in configs} <= names
    assert {"gptpl/py.typed", "gptpl/data/texts/tale.txt"} <= names
    vocabulary = ("vocab.bpe", "LICENSE", "README.md")
    assert {f"gptpl/tokenizers/gpt2_vocabulary/{name}" for name in vocabulary} <= names


def test_the_wheel_holds_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"gptpl"}
    assert not [name for name in names if "test" in name or name.endswith(".pyc")]


def test_the_installed_package_is_the_one_that_runs(run_installed, site):
    location = run_installed("-c", "import gptpl; print(gptpl.__file__)").strip()
    assert Path(location) == site / "gptpl" / "__init__.py"


def test_help_lists_the_shipped_config_groups(run_installed, site):
    listing = "".join(
        run_installed("-m", "gptpl", each, "--help") for each in ("train", "generate", "evaluate")
    )
    groups = {path.parent.name for path in (site / "gptpl/_conf").glob("*/*.yaml")}
    assert {"model", "data", "tokenizer", "experiment"} <= groups
    assert {group for group in groups if group not in listing} == set()


@pytest.mark.slow
def test_the_installed_package_trains(run_installed, tmp_path):
    short = ("trainer.max_steps=2", "scheduler=constant", "callbacks=checkpoint_last")
    run_installed("-m", "gptpl", "train", "experiment=quick", *short, "run_dir=run")
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
    assert (tmp_path / "run" / "run.json").is_file()
