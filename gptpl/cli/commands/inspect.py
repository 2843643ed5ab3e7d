"""Show the loss of a trained model on each token of a text, as a web page.

examples:
  gptpl inspect checkpoint=RUN text='Every effort moves you'          # writes surprisal.html
  gptpl inspect checkpoint=RUN text_file=my.txt output=my.html        # a whole file
  echo 'Every effort' | gptpl inspect checkpoint=RUN alternatives=10  # a piped text

Prints loss and perplexity. The page colours each token by its loss and lists the most likely alternatives;
it needs no network.
"""

import math
from functools import partial
from pathlib import Path

from tqdm import tqdm

from gptpl.cli.arguments import Arguments, configured
from gptpl.cli.model_input import given_model, given_text, settings_of
from gptpl.errors import InputError
from gptpl.files.durable import write_atomically


@configured("inspect")
def run(given: Arguments) -> None:
    """Writes the page, prints loss and perplexity."""
    from gptpl.model.protocol import context_length
    from gptpl.runs.loaded import load_language_model

    cfg = settings_of(given)
    output = Path(cfg["output"]).expanduser()
    if output.is_dir() or not output.parent.is_dir():
        raise InputError(f"output={cfg['output']} must be a file in a folder that exists")
    text = given_text(cfg["text"], cfg["text_file"], key="text")
    if not text:
        origin = "" if cfg["text_file"] is None else f" of text_file={cfg['text_file']}"
        wrong = "text is not set" if text is None else f"the text{origin} is empty"
        raise InputError(f"{wrong}: give text='...', text_file=FILE, or pipe one in")
    model = load_language_model(**given_model(cfg))
    total = len(model.tokenizer.encode(text))
    progress = partial(tqdm, total=total, unit="token", desc="reading", disable=None)
    inspected = model.inspect(text, alternatives=cfg["alternatives"], progress=progress)
    write_atomically(output, inspected.page(facts={"checkpoint": str(model.path), "step": f"{model.step:,}"}))
    T = context_length(model.net)
    print(f"tokens      {len(inspected.tokens):,}")
    print(
        f"scored      every token once, from all tokens before it, in a long text from the last {T // 2:,} to"
        f" {T:,} (more context than gptpl evaluate gives)"
    )
    print(f"loss        {inspected.loss:.4f} nats per token")
    print(f"perplexity  {inspected.perplexity:.2f}" if inspected.perplexity < math.inf else "perplexity  inf")
    print(f"page        {output}")
