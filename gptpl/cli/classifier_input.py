"""The classifier of `checkpoint=`: a run's best weights, an adapter, a folder that transformers can read."""

import logging
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from gptpl.cli.hydra_app import instantiate
from gptpl.cli.trainer import device_type
from gptpl.errors import InputError
from gptpl.training.adapter import adapter_checkpoint
from gptpl.training.checkpoint import read_checkpoint
from gptpl.training.checkpoint_files import checkpoint_file
from gptpl.training.classifier_checkpoint import (
    TASK,
    LoadedClassifier,
    classifier_of,
    is_classifier_checkpoint,
    load_classifier,
    load_foreign_classifier,
)
from gptpl.weights.adapter import is_adapter
from gptpl.weights.formats import is_foreign
from gptpl.weights.hugging_face_classifier import is_classifier
from gptpl.weights.model_files import read_record

log = logging.getLogger(__name__)

BEST = "checkpoints/best.ckpt"


def names_classifier(cfg: DictConfig) -> bool:
    """Whether `checkpoint=` is a classifier; False also for what cannot be read, which others will say."""
    if OmegaConf.is_missing(cfg, "checkpoint"):
        return False
    path = Path(cfg.checkpoint).expanduser()
    try:
        if is_adapter(path):
            return bool(read_record(path).get("task", {}).get("name") == TASK)
        if is_foreign(path):
            return is_classifier(path)
        return is_classifier_checkpoint(read_checkpoint(checkpoint_file(str(path))))
    except InputError:
        return False


def loaded_classifier(cfg: DictConfig) -> LoadedClassifier:
    """The classifier, on the device of `device=`; of a run's folder the best weights, if it keeps them.

    An adapter is added to its base, which `init=` names where it is no longer where it was. Raises InputError
    where there is no classifier.
    """
    if OmegaConf.is_missing(cfg, "checkpoint"):
        raise InputError("checkpoint is not set: give checkpoint=RUN_FOLDER, of a run with task=classify")
    device = device_type(cfg.get("device", "cpu"), key="device")
    path = Path(cfg.checkpoint).expanduser()
    init = cfg.get("init")
    if init is not None and not is_adapter(path):
        raise InputError(f"checkpoint={cfg.checkpoint} has all its weights: leave init= out")
    if is_adapter(path):
        base = None if init is None else instantiate(init)
        loaded = classifier_of(adapter_checkpoint(path, base=base), path, device=device)
    elif is_foreign(path):
        if not is_classifier(path):
            raise InputError(
                f"checkpoint={path} is a language model, no classifier: train one with gptpl train"
                f" task=classify init=state_dict init.path={path}"
            )
        loaded = load_foreign_classifier(path, device=device)
    else:
        best = path / BEST
        loaded = load_classifier(best if best.is_file() else checkpoint_file(str(path)), device=device)
    log.info("checkpoint: %s, step %d", loaded.path, loaded.step)
    return loaded


def run_folder_of(loaded: LoadedClassifier) -> Path | None:
    """The folder of the run that a classifier's checkpoint lies in; None: it lies elsewhere."""
    folder = loaded.path.parent
    return folder.parent if folder.name == "checkpoints" else None
