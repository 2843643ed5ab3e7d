"""What training can start from besides a run: random weights, published GPT-2, other programs' files."""

# D model, V vocabulary

import logging
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gptpl.errors import InputError
from gptpl.model import GPTConfig, GPTModel, empty_model
from gptpl.model.protocol import class_path
from gptpl.settings import POSITIVE, SIZE, check_limits
from gptpl.weights.formats import open_model
from gptpl.weights.model_files import ModelFiles, weights_sha256
from gptpl.weights.published import SIZES, Size, checked_size, checked_source, fetch, fetched_sha256
from gptpl.weights.transfer import CROPS, check_fits, check_memory, load_tensors

log = logging.getLogger(__name__)


class StartingWeights(ABC):
    """The first weights of a model; where they come from is returned as plain data, for records."""

    pretrained: ClassVar[bool] = True
    """Whether they have been trained: then a task may train only a part of them by default."""
    reads_text: ClassVar[bool] = False
    """Whether they need `read_text`, and with it plain text as the training data."""

    @property
    def crop(self) -> set[str]:
        """The sizes that the model may have smaller, by what weights have of the settings in `CROPS`."""
        return {size for size, setting in CROPS.items() if getattr(self, setting, False)}

    @abstractmethod
    def check(self, config: GPTConfig, tokenizer: Mapping[str, Any]) -> None:
        """Raise InputError if the weights do not fit the model or, by its `state`, the tokenizer.

        Nothing is fetched, and of local files only what they say about themselves is read.
        """

    def read_text(self, tokens: NDArray[np.integer[Any]]) -> None:  # noqa: B027  # most need none
        """Take in the tokens of the training text (N,); called before the model is made, in pretraining.

        Where they are in many files they are not an array, but have a length and slices, and become one.
        """

    @abstractmethod
    def load_into(self, net: GPTModel) -> dict[str, Any]:
        """Fill a model in which nothing was drawn; returns where the weights come from.

        Raises InputError for files that are damaged or cannot be fetched.
        """

    def make_model(self, config: GPTConfig) -> tuple[GPTModel, dict[str, Any]]:
        """The model with these weights, on the CPU, and where they come from; errors as `load_into`."""
        check_memory(config)
        net = empty_model(config)
        return net, self.load_into(net)

    def fill(
        self, net: nn.Module, built_from: Mapping[str, Any], tokenizer: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Fill a model that is not a `GPTModel`; returns where the weights come from.

        `net` has the weights that its class draws, `built_from` is its `_target_` and keywords, `tokenizer`
        the `state` of its tokenizer. Raises InputError for weights of another model, as most are.
        """
        raise InputError(
            f"init= names weights of GPT-2, this model is a {class_path(net)}: use init=random, or init=run"
            " with a run of the same model"
        )


class RandomWeights(StartingWeights):
    """Weights drawn as `GPTConfig.init` says, from torch's global generator."""

    pretrained: ClassVar[bool] = False
    name: ClassVar[str] = "random"
    """The choice of conf/init."""

    def check(self, config: GPTConfig, tokenizer: Mapping[str, Any]) -> None:
        """Random weights fit every model."""

    def load_into(self, net: nn.Module) -> dict[str, Any]:
        """Leave the weights as the model's class drew them."""
        return {"init": self.name}

    def make_model(self, config: GPTConfig) -> tuple[GPTModel, dict[str, Any]]:
        """See `StartingWeights`."""
        check_memory(config)
        net = GPTModel(config)
        return net, self.load_into(net)

    def fill(
        self, net: nn.Module, built_from: Mapping[str, Any], tokenizer: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See `load_into`."""
        return self.load_into(net)


@dataclass(kw_only=True)
class CooccurrenceWeights(RandomWeights):
    """Random weights, with token embeddings initialised from co-occurrence counts of the training text.

    A token's row has the direction of its `cooccurrence_vectors`, in an untied head too. Tokens without
    neighbours that are more frequent than by chance keep their random rows. For a short training, which sees
    most tokens only a few times (experiments/fast_recipe). The bits depend on the CPU and its threads.

    Args:
        std: the root mean square of a row's numbers.
        window: pairs at most this many tokens apart are counted.
        counted_tokens: at most so many tokens are counted, from 64 parts spread evenly over a longer text.
            Counting takes about half a second and 50 MB for a million, in every process of a run.

    Raises InputError for numbers out of range.
    """

    name = "cooccurrence"
    reads_text = True
    std: Annotated[float, POSITIVE] = 0.1
    window: Annotated[int, SIZE] = 4
    counted_tokens: Annotated[int, SIZE] = 20_000_000

    def __post_init__(self) -> None:
        check_limits(type(self), "init.", **asdict(self))
        self._tokens: NDArray[np.int64] | None = None

    def check(self, config: GPTConfig, tokenizer: Mapping[str, Any]) -> None:
        """See `StartingWeights`: next to positions drawn from N(0, 1) the embeddings would be lost."""
        if config.init != "gpt2":
            raise InputError(
                f"init=cooccurrence needs model.init=gpt2, got {config.init}: set it, or use init=random"
            )

    def read_text(self, tokens: NDArray[np.integer[Any]]) -> None:
        """See `StartingWeights`."""
        most = self.counted_tokens
        if len(tokens) > most:
            log.info("init=cooccurrence counts %s of %s tokens", f"{most:,}", f"{len(tokens):,}")
        self._tokens = evenly_spread(tokens, most).astype(np.int64)

    def load_into(self, net: nn.Module) -> dict[str, Any]:
        """See `StartingWeights`. Raises InputError without a text, and for a model that is not a GPTModel."""
        if not isinstance(net, GPTModel):
            raise InputError(f"init=cooccurrence is for a GPTModel, not {class_path(net)}: use init=random")
        self.check(net.config, {})
        if self._tokens is None:
            raise InputError("init=cooccurrence has read no text: call read_text first, or use init=random")
        started = time.perf_counter()
        V, D = net.tok_emb.weight.shape
        vectors = cooccurrence_vectors(self._tokens, vocab_size=V, size=D, window=self.window)
        counted = vectors.any(dim=1)  # (V,)
        rows = torch.nn.functional.normalize(vectors[counted]) * self.std * D**0.5
        with torch.no_grad():
            net.tok_emb.weight[counted] = rows
            net.out_head.weight[counted] = rows  # the same parameter if tied
        log.info(
            "init=cooccurrence: embeddings of %s tokens from counts of %s, %s random, in %.1f s",
            f"{len(rows):,}", f"{len(self._tokens):,}", f"{V - len(rows):,}", time.perf_counter() - started,
        )  # fmt: skip
        return {"init": self.name, **asdict(self)}


_PARTS = 64
"""Parts of a long text that are counted."""
_SMOOTHING = 0.75
"""Exponent of the frequencies of neighbours: rare ones would be too informative (Levy et al. 2015)."""
_MORE_COLUMNS, _ITERATIONS = 32, 4
"""Of the randomised factorisation: columns more than are kept, and products (Halko et al. 2011)."""
_ROUNDING = 1e-4
"""A vector this much shorter than the longest is rounding error."""


def evenly_spread(tokens: NDArray[Any], most: int) -> NDArray[Any]:
    """At most so many tokens, from up to 64 parts spread evenly over a longer text."""
    if len(tokens) <= most:
        return np.asarray(tokens)
    parts = min(_PARTS, most)
    starts = np.linspace(0, len(tokens), parts, endpoint=False).astype(int)
    return np.concatenate([tokens[start : start + most // parts] for start in starts])


def cooccurrence_vectors(tokens: NDArray[np.int64], *, vocab_size: int, size: int, window: int) -> Tensor:
    """Vectors (V, `size`) of tokens (N,) whose dot products approximate how much more often two co-occur.

    A pair d tokens apart, d up to `window`, counts 1/d. The matrix of positive pointwise mutual information
    (PPMI) is factorised into U sqrt(S), without the signs of S, as in Levy & Goldberg 2014. Vectors of tokens
    without positive information are 0, and so are columns beyond the vocabulary. torch's global random number
    generator is not used.
    """
    V = vocab_size
    pairs, counts = [], []
    for distance in range(1, window + 1):
        found, times = np.unique(tokens[:-distance] * V + tokens[distance:], return_counts=True)
        pairs.append(found)
        counts.append(times / distance)
    left, right = np.divmod(np.concatenate(pairs), V)
    places = torch.from_numpy(np.stack([np.append(left, right), np.append(right, left)]))  # either way around
    together = torch.from_numpy(np.concatenate(counts * 2))  # float64
    table = torch.sparse_coo_tensor(places, together, (V, V), check_invariants=False).coalesce()
    (row, column), together = table.indices(), table.values()
    alone = torch.zeros(V, dtype=torch.float64).index_add_(0, row, together)
    smoothed = alone.pow(_SMOOTHING) / alone.pow(_SMOOTHING).sum()
    # The smoothing is that of the neighbour: the mean of both ways around makes the matrix symmetric.
    pmi = torch.log(together) - (alone[row] * smoothed[column] * alone[column] * smoothed[row]).log() / 2
    positive = pmi > 0
    ppmi = torch.sparse_coo_tensor(
        table.indices()[:, positive], pmi[positive].float(), (V, V), check_invariants=False
    )
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # torch calls the format a beta
        ppmi = ppmi.to_sparse_csr()
    k = min(size, V)
    basis = torch.randn(V, min(V, k + _MORE_COLUMNS), generator=torch.Generator().manual_seed(0))
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(ppmi @ basis).Q
    values, vectors = torch.linalg.eigh(basis.t() @ (ppmi @ basis))
    largest = values.abs().argsort(descending=True)[:k]
    factors = (basis @ vectors[:, largest]) * values[largest].abs().sqrt()
    lengths = factors.norm(dim=1)
    factors[lengths <= _ROUNDING * lengths.max()] = 0
    return torch.nn.functional.pad(factors, (0, size - k))


@dataclass(frozen=True, kw_only=True)
class PublishedWeights(StartingWeights):
    """GPT-2 as OpenAI published it.

    Args:
        source: "hf", the Hugging Face hub, or "openai", OpenAI's own TensorFlow checkpoints.
        size: one of SIZES; None: the one with the model's shape.
        path: a folder with the files, instead of the cache and the network.
        mirror: an address in place of the source's server; None: the environment's GPTPL_MIRROR.
        crop_context: whether the model's context may be shorter.
    """

    source: str
    size: str | None = None
    path: str | None = None
    mirror: str | None = None
    crop_context: bool = False

    def __post_init__(self) -> None:
        checked_source(self.source)
        if self.size is not None:
            checked_size(self.size)

    @property
    def name(self) -> str:
        """The choice of conf/init."""
        return f"gpt2_{self.source}"

    def size_for(self, config: GPTConfig | None) -> Size:
        """The size asked for, or else of this shape, or 124M. Raises InputError if there is none."""
        if self.size is not None:
            return checked_size(self.size)
        if config is None:
            return SIZES["124M"]
        for size in SIZES.values():
            if (size.emb_dim, size.n_layers) == (config.emb_dim, config.n_layers):
                return size
        choices = ", ".join(size.choice for size in SIZES.values())
        raise InputError(
            f"init={self.name} has no weights for emb_dim={config.emb_dim} with n_layers={config.n_layers}:"
            f" set model= to one of {choices}"
        )

    def check(self, config: GPTConfig, tokenizer: Mapping[str, Any]) -> None:
        """See `StartingWeights`."""
        size = self.size_for(config)
        if tokenizer.get("name") != "gpt2":
            raise InputError(
                f"init={self.name} has weights for GPT-2's tokens, this run has"
                f" tokenizer={tokenizer.get('name')}: set tokenizer=gpt2"
            )
        name = f"init={self.name}: the weights of GPT-2 {size.name}"
        check_fits(config, size.config, name=name, crop=self.crop, choice=size.choice)

    def open(self, size: Size) -> ModelFiles:
        """The files, fetched where they are not in the cache."""
        if self.path is None:
            return open_model(fetch(size, self.source, mirror=self.mirror))
        files = open_model(Path(self.path).expanduser())
        if self.size is not None and files.config is not None:
            check_fits(files.config, size.config, name=f"init.path={self.path}: GPT-2 {size.name}'s weights")
        return files

    def load_into(self, net: GPTModel) -> dict[str, Any]:
        """See `StartingWeights`."""
        size = self.size_for(net.config)
        files = self.open(size)
        if files.config is None:
            raise InputError(f"init.path={self.path} does not describe its model: use init=state_dict for it")
        check_fits(net.config, files.config, name=f"the weights in {files.path}", crop=self.crop)
        load_tensors(net, files.tensors, files.table, crop=self.crop)
        log.info("weights: GPT-2 %s from %s", size.name, files.path)
        return self.origin(size, files)

    def origin(self, size: Size, files: ModelFiles) -> dict[str, Any]:
        """Where the weights come from, for records."""
        return {
            "init": self.name,
            "size": size.name,
            "path": self.path,
            "crop_context": self.crop_context,
            "sha256": weights_sha256(files.path) if self.path else fetched_sha256(size, self.source),
        }


@dataclass(frozen=True, kw_only=True)
class FileWeights(StartingWeights):
    """Weights in another program's file or folder: the book's `model.pth`, nanoGPT's, an export of gptpl."""

    path: str | None = None
    crop_context: bool = False
    crop_vocabulary: bool = False

    def open(self) -> ModelFiles:
        """The files. Raises InputError without a path."""
        if self.path is None:
            raise InputError("init.path is not set: give init.path=FILE, such as the book's model.pth")
        return open_model(Path(self.path).expanduser())

    def check(self, config: GPTConfig, tokenizer: Mapping[str, Any]) -> None:
        """See `StartingWeights`; what the files do not say cannot be checked."""
        files = self.open()
        stored = files.record.get("tokenizer")
        if stored and stored.get("sha256") != tokenizer.get("sha256"):
            theirs, ours = (
                f"{each.get('name')} ({str(each.get('sha256'))[:12]})" for each in (stored, tokenizer)
            )
            remedy = "use the text whose vocabulary it is"
            if stored.get("name") != tokenizer.get("name"):
                remedy = f"set tokenizer={stored.get('name')}"
            raise InputError(
                f"init.path={self.path} has weights for the tokens of tokenizer={theirs}, this run has"
                f" tokenizer={ours}: {remedy}"
            )
        if files.config is not None:
            check_fits(config, files.config, name=f"init.path={self.path}: the weights", crop=self.crop)

    def load_into(self, net: GPTModel) -> dict[str, Any]:
        """See `StartingWeights`; an export's own past is its `parent`."""
        files = self.open()
        load_tensors(net, files.tensors, files.table, crop=self.crop)
        log.info("weights: %s, in the format of %s", files.path, files.table.format)
        lineage = {
            "init": "state_dict",
            "path": str(files.path.absolute()),
            "format": files.table.format,
            "crop_context": self.crop_context,
            "crop_vocabulary": self.crop_vocabulary,
            "sha256": weights_sha256(files.path),
        }
        return lineage | ({"parent": files.record["lineage"]} if "lineage" in files.record else {})
