"""Loggers of Weights & Biases and MLflow for runs that are resumed; both work without a network.

Neither can forget a point: points after the checkpoint that a run resumes from are there twice.
"""

import os
from argparse import Namespace
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from gptpl.errors import InputError
from gptpl.training.loggers import mlflow_image, mlflow_table, mlflow_text

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


class RunWandbLogger(WandbLogger):
    """Lightning's W&B logger; a resumed run continues its run of W&B, and each gptpl run has its own.

    `offline` only writes to the folder `wandb` in `save_dir`, for `wandb sync`; else to a W&B server.
    `settings` are those of Lightning's logger and of `wandb.init`.
    """

    def __init__(
        self, *, save_dir: str, project: str, name: str | None = None, offline: bool = True, **settings: Any
    ) -> None:
        _check_installed("wandb")
        self._given = {"project": project, "name": name, "offline": offline, "save_dir": save_dir, **settings}
        super().__init__(**self._given)

    def position(self) -> dict[str, Any]:
        """See `ResumableLogger`: W&B's id of the run."""
        return {"id": self.version} if self.version else {}

    def sync(self) -> None:
        """See `ResumableLogger`; W&B writes in a process of its own."""

    def return_to(self, position: dict[str, Any]) -> None:
        """See `ResumableLogger`: the same run of W&B is opened when something is logged."""
        if "id" in position:
            super().__init__(**(self._given | {"id": position["id"]}))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the run of W&B; Lightning would log the next run of this process into it, too."""
        super().finalize(status)
        import wandb

        if wandb.run is not None and wandb.run.id == self.version:
            position = self.position()
            wandb.finish(exit_code=0 if status == "success" else 1)
            self.return_to(position)


class RunMLFlowLogger(Logger):
    """Lightning's MLflow logger, opened when something is logged; a resumed run continues its MLflow run.

    `tracking_uri` names an MLflow server or database; None: `MLFLOW_TRACKING_URI`, or else `mlflow.db` and a
    folder `mlflow` of artifacts in `save_dir`.
    """

    name, save_dir = "", ""
    log_text, log_image, log_table = mlflow_text, mlflow_image, mlflow_table

    def __init__(
        self,
        *,
        save_dir: str,
        experiment_name: str,
        run_name: str | None = None,
        tracking_uri: str | None = None,
    ) -> None:
        _check_installed("mlflow")
        super().__init__()
        self.name, self.save_dir = experiment_name, save_dir
        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        self._given: dict[str, Any] = {
            "experiment_name": experiment_name,
            "run_name": run_name,
            "tracking_uri": uri or f"sqlite:///{Path(save_dir, 'mlflow.db').absolute()}",
            "artifact_location": None if uri else Path(save_dir, "mlflow").absolute().as_uri(),
        }
        self._run_id: str | None = None
        self._opened: MLFlowLogger | None = None

    @property
    def version(self) -> str:
        """MLflow's id of the run, or empty before anything is logged."""
        return self._run_id or ""

    @property
    @rank_zero_experiment
    def experiment(self) -> "MlflowClient":
        """MLflow's client."""
        return self._logger().experiment

    def _logger(self) -> MLFlowLogger:
        # Not in __init__, where it would create the database, on every rank.
        if self._opened is None:
            self._opened = MLFlowLogger(**self._given, run_id=self._run_id)
            self._run_id = self._opened.run_id
        return self._opened

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a point to each metric's curve."""
        self._logger().log_metrics(metrics, step)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Set MLflow's parameters, which cannot change: what a resumed run has changed becomes a tag."""
        logger = self._logger()
        given = vars(params) if isinstance(params, Namespace) else params
        before = logger.experiment.get_run(self._run_id).data.params
        logger.log_hyperparams({name: value for name, value in given.items() if name not in before})
        for name, value in given.items():
            if before.get(name, str(value)[:250]) != str(value)[:250]:  # as much as Lightning lets through
                logger.experiment.set_tag(self._run_id, f"resumed.{name}", str(value))

    def position(self) -> dict[str, Any]:
        """See `ResumableLogger`: MLflow's id of the run."""
        return {"id": self._run_id} if self._run_id else {}

    def sync(self) -> None:
        """See `ResumableLogger`; every point is in the database when it has been logged."""

    def return_to(self, position: dict[str, Any]) -> None:
        """See `ResumableLogger`: the same MLflow run is opened when something is logged."""
        self._run_id = position.get("id")

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Tell MLflow how the run ended."""
        if self._opened is not None:
            self._opened.finalize(status)


def _check_installed(package: str) -> None:
    if find_spec(package) is None:
        raise InputError(f"logger={package} needs the package {package}: pip install 'gptpl[{package}]'")
