"""A model of another program as if it were a checkpoint: rebuilt, with its tokenizer and its past."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gptpl.data.tokenizers import GPT2Tokenizer, Tokenizer, tokenizer_from_state
from gptpl.data.tokenizers.hugging_face import is_gpt2_vocabulary
from gptpl.errors import InputError
from gptpl.model import GPTConfig, empty_model
from gptpl.training.checkpoint import LoadedCheckpoint
from gptpl.weights.model_files import ModelFiles, weights_sha256
from gptpl.weights.starting import PublishedWeights
from gptpl.weights.transfer import check_memory, check_tensors, load_tensors


def load_foreign(
    files: ModelFiles,
    *,
    config: GPTConfig | None = None,
    tokenizer: Tokenizer | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    start: Mapping[str, Any] | None = None,
) -> LoadedCheckpoint:
    """The model of the files, in evaluation mode, in that data type.

    `start` is where they come from, if known; `config` and `tokenizer` are for files that say neither.

    Raises InputError for files that are not whole, and where nobody says which model or tokenizer they have.
    """
    if files.config is not None and config is not None:
        raise InputError(f"{files.path} says itself which model it is: leave model= out")
    described = files.config is not None
    config = files.config or config
    if config is None:
        raise InputError(
            f"{files.path} holds weights, but not which model they are of: convert it once, gptpl weights"
            f" convert checkpoint={files.path} model=gpt_124m format=gptpl output=FOLDER, and use that FOLDER"
        )
    try:
        check_tensors(config, files.tensors, files.table)
        tokenizer = tokenizer_of(files, config, tokenizer)
        check_memory(config)
        net = empty_model(config, device=device, dtype=dtype)
        load_tensors(net, files.tensors, files.table)
    except InputError as error:
        raise InputError(_with_remedy_here(str(error), described)) from error
    return LoadedCheckpoint(
        path=files.path,
        net=net.eval(),
        tokenizer=tokenizer,
        run_config={},
        step=files.record.get("lineage", {}).get("step", 0),
        lineage=foreign_lineage(files, start),
    )


def load_published(
    weights: PublishedWeights, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> LoadedCheckpoint:
    """GPT-2 as OpenAI published it, fetched where the cache does not have it."""
    size = weights.size_for(None)
    files = weights.open(size)
    start = weights.origin(size, files)
    return load_foreign(files, device=device, dtype=dtype, start=start)


def _with_remedy_here(said: str, described: bool) -> str:
    """What is wrong, with a remedy for files whose model no setting of the command changes, or only some."""
    fact, _, remedy = said.rpartition(": ")
    if not remedy.startswith("set model."):
        return said
    if described:
        return f"{fact}: restore what describes it, or fetch it anew"
    return said.partition(", or init.")[0]


def foreign_lineage(files: ModelFiles, start: Mapping[str, Any] | None) -> dict[str, Any]:
    """What an export recorded, or else that another program made the files."""
    if "lineage" in files.record:
        return dict(files.record["lineage"])
    found = start or {
        "init": "file",
        "path": str(files.path.absolute()),
        "format": files.table.format,
        "sha256": weights_sha256(files.path),
    }
    return {"step": 0, "tokens_seen": 0, "data": {}, "losses": {}, "start": dict(found)}


def tokenizer_of(files: ModelFiles, config: GPTConfig, given: Tokenizer | None) -> Tokenizer:
    """The tokenizer that the files name, or GPT-2's where nothing speaks against it."""
    if files.record:
        if given is not None:
            raise InputError(f"{files.path} says itself which tokenizer it has: leave tokenizer= out")
        tokenizer = tokenizer_from_state(files.record["tokenizer"])
    elif given is not None:
        tokenizer = given
    else:
        tokenizer = GPT2Tokenizer()
        _check_gpt2(files.path, config)
    if config.vocab_size < tokenizer.vocab_size:
        raise InputError(
            f"{files.path} has {config.vocab_size} tokens, the {tokenizer.name} tokenizer"
            f" {tokenizer.vocab_size}: give the tokenizer that it was trained with"
        )
    return tokenizer


def check_vocabulary(path: Path) -> None:
    """Refuses a model of GPT-2's shape in whose folder the files of another tokenizer are."""
    folder = path if path.is_dir() else path.parent
    if is_gpt2_vocabulary(folder) is False:
        raise InputError(f"{folder} has another tokenizer than GPT-2's: gptpl cannot use its model")


def _check_gpt2(path: Path, config: GPTConfig) -> None:
    check_vocabulary(path)
    padded = -(-GPT2Tokenizer().vocab_size // 128) * 128
    if not GPT2Tokenizer().vocab_size <= config.vocab_size <= padded:
        raise InputError(
            f"{path} has {config.vocab_size} tokens, and GPT-2's tokenizer 50257 (padded: up to {padded}):"
            " gptpl does not know its tokenizer"
        )
