"""The HPARAMS tab's records, read back from the event file with TensorBoard's own reader."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from gptpl.callbacks.metrics import Hyperparameters
from gptpl.training.loggers import MetricsCSVLogger, RunTensorBoardLogger


class Tab:
    """What TensorBoard would show of a folder."""

    def __init__(self, folder: Path) -> None:
        self.events = EventAccumulator(str(folder))
        self.events.Reload()

    def settings(self) -> dict[str, Any]:
        data = self._plugin_data("_hparams_/session_start_info").session_start_info.hparams
        return {name: getattr(value, value.WhichOneof("kind")) for name, value in data.items()}

    def course(self, name: str) -> dict[int, float]:
        return {event.step: event.value for event in self.events.Scalars(name)}

    def _plugin_data(self, tag: str) -> Any:
        content = self.events.SummaryMetadata(tag).plugin_data.content
        return HParamsPluginData.FromString(content)


def fit(pretraining: Any, **options: Any) -> None:
    folder = str(pretraining.folder)
    loggers = [RunTensorBoardLogger(save_dir=folder), MetricsCSVLogger(save_dir=folder)]
    pretraining.fit(Hyperparameters(), logger=loggers, **options)


def test_the_tab_shows_settings_and_the_lowest_losses(pretraining):
    fit(pretraining)
    tab = Tab(pretraining.folder / "tensorboard")
    assert tab.settings() == {"model.n_layers": 1.0, "seed": 1.0, "name": "None"}
    measured = pretraining.column("val/loss")
    lowest = {step: min(v for s, v in measured.items() if s <= step) for step in measured}
    assert tab.course("best_val/loss") == pytest.approx(lowest, rel=1e-6)
    assert [name for name in tab.events.Tags()["scalars"] if "perplexity" in name and "best" in name] == []
    assert "best_val/loss" not in (pretraining.folder / "metrics.csv").read_text()
    assert min(measured.values()) < measured[0]


def test_of_several_runs_tensorboard_shows_all_settings_those_that_differ_first(tmp_path):
    for name, settings in (("a", {"lr": 0.1, "a": 1}), ("b", {"lr": 0.2, "a": 1, "momentum": 0.9})):
        logger = RunTensorBoardLogger(save_dir=str(tmp_path / name))
        logger.log_hyperparams(settings, {"best_val/loss": 3.0}, step=1)
        logger.finalize("success")
    runs = EventMultiplexer()
    runs.AddRunsFromDirectory(str(tmp_path))
    runs.Reload()
    tab = Context(TBContext(data_provider=MultiplexerDataProvider(runs, str(tmp_path))))
    request = RequestContext()
    data = tab.hparams_metadata(request, "")
    experiment = tab.experiment_from_metadata(request, "", True, data, [])
    assert [info.name for info in experiment.hparam_infos] == ["lr", "a", "momentum"]
    assert [info.name.tag for info in experiment.metric_infos] == ["best_val/loss"]


def test_a_loss_that_rises_again_does_not_change_the_lowest(pretraining):
    """A huge rate from the start: the first loss is the best."""
    pretraining.lr = 3.0
    fit(pretraining)
    first = pretraining.column("val/loss")[0]
    assert max(pretraining.column("val/loss").values()) > first
    shown = Tab(pretraining.folder / "tensorboard").course("best_val/loss")
    assert list(shown.values()) == pytest.approx([first] * len(shown), rel=1e-6)


class Recorder(RunTensorBoardLogger):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(save_dir="unused")
        self.told: list[tuple[str, Any, int]] = []

    def log_hyperparams(self, params: Any, metrics: Any = None, step: int | None = None) -> None:
        self.told.append(("settings", dict(metrics), step or 0))

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.told.append(("metrics", dict(metrics), step or 0))


@pytest.fixture
def evaluate():
    """Tells a callback of an evaluation with this loss."""
    logger = Recorder()

    def on(
        callback: Hyperparameters,
        loss: float,
        step: int,
        fn: TrainerFn = TrainerFn.FITTING,
        metrics: Any = {"val/loss": "min", "val/perplexity": "min"},  # noqa: B006
    ) -> Recorder:
        trainer: Any = SimpleNamespace(
            state=SimpleNamespace(fn=fn),
            callback_metrics={"val/loss": torch.tensor(loss), "val/f1": torch.tensor(1 - loss / 10)},
            loggers=[logger],
            global_step=step,
        )
        module: Any = SimpleNamespace(run_config={"seed": 1}, metrics=metrics)
        callback.on_validation_end(trainer, module)
        return logger

    return on


def test_settings_are_told_once_and_then_numbers(evaluate):
    callback = Hyperparameters()
    for step, loss in ((0, 5.0), (3, 4.0), (6, 4.5)):
        logger = evaluate(callback, loss, step)
    assert logger.told == [
        ("settings", {"best_val/loss": 5.0}, 0),
        ("metrics", {"best_val/loss": 4.0}, 3),
        ("metrics", {"best_val/loss": 4.0}, 6),
    ]


def test_a_loss_that_is_no_number_is_not_the_lowest(evaluate):
    callback = Hyperparameters()
    for step, loss in enumerate((3.0, float("nan"), 4.0, float("inf"))):
        logger = evaluate(callback, loss, step)
    assert [metrics["best_val/loss"] for _, metrics, _ in logger.told] == [3.0] * 4


def test_a_run_that_starts_with_no_number_is_shown_all_the_same(evaluate):
    callback = Hyperparameters()
    evaluate(callback, float("nan"), 0)
    logger = evaluate(callback, 4.0, 3)
    assert logger.told[0][0] == "settings"
    assert logger.told[1] == ("metrics", {"best_val/loss": 4.0}, 3)


def test_a_resumed_run_remembers_the_lowest(evaluate):
    first = Hyperparameters()
    evaluate(first, 3.0, 3)
    second = Hyperparameters()
    second.load_state_dict(first.state_dict())
    assert evaluate(second, 4.0, 6).told[-1] == ("settings", {"best_val/loss": 3.0}, 6)


def test_a_metric_that_is_to_be_high_is_shown_at_its_highest(evaluate):
    callback = Hyperparameters()
    for step, loss in enumerate((3.0, 2.0, 4.0)):
        logger = evaluate(callback, loss, step, metrics={"val/loss": "min", "val/f1": "max", "val/x": "max"})
    assert logger.told[-1] == ("metrics", {"best_val/loss": 2.0, "best_val/f1": pytest.approx(0.8)}, 2)


def test_a_run_of_before_goes_on_with_its_lowest_loss(evaluate):
    callback = Hyperparameters()
    callback.load_state_dict({"lowest": {"hp/val_loss": 3.0, "hp/val_perplexity": 20.0}})
    assert evaluate(callback, 4.0, 6).told[-1] == ("settings", {"best_val/loss": 3.0}, 6)


def test_validating_a_finished_model_is_no_part_of_the_run(evaluate):
    assert evaluate(Hyperparameters(), 3.0, 0, TrainerFn.VALIDATING).told == []
