"""Makes objects of config nodes, after checking that their classes may be used.

What the user's own command line, Python or config folder names is trusted. What a run's folder, a checkpoint
or an exported folder names is used only if it is a class of gptpl, torch or Lightning, of the kind that its
place expects, or of a package that the user trusts by name; that is decided before anything of it is
imported.
"""

import inspect
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig

from gptpl.config.groups import Folder, stands_in_a_yaml, walk
from gptpl.config.signatures import locate
from gptpl.config.slots import slot_of
from gptpl.errors import InputError
from gptpl.text import one_line

OWN_PACKAGES = frozenset({"gptpl", "torch", "lightning"})


def instantiate(node: Any, **runtime: Any) -> Any:
    """The object of a node with a `_target_`, made with plain lists and dictionaries.

    What the object's own checks say (InputError) is passed on; other errors of its class become one line.
    """
    if isinstance(node, DictConfig | Mapping) and "_target_" in node:
        locate(str(node["_target_"]), "_target_")
    try:
        return hydra.utils.instantiate(node, _convert_="all", **runtime)
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, InputError):
                raise cause from error
            last, cause = cause, cause.__cause__
        raise InputError(f"{node['_target_']} refuses its settings: {' '.join(str(last).split())}") from error


def check_kind(target: Any, key: str, said: str) -> None:
    """Raises InputError for a class that cannot be in its place, that of the node `key`."""
    if not callable(target):
        raise InputError(f"{said} is no class: give package.module.Class")
    place = slot_of(key)
    if not place.kinds or (
        place.by_position
        and (not inspect.isclass(target) or hasattr(target, "factor") or hasattr(target, "step"))
    ):
        return
    if not _is_a(target, place.kinds):
        raise InputError(f"{said} is no {_names(place.kinds)}, which {key.partition('.')[0]} needs: give one")


def _is_a(target: Any, kinds: Sequence[str]) -> bool:
    """Whether a target is a class of one of these kinds; a protocol's has its `factor`."""
    if not inspect.isclass(target):
        return False
    classes = [locate(kind, kind) for kind in kinds]
    protocols = [each for each in classes if getattr(each, "_is_protocol", False)]
    if issubclass(target, tuple(each for each in classes if each not in protocols)):
        return True
    return bool(protocols) and hasattr(target, "factor")


def _names(kinds: Sequence[str]) -> str:
    return " or ".join(kind.rpartition(".")[2] for kind in kinds)


def partial_of(node: Mapping[str, Any] | DictConfig, *, without: Sequence[str] = ()) -> partial[Any]:
    """What calls the node's class with its settings and with what it is given."""
    kept = {str(key): value for key, value in node.items() if key not in (*without, "_partial_")}
    made: partial[Any] = instantiate({**kept, "_partial_": True})
    return made


# --- settings of strangers ------------------------------------------------------------------------------

_NESTED = (
    "gptpl.data.sources.Corpus",
    "gptpl.data.classification.corpora.LabelledCorpus",
    "gptpl.tokenizers.Tokenizer",
    "gptpl.generation.SamplingRules",
    "torch.nn.Module",
    "torch.optim.Optimizer",
    "torch.optim.lr_scheduler.LRScheduler",
)
"""What may be nested in a node of a stranger's."""


def check_trusted(settings: Mapping[str, Any], source: str, trusted: Collection[str]) -> None:
    """Raises InputError for a class in settings of a stranger's that may not be used; imports none of theirs.

    The settings are plain data, such as a run's config.yaml; `source` says in messages where they come from,
    `trusted` are packages of the user's.
    """
    for key, node in walk(settings):
        if not (isinstance(node, Mapping) and "_target_" in node):
            continue
        name = node["_target_"]
        package = name.partition(".")[0] if isinstance(name, str) else ""
        if package in trusted:
            continue
        if package not in OWN_PACKAGES:
            raise InputError(
                f"{source} has {key}._target_={_shown(name)}, a class of a package that is neither gptpl's"
                f" nor trusted: if you know whose it is, give trust=[{_shown(package) or 'PACKAGE'}] or the"
                " --config-dir that names it"
            )
        target = locate(name, f"{source}: {key}._target_")
        kinds = slot_of(key).of_strangers or slot_of(key).kinds or _NESTED
        ours = key == "optimizer" and str(getattr(target, "__module__", "")) == "gptpl.training.optimizers"
        if not (_is_a(target, kinds) or (ours and inspect.isfunction(target))):
            raise InputError(
                f"{source} has {key}._target_={_shown(name)}, which is no {_names(kinds)}: it is not used"
            )
        if "_args_" in node:  # which have no names that would say what they are
            raise InputError(f"{source} has {key}._args_: settings are given by name, it is not used")


def check_paths_inside(
    settings: Mapping[str, Any],
    run_dir: Path,
    *,
    source: str,
    given: Sequence[str] | frozenset[str] = (),
    config_dir: Folder | None = None,
) -> None:
    """Raises InputError for what would make a run write outside of its folder, or open a connection.

    That is a path of a callback, a logger, the trainer or a cache that leads out; an address that no YAML
    of gptpl's or of the user's has; a link in the folder to what is not in it. `given` are the keys that the
    user gave, who may write wherever they like.
    """
    for path in sorted(run_dir.rglob("*")):
        if path.is_symlink() and not _is_inside(path, run_dir):
            raise InputError(
                f"{source} has a link to outside of the run's folder, {_shown(path.relative_to(run_dir))}:"
                " replace it by what it leads to"
            )
    for key, value in walk(settings):
        parts = key.split(".")
        names = [part for part in parts if not part.isdigit()]
        if not isinstance(value, str) or parts[0] not in _WRITING or names[-1] in _TEXTS:
            continue
        if any(".".join(parts[:end]) in given for end in range(2, len(parts) + 1)):
            continue
        if "://" in value:
            if not stands_in_a_yaml(value, config_dir):
                raise InputError(
                    f"{source} has {key}={_shown(value)}, an address: give {key}=ADDRESS on the command"
                    " line if it is to be used"
                )
            continue
        path = Path(value)
        if parts[0] in _READING and names[-1] != "cache_dir":
            continue
        leads_out = path.is_absolute() or ".." in path.parts or value.startswith("~")
        if (leads_out or _is_folder(names[-1])) and not _is_inside(path, run_dir):
            raise InputError(
                f"{source} has {key}={_shown(value)}, which is outside of the run's folder: give"
                f" {key}=PATH on the command line if it is to be written there"
            )


_WRITING = ("callbacks", "logger", "trainer", "data", "tokenizer")
"""Nodes whose objects may write, or open a connection; a resumed run makes nothing of `init`."""
_READING = ("data", "tokenizer")
"""Those of them that write to a cache alone."""
_TEXTS = ("prompts", "_target_")
"""Settings that are no paths, whatever they look like."""


def _is_folder(name: str) -> bool:
    """Whether a setting is a path from the folder that one is in, and not just the name of a file."""
    return name.endswith(("path", "dir", "file")) or name in ("root", "output")


def _is_inside(path: Path, folder: Path) -> bool:
    try:
        return path.expanduser().resolve().is_relative_to(folder.resolve())
    except (ValueError, RuntimeError, OSError):  # a zero byte, a home of nobody, links in a circle
        return False


def _shown(value: Any) -> str:
    return one_line(str(value)[:200])
