"""Makes objects of config nodes, after checking that their classes may be used.

What the user's own command line, Python or config folder names is trusted. What a run's folder, a checkpoint
or an exported folder names is used only if it is a class of gptpl, torch or Lightning, of the kind that its
place expects, or of a package that the user trusts by name; that is decided before anything of it is
imported.
"""

import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig

from gptpl.config.groups import Folder, folders
from gptpl.errors import InputError

OWN_PACKAGES = frozenset({"gptpl", "torch", "lightning"})
KINDS_OF_SLOTS: Mapping[str, Sequence[str]] = {
    "model": ("torch.nn.Module", "gptpl.model.GPTConfig"),
    "tokenizer": ("gptpl.data.tokenizers.Tokenizer",),
    "init": ("gptpl.weights.starting.StartingWeights",),
    "data": ("lightning.LightningDataModule",),
    "task": ("lightning.LightningModule",),
    "tune": ("gptpl.training.tuning.Tuning",),
    "optimizer": ("torch.optim.Optimizer",),
    "scheduler": ("torch.optim.lr_scheduler.LRScheduler", "gptpl.training.schedules.Schedule"),
    "trainer": ("lightning.Trainer",),
    "callbacks": ("lightning.Callback",),
    "logger": ("lightning.pytorch.loggers.Logger",),
    "sampling": ("gptpl.generation.SamplingRules",),
    "judge": ("gptpl.judging.JudgeModel", "gptpl.judging.NoJudge"),
}
"""What the class of a node must be, by the node's place."""
_FACTORIES = ("optimizer", "scheduler")
"""Places where a function will do, too: it is called with what the class would be."""


def slot_of(key: str) -> str:
    """The place of a node: `callbacks` of `callbacks.mine`, `data.corpus` of itself."""
    first, _, rest = key.partition(".")
    if first in ("callbacks", "logger") and rest:
        return first if "." not in rest else f"{first}.*"
    return key


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


def locate(name: str, key: str) -> Any:
    """The class or function of a dotted name, also a nested class. Raises InputError where there is none."""
    parts = name.split(".")
    if not all(part.isidentifier() for part in parts) or len(parts) < 2:
        raise InputError(f"{key}={name} is no class: give package.module.Class")
    for end in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:end])
        try:
            found: Any = import_module(module)
        except ModuleNotFoundError as error:
            if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
                continue
            raise InputError(f"{key}={name} cannot be imported: {error}") from error
        except ImportError as error:
            raise InputError(f"{key}={name} cannot be imported: {error}") from error
        for part in parts[end:]:
            found = getattr(found, part, None)
            if found is None:
                raise InputError(f"{key}={name} cannot be imported: {module} has no {part}")
        return found
    raise InputError(
        f"{key}={name} cannot be imported: there is no package {parts[0]} (it must be installed, or lie in"
        " the folder that you are in)"
    )


def check_kind(target: Any, slot: str, said: str) -> None:
    """Raises InputError for a class that cannot be in its place."""
    if not callable(target):
        raise InputError(f"{said} is no class: give package.module.Class")
    kinds = KINDS_OF_SLOTS.get(slot)
    if kinds is None:
        return
    if slot in _FACTORIES and (
        not inspect.isclass(target) or hasattr(target, "factor") or hasattr(target, "step")
    ):
        return
    classes = tuple(locate(kind, slot) for kind in kinds)
    if not (inspect.isclass(target) and _is_a(target, classes)):
        names = " or ".join(kind.rpartition(".")[2] for kind in kinds)
        raise InputError(f"{said} is no {names}, which {slot} needs: give one")


def _is_a(target: type, classes: tuple[type, ...]) -> bool:
    if issubclass(target, tuple(each for each in classes if not getattr(each, "_is_protocol", False))):
        return True
    return any(getattr(each, "_is_protocol", False) and hasattr(target, "factor") for each in classes)


# --- settings of strangers ------------------------------------------------------------------------------

_NESTED = (
    "gptpl.data.corpora.Corpus",
    "gptpl.data.labelled.corpora.LabelledCorpus",
    "gptpl.data.tokenizers.Tokenizer",
    "gptpl.generation.SamplingRules",
    "torch.nn.Module",
    "torch.optim.Optimizer",
    "torch.optim.lr_scheduler.LRScheduler",
)
"""What may be nested in a node of a stranger's."""


def check_trusted(settings: Mapping[str, Any], source: str, trusted: Collection[str]) -> None:
    """Raises InputError for a class in settings of a stranger's that may not be used; imports none of theirs.

    Args:
        settings: plain data, such as a run's config.yaml.
        source: where they come from, for the message.
        trusted: packages of the user's.
    """
    for key, node in _nodes(settings):
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
        slot = slot_of(key)
        target = locate(name, f"{source}: {key}._target_")
        kinds = _OF_STRANGERS.get(slot) or KINDS_OF_SLOTS.get(slot, _NESTED)
        fits = inspect.isclass(target) and _is_a(target, tuple(locate(kind, slot) for kind in kinds))
        ours = slot == "optimizer" and str(getattr(target, "__module__", "")) == "gptpl.training.optimizers"
        if not (fits or (ours and inspect.isfunction(target))):
            names = " or ".join(kind.rpartition(".")[2] for kind in kinds)
            raise InputError(
                f"{source} has {key}._target_={_shown(name)}, which is no {names}: it is not used"
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
    for link in _links(run_dir):
        raise InputError(
            f"{source} has a link to outside of the run's folder, {_shown(link.relative_to(run_dir))}:"
            " replace it by what it leads to"
        )
    for key, value in _strings(settings, ""):
        parts = key.split(".")
        names = [part for part in parts if not part.isdigit()]
        if parts[0] not in _WRITING or names[-1] in _TEXTS:
            continue
        if any(".".join(parts[:end]) in given for end in range(2, len(parts) + 1)):
            continue
        if "://" in value:
            if not _stands_in_a_yaml(value, config_dir):
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


_OF_STRANGERS: Mapping[str, Sequence[str]] = {
    "data": ("gptpl.data.training_data.TrainingData",),  # Lightning's example downloads to where it is told
    "task": ("gptpl.training.training_module.TrainingModule",),
}
_WRITING = ("callbacks", "logger", "trainer", "data", "tokenizer")
"""Nodes whose objects may write, or open a connection; a resumed run makes nothing of `init`."""
_READING = ("data", "tokenizer")
"""Those of them that write to a cache alone."""
_TEXTS = ("prompts", "_target_")
"""Settings that are no paths, whatever they look like."""


def _stands_in_a_yaml(value: str, config_dir: Folder | None) -> bool:
    """Whether a YAML of gptpl's or of the user's has the text, other than in a comment."""
    files = (file for folder in folders(config_dir) for file in folder.rglob("*.yaml"))
    lines = (line for file in files for line in file.read_text(encoding="utf-8").splitlines())
    return any(value in line for line in lines if not line.lstrip().startswith("#"))


def _is_folder(name: str) -> bool:
    """Whether a setting is a path from the folder that one is in, and not just the name of a file."""
    return name.endswith(("path", "dir", "file")) or name in ("root", "output")


def _is_inside(path: Path, folder: Path) -> bool:
    try:
        return path.expanduser().resolve().is_relative_to(folder.resolve())
    except (ValueError, RuntimeError, OSError):  # a zero byte, a home of nobody, links in a circle
        return False


def _links(folder: Path) -> Iterator[Path]:
    """Links in a folder that lead out of it."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and not _is_inside(path, folder):
            yield path


def _nodes(settings: Any, key: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every node that names a class, outer before inner, also those in lists."""
    if isinstance(settings, Mapping):
        if "_target_" in settings:
            yield key, settings
        for name, value in settings.items():
            yield from _nodes(value, f"{key}.{name}" if key else str(name))
    elif isinstance(settings, list):
        for number, value in enumerate(settings):
            yield from _nodes(value, f"{key}.{number}")


def _strings(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield from _strings(each, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from _strings(each, f"{key}.{number}")


def _shown(value: Any) -> str:
    text = str(value)
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:200])


def partial_of(node: Mapping[str, Any] | DictConfig, *, without: Sequence[str] = ()) -> partial[Any]:
    """What calls the node's class with its settings and with what it is given."""
    kept = {str(key): value for key, value in node.items() if key not in (*without, "_partial_")}
    made: partial[Any] = instantiate({**kept, "_partial_": True})
    return made
