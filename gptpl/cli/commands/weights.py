"""The commands on weights: download, list, convert and describe them."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptpl.cli.arguments import Arguments, configured
from gptpl.errors import InputError
from gptpl.text import table

if TYPE_CHECKING:
    from gptpl.checkpoints.loading import LoadedCheckpoint, LoadedClassifier
    from gptpl.tokenizers import Tokenizer


@configured("weights fetch")
def weights_fetch(given: Arguments) -> None:
    """Download GPT-2 ahead of time, to use it without a network.

    examples:
      gptpl weights fetch                                          # 124M from the Hugging Face hub
      gptpl weights fetch size=355M source=openai                  # OpenAI's TensorFlow files
      gptpl weights fetch size=1558M mirror=https://hf-mirror.com  # from another server

    Prints the folder, in GPTPL_CACHE or your cache folder. Downloads resume, and their hashes are checked.
    """
    from gptpl.weights.published import checked_size, checked_source, fetch

    cfg = given.config
    print(fetch(checked_size(cfg.size), checked_source(cfg.source), mirror=cfg.mirror))


def weights_list(arguments: list[str]) -> int:
    """List the GPT-2 weights in the cache.

    usage: gptpl weights list

    examples:
      gptpl weights list                          # sizes, sources, bytes, folders
      gptpl weights list | grep complete          # what can be used without a network
      GPTPL_CACHE=/data/cache gptpl weights list  # in another cache folder

    For each size and source: whether all files are there, how many bytes, and the folder.
    """
    from gptpl.weights.published import SERVERS, SIZES, cached_bytes, weights_folder

    if arguments:
        raise InputError(f"gptpl weights list has no settings: leave {arguments[0]} out")
    rows = [["size", "source", "in the cache", "bytes", "folder"]]
    for source in SERVERS:
        for size in SIZES.values():
            found, complete = cached_bytes(size, source)
            state = "complete" if complete else "in part" if found else "-"
            folder = str(weights_folder(size, source)) if found else ""
            rows.append([size.name, source, state, f"{found:,}", folder])
    print("\n".join(table(rows, right=[3])))
    return 0


@configured("weights convert")
def weights_convert(given: Arguments) -> None:
    """Convert a model to or from another program's format.

    examples:
      gptpl weights convert checkpoint=RUN format=hf output=my-model            # for transformers
      gptpl weights convert checkpoint=RUN format=book output=my-model          # for the book's code
      gptpl weights convert init=gpt2_hf format=nanogpt output=gpt2             # GPT-2 for nanoGPT
      gptpl weights convert checkpoint=RUN format=gguf dtype=q8_0 output=small  # for llama.cpp; or float16
      gptpl weights convert checkpoint=RUN format=adapter output=my-adapter     # what tune=lora learned, for PEFT
      gptpl weights convert checkpoint=model.pth model=gpt_124m format=gptpl output=mine  # from the book's file

    Writes the folder output= with a model card, and prints its name. Before the folder appears, the new files are
    read again and their logits compared.
    """
    from gptpl.cli.model_input import NOT_SET, settings_of
    from gptpl.runs.export import check_export, export

    cfg = settings_of(given)
    for key in ("format", "output"):
        if cfg[key] == NOT_SET:
            raise InputError(f"{key} is not set: give {key}=VALUE; see gptpl weights convert --help")
    check_export(cfg["format"], cfg["output"], dtype=cfg["dtype"])  # before a model is read
    if cfg["format"] == "adapter" and any(cfg.get(key) for key in ("model", "tokenizer", "init")):
        raise InputError("format=adapter keeps what the run has: leave model=, tokenizer= and init= out")
    print(export(_loaded(cfg), cfg["format"], cfg["output"], dtype=cfg["dtype"], verify=cfg["verify"]))


@configured("card")
def card(given: Arguments) -> None:
    """Write the model card of a run: its past, what was measured of it, what it is for.

    examples:
      gptpl card checkpoint=RUN                                  # RUN/model_card.md
      gptpl card checkpoint=RUN intended_use='Teaching only.' licence='CC BY 4.0'  # in your own words
      gptpl card checkpoint=RUN output=README.md                 # another file

    Measure first, the figures come from the run's folder: gptpl evaluate checkpoint=RUN suite=core, and suite=bias.
    """
    from gptpl.cli.model_input import settings_of
    from gptpl.runs.export import CARD, write_card

    cfg = settings_of(given)
    loaded = _loaded(cfg)
    run_dir = getattr(loaded, "run_dir", None)
    output = (run_dir or Path()) / CARD if cfg["output"] is None else Path(cfg["output"])
    print(write_card(loaded, output, intended_use=cfg["intended_use"], licence=cfg["licence"]))


def _loaded(cfg: dict[str, Any]) -> "LoadedCheckpoint | LoadedClassifier":
    from gptpl.cli.model_input import given_model
    from gptpl.config.instantiate import instantiate
    from gptpl.model import GPTConfig
    from gptpl.runs.loaded import load_classifier, load_language_model, names_classifier
    from gptpl.tokenizers import GPT2Tokenizer

    given, node, fields = given_model(cfg), cfg.get("tokenizer"), cfg.get("model")
    if names_classifier(given["source"]):
        if fields or node:
            raise InputError(
                f"checkpoint={cfg['checkpoint']} describes its model: leave model= and tokenizer= out"
            )
        return load_classifier(**given)
    # For files that do not describe their model.
    tokenizer: Tokenizer | None = None if node is None else instantiate({"_target_": node["_target_"]})
    config = None
    if fields is not None:
        vocab_size = fields.get("vocab_size") or (tokenizer or GPT2Tokenizer()).vocab_size
        config = GPTConfig(**{**fields, "vocab_size": vocab_size})
    return load_language_model(**given, config=config, tokenizer=tokenizer)
