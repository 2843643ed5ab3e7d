"""The text that a model was trained on, found again without believing what its checkpoint says of it."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path

from gptpl.checkpoints.loading import LoadedCheckpoint
from gptpl.data.pretraining.encoding import cached_corpus, encode_corpus, encode_in_memory
from gptpl.data.pretraining.token_cache import EncodedCorpus
from gptpl.data.sources import Corpus, PythonStdlib, Tale
from gptpl.errors import InputError

log = logging.getLogger(__name__)

_USUAL_RATIO = 0.9


def training_corpus(
    loaded: LoadedCheckpoint,
    corpus: Corpus | None = None,
    *,
    train_ratio: float | None = None,
    cache_dir: Path | None = None,
) -> EncodedCorpus:
    """The text of a model's training in its own tokens, split as it was; `train` is what it has learned.

    A checkpoint may come from anywhere: nothing is fetched, opened or written because it names it. Its text
    is known by the SHA-256 that it records, and taken from the cache of encoded texts, or made of the text
    that ships with gptpl or the running Python's own source where it is that. Any other the caller names as
    `corpus`, with a `train_ratio` if it is not the recorded one, or 0.9.

    Raises InputError where the recorded text is not at hand, and what `encode_corpus` raises.
    """
    sha256, ratio = _recorded(loaded)
    if corpus is not None:
        if sha256 is not None and corpus.content_sha256() != sha256:
            log.warning("%s is not the text that %s was trained on (SHA-256)", corpus.name, loaded.path)
        chosen = train_ratio or ratio or _USUAL_RATIO
        return encode_corpus(corpus, loaded.tokenizer, train_ratio=chosen, cache_dir=cache_dir)
    ratio = train_ratio or ratio
    if sha256 is not None and ratio is not None:
        found = cached_corpus(sha256, loaded.tokenizer, train_ratio=ratio, cache_dir=cache_dir)
        if found is not None:
            return found
        for bundled in (Tale(), PythonStdlib()):
            if bundled.content_sha256() == sha256:
                return encode_in_memory(bundled, loaded.tokenizer, train_ratio=ratio)
    known = f"SHA-256 {sha256[:12]}" if sha256 else "whose SHA-256 it does not record"
    raise InputError(
        f"the text that {loaded.path} was trained on ({known}) is not in this machine's cache of encoded"
        " texts: name it, training_text=FILE (in Python corpus=TextFiles(FILE)), or leave"
        " memorisation out"
    )


def _recorded(loaded: LoadedCheckpoint) -> tuple[str | None, float | None]:
    """Hash of the text, and the share that was trained on; None for what is not there, or makes no sense."""
    data = loaded.lineage.get("data")
    sha256 = data.get("sha256") if isinstance(data, Mapping) else None
    settings = loaded.run_config.get("data")
    ratio = settings.get("train_ratio") if isinstance(settings, Mapping) else None
    return (
        sha256 if isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256) else None,
        ratio if isinstance(ratio, float) and 0 < ratio < 1 else None,
    )
