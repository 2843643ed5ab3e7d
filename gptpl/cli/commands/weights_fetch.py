"""Download GPT-2 ahead of time, to use it without a network.

examples:
  gptpl weights fetch                                          # 124M from the Hugging Face hub
  gptpl weights fetch size=355M source=openai                  # OpenAI's TensorFlow files
  gptpl weights fetch size=1558M mirror=https://hf-mirror.com  # from another server

Prints the folder, in GPTPL_CACHE or your cache folder. Downloads resume, and their hashes are checked.
"""

from gptpl.cli.arguments import Arguments, configured


@configured("weights fetch")
def run(given: Arguments) -> None:
    """Downloads, and prints the folder."""
    from gptpl.weights.published import checked_size, checked_source, fetch

    cfg = given.config
    print(fetch(checked_size(cfg.size), checked_source(cfg.source), mirror=cfg.mirror))
