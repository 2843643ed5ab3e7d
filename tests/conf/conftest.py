"""Composes configs as the commands do, without running anything."""

from collections.abc import Callable, Iterator

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from gptpl.cli.configs import config_folder
from gptpl.cli.schema import register_schemas


@pytest.fixture
def compose(tmp_path, monkeypatch) -> Iterator[Callable[..., DictConfig]]:
    """Composes a command's config, with a text of the test's own for `data=text_file`, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPTPL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("A text of the user's own. " * 200)
    register_schemas()
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(config_dir=str(config_folder()), version_base="1.3"):

        def composed(command: str, *overrides: str) -> DictConfig:
            files = {"data=text_file", "data=instruction_file"}
            own = ["data.path=text.txt"] if files & set(overrides) else []
            run = [f"run_dir={tmp_path / 'run'}"] if command == "train" else []
            return hydra.compose(command, overrides=[*overrides, *own, *run])

        yield composed
