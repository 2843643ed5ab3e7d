"""Checks every node of a config with a `_target_` against the signature of its class, ours or a user's.

A setting that the class does not take is an error, unless another setting refers to it: in
`data: {path: null, corpus: {path: ${data.path}}}` the first path is a short name of the second.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from gptpl.config.groups import (
    Folder,
    choices,
    command_of,
    config_file,
    default_choices,
    dotted,
    is_global,
    keys_of,
    known_keys,
    members_of,
    root_of,
    walk,
)
from gptpl.config.instantiate import check_kind
from gptpl.config.overrides import nearest_key
from gptpl.config.roots import settings_of_root
from gptpl.config.signatures import Signature, dataclass_in, locate, read_signature, signature_of, typed
from gptpl.config.slots import HYDRA_KEYS, SLOTS, Slot, resume_of, settings_of, slot_of, with_extras
from gptpl.errors import InputError
from gptpl.files.run_record import read_config
from gptpl.settings import NEVER, check_limit
from gptpl.text import closest, nearest

AUTO = "auto"


def check(
    cfg: DictConfig,
    config_name: str = "train",
    *,
    overrides: Sequence[Override] = (),
    config_dir: Folder | None = None,
    only: frozenset[str] | None = None,
    written: DictConfig | None = None,
    without_imports: bool = False,
) -> None:
    """Raises InputError for a setting that is unknown, of the wrong type, or missing; settles number types.

    `without_imports` checks what the source files of the classes say, in a fraction of a second.

    `overrides` are those of the command line: a setting that none of them gives comes from a YAML, which is
    named. `only` are keys to check, others come from a run and have been checked. `written` is the config
    before its interpolations were resolved.
    """
    root = root_of(config_name, config_dir)
    groups = default_choices(root, config_dir)
    checked = _Check(
        root=root,
        config_name=config_name,
        config_dir=config_dir,
        given=frozenset(each.key_or_group for each in overrides) - set(groups),
        used=frozenset(_references(OmegaConf.to_container(cfg if written is None else written))),
        only=only,
        choices=cfg.get("choices") or {},
        checkpoint=None if OmegaConf.is_missing(cfg, "checkpoint") else cfg.get("checkpoint"),
        without_imports=without_imports,
    )
    own = signature_of(settings_of_root(root))
    # A node of the root's own may name a class instead: `data` of gptpl evaluate.
    nodes = [each for each in groups if each in cfg and (each not in own.parameters or _is_node(cfg[each]))]
    checked.values(cfg, "", own, known={*nodes, "choices"})
    for key in nodes:
        checked.node(cfg, key)


def check_launcher(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of hydra.launcher, checked against the signature of its class."""
    cfg = OmegaConf.create({"hydra": {"launcher": dict(settings)}})
    _Check(root="sweep").node(cfg, "hydra.launcher")
    found = OmegaConf.to_container(cfg.hydra.launcher)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


@dataclass(frozen=True, kw_only=True)
class _Check:
    """The check of a config, with what its messages need."""

    root: str
    config_name: str = ""
    config_dir: Folder | None = None
    given: frozenset[str] = frozenset()
    used: frozenset[str] = frozenset()
    only: frozenset[str] | None = None
    choices: Mapping[str, Any] = field(default_factory=dict)
    without_imports: bool = False
    checkpoint: str | None = None

    @property
    def command(self) -> str:
        return f"gptpl {command_of(self.root)}"

    def is_right(self, path: str) -> bool:
        """Whether a key need not be checked."""
        key = path.partition("[")[0]  # a list is checked with its members
        return self.only is not None and not any(f"{key}.".startswith(f"{each}.") for each in self.only)

    def node(self, cfg: DictConfig, key: str) -> None:
        """The node of a group, or of one callback or logger, and the nodes in it."""
        slot = slot_of(key)
        node = None if OmegaConf.is_missing(cfg, key) else OmegaConf.select(cfg, key)
        if node is None and (slot.optional or default_choices(self.root, self.config_dir).get(key) == "null"):
            return
        if not isinstance(node, DictConfig):
            offered = choices(key.partition(".")[0], self.config_dir)
            raise InputError(f"{key}={_text(node)} is unknown: choose one of {', '.join(offered)}")
        if slot.several and "." not in key:
            for member in map(str, node):
                if node[member] is not None:
                    self.node(cfg, f"{key}.{member}")
            return
        name = node.get("_target_") or slot.implicit
        if name is None or name == MISSING:
            if self.without_imports and self.choices.get(key) == AUTO:
                return  # the class follows from that of another node
            raise InputError(self._no_class(key, node))
        if self.without_imports:
            read = read_signature(str(name))
            if read is None:
                return
            signature = with_extras(read, key)
        else:
            target = locate(str(name), f"{key}._target_")
            check_kind(target, key, f"{key}._target_={name}")
            signature = settings_of(target, key)
        self.values(node, key, signature, known=HYDRA_KEYS, of=str(name))
        around = SLOTS.get(key.partition(".")[0], Slot())
        lenient = slot.lenient or key.startswith("model.")
        for each, parameter in signature.parameters.items():
            passed = lenient or each in slot.at_runtime or (around.by_position and parameter.positional)
            if parameter.required and not passed and each not in node and not self.is_right(f"{key}.{each}"):
                raise InputError(f"{key}.{each} is not set: give {key}.{each}=VALUE")
        for child in map(str, node):
            if OmegaConf.is_interpolation(node, child) or OmegaConf.is_missing(node, child):
                continue  # what it refers to is checked at its own place
            if _is_node(node[child]):
                self.node(cfg, f"{key}.{child}")

    def values(
        self, node: DictConfig, prefix: str, takes: Signature, *, known: Collection[str] = (), of: str = ""
    ) -> None:
        """Names and types of the settings of one node; sets a value as its type has it (1 becomes 1.0)."""
        for key in map(str, list(node)):
            path = f"{prefix}.{key}" if prefix else key
            if key in known or self.is_right(path):
                continue
            if key not in takes.parameters:
                if takes.open or any(f"{each}.".startswith(f"{path}.") for each in self.used):
                    continue
                raise InputError(self._unknown(node, path, [*takes.parameters], of))
            if OmegaConf.is_missing(node, key):
                continue
            annotation = takes.parameters[key].annotation
            by_reference = OmegaConf.is_interpolation(node, key)
            try:
                value = node[key]
                plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            except OmegaConfBaseException as error:
                if isinstance(error, InterpolationKeyError) and path == "model.vocab_size":
                    node[key] = None  # that of the tokenizer, which is the checkpoint's
                    continue
                raise InputError(f"{path}: {' '.join(str(error).split())}{self._origin(path)}") from error
            if value is None and by_reference:
                continue  # known once there is a run: its folder, the size of a vocabulary
            if kind := dataclass_in(annotation):  # such as the strategies of sampling
                for place, each in _members(value, path):
                    self.values(each, place, signature_of(kind), of=of and kind.__name__)
                if isinstance(value, DictConfig) and not of:
                    continue  # a node of the root's own
            try:
                found = typed(plain, annotation)
            except ValueError as error:
                name = path.rpartition(".")[2]
                remedy = f"see {self.command} --help"
                if name != path and plain in choices(name, self.config_dir):
                    remedy = f"to choose a YAML of conf/{name}, give +{name}@{path}={plain}"
                raise InputError(f"{path}={_text(plain)}{self._origin(path)}: {error}; {remedy}") from error
            check_limit(annotation, path.removeprefix("model."), found)
            if (type(found) is not type(plain) or found != plain) and not by_reference:
                node[key] = found

    # ------------------------------------------------------------------------------------------- messages

    def _unknown(self, node: DictConfig, path: str, names: list[str], of: str) -> str:
        """The message for a setting that nothing takes."""
        first, _, rest = path.partition(".")
        where = self._origin(path)
        if not rest:
            known = [*names, *known_keys(self.root, self.config_dir)]
            meant = nearest_key(path, [each for each in known if each != path])
            return f"{self.command} has no setting {path}{where}{meant}"
        others = []
        if not where.startswith(f" in {first}/"):  # a mistake in a choice's own YAML means no other choice
            offered = [f"{first}/{choice}" for choice in choices(first, self.config_dir)]
            others = [each.replace("/", "=") for each in offered if path in self._keys(each)]
        if others and where:
            choice = " or ".join(others)
            return f"{where[4:]} sets {path}, a setting of {choice}: keep that choice, or remove the setting"
        if others and self.only is not None and resume_of(f"{first}._target_", {}) == NEVER:
            return f"{path} is a setting of {' or '.join(others)}, not of the run resumed: leave it out"
        if others:
            if (own := self._own_choice(first)) in others:
                others = [f"{own}, which the model's own run has"]
            return f"{path} is a setting of {' or '.join(others)}: add that, or leave {path} out"
        parent, _, key = path.rpartition(".")
        prefix = "" if "[" in parent else f"{parent}."
        short = [each.removeprefix(prefix) for each in self.used if each.startswith(prefix)]
        inner = [each for each in dotted(OmegaConf.to_container(node)) if "." in each]
        ends = {each.rpartition(".")[2]: each for each in inner}
        meant = closest(key, [*names, *short, HYDRA_KEYS[0]]) or ends.get(closest(key, ends), "")
        remedy = f"did you mean {prefix}{meant}?" if meant else f"it takes {', '.join(names) or 'none'}"
        return f"{of.rpartition('.')[2] or self.command} has no setting {path}{where}: {remedy}"

    def _no_class(self, key: str, node: DictConfig) -> str:
        """The message for a node without `_target_`: its name or its `_target_` may be misspelt."""
        for child in map(str, node):
            path = f"{key}.{child}"
            if nearest(child, ["_target_"], likeness=0.8):
                return f"unknown setting {path}{self._origin(path)}: did you mean {key}._target_?"
            known = [each for each in known_keys(self.root, self.config_dir) if each != path]
            if meant := "." in key and nearest(path, known, likeness=0.8):
                return f"unknown setting {path}{self._origin(path)}{meant}"
        return f"{key} has no class: give {key}._target_=package.module.Class"

    def _own_choice(self, group: str) -> str | None:
        """The choice of a group that the run made whose folder `checkpoint` names, if it names one."""
        try:
            recorded = read_config(Path(self.checkpoint or "").expanduser(), needs=("choices",))["choices"]
        except InputError:  # another kind of checkpoint, or a name, or a damaged folder, is for the command
            return None
        return f"{group}={recorded.get(group)}"

    def _keys(self, name: str) -> list[str]:
        return keys_of(name, name.rpartition("/")[0], self.config_dir)

    def _origin(self, path: str) -> str:
        """` in data/tale.yaml`: the last YAML that sets a key; empty if an override gives it."""
        path = path.partition("[")[0]  # of a list's members
        if any(f"{path}.".startswith(f"{each}.") for each in self.given):
            return ""
        files = (name for name in self._files(path.partition(".")[0]) if path in self._keys(name))
        return next((f" in {name}.yaml" for name in files), "")

    def _files(self, first: str) -> Iterator[str]:
        """The YAML files that may set a key with this first part, in the order in which they win."""
        for group in reversed(default_choices(self.root, self.config_dir)):
            own = group.partition("/")[0] == first
            chosen = [str(self.choices.get(group))]
            if own and group not in self.choices:  # as with a list (`callbacks=[default,mine]`)
                chosen = choices(group, self.config_dir)
            names = [each for each in chosen if own or is_global(f"{group}/{each}", self.config_dir)]
            for choice in names:  # grows by the files that they include
                if config_file(f"{group}/{choice}", self.config_dir):
                    yield f"{group}/{choice}"
                    names += members_of(group, choice, self.config_dir)
        yield from (self.config_name, self.root)


def _is_node(value: Any) -> bool:
    return isinstance(value, DictConfig) and "_target_" in value


def _members(value: Any, path: str) -> Iterator[tuple[str, DictConfig]]:
    """A mapping, or those in a list, without a class of their own."""
    several = list(value) if isinstance(value, ListConfig) else [value]
    for number, each in enumerate(several):
        if isinstance(each, DictConfig) and "_target_" not in each:
            yield f"{path}[{number}]" if isinstance(value, ListConfig) else path, each


def _text(value: Any) -> str:
    """A value as one writes it in an override."""
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _references(settings: Any) -> Iterator[str]:
    """The keys that interpolations refer to; `${..x}` is that of the node above."""
    for key, value in walk(settings):
        for dots, name in re.findall(r"\$\{(\.*)(\w[\w.]*)\}", value) if isinstance(value, str) else ():
            above = key.split(".")[: -len(dots)] if dots else []
            yield ".".join((*above, name))
