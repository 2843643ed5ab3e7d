"""From a composed config to the data: tokenizer, windows, and the vocabulary that the model takes."""

from omegaconf import DictConfig

from gptpl.cli.batch import AUTO, whole_batch_size
from gptpl.cli.hydra_app import instantiate
from gptpl.cli.resume import Resumption
from gptpl.data.datamodule import TextDataModule
from gptpl.data.tokenizers import Tokenizer
from gptpl.errors import InputError
from gptpl.model import GPTConfig


def build_datamodule(cfg: DictConfig, *, resume: Resumption | None = None) -> TextDataModule:
    """The data of `cfg.data` under `cfg.tokenizer`, encoded or opened from the cache.

    Of a run that is resumed it must be the same text.
    """
    if cfg.data.max_length is None:
        cfg.data.max_length = cfg.model.context_length
    if cfg.data.stride is None:
        cfg.data.stride = cfg.data.max_length
    if cfg.data.max_length > cfg.model.context_length:
        raise InputError(
            f"data.max_length={cfg.data.max_length} is longer than model.context_length="
            f"{cfg.model.context_length}: set data.max_length={cfg.model.context_length} or a larger context"
        )
    datamodule = TextDataModule(
        corpus=instantiate(cfg.data.corpus),
        tokenizer=build_tokenizer(cfg.tokenizer),
        max_length=cfg.data.max_length,
        stride=cfg.data.stride,
        batch_size=1 if cfg.data.batch_size == AUTO else whole_batch_size(cfg.data.batch_size),
        train_ratio=cfg.data.train_ratio,
        seed=cfg.seed,
        num_workers=cfg.data.num_workers,
        pin_memory=cfg.data.pin_memory,
        persistent_workers=cfg.data.persistent_workers,
        eval_train_batches=cfg.eval_train_batches,
        eval_val_batches=cfg.eval_val_batches,
    )
    if resume is not None:
        resume.check_text(datamodule.corpus.content_sha256())
    datamodule.load()
    datamodule.setup()
    return datamodule


def build_tokenizer(node: DictConfig) -> Tokenizer:
    """The tokenizer; `vocab_size` in its YAML is there for the model's, and checked here."""
    target = {key: value for key, value in node.items() if key != "vocab_size"}
    tokenizer: Tokenizer = instantiate(target)
    if node.vocab_size is not None and node.vocab_size != tokenizer.vocab_size:
        raise InputError(
            f"tokenizer.vocab_size={node.vocab_size}, but the {tokenizer.name} tokenizer has"
            f" {tokenizer.vocab_size} tokens: leave tokenizer.vocab_size as it is"
        )
    return tokenizer


def build_model_config(cfg: DictConfig, datamodule: TextDataModule) -> GPTConfig:
    """The model's configuration, its vocabulary taken from the tokenizer unless the config gives one."""
    tokenizer = datamodule.tokenizer
    known = tokenizer.vocab_size
    fields = {**cfg.model, "vocab_size": known if cfg.model.vocab_size is None else cfg.model.vocab_size}
    config = GPTConfig(**fields)
    if config.vocab_size < known:
        raise InputError(
            f"model.vocab_size={config.vocab_size} is smaller than the {tokenizer.name} tokenizer's"
            f" {known} tokens: leave model.vocab_size out, or set it to {known} or more"
        )
    return config
