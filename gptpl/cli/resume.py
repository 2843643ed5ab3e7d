"""`gptpl train resume=RUN_DIR`: the run's own config, and the checkpoint to go on from."""

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from gptpl.cli.run_folder import read_config
from gptpl.cli.sweep import SweepError
from gptpl.errors import InputError
from gptpl.training.checkpoint import read_checkpoint

CHANGEABLE_GROUPS = ("callbacks", "logger")
CHANGEABLE = ("trainer.", "callbacks.", "logger.", "eval_")


def resumed_config(cfg: DictConfig) -> tuple[DictConfig, Path]:
    """The stored config with the allowed overrides on it, and the run's last checkpoint.

    `cfg` is what Hydra composed: it gives the overrides their types; its other values do not matter. Raises
    InputError for a folder without a run, a run without a usable checkpoint, and an override that would make
    it another run.
    """
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        raise SweepError(f"resume={cfg.resume} continues one run, which no sweep can: leave -m out")
    run_dir = Path(cfg.resume).expanduser().absolute()
    stored = read_config(run_dir)
    checkpoint = run_dir / "checkpoints" / "last.ckpt"
    if not checkpoint.is_file():
        raise InputError(f"resume={run_dir} has no checkpoints/last.ckpt to go on from: start the run anew")
    read_checkpoint(checkpoint)  # whole, before anything is built for it
    config = OmegaConf.create(_moved(stored, str(stored.get("run_dir")), str(run_dir)))
    OmegaConf.set_struct(config, True)
    for override in OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task)):
        if override.key_or_group != "resume":
            _apply(override, config, cfg)
    return config, checkpoint


def _moved(value: Any, old: str, new: str) -> Any:
    """The settings with paths into the run's folder changed to where the folder is now."""
    if isinstance(value, dict):
        return {key: _moved(item, old, new) for key, item in value.items()}
    if isinstance(value, list):
        return [_moved(item, old, new) for item in value]
    inside = isinstance(value, str) and (value == old or value.startswith((f"{old}/", f"{old}\\")))
    return new + value[len(old) :] if inside else value


def _apply(override: Override, config: DictConfig, composed: DictConfig) -> None:
    """Takes over one override's value, as Hydra composed it, or leaves out what it deletes."""
    key = override.key_or_group
    if key not in CHANGEABLE_GROUPS and not key.startswith(CHANGEABLE):
        raise InputError(
            f"{key} cannot change when a run is resumed, which goes on with its own config: leave it out"
            f" (what may change: {', '.join(CHANGEABLE_GROUPS)}, and {'*, '.join(CHANGEABLE)}*)"
        )
    try:
        if override.is_delete():
            parent, _, name = key.rpartition(".")
            with open_dict(config):
                del OmegaConf.select(config, parent)[name]
        else:
            added = override.is_add() or key in CHANGEABLE_GROUPS
            value = OmegaConf.select(composed, key)
            OmegaConf.update(config, key, value, merge=False, force_add=added)
    except (OmegaConfBaseException, KeyError, TypeError) as error:
        raise InputError(f"{key} is no key of the run in {config.run_dir}: see its config.yaml") from error
