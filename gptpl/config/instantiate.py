"""Objects of config nodes, made after checking that their classes may be used.

Whatever the user's own command line, Python or config folder names is trusted. Classes that a run's folder, a
checkpoint or an exported folder names are used only if they are of gptpl, torch or Lightning and of the kind
that their node takes, or of a package that the user trusts by name. This is decided before anything of theirs
is imported.
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
from gptpl.config.signatures import OWN_PACKAGES, locate
from gptpl.config.slots import slot_of
from gptpl.errors import InputError
from gptpl.text import one_line


def instantiate(node: Any, **runtime: Any) -> Any:
    """The object of a node with a `_target_`, made from plain lists and dictionaries.

    An InputError of the class is raised as it is; its other errors become one line.
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
        raise InputError(
            f"{node['_target_']} does not take its settings: {' '.join(str(last).split())}"
        ) from error


def partial_of(node: Mapping[str, Any] | DictConfig) -> partial[Any]:
    """A function that calls the node's class with its settings and further arguments."""
    made: partial[Any] = instantiate({**node, "_partial_": True})
    return made


def check_kind(target: Any, key: str, named: str) -> None:
    """Raises InputError for a class that the node `key` does not take; `named` names it in the message."""
    if not callable(target):
        raise InputError(f"{named} is not a class: give package.module.Class")
    slot = slot_of(key)
    is_function = not inspect.isclass(target) or hasattr(target, "step")
    if slot.kinds and not (slot.by_position and is_function) and not _is_a(target, slot.kinds):
        raise InputError(f"{named} is not a {_names(slot.kinds)}: {key.partition('.')[0]} needs one")


def _is_a(target: Any, kinds: Sequence[str]) -> bool:
    """Whether a target is a class of one of these kinds."""
    return inspect.isclass(target) and issubclass(target, tuple(locate(kind, kind) for kind in kinds))


def _names(kinds: Sequence[str]) -> str:
    return " or ".join(kind.rpartition(".")[2] for kind in kinds)


# --- settings of other people's runs --------------------------------------------------------------------

_NESTED = (
    "gptpl.data.sources.Corpus",
    "gptpl.data.sources.LabelledCorpus",
    "gptpl.evaluation.questions.Questions",
    "gptpl.evaluation.suite.Suite",
    "gptpl.evaluation.benchmarks.Task",
    "gptpl.filters.Filter",
    "gptpl.generation.SamplingRules",
    "torch.nn.Module",
    "torch.optim.Optimizer",
    "torch.optim.lr_scheduler.LRScheduler",
)
"""Kinds of the objects that may be nested in their nodes."""


def check_trusted(settings: Mapping[str, Any], source: str, trusted: Collection[str]) -> None:
    """Raises InputError for a class that may not be used, before it is imported.

    `settings` are plain data, such as a run's config.yaml; `source` says in messages where they come from;
    `trusted` are packages that the user named.
    """
    for key, node in walk(settings):
        if not (isinstance(node, Mapping) and "_target_" in node):
            continue
        name = node["_target_"]
        package = name.partition(".")[0] if isinstance(name, str) else ""
        if package in trusted:
            continue
        found = f"{source} has {key}._target_={_shown(name)}"
        if package not in OWN_PACKAGES:
            raise InputError(
                f"{found}, a class of a package that is neither gptpl's nor trusted: if you trust it, give"
                f" trust=[{_shown(package) or 'PACKAGE'}] or the --config-dir that names it"
            )
        target = locate(name, f"{source}: {key}._target_")
        if getattr(target, "runs_named_code", False):
            raise InputError(f"{found}, which runs code that its settings name: it is not used")
        kinds = slot_of(key).of_strangers or slot_of(key).kinds or _NESTED
        ours = key == "optimizer" and str(getattr(target, "__module__", "")) == "gptpl.training.optimizers"
        if not (_is_a(target, kinds) or (ours and inspect.isfunction(target))):
            raise InputError(f"{found}, which is not a {_names(kinds)}: it is not used")
        if "_args_" in node:  # without names there is no telling what they are
            raise InputError(f"{source} has {key}._args_, settings without names: they are not used")


_WRITING = ("callbacks", "logger", "trainer", "data", "tokenizer")
"""Nodes whose objects may write, or open a connection; a resumed run makes nothing of `init`."""
_READING = ("data", "tokenizer")
"""Of these, the ones that write to a cache only."""
_TEXTS = ("prompts", "_target_")
"""Settings that are not paths, whatever they look like."""


def check_paths_inside(
    settings: Mapping[str, Any],
    run_dir: Path,
    *,
    source: str,
    given: Sequence[str] | frozenset[str] = (),
    config_dir: Folder | None = None,
) -> None:
    """Raises InputError for settings that would make a run write outside its folder, or open a connection.

    These are paths of a callback, a logger, the trainer or a cache that lead out of the folder; addresses
    that no YAML of gptpl's or of the user's holds; and links in the folder to something outside it. `given`
    are keys that the user set, who may write anywhere; an address given once may stand elsewhere, too.
    """
    for path in sorted(run_dir.rglob("*")):
        if path.is_symlink() and not _is_inside(path, run_dir):
            raise InputError(
                f"{source} has a link out of the run's folder, {_shown(path.relative_to(run_dir))}: replace"
                " it by what it leads to"
            )

    def is_given(key: str) -> bool:
        return any(key == each or key.startswith(f"{each}.") for each in given if "." in each)

    asked = {value for key, value in walk(settings) if isinstance(value, str) and is_given(key)}
    for key, value in walk(settings):
        parts = key.split(".")
        name = next((part for part in reversed(parts) if not part.isdigit()), "")
        if not isinstance(value, str) or parts[0] not in _WRITING or name in _TEXTS or is_given(key):
            continue
        if "://" in value:
            if value not in asked and not stands_in_a_yaml(value, config_dir):
                raise InputError(
                    f"{source} has {key}={_shown(value)}, an address: to use it, give {key}=ADDRESS on the"
                    " command line"
                )
            continue
        path = Path(value)
        reads = parts[0] in _READING or not {"filter", "suite"}.isdisjoint(parts[2:-1])  # of a callback
        if reads and name != "cache_dir":
            continue
        is_path = name.endswith(("path", "dir", "file")) or name in ("root", "output")
        leads_out = path.is_absolute() or ".." in path.parts or value.startswith("~")
        if (leads_out or is_path) and not _is_inside(path, run_dir):
            raise InputError(
                f"{source} has {key}={_shown(value)}, outside the run's folder: to write there, give"
                f" {key}=PATH on the command line"
            )


def _is_inside(path: Path, folder: Path) -> bool:
    try:
        return path.expanduser().resolve().is_relative_to(folder.resolve())
    except (ValueError, RuntimeError, OSError):  # a zero byte, the home of an unknown user, circular links
        return False


def _shown(value: Any) -> str:
    return one_line(str(value)[:200])
