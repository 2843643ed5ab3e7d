"""The adapter that a run of LoRA leaves in its folder."""

import logging
from pathlib import Path

from gptpl.training.adapter import export_adapter, has_base
from gptpl.training.checkpoint_files import LAST
from gptpl.training.training_module import TrainingModule
from gptpl.training.tuning import TuneLowRank

log = logging.getLogger(__name__)

FOLDER = "adapter"


def leave_adapter(module: TrainingModule, run_dir: Path) -> None:
    """Writes the adapter of the run's best weights, or its last where no best were kept.

    Nothing is written by other runs than LoRA's, and where there is no base that it could name.
    """
    if module.tune["name"] != TuneLowRank.name:
        return
    if not has_base(module.start):
        log.info("no adapter: the run began with random weights, which no file holds")
        return
    for name in ("best.ckpt", LAST):
        path = run_dir / "checkpoints" / name
        if path.is_file():
            export_adapter(path, run_dir / FOLDER)
            log.info("adapter: %s, of %s", run_dir / FOLDER, name)
            return
    log.info("no adapter: the run kept no checkpoint")
