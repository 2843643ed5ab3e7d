"""The recorded curve, the picture of it, and where both end up."""

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gptpl.callbacks.metrics import LossCurve, loss_figure
from gptpl.evaluation.loss_curves import LossPoint
from gptpl.files.figures import figure_pixels, write_png

Logged = Callable[[], list[str]]


pytestmark = pytest.mark.usefixtures("with_pictures")


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


# --- the callback -------------------------------------------------------------------------------------


def test_every_evaluation_is_a_point(training: Any, tmp_path: Path) -> None:
    module, curve = training.module(), LossCurve(path=tmp_path / "loss.png")
    measured: list[tuple[float, float]] = []

    class Measure(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            pl_module.eval()
            losses = [pl_module.loss_of(next(iter(training.loader(1, seed)))).item() for seed in (1, 2)]
            measured.append((losses[0], losses[1]))

    training.fit(curve, Measure(), module=module)
    assert [point.step for point in curve.points] == [0, 2, 4, 6, 8]
    assert [point.epoch for point in curve.points] == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert [point.tokens_seen for point in curve.points] == [0, 64, 128, 192, 256]
    for point, (train_loss, val_loss) in zip(curve.points, measured, strict=True):
        assert point.train_loss == pytest.approx(train_loss, rel=1e-6)
        assert point.val_loss == pytest.approx(val_loss, rel=1e-6)
    assert len({point.train_loss for point in curve.points}) == 5


def test_end_of_training_draws_and_judges(training: Any, tmp_path: Path, logged: Logged) -> None:
    path = tmp_path / "run" / "loss.png"
    board = TensorBoardLogger(tmp_path, name="", version="tb")
    training.fit(LossCurve(path=path), logger=board)
    assert png_size(path) == (1200, 750)
    assert [file.name for file in path.parent.iterdir()] == ["loss.png"]
    (line,) = logged()
    assert line.startswith(("Learning: ", "Underfitting: ", "Overfitting from step "))
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    (image,) = events.Images("loss")
    assert (image.step, image.width, image.height) == (8, 1200, 750)
    shown = tmp_path / "shown.png"
    shown.write_bytes(image.encoded_image_string)
    assert np.array_equal(imread(shown), imread(path)[..., :3])


def test_the_verdict_knows_what_trains_and_what_the_data_lack(
    training: Any, tmp_path: Path, logged: Logged
) -> None:
    class Data(L.LightningDataModule):
        caveat = "All are cut."

        def train_dataloader(self) -> Any:
            return training.loader(4, 1)

        def val_dataloader(self) -> Any:
            return [training.loader(1, 1), training.loader(1, 2)]

    module = training.module(lr=0.0)
    module.net.tok_emb.requires_grad_(False)
    training.trainer(LossCurve(path=tmp_path / "loss.png")).fit(module, datamodule=Data())
    (line,) = logged()
    assert line.startswith("All are cut. Underfitting: ")
    assert line.endswith("training more of the model (tune=all).")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_interrupted_training_is_drawn_too(
    training: Any, tmp_path: Path, logged: Logged, error: type[BaseException]
) -> None:
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 5:
                raise error("stop")

    path = tmp_path / "loss.png"
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        training.fit(LossCurve(path=path), Stop())
    assert png_size(path) == (1200, 750)
    assert len(logged()) == 1


def test_error_before_the_first_evaluation_draws_nothing(training: Any, tmp_path: Path) -> None:
    class Stop(L.Callback):
        def on_sanity_check_start(self, *args: Any) -> None:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        training.fit(LossCurve(path=tmp_path / "loss.png"), Stop())
    assert not (tmp_path / "loss.png").exists()


def test_no_evaluation_draws_nothing(training: Any, tmp_path: Path, logged: Logged) -> None:
    training.fit(LossCurve(path=tmp_path / "loss.png"), limit_val_batches=0)
    assert not (tmp_path / "loss.png").exists()
    assert logged() == []


def test_picture_that_cannot_be_written_is_a_warning(
    training: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, logged: Logged
) -> None:
    (tmp_path / "file").write_text("in the way")
    training.fit(LossCurve(path=tmp_path / "file" / "loss.png"))
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "could not be written" in warning.getMessage()
    assert len(logged()) == 2, "the verdict is told all the same"


def test_evaluation_outside_training_is_no_point(training: Any, tmp_path: Path) -> None:
    curve = LossCurve(path=tmp_path / "loss.png")
    trainer = training.trainer(curve)
    trainer.validate(training.module(), [training.loader(1, 1), training.loader(1, 2)], verbose=False)
    assert curve.points == []


def test_resumed_run_has_the_whole_curve_once(training: Any, tmp_path: Path) -> None:
    first, second = LossCurve(path=tmp_path / "1.png"), LossCurve(path=tmp_path / "2.png")
    checkpoint = tmp_path / "at_4.ckpt"
    training.fit(first, max_steps=4).save_checkpoint(checkpoint)
    torch.load(checkpoint, weights_only=True)  # plain values only
    training.fit(second, resume=checkpoint)
    assert [point.step for point in second.points] == [0, 2, 4, 6, 8]
    assert second.points[:3] == first.points


def test_evaluating_a_step_again_replaces_its_point(training: Any, tmp_path: Path) -> None:
    curve = LossCurve(path=tmp_path / "loss.png")
    late = [LossPoint(step=s, epoch=s / 4, tokens_seen=1, train_loss=1, val_loss=1) for s in (0, 2, 6, 10)]
    curve.load_state_dict({"points": [vars(point) for point in late]})
    training.fit(curve, max_steps=2)
    assert [point.step for point in curve.points] == [0, 2]
    assert curve.points[1].val_loss != 1


# --- the figure ---------------------------------------------------------------------------------------


def points(count: int, *, per_step: int = 512) -> list[LossPoint]:
    return [
        LossPoint(
            step=5 * i,
            epoch=5 * i / 9,
            tokens_seen=5 * i * per_step,
            train_loss=10 * 0.9**i,
            val_loss=6 + (i - 6) ** 2 / 10,
        )
        for i in range(count)
    ]


def test_figure_shows_the_losses_and_marks_the_lowest() -> None:
    figure = loss_figure(points(12))
    (axes,) = figure.axes
    train, val, lowest = axes.lines
    assert train.get_ydata() == pytest.approx([10 * 0.9**i for i in range(12)])
    assert val.get_xdata() == pytest.approx([5 * i / 9 for i in range(12)])
    assert lowest.get_xdata() == pytest.approx([30 / 9])
    assert lowest.get_ydata() == pytest.approx([6.0])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "training loss",
        "validation loss",
        "lowest validation loss 6.00 (step 30)",
    ]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Epochs", "Loss (nats per token)")


def test_second_axis_counts_tokens() -> None:
    figure = loss_figure(points(12))
    figure_pixels(figure)
    (top,) = figure.axes[0].child_axes
    assert top.get_xlabel() == "Tokens seen"
    epochs, tokens = figure.axes[0].get_xlim(), top.get_xlim()
    assert tokens == pytest.approx([epoch * 9 * 512 for epoch in epochs])
    labels = [label.get_text() for label in top.get_xticklabels()]
    assert "10k" in labels


@pytest.mark.parametrize("caption", ["", "word " * 60])
@pytest.mark.parametrize("count", [2, 18, 5000])
def test_nothing_overlaps_or_leaves_the_picture(count: int, caption: str) -> None:
    figure = loss_figure(points(count, per_step=10**5), caption=caption.strip())
    pixels = figure_pixels(figure)
    assert pixels.shape == (750, 1200, 3)
    axes, (legend,) = figure.axes[0], figure.legends
    (top,) = axes.child_axes
    (title,) = figure.texts
    boxes = [legend.get_window_extent(), axes.get_window_extent(), title.get_window_extent()]
    boxes += [axes.xaxis.label.get_window_extent(), top.xaxis.label.get_window_extent()]
    boxes += [axes.title.get_window_extent()] if caption else []
    for i, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= 1200
        assert box.y1 <= 750
        for other in boxes[:i]:
            apart = box.x1 <= other.x0 or other.x1 <= box.x0 or box.y1 <= other.y0 or other.y1 <= box.y0
            assert apart, (box, other)
    # The picture is drawn into, in the colours of both curves.
    for colour in [(31, 119, 180), (255, 127, 14)]:
        assert (pixels == colour).all(axis=-1).sum() > 100


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_losses_that_are_not_finite_leave_gaps(bad: float) -> None:
    some = points(6)
    some[3] = LossPoint(step=15, epoch=1.7, tokens_seen=1, train_loss=bad, val_loss=bad)
    figure = loss_figure(some)
    assert (
        np.isnan(np.asarray(figure.axes[0].lines[0].get_ydata())).tolist()
        == [False] * 3 + [True] + [False] * 2
    )
    figure_pixels(figure)
    figure_pixels(loss_figure([LossPoint(step=0, epoch=0, tokens_seen=0, train_loss=bad, val_loss=bad)]))


def test_picture_is_replaced_in_one_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "loss.png"
    write_png(np.zeros((4, 6, 3), dtype=np.uint8), path)
    assert png_size(path) == (6, 4)

    def cut_off(file: Any, *args: Any, **kwargs: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.image.imsave", cut_off)
    with pytest.raises(OSError, match="disk full"):
        write_png(np.ones((9, 9, 3), dtype=np.uint8), path)
    assert png_size(path) == (6, 4)
