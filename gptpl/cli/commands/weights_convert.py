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

from typing import TYPE_CHECKING, Any

from gptpl.cli.arguments import Arguments, configured
from gptpl.cli.model_input import NOT_SET, given_model, settings_of
from gptpl.config.instantiate import instantiate
from gptpl.errors import InputError
from gptpl.tokenizers import GPT2Tokenizer, Tokenizer

if TYPE_CHECKING:
    from gptpl.checkpoints.loading import LoadedCheckpoint, LoadedClassifier


@configured("weights convert")
def run(given: Arguments) -> None:
    """Writes the folder and prints its name."""
    from gptpl.runs.export import check_export, export

    cfg = settings_of(given)
    for key in ("format", "output"):
        if cfg[key] == NOT_SET:
            raise InputError(f"{key} is not set: give {key}=VALUE; see gptpl weights convert --help")
    check_export(cfg["format"], cfg["output"], dtype=cfg["dtype"])  # before a model is read
    if cfg["format"] == "adapter" and any(cfg.get(key) for key in ("model", "tokenizer", "init")):
        raise InputError("format=adapter keeps what the run has: leave model=, tokenizer= and init= out")
    print(export(_loaded(cfg), cfg["format"], cfg["output"], dtype=cfg["dtype"], verify=cfg["verify"]))


def _loaded(cfg: dict[str, Any]) -> "LoadedCheckpoint | LoadedClassifier":
    from gptpl.model import GPTConfig
    from gptpl.runs.loaded import load_classifier, load_language_model, names_classifier

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
