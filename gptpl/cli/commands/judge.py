"""Score a model's answers: against references, by a judge model, or against another model's answers.

examples:
  gptpl judge responses=responses.json                      # scores from 0 to 100 by llama3 on Ollama
  gptpl judge responses=responses.json judge=none           # exact match, F1, ROUGE-L; no server
  gptpl judge responses=A.json compare=B.json both_orders=true  # which of two models is better?
  gptpl judge responses=A.json judge=openai judge.model=NAME  # the key from OPENAI_API_KEY
  gptpl judge responses=A.json judge=openai judge.address=URL judge.api_key_env=null  # a server without a key

Writes scores.json or comparison.json next to the responses, or output=, and a picture of the same name.
Replies are kept as they come: the same command again resumes.
"""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from gptpl.cli.arguments import Arguments, configured
from gptpl.cli.model_input import NOT_SET
from gptpl.config.compose import plain
from gptpl.config.instantiate import instantiate
from gptpl.errors import InputError

if TYPE_CHECKING:
    from gptpl.judging import Comparison, Scores


@configured("judge")
def run(given: Arguments) -> None:
    """Writes the result and its picture, prints a table."""
    from gptpl.judging import compare, score

    cfg = plain(given.config)
    responses, other, both_orders = cfg["responses"], cfg["compare"], cfg["both_orders"]
    if responses == NOT_SET:
        raise InputError("responses is not set: give responses=FILE, written by gptpl respond")
    if both_orders and other is None:
        raise InputError("both_orders=true needs two answers to swap: give compare=FILE, or leave it out")
    name = "scores.json" if other is None else "comparison.json"
    output = Path(cfg["output"] or Path(responses).with_name(name)).expanduser()
    settings: dict[str, Any] = {
        "judge": instantiate(cfg["judge"]),
        "output": output,
        "progress": partial(tqdm, unit="answer", disable=None, leave=False),
        **{key: cfg[key] for key in ("seed", "bootstrap_samples", "markers")},
    }
    result: Scores | Comparison
    if other is None:
        result = score(responses, **settings)
    else:
        result = compare(responses, other, both_orders=both_orders, **settings)
    files = [str(Path(path).expanduser()) for path in (responses, other) if path is not None]
    print(f"answers     {' against '.join(files)}, {len(result.entries)} entries")
    if result.judge is not None:
        print(f"judge       {result.judge.settings.model} at {result.judge.client.address}")
    print("\n" + "\n".join(result.lines()) + "\n")
    print(f"result      {output}")
    print(f"picture     {output.with_suffix('.png')}")
    result.check_readable()
