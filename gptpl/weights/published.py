"""GPT-2 as OpenAI published it: where its files are, how large, with which hashes, how they are fetched."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gptpl.errors import InputError
from gptpl.files.download import cache_dir, download
from gptpl.files.hashes import record_file, recorded_sha256
from gptpl.model import GPTConfig, count_parameters


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file of a checkpoint.

    Attributes:
        name: in its folder.
        path: on the source's server.
        size: bytes; None: not published where gptpl could look it up.
        sha256: None: not published; the first download's is recorded, and holds from then on.
    """

    name: str
    path: str
    size: int | None = None
    sha256: str | None = None


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

SERVERS: Mapping[str, str] = {
    "hf": "https://huggingface.co",
    "openai": "https://openaipublic.blob.core.windows.net",
}
MIRROR = "GPTPL_MIRROR"
"""Environment variable: an address in place of a source's server, with the same paths behind it."""

# The revisions of the Hugging Face hub that are pinned, and what is published of their model.safetensors.
_HUB: Mapping[str, tuple[str, str, int | None, str | None]] = {
    "124M": (
        "gpt2",
        "607a30d783dfa663caf39e06633721c8d4cfcd7e",
        548_105_171,
        "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    ),
    "355M": ("gpt2-medium", "6dcaa7a952f72f9298047fd5137cd6e4f05f41da", None, None),
    "774M": ("gpt2-large", "32b71b12589c2f8d625668d2335a01cac3249519", None, None),
    "1558M": (
        "gpt2-xl",
        "15ea56dee5df4983c59b2538573817e1667135e2",
        None,
        "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
    ),
}
_HUB_CONFIG_SHA256 = {
    "124M": "0daed7749b4f02b8f76240d5444551d7b08712dab4d0adb8239c56ba823bb7b4",
    "1558M": "be48115d52314bc27327e160bf10197760db02ea689d10adb24db4102edf7a8a",
}
_VOCABULARY = {
    "encoder.json": (1_042_301, "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
    "vocab.bpe": (456_318, "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
}
# OpenAI publishes no hashes; the sizes of two models are in the tests of the book's repository.
_OPENAI_BYTES: Mapping[str, Mapping[str, int]] = {
    "124M": {
        "checkpoint": 77,
        "hparams.json": 90,
        "model.ckpt.data-00000-of-00001": 497_759_232,
        "model.ckpt.index": 5_215,
        "model.ckpt.meta": 471_155,
    },
    "355M": {
        "checkpoint": 77,
        "hparams.json": 91,
        "model.ckpt.data-00000-of-00001": 1_419_292_672,
        "model.ckpt.index": 10_399,
        "model.ckpt.meta": 926_519,
    },
}
_OPENAI_FILES = tuple(_OPENAI_BYTES["124M"])
_WEIGHTS_FILES = ("model.safetensors", "model.ckpt.data-00000-of-00001")


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
    return f"openai-community/{_HUB[size.name][0]}"


def files_of(size: Size, source: str) -> list[RemoteFile]:
    """What a source's checkpoint of a size is made of; the largest file comes last."""
    if source == "hf":
        _, revision, length, sha256 = _HUB[size.name]
        folder = f"{hub_name(size)}/resolve/{revision}"
        return [
            RemoteFile(
                name="config.json", path=f"{folder}/config.json", sha256=_HUB_CONFIG_SHA256.get(size.name)
            ),
            RemoteFile(
                name="model.safetensors", path=f"{folder}/model.safetensors", size=length, sha256=sha256
            ),
        ]
    folder = f"gpt-2/models/{size.name}"
    lengths = _OPENAI_BYTES.get(size.name, {})
    files = [
        RemoteFile(name=name, path=f"{folder}/{name}", size=length, sha256=sha256)
        for name, (length, sha256) in _VOCABULARY.items()
    ]
    files += [
        RemoteFile(name=name, path=f"{folder}/{name}", size=lengths.get(name)) for name in _OPENAI_FILES
    ]
    return sorted(files, key=lambda file: ".data-" in file.name)


def weights_folder(size: Size, source: str) -> Path:
    """Where in the cache a source's checkpoint of a size is, or will be."""
    return cache_dir() / "weights" / source / size.name


def cached_bytes(size: Size, source: str) -> tuple[int, bool]:
    """How many bytes of a checkpoint are in the cache, parts of files included; whether all its files are."""
    folder = weights_folder(size, source)
    names = [file.name for file in files_of(size, source)]
    paths = [folder / name for name in names] + [folder / f"{name}.part" for name in names]
    there = [path for path in paths if path.is_file()]
    complete = all((folder / name).is_file() for name in names)
    return sum(path.stat().st_size for path in there), complete


def fetch(size: Size, source: str, *, mirror: str | None = None) -> Path:
    """The folder of a source's checkpoint, its files fetched where the cache does not have them.

    `mirror` (None: the environment's GPTPL_MIRROR) is an address in place of the source's server.

    Raises InputError as `gptpl.files.download.download` does; without a network it names what the cache has.
    """
    server = (mirror or os.environ.get(MIRROR) or SERVERS[source]).rstrip("/")
    folder = weights_folder(size, source)
    for file in files_of(size, source):
        try:
            download(
                f"{server}/{file.path}",
                sha256=file.sha256,
                size=file.size,
                filename=file.name,
                cache_dir=folder,
            )
        except InputError as error:
            raise InputError(f"{error}. {_elsewhere(size, source, folder)}") from error
        if file.sha256 is None:
            _check_plausible(folder / file.name, size)
    return folder


def _check_plausible(path: Path, size: Size) -> None:
    """Refuses, and takes away, a file without a published hash that is another one than it should be.

    Such as the page of a network that wants a login first: its hash would hold from then on.
    """
    with path.open("rb") as file:
        is_page = file.read(100).lstrip().startswith(b"<")
    least = 4 * count_parameters(size.config).total if path.name in _WEIGHTS_FILES else 1
    if is_page or path.stat().st_size < least:
        length = path.stat().st_size
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


def _elsewhere(size: Size, source: str, folder: Path) -> str:
    cached = [
        f"{other} from {origin}"
        for origin in SERVERS
        for other in SIZES
        if cached_bytes(SIZES[other], origin)[1]
    ]
    return (
        f"In the cache are: {', '.join(cached) or 'no weights'}. To fetch them elsewhere: gptpl weights fetch"
        f" size={size.name} source={source} on a machine with a network, then copy its folder to {folder}"
        f" (another server: {MIRROR}=ADDRESS)"
    )
