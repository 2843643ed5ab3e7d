"""Composes configs as the commands do, without running anything."""

from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from gptpl.config.compose import composed
from gptpl.tokenizers import train_bpe


@pytest.fixture
def compose(tmp_path, monkeypatch) -> Callable[..., DictConfig]:
    """Composes a config, with a text of the test's own where `data=` needs one, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPTPL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("A text of the user's own. " * 200)

    def compose(command: str, *overrides: str) -> DictConfig:
        files = {"data=canaries", "data=text_file", "data=corpus", "data=instruction_file"}
        own = ["data.path=text.txt"] if files & set(overrides) else []
        if "data=mixture" in overrides:
            text = "path: text.txt, epochs: 1"
            own.append(f"data.sources={{one: {{{text}}}, two: {{{text}}}}}")
        if "tokenizer=file" in overrides:
            if not Path("own.json").exists():
                train_bpe(["a few words"], vocab_size=257).save("own.json")
            own.append("tokenizer.path=own.json")
        run = [f"run_dir={tmp_path / 'run'}"] if command == "train" else []
        return composed([*overrides, *own, *run], command).cfg

    return compose
