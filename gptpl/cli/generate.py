"""`gptpl generate`: a prompt continued by a trained model, to standard output."""

import io
import logging
import sys

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from gptpl.cli.console import RunLog
from gptpl.cli.hydra_app import run_under_hydra
from gptpl.cli.run_folder import checkpoint_file
from gptpl.cli.trainer import check_seed, device_type
from gptpl.errors import InputError
from gptpl.generation import generate
from gptpl.training.checkpoint import LoadedCheckpoint, load_model

log = logging.getLogger(__name__)


def run(arguments: list[str]) -> int:
    """Prints the prompt and its continuation; everything else goes to standard error."""
    run_under_hydra("generate", arguments, _generate)
    return 0


def loaded_checkpoint(cfg: DictConfig) -> LoadedCheckpoint:
    """The model named by `checkpoint=`, on the device named by `device=`."""
    if OmegaConf.is_missing(cfg, "checkpoint"):
        raise InputError("checkpoint is not set: give checkpoint=RUN_FOLDER or checkpoint=FILE.ckpt")
    loaded = load_model(checkpoint_file(cfg.checkpoint), device=device_type(cfg.device, key="device"))
    log.info("checkpoint: %s, step %d", loaded.path, loaded.step)
    return loaded


def _generate(cfg: DictConfig) -> None:
    run_log = RunLog()
    try:
        if cfg.seed is not None:
            check_seed(cfg.seed)
        text = _continued(loaded_checkpoint(cfg), cfg)
        if isinstance(sys.stdout, io.TextIOWrapper):
            # A terminal that lacks a character shows a question mark: better than no text at all.
            sys.stdout.reconfigure(errors="replace")
        print(text)
    finally:
        run_log.close()


def _continued(loaded: LoadedCheckpoint, cfg: DictConfig) -> str:
    """The prompt and its continuation, without the end-of-text token that may end it."""
    net, tokenizer = loaded.net, loaded.tokenizer
    prompt = "???" if OmegaConf.is_missing(cfg, "prompt") else cfg.prompt  # OmegaConf's own "not set"
    ids = tokenizer.encode(prompt)
    if len(ids) == 0:
        raise InputError(f"prompt={prompt!r} holds no token: give at least one word to continue")
    device = next(net.parameters()).device
    generator = torch.Generator(device)
    # torch starts every generator at the same seed: without one of the user's, take one from the system.
    generator.seed() if cfg.seed is None else generator.manual_seed(cfg.seed)
    tokens = generate(
        net,
        torch.from_numpy(ids.astype(np.int64))[None].to(device),  # (1, T)
        max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature,
        top_k=_top_k(cfg.top_k, net.config.vocab_size),
        eot_id=tokenizer.eot_id,
        generator=generator,
    )
    continuation = tokens[0, len(ids) :].tolist()
    end = continuation.index(tokenizer.eot_id) if tokenizer.eot_id in continuation else len(continuation)
    return tokenizer.decode([*ids.tolist(), *continuation[:end]])


def _top_k(asked: int | None, vocab_size: int) -> int | None:
    """The top_k to sample with: the 40 most likely of 20 words are all of them, which is said."""
    if asked is None or asked <= vocab_size:
        return asked
    log.info("top_k=%d exceeds the vocabulary of %d tokens: sampling from all of them", asked, vocab_size)
    return None
