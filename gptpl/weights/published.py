"""GPT-2 as OpenAI published it: its files, their sizes and hashes, and how they are fetched.

Hugging Face's come by `gptpl.files.download`, too, not by huggingface_hub: that one (2.4) compares no hashes,
starts an interrupted file over in a new process, and needs more of a mirror than a plain file server sends.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gptpl.errors import InputError
from gptpl.files.download import cache_dir, download
from gptpl.files.durable import record_file, recorded_sha256

if TYPE_CHECKING:  # it imports torch, which a list of the cache does not need
    from gptpl.model import GPTConfig


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file of a checkpoint; `path` is on the source's server, and None is not published."""

    name: str
    path: str
    size: int | None
    sha256: str | None


@dataclass(frozen=True, kw_only=True)
class Size:
    """One of the four models: its name, its shape, and the same model in conf/model."""

    name: str
    emb_dim: int
    n_heads: int
    n_layers: int
    choice: str

    @property
    def config(self) -> "GPTConfig":
        """The model of the weights."""
        from gptpl.model import GPTConfig

        return GPTConfig(
            vocab_size=50257,
            context_length=1024,
            emb_dim=self.emb_dim,
            n_heads=self.n_heads,
            n_layers=self.n_layers,
            drop_rate=0.1,
            qkv_bias=True,
            tie_weights=True,
            init="gpt2",
        )


SIZES: Mapping[str, Size] = {
    size.name: size
    for size in (
        Size(name="124M", emb_dim=768, n_heads=12, n_layers=12, choice="gpt2_small"),
        Size(name="355M", emb_dim=1024, n_heads=16, n_layers=24, choice="gpt2_medium"),
        Size(name="774M", emb_dim=1280, n_heads=20, n_layers=36, choice="gpt2_large"),
        Size(name="1558M", emb_dim=1600, n_heads=25, n_layers=48, choice="gpt2_xl"),
    )
}
_HUB: Mapping[str, tuple[str, str]] = {
    "124M": ("openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e"),
    "355M": ("openai-community/gpt2-medium", "6dcaa7a952f72f9298047fd5137cd6e4f05f41da"),
    "774M": ("openai-community/gpt2-large", "32b71b12589c2f8d625668d2335a01cac3249519"),
    "1558M": ("openai-community/gpt2-xl", "15ea56dee5df4983c59b2538573817e1667135e2"),
}
"""Names on the Hugging Face hub, and the revisions that are fetched."""
_VOCABULARY = ("encoder.json", "vocab.bpe")
_DATA = "model.ckpt.data-00000-of-00001"
_WEIGHTS_FILES = ("model.safetensors", _DATA)
_PINNED: Mapping[str, tuple[int | None, str | None]] = {
    "encoder.json": (1_042_301, "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
    "vocab.bpe": (456_318, "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
    "124M/config.json": (None, "0daed7749b4f02b8f76240d5444551d7b08712dab4d0adb8239c56ba823bb7b4"),
    "124M/model.safetensors": (
        548_105_171,
        "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    ),
    "1558M/config.json": (None, "be48115d52314bc27327e160bf10197760db02ea689d10adb24db4102edf7a8a"),
    "1558M/model.safetensors": (None, "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a"),
    "124M/checkpoint": (77, None),
    "124M/hparams.json": (90, None),
    f"124M/{_DATA}": (497_759_232, None),
    "124M/model.ckpt.index": (5_215, None),
    "124M/model.ckpt.meta": (471_155, None),
    "355M/checkpoint": (77, None),
    "355M/hparams.json": (91, None),
    f"355M/{_DATA}": (1_419_292_672, None),
    "355M/model.ckpt.index": (10_399, None),
    "355M/model.ckpt.meta": (926_519, None),
}
"""Bytes and SHA-256 where known: the hub's hashes, OpenAI's sizes from the tests of the book's repository."""
SERVERS: Mapping[str, str] = {
    "hf": "https://huggingface.co",
    "openai": "https://openaipublic.blob.core.windows.net",
}
MIRROR = "GPTPL_MIRROR"
"""Environment variable: an address in place of a source's server, with the same paths behind it."""


def checked_size(size: str) -> Size:
    """The size of that name. Raises InputError for an unknown one."""
    if str(size) not in SIZES:
        raise InputError(f"size={size} is unknown: choose one of {', '.join(SIZES)}")
    return SIZES[str(size)]


def checked_source(source: str) -> str:
    """The source itself. Raises InputError for an unknown one."""
    if source not in SERVERS:
        raise InputError(f"source={source} is unknown: choose one of {', '.join(SERVERS)}")
    return source


def hub_name(size: Size) -> str:
    """The model on the Hugging Face hub."""
    return _HUB[size.name][0]


def files_of(size: Size, source: str) -> list[RemoteFile]:
    """The files of a source's checkpoint; the largest comes last."""
    folder, names = "/resolve/".join(_HUB[size.name]), ["config.json", "model.safetensors"]
    if source == "openai":
        folder = f"gpt-2/models/{size.name}"
        names = [*_VOCABULARY, "checkpoint", "hparams.json", "model.ckpt.index", "model.ckpt.meta", _DATA]
    files = []
    for name in names:
        n_bytes, sha256 = _PINNED.get(name if name in _VOCABULARY else f"{size.name}/{name}", (None, None))
        files.append(RemoteFile(name=name, path=f"{folder}/{name}", size=n_bytes, sha256=sha256))
    return files


def weights_folder(size: Size, source: str) -> Path:
    """The folder of a source's checkpoint in the cache; it may not exist yet."""
    return cache_dir() / "weights" / source / size.name


def cached_bytes(size: Size, source: str) -> tuple[int, bool]:
    """How many bytes of a checkpoint are in the cache, unfinished files included, and whether all are."""
    paths = [weights_folder(size, source) / file.name for file in files_of(size, source)]
    parts = [path.with_name(f"{path.name}.part") for path in paths]
    there = sum(path.stat().st_size for path in paths + parts if path.is_file())
    return there, all(path.is_file() for path in paths)


def fetch(size: Size, source: str, *, mirror: str | None = None) -> Path:
    """The folder of a source's checkpoint in the cache, missing files fetched.

    `mirror` (None: the environment's GPTPL_MIRROR) is an address in place of the source's server. Raises
    InputError as `gptpl.files.download.download` does.
    """
    server = (mirror or os.environ.get(MIRROR) or SERVERS[source]).rstrip("/")
    folder = weights_folder(size, source)
    for file in files_of(size, source):
        address = f"{server}/{file.path}"
        try:
            download(address, sha256=file.sha256, size=file.size, filename=file.name, folder=folder)
        except InputError as error:
            raise InputError(
                f"{error}. Without a network: see gptpl weights list for what is in the cache, or run gptpl"
                f" weights fetch size={size.name} source={source} on a machine with one (another server:"
                f" {MIRROR}=ADDRESS), and copy its folder to {folder}"
            ) from error
        if file.sha256 is None:
            _check_plausible(folder / file.name, size)
    return folder


def _check_plausible(path: Path, size: Size) -> None:
    """Refuse and remove a file without a published hash that cannot be the right one.

    A network's login page, for example: its hash would hold from then on.
    """
    with path.open("rb") as file:
        is_page = file.read(100).lstrip().startswith(b"<")
    length = path.stat().st_size
    least = 4 * size.config.n_parameters if path.name in _WEIGHTS_FILES else 1
    if is_page or length < least:
        path.unlink()
        record_file(path).unlink(missing_ok=True)
        what = "a web page" if is_page else f"{length:,} bytes, fewer than the weights have"
        raise InputError(
            f"{path.name} of GPT-2 {size.name} came as {what}: it was removed; check network and mirror"
        )


def fetched_sha256(size: Size, source: str) -> dict[str, str]:
    """The hash of the fetched file with the weights, by its name: the pinned or the recorded one."""
    *_, file = files_of(size, source)
    sha256 = file.sha256 or recorded_sha256(weights_folder(size, source) / file.name)
    assert sha256 is not None, "fetched files have a hash"
    return {file.name: sha256}
