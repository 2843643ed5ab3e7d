"""GPT-2 as OpenAI published it: where its files are, how large, with which hashes, how they are fetched."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gptpl.errors import InputError
from gptpl.files.download import cache_dir, download
from gptpl.files.durable import record_file, recorded_sha256
from gptpl.model import GPTConfig, count_parameters


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file of a checkpoint; None is what is not published where gptpl could look it up."""

    name: str
    path: str
    """On the source's server."""
    size: int | None
    sha256: str | None
    """None: the first download's is recorded, and holds from then on."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """One of the four models: its name, its shape, the choice of conf/model that is the same."""

    name: str
    emb_dim: int
    n_heads: int
    n_layers: int
    choice: str

    @property
    def config(self) -> GPTConfig:
        """The model that the weights are of."""
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
_ALL = "of all sizes"
_SHA256: Mapping[tuple[str, str], str] = {
    (_ALL, "encoder.json"): "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    (_ALL, "vocab.bpe"): "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    ("124M", "config.json"): "0daed7749b4f02b8f76240d5444551d7b08712dab4d0adb8239c56ba823bb7b4",
    ("124M", "model.safetensors"): "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    ("1558M", "config.json"): "be48115d52314bc27327e160bf10197760db02ea689d10adb24db4102edf7a8a",
    ("1558M", "model.safetensors"): "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
}
"""What the hub publishes of its files; OpenAI publishes no hashes."""
_BYTES: Mapping[tuple[str, str], int] = {
    (_ALL, "encoder.json"): 1_042_301,
    (_ALL, "vocab.bpe"): 456_318,
    ("124M", "model.safetensors"): 548_105_171,
    ("124M", "checkpoint"): 77,
    ("124M", "hparams.json"): 90,
    ("124M", "model.ckpt.data-00000-of-00001"): 497_759_232,
    ("124M", "model.ckpt.index"): 5_215,
    ("124M", "model.ckpt.meta"): 471_155,
    ("355M", "checkpoint"): 77,
    ("355M", "hparams.json"): 91,
    ("355M", "model.ckpt.data-00000-of-00001"): 1_419_292_672,
    ("355M", "model.ckpt.index"): 10_399,
    ("355M", "model.ckpt.meta"): 926_519,
}
"""OpenAI's are in the tests of the book's repository."""
_WEIGHTS_FILES = ("model.safetensors", "model.ckpt.data-00000-of-00001")
SERVERS: Mapping[str, str] = {
    "hf": "https://huggingface.co",
    "openai": "https://openaipublic.blob.core.windows.net",
}
MIRROR = "GPTPL_MIRROR"
"""Environment variable: an address in place of a source's server, with the same paths behind it."""


def checked_size(size: str) -> Size:
    """The size of that name. Raises InputError for a name that is none."""
    if str(size) not in SIZES:
        raise InputError(f"size={size} is unknown: choose one of {', '.join(SIZES)}")
    return SIZES[str(size)]


def checked_source(source: str) -> str:
    """The source itself. Raises InputError for one that is unknown."""
    if source not in SERVERS:
        raise InputError(f"source={source} is unknown: choose one of {', '.join(SERVERS)}")
    return source


def hub_name(size: Size) -> str:
    """What the Hugging Face hub calls it."""
    return _HUB[size.name][0]


def files_of(size: Size, source: str) -> list[RemoteFile]:
    """What a source's checkpoint of a size is made of; the largest file comes last."""
    if source == "hf":
        folder = "/resolve/".join(_HUB[size.name])
        names = ["config.json", "model.safetensors"]
    else:
        folder = f"gpt-2/models/{size.name}"
        names = [*_VOCABULARY, "checkpoint", "hparams.json", "model.ckpt.index", "model.ckpt.meta"]
        names.append("model.ckpt.data-00000-of-00001")
    found = []
    for name in names:
        key = (_ALL if name in _VOCABULARY else size.name, name)
        found.append(
            RemoteFile(name=name, path=f"{folder}/{name}", size=_BYTES.get(key), sha256=_SHA256.get(key))
        )
    return found


def weights_folder(size: Size, source: str) -> Path:
    """Where in the cache a source's checkpoint of a size is, or will be."""
    return cache_dir() / "weights" / source / size.name


def cached_bytes(size: Size, source: str) -> tuple[int, bool]:
    """How many bytes of a checkpoint are in the cache, parts of files included; whether all its files are."""
    paths = [weights_folder(size, source) / file.name for file in files_of(size, source)]
    parts = [path.with_name(f"{path.name}.part") for path in paths]
    there = sum(path.stat().st_size for path in paths + parts if path.is_file())
    return there, all(path.is_file() for path in paths)


def fetch(size: Size, source: str, *, mirror: str | None = None) -> Path:
    """The folder of a source's checkpoint, its files fetched where the cache does not have them.

    `mirror` (None: the environment's GPTPL_MIRROR) is an address in place of the source's server.

    Raises InputError as `gptpl.files.download.download` does; without a network it names what the cache has.
    """
    server = (mirror or os.environ.get(MIRROR) or SERVERS[source]).rstrip("/")
    folder = weights_folder(size, source)
    for file in files_of(size, source):
        address = f"{server}/{file.path}"
        try:
            download(address, sha256=file.sha256, size=file.size, filename=file.name, folder=folder)
        except InputError as error:
            cached = [
                f"{other} from {origin}"
                for origin in SERVERS
                for other in SIZES
                if cached_bytes(SIZES[other], origin)[1]
            ]
            raise InputError(
                f"{error}. In the cache are: {', '.join(cached) or 'no weights'}. To fetch them elsewhere:"
                f" gptpl weights fetch size={size.name} source={source} on a machine with a network, then"
                f" copy its folder to {folder} (another server: {MIRROR}=ADDRESS)"
            ) from error
        if file.sha256 is None:
            _check_plausible(folder / file.name, size)
    return folder


def _check_plausible(path: Path, size: Size) -> None:
    """Refuses, and takes away, a file without a published hash that is another one than it should be.

    Such as the page of a network that wants a login first: its hash would hold from then on.
    """
    with path.open("rb") as file:
        is_page = file.read(100).lstrip().startswith(b"<")
    length = path.stat().st_size
    least = 4 * count_parameters(size.config).total if path.name in _WEIGHTS_FILES else 1
    if is_page or length < least:
        path.unlink()
        record_file(path).unlink(missing_ok=True)
        what = "a web page" if is_page else f"{length:,} bytes, fewer than the weights have"
        raise InputError(
            f"{path.name} of GPT-2 {size.name} came as {what}: it was removed; check network and mirror"
        )


def fetched_sha256(size: Size, source: str) -> dict[str, str]:
    """The hash of the file with the weights, once it is fetched: the pinned one, or the recorded one."""
    *_, file = files_of(size, source)
    pinned = file.sha256 or recorded_sha256(weights_folder(size, source) / file.name)
    assert pinned is not None, "fetched files have a hash"
    return {file.name: pinned}
