"""Make a tokenizer from a text: byte-level byte-pair encoding, as GPT-2's.

examples:
  gptpl tokenizer train data=corpus data.path=books                    # 8,192 tokens, into tokenizer.json
  gptpl tokenizer train data=text_file data.path=poems.txt tokenizer.vocab_size=512  # a small one
  gptpl tokenizer train data=python_stdlib tokenizer.output=code.json        # another name

Then: gptpl train tokenizer=file tokenizer.path=tokenizer.json data=corpus data.path=books

Prints how many bytes of text a token stands for, compared with GPT-2's. Every checkpoint and export carries
its tokenizer.
"""

from gptpl.cli.arguments import Arguments, configured
from gptpl.runs.tokenizer import train_tokenizer


@configured("tokenizer train")
def run(given: Arguments) -> None:
    """Writes the file, and prints a comparison and its name."""
    trained = train_tokenizer(given.config)
    trained.tokenizer.save(given.config.tokenizer.output)
    print("\n".join(trained.lines))
    print(given.config.tokenizer.output)
