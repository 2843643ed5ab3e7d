"""Encode the text of a training run ahead of it, with all cores.

examples:
  gptpl data encode data=corpus data.path=books              # a folder of text, JSON Lines or Parquet
  gptpl data encode data=corpus data.path='web/*.jsonl.zst' data.field=content   # of many compressed files
  gptpl data encode data=corpus data.path=books data.check_text=true   # has any text changed since?

Takes the settings of gptpl train, which does the same when it meets a text for the first time. The tokens go
to GPTPL_CACHE. Stopped at any moment, it continues with the shards that are missing.
"""

from gptpl.cli.arguments import Arguments, configured
from gptpl.runs.parts import encode, is_gpt, model_config


@configured("data encode")
def run(given: Arguments) -> None:
    """Encodes the text and prints the report on it."""
    data = encode(given.config)
    parameters = None
    if is_gpt(given.config):
        parameters = model_config(given.config, data.tokenizer.vocab_size).n_parameters
    print("\n".join(data.report(parameters=parameters, world_size=1)))
