"""Download GPT-2 ahead of time, to use it without a network.

examples:
  gptpl weights fetch                                          # 124M from the Hugging Face hub
  gptpl weights fetch size=355M source=openai                  # OpenAI's TensorFlow files
  gptpl weights fetch size=1558M mirror=https://hf-mirror.com  # from another server

Prints the folder, in GPTPL_CACHE or your cache folder. Downloads resume, and are checked.
"""

from gptpl.cli.arguments import parse, shown
from gptpl.cli.console import Console
from gptpl.config.compose import Config, composed
from gptpl.weights.published import checked_size, checked_source, fetch


def run(arguments: list[str]) -> int:
    """Prints the folder to standard output, progress to standard error; returns the exit status."""
    given = parse("weights fetch", arguments)
    if not shown(given):
        cfg = composed(given.overrides, given.config_name, config_dir=given.config_dir).cfg
        with Console():
            _fetch(cfg)
    return 0


def _fetch(cfg: Config) -> None:
    print(fetch(checked_size(cfg.size), checked_source(cfg.source), mirror=cfg.mirror))
