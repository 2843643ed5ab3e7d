"""Tensors of a file or several, by name: shapes at once, the numbers only when they are asked for."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gptpl.errors import InputError
from gptpl.files.plain import check_sharing
from gptpl.weights.tables import Shape


class TensorSource(Protocol):
    """Tensors by name. Nothing but what is read takes memory."""

    @property
    def where(self) -> str:
        """The file or folder, for messages."""

    def shapes(self) -> Mapping[str, Shape]:
        """Every tensor's name and shape."""

    def dtype(self, name: str) -> str:
        """The tensor's data type in torch's word, such as "float32"."""

    def read(self, name: str) -> Tensor:
        """The tensor on the CPU; it may lie over the file, and is not to be written to."""


class SafetensorsFiles:
    """One safetensors file, or the shards of one, mapped into memory.

    Raises InputError for a file that is missing, cut short, or whose header does not fit it, and for a name
    that two shards have.
    """

    _DTYPES: Mapping[str, str] = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

    def __init__(self, paths: Iterable[Path]) -> None:
        from safetensors import SafetensorError, safe_open

        self._paths = list(paths)
        self._files: dict[str, Any] = {}
        self._shapes: dict[str, Shape] = {}
        for path in self._paths:
            try:
                file: Any = safe_open(path, framework="pt")
                names = file.keys()
            except (SafetensorError, OSError, ValueError) as error:
                raise _unreadable(path, error) from error
            for name in names:
                if name in self._files:
                    raise InputError(
                        f"{path} holds {name!r}, and so does another of its shards: fetch them anew"
                    )
                self._files[name] = file
                self._shapes[name] = tuple(file.get_slice(name).get_shape())

    @property
    def where(self) -> str:
        """The file, or the folder of the shards."""
        return str(self._paths[0] if len(self._paths) == 1 else self._paths[0].parent)

    def shapes(self) -> Mapping[str, Shape]:
        """Of all shards."""
        return self._shapes

    def dtype(self, name: str) -> str:
        """The data type that the header names."""
        stored = str(self._files[name].get_slice(name).get_dtype())
        return self._DTYPES.get(stored, stored)

    def read(self, name: str) -> Tensor:
        """The tensor, over the mapped file."""
        return self._files[name].get_tensor(name)


def safetensors_of(folder: Path, stem: str = "model") -> SafetensorsFiles:
    """`model.safetensors` of a folder, or the shards that `model.safetensors.index.json` lists."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file() or not index.is_file():
        return SafetensorsFiles([single])
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(shards.values()))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{index} lists no shards ({error}): fetch it anew") from error
    if not names or not all(isinstance(name, str) for name in names):
        raise InputError(f"{index} lists no shards: fetch it anew")
    if any(Path(name).name != name for name in names):
        raise InputError(f"{index} lists files outside its folder: use another copy")
    source = SafetensorsFiles(folder / name for name in names)
    if missing := sorted(shards.keys() - source.shapes().keys()):
        raise InputError(f"{index} lists {missing[0]!r}, which no shard holds: fetch the shards anew")
    return source


class StateDict:
    """Tensors that torch has read, by name."""

    def __init__(self, tensors: Mapping[str, Any], where: str) -> None:
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise InputError(f"{where} holds {name!r}, which is no tensor: give a state dict of a model")
        check_sharing(tensors.values(), where)
        self._tensors = tensors
        self._where = where

    @property
    def where(self) -> str:
        """The file that they come from."""
        return self._where

    def shapes(self) -> Mapping[str, Shape]:
        """Of all tensors."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def dtype(self, name: str) -> str:
        """The tensor's own."""
        return str(self._tensors[name].dtype).removeprefix("torch.")

    def read(self, name: str) -> Tensor:
        """The tensor itself."""
        return self._tensors[name]


def _unreadable(path: Path, error: Exception) -> InputError:
    if not path.is_file():
        return InputError(f"{path} does not exist: give the folder that holds it")
    reason = " ".join(str(error).split())
    return InputError(
        f"{path} is no whole safetensors file ({reason}; it has {path.stat().st_size:,} bytes): fetch it anew"
    )


DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""What weights may be stored in."""
