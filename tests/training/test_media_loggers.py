"""Texts, pictures, tables and settings in every kind of logger: read back with what is not gptpl's own."""

import csv
import json
import struct
import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gptpl.callbacks.metrics import Hyperparameters, LossCurve
from gptpl.callbacks.records import RecordEvaluations
from gptpl.callbacks.samples import SampleText
from gptpl.errors import InputError
from gptpl.training import loggers as sending
from gptpl.training.loggers import MetricsCSVLogger, ResumableLogger
from gptpl.training.tracking import RunMLFlowLogger, RunWandbLogger

PIXELS = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
ROWS = [['a, "b"\nc', "<i>d</i>"], ["e", "`f`"]]


class NumbersOnly(Logger):
    """A user's logger that has no more than Lightning asks for."""

    name = "numbers"
    version = "0"

    def __init__(self) -> None:
        super().__init__()
        self.metrics: list[tuple[dict[str, float], int | None]] = []
        self.settings: list[dict[str, Any]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.metrics.append((dict(metrics), step))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.settings.append(dict(params))


class Everything(NumbersOnly):
    """A user's logger that takes all that there is."""

    def __init__(self) -> None:
        super().__init__()
        self.media: list[tuple[str, str, Any, int]] = []

    def log_text(self, name: str, text: str, step: int) -> None:
        self.media.append(("text", name, text, step))

    def log_image(self, name: str, pixels: Any, step: int) -> None:
        self.media.append(("image", name, pixels, step))

    def log_table(self, name: str, columns: Any, rows: Any, step: int) -> None:
        self.media.append(("table", name, (list(columns), list(rows)), step))


def send(*loggers: Logger, step: int = 3) -> None:
    sending.log_text(loggers, "verdict", "**Learning**", step)
    sending.log_image(loggers, "loss", PIXELS, step)
    sending.log_table(loggers, "sample/greedy", ["prompt", "continuation"], ROWS, step)
    sending.log_hyperparameters(loggers, {"model.n_layers": 2}, {"best_val/loss": 1.5}, step)


def test_a_logger_is_sent_what_it_has_methods_for(tmp_path):
    everything, numbers = Everything(), NumbersOnly()
    send(everything, numbers, MetricsCSVLogger(save_dir=str(tmp_path)))
    assert [(kind, name, step) for kind, name, _, step in everything.media] == [
        ("text", "verdict", 3),
        ("image", "loss", 3),
        ("table", "sample/greedy", 3),
    ]
    assert everything.media[2][2] == (["prompt", "continuation"], ROWS)
    for logger in (everything, numbers):
        assert logger.settings == [{"model.n_layers": 2}]
        assert logger.metrics == [({"best_val/loss": 1.5}, 3)]
    sending.log_hyperparameters([numbers], {}, {"best_val/loss": 1.2}, 6)
    assert len(numbers.settings) == 1
    assert numbers.metrics[-1] == ({"best_val/loss": 1.2}, 6)


def test_lightnings_own_tensorboard_logger_shows_all(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="tb", default_hp_metric=False)
    send(logger)
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert {event.tensor_proto.string_val[0] for event in events.Tensors("verdict/text_summary")} == {
        b"**Learning**"
    }
    [image] = events.Images("loss")
    assert (image.step, image.width, image.height) == (3, 4, 4)
    [table] = events.Tensors("sample/greedy/text_summary")
    assert table.tensor_proto.string_val[0].decode().split("\n\n")[:2] == ["**prompt**", '    a, "b"\n    c']
    assert events.Scalars("best_val/loss")[0].value == 1.5
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_a_training_sends_its_samples_curve_and_settings(pretraining, tmp_path):
    """The callbacks know no logger by its class."""
    logger = Everything()
    train(pretraining, tmp_path, logger)
    assert {(kind, name, step) for kind, name, _, step in logger.media} == {
        ("table", "sample/greedy", 4),
        ("table", "sample/greedy", 6),
        ("image", "loss", 6),
        ("text", "verdict", 6),
    }
    [(columns, [[prompt, continuation]])] = [each for _, _, each, step in logger.media[:1]]
    assert (columns, prompt) == (["prompt", "continuation"], "ab")
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert continuation == samples[0]["continuation"]
    assert logger.settings == [{"model.n_layers": 1, "seed": 1, "name": "None"}]
    lowest = [metrics["best_val/loss"] for metrics, _ in logger.metrics if "best_val/loss" in metrics]
    assert lowest == sorted(lowest, reverse=True)
    assert len(lowest) == 3


def train(pretraining: Any, folder: Path, *loggers: Logger, **options: Any) -> L.Trainer:
    steps = options.pop("steps", 6)
    return pretraining.fit(
        RecordEvaluations(),
        Hyperparameters(),
        SampleText(prompts=["ab"], path=folder / "samples.jsonl", max_new_tokens=3, every_n_steps=4),
        LossCurve(path=folder / "loss.png"),
        module=pretraining.module(total_steps=steps),
        logger=list(loggers),
        default_root_dir=folder,
        **options,
    )


# --- Weights & Biases, offline --------------------------------------------------------------------------


def wandb_logger(folder: Path) -> RunWandbLogger:
    settings = {"console": "off", "silent": True}
    return RunWandbLogger(save_dir=str(folder), project="gptpl", offline=True, settings=settings)


def wandb_records(folder: Path) -> list[dict[str, Any]]:
    """Every history row with the id of its run, and every setting, of the offline runs in a folder."""
    from wandb.proto import wandb_internal_pb2

    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        patience_ends = time.monotonic() + 30
        records: list[Any] = []
        while not any(record.HasField("exit") for record in records) and time.monotonic() < patience_ends:
            time.sleep(0.1)  # another process writes the file
            found = leveldb_records(path.read_bytes()[7:])
            records = [wandb_internal_pb2.Record.FromString(data) for data in found]
        for record in records:
            items = record.history.item
            row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
            if row:
                rows.append(row | {"id": path.stem.removeprefix("run-")})
            for item in (*record.run.config.update, *record.config.update):
                rows.append({"config": item.key, "value": json.loads(item.value_json)})
    return rows


def leveldb_records(log: bytes) -> list[bytes]:
    """The records in LevelDB's log format; W&B's header of 7 bytes counts in the first block."""
    records, place, part = [], 7, b""
    while place - 7 < len(log):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        size, kind = struct.unpack_from("<HB", log, place - 7 + 4)
        part += log[place : place + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            records.append(part)
            part = b""
    return records


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_wandb_has_the_samples_curves_figure_and_settings_and_a_resumed_run_its_id(
    pretraining, tmp_path, monkeypatch
):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    first = wandb_logger(tmp_path)
    assert isinstance(first, ResumableLogger)
    train(pretraining, tmp_path, first)
    position = first.position()
    resumed = wandb_logger(tmp_path)
    resumed.return_to(position)
    resumed.log_metrics({"val/loss": 0.5}, step=9)
    resumed.finalize("success")
    other = wandb_logger(tmp_path)
    other.log_metrics({"val/loss": 0.25}, step=1)
    other.finalize("success")

    rows = wandb_records(tmp_path)
    assert {"config": "model.n_layers", "value": 1} in rows
    mine = [row for row in rows if row.get("id") == position["id"]]
    losses = [(row["trainer/global_step"], row["val/loss"]) for row in mine if "val/loss" in row]
    assert [step for step, _ in losses] == [0, 3, 6, 9]
    evaluations = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert [loss for _, loss in losses[:3]] == pytest.approx(
        [record["metrics"]["val/loss"] for record in evaluations], rel=1e-6
    )
    assert [row["val/loss"] for row in rows if row.get("id") == other.position()["id"]] == [0.25]
    kinds = {
        name.removesuffix("/_type"): row[name] for row in mine for name in row if name.endswith("/_type")
    }
    assert kinds == {"loss": "images/separated", "verdict": "table-file", "sample/greedy": "table-file"}
    files = [path for path in tmp_path.glob("wandb/*/files/media/**/*.json") if "greedy" in path.name]
    tables = [json.loads(path.read_text()) for path in files]
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert sorted(table["data"][0] for table in tables) == sorted(
        [each["prompt"], each["continuation"]] for each in samples
    )


# --- MLflow, in a database of the run's own --------------------------------------------------------------


def mlflow_logger(folder: Path) -> RunMLFlowLogger:
    return RunMLFlowLogger(save_dir=str(folder), experiment_name="gptpl", run_name="mine")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_mlflow_has_the_samples_curves_figure_and_settings_and_a_resumed_run_its_id(
    pretraining, tmp_path, monkeypatch
):
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    from mlflow.tracking import MlflowClient

    first = mlflow_logger(tmp_path)
    assert isinstance(first, ResumableLogger)
    assert list(tmp_path.glob("mlflow*")) == [], "a logger that has logged nothing leaves nothing"
    train(pretraining, tmp_path, first)
    position = first.position()
    resumed = mlflow_logger(tmp_path)
    resumed.return_to(position)
    sending.log_hyperparameters([resumed], {"model.n_layers": 1, "seed": 2, "new": 3}, {"val/loss": 0.5}, 9)
    resumed.finalize("success")

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    [run] = client.search_runs([client.get_experiment_by_name("gptpl").experiment_id])
    assert run.info.run_id == position["id"]
    assert (run.info.run_name, run.info.status) == ("mine", "FINISHED")
    assert run.data.params == {"model.n_layers": "1", "seed": "1", "name": "None", "new": "3"}
    assert run.data.tags["resumed.seed"] == "2"
    losses = [(each.step, each.value) for each in client.get_metric_history(position["id"], "val/loss")]
    assert [step for step, _ in losses] == [0, 3, 6, 9]
    evaluations = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert [loss for _, loss in losses[:3]] == pytest.approx(
        [record["metrics"]["val/loss"] for record in evaluations], rel=1e-6
    )
    artifacts = tmp_path / "mlflow" / position["id"] / "artifacts"
    assert (artifacts / "verdict/step-00000006.md").read_text()
    assert len(list((artifacts / "images").glob("loss*.png"))) == 1
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    for sample in samples:
        with (artifacts / f"sample/greedy/step-{sample['step']:08d}.csv").open(newline="") as file:
            assert list(csv.DictReader(file)) == [{name: sample[name] for name in ("prompt", "continuation")}]


@pytest.mark.parametrize(("make", "package"), [(wandb_logger, "wandb"), (mlflow_logger, "mlflow")])
def test_a_missing_package_is_named_with_its_extra(make, package, tmp_path, monkeypatch):
    monkeypatch.setattr("gptpl.training.tracking.find_spec", lambda name: None)
    with pytest.raises(InputError, match=rf"needs the package {package}: pip install 'gptpl\[{package}\]'"):
        make(tmp_path)
