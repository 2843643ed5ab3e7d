"""`gptpl weights convert`: a model into another program's format, or from it into gptpl's."""

import json
import logging
import shutil
import tempfile
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from gptpl.cli.adapter_convert import convert_to_adapter
from gptpl.cli.classifier_convert import convert_classifier
from gptpl.cli.classifier_input import names_classifier
from gptpl.cli.console import RunLog
from gptpl.cli.hydra_app import instantiate, run_under_hydra
from gptpl.cli.model_card import model_card
from gptpl.cli.model_input import loaded_checkpoint
from gptpl.data.tokenizers import GPT2Tokenizer, Tokenizer
from gptpl.data.tokenizers.gpt2 import vocabulary_files
from gptpl.data.tokenizers.hugging_face import write_tokenizer
from gptpl.errors import InputError
from gptpl.files.sharing import share
from gptpl.model import GPTConfig, GPTModel
from gptpl.training.checkpoint import LoadedCheckpoint, load_model
from gptpl.training.checkpoint_files import EXPORTED
from gptpl.training.exported_checkpoint import write_model
from gptpl.training.foreign_checkpoint import load_foreign
from gptpl.weights.adapter import FORMAT as ADAPTER
from gptpl.weights.comparison import compare_logits, prompt_logits
from gptpl.weights.formats import FORMATS, open_model
from gptpl.weights.model_files import RECORD_FILE, record_of
from gptpl.weights.sources import DTYPES

log = logging.getLogger(__name__)

OWN = "gptpl"


def run(arguments: list[str]) -> int:
    """Writes the folder and prints its name; returns the exit status."""
    run_under_hydra("weights_convert", arguments, _convert)
    return 0


def _convert(cfg: DictConfig) -> None:
    with RunLog():
        dtype = _checked(cfg)
        output = Path(cfg.output).expanduser()
        # Beside its place, so that a folder that is there is whole.
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.absolute().parent))
        try:
            if cfg.format == ADAPTER:
                convert_to_adapter(cfg, temporary, shown_as=output.name)
            elif names_classifier(cfg):
                convert_classifier(cfg, temporary, shown_as=output.name)
            else:
                _convert_model(cfg, temporary, dtype, shown_as=output.name)
            share(temporary)
            _move(temporary, output)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        print(output)


def _convert_model(cfg: DictConfig, folder: Path, dtype: torch.dtype | None, *, shown_as: str) -> None:
    config, tokenizer = _given_model(cfg)
    loaded = loaded_checkpoint(cfg, config=config, tokenizer=tokenizer)
    if dtype is not None:
        _cast(loaded.net, dtype)
    _write(cfg.format, loaded, folder, shown_as=shown_as)
    if cfg.verify:
        _verify(cfg.format, loaded, folder)


def _move(temporary: Path, output: Path) -> None:
    try:
        temporary.rename(output)
    except OSError as error:
        if not output.exists():
            raise
        raise InputError(f"output={output} came into being meanwhile: give another folder") from error


def _checked(cfg: DictConfig) -> torch.dtype | None:
    """The data type asked for, after all settings that need no model to be judged."""
    for key in ("format", "output"):
        if OmegaConf.is_missing(cfg, key):
            raise InputError(f"{key} is not set: give {key}=VALUE; see gptpl weights convert --help")
    known = (*FORMATS, OWN, ADAPTER)
    if cfg.format not in known:
        raise InputError(f"format={cfg.format} is unknown: choose one of {', '.join(known)}")
    if cfg.format == ADAPTER and (cfg.dtype or cfg.model or cfg.tokenizer or cfg.init):
        raise InputError(
            "format=adapter keeps what the run has: leave dtype=, model=, tokenizer= and init= out"
        )
    allowed = FORMATS[cfg.format].dtypes if cfg.format in FORMATS else DTYPES
    if cfg.dtype is not None and cfg.dtype not in allowed:
        raise InputError(f"dtype={cfg.dtype}: format={cfg.format} has {', '.join(allowed)} only, give one")
    output = Path(cfg.output).expanduser()
    if output.exists():
        raise InputError(f"output={cfg.output} is there already: give a folder that is not, or remove it")
    if not output.absolute().parent.is_dir():
        raise InputError(
            f"output={cfg.output} cannot be made: its parent folder does not exist, make it first"
        )
    return None if cfg.dtype is None else DTYPES[cfg.dtype]


def _given_model(cfg: DictConfig) -> tuple[GPTConfig | None, Tokenizer | None]:
    """What the user says of files that do not say it themselves."""
    tokenizer: Tokenizer | None = None
    if cfg.tokenizer is not None:
        tokenizer = instantiate({"_target_": cfg.tokenizer._target_})
    if cfg.model is None:
        return None, tokenizer
    fields = OmegaConf.to_container(cfg.model, resolve=False)
    assert isinstance(fields, dict)
    if not isinstance(fields["vocab_size"], int):  # the tokenizer's
        fields["vocab_size"] = (tokenizer or GPT2Tokenizer()).vocab_size
    return GPTConfig(**{str(name): value for name, value in fields.items()}), tokenizer


def _cast(net: GPTModel, dtype: torch.dtype) -> None:
    """Raises InputError where a weight is too large for the data type."""
    net.to(dtype)
    for name, parameter in net.named_parameters():
        if not torch.isfinite(parameter).all():
            word = str(dtype).removeprefix("torch.")
            raise InputError(f"dtype={word} cannot hold the weights of {name}: use bfloat16 or float32")


def _write(name: str, loaded: LoadedCheckpoint, folder: Path, *, shown_as: str) -> None:
    """All files of an export."""
    config, tokenizer = loaded.net.config, loaded.tokenizer
    if name == OWN:
        write_model(loaded, folder / EXPORTED)
    else:
        FORMATS[name].write(loaded.net, folder, dtype=None, eot_id=tokenizer.eot_id)
        record = record_of(folder, config, tokenizer.state(), loaded.lineage)
        (folder / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if name == "hf":
        write_tokenizer(tokenizer, folder, context_length=config.context_length)
    if name == "openai-tf" and isinstance(tokenizer, GPT2Tokenizer):
        for file, path in vocabulary_files().items():
            shutil.copyfile(path, folder / file)
    (folder / "README.md").write_text(model_card(loaded, name, shown_as=shown_as), encoding="utf-8")


def _verify(name: str, loaded: LoadedCheckpoint, folder: Path) -> None:
    """Reads what was written, and compares the logits of a fixed prompt."""
    before = prompt_logits(loaded.net)
    dtype = next(loaded.net.parameters()).dtype
    again = load_model(folder / EXPORTED) if name == OWN else load_foreign(open_model(folder), dtype=dtype)
    difference = compare_logits(before, prompt_logits(again.net.to(dtype)), name=name)
    log.info("verified: the logits of %d tokens differ by %.1e at most", before.shape[1], difference)
