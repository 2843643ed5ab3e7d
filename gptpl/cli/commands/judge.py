"""Score a model's answers by their references, by a judge model, or against another model's.

examples:
  gptpl judge responses=responses.json                      # scores from 0 to 100 by llama3, served by Ollama
  gptpl judge responses=responses.json judge=none           # exact match, F1, ROUGE-L; no server
  gptpl judge responses=A.json compare=B.json both_orders=true  # which of two models is better?
  gptpl judge responses=A.json judge=openai judge.model=NAME  # the key from OPENAI_API_KEY
  gptpl judge responses=A.json judge=openai judge.address=URL judge.api_key_env=null  # a server without a key

Writes scores.json or comparison.json beside the responses, or output=, and a picture of the same name.
Replies are kept as they come: the same command again resumes.
"""

from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gptpl.cli.arguments import parse, shown
from gptpl.cli.console import Console
from gptpl.config.compose import Config, composed, is_missing
from gptpl.config.instantiate import instantiate
from gptpl.errors import InputError
from gptpl.judging import Comparison, Scores, compare, score


def run(arguments: list[str]) -> int:
    """Writes the result and its picture, prints a table to standard output; returns the exit status."""
    given = parse("judge", arguments)
    if not shown(given):
        cfg = composed(given.overrides, given.config_name, config_dir=given.config_dir).cfg
        with Console():
            _judge(cfg)
    return 0


def _judge(cfg: Config) -> None:
    if is_missing(cfg, "responses"):
        raise InputError("responses is not set: give responses=FILE, which gptpl respond wrote")
    if cfg.both_orders and cfg.compare is None:
        raise InputError(
            "both_orders=true has two answers to swap only with compare=: give it, or leave it out"
        )
    name = "scores.json" if cfg.compare is None else "comparison.json"
    output = Path(cfg.output or Path(cfg.responses).with_name(name)).expanduser()
    settings: dict[str, Any] = {
        "judge": instantiate(cfg.judge),
        "output": output,
        "seed": cfg.seed,
        "bootstrap_samples": cfg.bootstrap_samples,
        "markers": list(cfg.markers),
        "progress": partial(tqdm, unit="answer", disable=None, leave=False),
    }
    result: Scores | Comparison
    if cfg.compare is None:
        result = score(cfg.responses, **settings)
    else:
        result = compare(cfg.responses, cfg.compare, both_orders=cfg.both_orders, **settings)
    _print(cfg, result, output)


def _print(cfg: Config, result: Scores | Comparison, output: Path) -> None:
    files = [str(Path(path).expanduser()) for path in (cfg.responses, cfg.compare) if path is not None]
    print(f"answers     {' against '.join(files)}, {result.count} entries")
    if result.judge is not None:
        print(f"judge       {result.judge.client.model} at {result.judge.client.address}")
    print("\n" + "\n".join(result.lines()) + "\n")
    print(f"result      {output}")
    print(f"picture     {output.with_suffix('.png')}")
    result.check_readable()
