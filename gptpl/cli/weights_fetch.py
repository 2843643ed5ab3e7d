"""`gptpl weights fetch`: published GPT-2 weights into the cache, for use without a network."""

from omegaconf import DictConfig

from gptpl.cli.console import RunLog
from gptpl.cli.hydra_app import run_under_hydra
from gptpl.weights.published import checked_size, checked_source, fetch


def run(arguments: list[str]) -> int:
    """Prints the folder to standard output, progress to standard error; returns the exit status."""
    run_under_hydra("weights_fetch", arguments, _fetch)
    return 0


def _fetch(cfg: DictConfig) -> None:
    with RunLog():
        print(fetch(checked_size(cfg.size), checked_source(cfg.source), mirror=cfg.mirror))
