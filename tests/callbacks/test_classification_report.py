"""Pictures of a classifier: what is in them, and that they are written, or a warning is."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from matplotlib.image import imread

from gptpl.callbacks.classification import ClassificationReport, confusion_figure, reliability_figure
from gptpl.errors import InputError
from gptpl.training.classification import ClassificationModule

CONFUSION = np.array([[6.0, 2, 0], [1, 1, 0], [0, 0, 0]])
CALIBRATION = np.array([[8.0, 2], [4.8, 1.8], [6, 1]])


pytestmark = pytest.mark.usefixtures("with_pictures")


def test_the_confusion_matrix_has_a_number_a_cell_and_the_true_classes_in_rows() -> None:
    axes = confusion_figure(CONFUSION, ["a", "b", "a very long name of a class"]).axes[0]
    found = {
        (round(text.get_position()[1]), round(text.get_position()[0])): text.get_text() for text in axes.texts
    }
    assert found == {
        (row, column): f"{CONFUSION[row, column]:.0f}" for row in range(3) for column in range(3)
    }
    shares = axes.images[0].get_array()
    assert shares is not None
    assert shares[0].tolist() == [0.75, 0.25, 0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "a very long nam..."]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Predicted", "True")
    assert not confusion_figure(np.eye(40), [str(i) for i in range(40)]).axes[0].texts


def test_the_reliability_picture_has_accuracy_above_and_numbers_below() -> None:
    above, below = reliability_figure(CALIBRATION, error=0.2).axes
    assert [bar.get_height() for bar in above.patches] == [0.75, 0.5]  # type: ignore[attr-defined]
    assert [bar.get_height() for bar in below.patches] == [8, 2]  # type: ignore[attr-defined]
    assert "expected calibration error 0.200" in above.get_title()


def trainer(folder: Path, fn: TrainerFn = TrainerFn.FITTING) -> Any:
    loggers = [TensorBoardLogger(save_dir=folder / "logs", name="", version="")]
    return SimpleNamespace(state=SimpleNamespace(fn=fn), is_global_zero=True, global_step=7, loggers=loggers)


@pytest.fixture
def module() -> ClassificationModule:
    made = ClassificationModule.__new__(ClassificationModule)
    L.LightningModule.__init__(made)
    made.labels = ("a", "b", "c")
    made.evaluated = {"val": {"confusion": CONFUSION, "calibration": CALIBRATION}}
    return made


def test_every_evaluation_of_a_training_is_drawn(
    tmp_path: Path, module: ClassificationModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = tmp_path / "run/confusion.png", tmp_path / "run/calibration.png"
    callback = ClassificationReport(confusion_path=paths[0], calibration_path=paths[1])
    callback.on_validation_end(trainer(tmp_path, TrainerFn.VALIDATING), module)
    assert not paths[0].exists()
    running = trainer(tmp_path)
    shown: dict[str, Any] = {}
    monkeypatch.setattr(
        running.loggers[0].experiment,
        "add_image",
        lambda name, pixels, *_, **__: shown.update({name: pixels}),
    )
    callback.on_validation_end(running, module)
    for path, name in zip(paths, ("confusion", "calibration"), strict=True):
        picture = imread(path)
        assert picture.shape[:2] == shown[name].shape[:2]
        assert picture[..., :3].std() > 0.05


def test_a_folder_that_cannot_be_written_is_a_warning(
    tmp_path: Path, module: ClassificationModule, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    callback = ClassificationReport(
        confusion_path=tmp_path / "file/a.png", calibration_path=tmp_path / "file/b.png"
    )
    with caplog.at_level(logging.WARNING):
        callback.on_validation_end(trainer(tmp_path), module)
    assert len(caplog.records) == 2


def test_another_task_is_refused(tmp_path: Path) -> None:
    callback = ClassificationReport(confusion_path="a.png", calibration_path="b.png")
    with pytest.raises(InputError, match="needs task=classify: leave it out with"):
        callback.on_validation_end(trainer(tmp_path), L.LightningModule())
