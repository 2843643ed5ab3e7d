"""Checkpoints that cannot be used are refused, by every command and before anything is written."""

import shutil
from pathlib import Path

import pytest
import torch

from gptpl.tokenizers import WordsTokenizer


@pytest.fixture
def last(quick, tmp_path) -> Path:
    """A copy of a good checkpoint."""
    return Path(shutil.copy(quick.run.path / "checkpoints/last.ckpt", tmp_path / "model.ckpt"))


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-60_000])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def text_instead(path: Path) -> None:
    path.write_text("not a checkpoint")


def other_programs(path: Path) -> None:
    torch.save({"state_dict": {"weight": torch.zeros(3)}}, path)


def code_inside(path: Path) -> None:
    torch.save({"gptpl": Path("x"), "state_dict": {}}, path)


def other_shape(path: Path) -> None:
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["gptpl"]["model"]["emb_dim"] = 32
    torch.save(checkpoint, path)


def other_vocabulary(path: Path) -> None:
    checkpoint = torch.load(path, weights_only=True)
    state = WordsTokenizer(["a", "b", "<|unk|>", "<|endoftext|>"]).state()
    checkpoint["gptpl"]["tokenizer"] = state | {"vocabulary": ["a", "c", "<|unk|>", "<|endoftext|>"]}
    torch.save(checkpoint, path)


def other_tokenizer(path: Path) -> None:
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["gptpl"]["tokenizer"]["name"] = "sentences"
    torch.save(checkpoint, path)


def newer_format(path: Path) -> None:
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["gptpl"]["format_version"] = 99
    torch.save(checkpoint, path)


@pytest.mark.parametrize("command", ["generate", "evaluate"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncated, "cut short"),
        (emptied, "cut short"),
        (text_instead, "cut short"),
        (other_programs, "not written by gptpl train"),
        (code_inside, "hold code"),
        (other_shape, "own configuration wants"),
        (other_vocabulary, "words"),
        (other_tokenizer, "sentences"),
        (newer_format, "format version 99"),
        (Path.unlink, "does not exist"),
    ],
)
def test_a_checkpoint_that_cannot_be_used(command, damage, words, last, refused):
    damage(last)
    line = refused(command, "checkpoint=model.ckpt")
    assert words in line, line
    assert "model.ckpt" in line or "tokenizer" in line, line


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_a_folder_without_a_checkpoint(command, refused, tmp_path):
    assert "checkpoint is not set" in refused(command)
    assert "checkpoint=" in refused(command, "checkpoint=")
    (tmp_path / "run").mkdir()
    assert "checkpoint=run holds no checkpoints/last.ckpt or best.ckpt" in refused(command, "checkpoint=run")


def test_a_resumed_run_whose_words_changed(words, refused, tmp_path):
    shutil.copytree(words.folder, tmp_path / "copy")
    (tmp_path / "my text, 1.txt").write_text("Another text, with other words. " * 50)
    line = refused("train", "resume=copy/run", "trainer.max_steps=9", "data.path=my text, 1.txt")
    assert line.startswith("data.path=my text, 1.txt holds another text than the run in ")
    assert "restore the text, or start a new run" in line
