"""The commands on a text before training: encode it, show what it holds, make a tokenizer of it."""

from gptpl.cli.arguments import Arguments, checked_output, configured


@configured("data encode")
def data_encode(given: Arguments) -> None:
    """Encode the text of a training run ahead of it, with all cores.

    examples:
      gptpl data encode data=corpus data.path=books              # a folder of text, JSON Lines or Parquet
      gptpl data encode data=corpus data.path='web/*.jsonl.zst' data.field=content   # of many compressed files
      gptpl data encode data=corpus data.path=books data.check_text=true   # has any text changed since?

    Takes the settings of gptpl train, which does the same when it meets a text for the first time. The tokens go
    to GPTPL_CACHE. Stopped at any moment, it continues with the shards that are missing.
    """
    from gptpl.runs.parts import encode, is_gpt, model_config

    data = encode(given.config)
    parameters = None
    if is_gpt(given.config):
        parameters = model_config(given.config, data.tokenizer.vocab_size).n_parameters
    print("\n".join(data.report(parameters=parameters, world_size=1)))


@configured("data show")
def data_show(given: Arguments) -> None:
    """Show what a text holds before training on it, in the terminal and as a web page.

    examples:
      gptpl data show data=text_file data.path=my.txt                # a book; writes data.html
      gptpl data show data=corpus data.path=books sequences=3        # also the first sequences of training
      gptpl data show data=corpus data.path=books sample_bytes=null  # all of it, however large

    Takes the settings of gptpl train. Shows documents, tokens, lengths, scripts, the most frequent tokens,
    duplicates, and odd documents: empty, enormous, binary, not UTF-8, damaged, not JSON. What cannot be read is
    listed and left out. The page needs no network.
    """
    from gptpl.runs.texts import data_report

    cfg = given.config
    page = None if cfg.output is None else checked_output("output", cfg.output, suffix=".html")
    report = data_report(cfg, sequences=cfg.sequences, sample_bytes=cfg.sample_bytes)
    print("\n".join(report.lines()))
    if page is not None:
        report.write(page)
        print(f"\npage  {page}")


@configured("tokenizer train")
def tokenizer_train(given: Arguments) -> None:
    """Make a tokenizer from a text: byte-level byte-pair encoding, as GPT-2's.

    examples:
      gptpl tokenizer train data=corpus data.path=books                    # 8,192 tokens, into tokenizer.json
      gptpl tokenizer train data=text_file data.path=poems.txt tokenizer.vocab_size=512  # a small one
      gptpl tokenizer train data=python_stdlib tokenizer.output=code.json        # another name

    Then: gptpl train tokenizer=file tokenizer.path=tokenizer.json data=corpus data.path=books

    Prints how many bytes of text a token stands for, compared with GPT-2's. Every checkpoint and export carries
    its tokenizer.
    """
    from gptpl.runs.texts import train_tokenizer

    trained = train_tokenizer(given.config)
    trained.tokenizer.save(given.config.tokenizer.output)
    print("\n".join(trained.lines))
    print(given.config.tokenizer.output)
