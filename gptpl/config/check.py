"""Checks a composed config: a node with a `_target_` against the signature of its class, ours or the user's.

A key that the class does not take dies with the nearest right name, unless another setting refers to it: in
`data: {path: null, corpus: {path: ${data.path}}}` the first path is a short name of the second.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from gptpl.config.groups import (
    Folder,
    choices,
    choices_with,
    config_file,
    default_choices,
    dotted,
    is_global,
    keys_of,
    known_keys,
    root_of,
    walk,
    with_members,
)
from gptpl.config.instantiate import check_kind
from gptpl.config.overrides import command_of, nearest_key
from gptpl.config.roots import ROOTS
from gptpl.config.signatures import Signature, dataclass_in, locate, signature_of, typed
from gptpl.config.slots import HYDRA_KEYS, SLOTS, Slot, settings_of, slot_of
from gptpl.errors import InputError
from gptpl.text import closest, nearest


def check(
    cfg: DictConfig,
    config_name: str = "train",
    *,
    overrides: Sequence[Override] = (),
    config_dir: Folder | None = None,
    only: frozenset[str] | None = None,
    written: DictConfig | None = None,
) -> None:
    """Raises InputError for a setting that nothing takes, of another type, or missing; settles number types.

    `overrides` are those of the command line, to tell its mistakes from those in a YAML. With `only`, what
    does not belong to one of these keys is right already: it is a run's own. `written` is the config before
    its interpolations were filled in.
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
    )
    own = signature_of(ROOTS[root])
    # A node of the root's own may name a class instead: `data` of gptpl evaluate.
    nodes = [each for each in groups if each in cfg and (each not in own.parameters or _is_node(cfg[each]))]
    checked.values(cfg, "", own, known={*nodes, "choices"})
    for key in nodes:
        checked.node(cfg, key)


def check_launcher(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of hydra.launcher, checked against the signature of what they name."""
    cfg = OmegaConf.create({"hydra": {"launcher": dict(settings)}})
    _Check(root="sweep").node(cfg, "hydra.launcher")
    found = OmegaConf.to_container(cfg.hydra.launcher)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


@dataclass(frozen=True, kw_only=True)
class _Check:
    """The check of a config, with what its messages need beside it."""

    root: str
    config_name: str = ""
    config_dir: Folder | None = None
    given: frozenset[str] = frozenset()
    used: frozenset[str] = frozenset()
    only: frozenset[str] | None = None
    choices: Mapping[str, Any] = field(default_factory=dict)

    @property
    def command(self) -> str:
        return f"gptpl {command_of(self.root)}"

    def is_right(self, path: str) -> bool:
        """Whether a key need not be checked."""
        key = path.partition("[")[0]  # a list is checked with its members
        return self.only is not None and not any(f"{key}.".startswith(f"{each}.") for each in self.only)

    def node(self, cfg: DictConfig, key: str) -> None:
        """The node of a group, or of one callback or logger, and what is nested in it."""
        place = slot_of(key)
        node = None if OmegaConf.is_missing(cfg, key) else OmegaConf.select(cfg, key)
        if node is None and (
            place.optional or default_choices(self.root, self.config_dir).get(key) == "null"
        ):
            return
        if not isinstance(node, DictConfig):
            offered = choices(key.partition(".")[0], self.config_dir)
            raise InputError(f"{key}={_text(node)} is no choice of {key}: choose one of {', '.join(offered)}")
        if place.several and "." not in key:
            for member in map(str, node):
                if node[member] is not None:
                    self.node(cfg, f"{key}.{member}")
            return
        name = node.get("_target_") or place.implicit
        if name is None or name == MISSING:
            raise InputError(self._no_class(key, node))
        target = locate(str(name), f"{key}._target_")
        check_kind(target, key, f"{key}._target_={name}")
        signature = settings_of(target, key)
        self.values(node, key, signature, known=HYDRA_KEYS, of=str(name))
        around = SLOTS.get(key.partition(".")[0], Slot())
        for each, parameter in signature.parameters.items():
            lenient = place.lenient or key.startswith("model.")
            handed_over = lenient or each in place.at_runtime
            by_position = around.by_position and parameter.positional
            needed = parameter.required and not (handed_over or by_position)
            if needed and each not in node and not self.is_right(f"{key}.{each}"):
                raise InputError(f"{key}.{each} is not set: give {key}.{each}=VALUE")
        for child in map(str, node):
            if OmegaConf.is_interpolation(node, child) or OmegaConf.is_missing(node, child):
                continue  # what it refers to is checked where it stands
            if _is_node(node[child]):
                self.node(cfg, f"{key}.{child}")

    def values(
        self, node: DictConfig, prefix: str, takes: Signature, *, known: Collection[str] = (), of: str = ""
    ) -> None:
        """Names and types of one node; writes a value back where its type settles it (1 to 1.0)."""
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
                where = self._origin(path)
                if str(error).startswith("choose one of"):
                    raise InputError(f"{path}={_text(plain)}{where} is unknown: {error}") from error
                raise InputError(
                    f"{path}={_text(plain)}{where} cannot be taken: {error}; see {self.command} --help"
                ) from error
            if (type(found) is not type(plain) or found != plain) and not by_reference:
                node[key] = found

    # ------------------------------------------------------------------------------------------- messages

    def _unknown(self, node: DictConfig, path: str, names: list[str], of: str) -> str:
        """A key that nothing takes."""
        first, _, rest = path.partition(".")
        where = self._origin(path)
        if not rest:
            known = known_keys(self.root, self.config_dir)
            everywhere = [*names, *(each for each in known if each != path)]
            return f"{path}{where} is no key of {self.command}{nearest_key(path, everywhere)}"
        # A YAML's own mistake is no sign that the key is one of its choice.
        others = [] if where.startswith(f" in {first}/") else choices_with(first, rest, self.config_dir)
        if others:
            choice = " or ".join(others)
            if where:
                return f"{where[4:]} sets {path}, a key of {choice}: keep that choice, or leave the key out"
            return f"{path} is a key of {choice}: add that, or leave {path} out"
        parent, _, key = path.rpartition(".")
        prefix = "" if "[" in parent else f"{parent}."
        short = [each.removeprefix(prefix) for each in self.used if each.startswith(prefix)]
        inner = [each for each in dotted(OmegaConf.to_container(node)) if "." in each]
        ends = {each.rpartition(".")[2]: each for each in inner}
        meant = closest(key, [*names, *short, HYDRA_KEYS[0]]) or ends.get(closest(key, ends))
        taken = f": it takes {', '.join(names)}" if names else ": it takes none"
        offer = f": did you mean {prefix}{meant}?" if meant else taken
        return f"{path}{where} is no setting of {of.rpartition('.')[2] or self.command}{offer}"

    def _no_class(self, key: str, node: DictConfig) -> str:
        """A node without `_target_`: a callback whose name is misspelt, or a misspelt `_target_`."""
        for child in map(str, node):
            path = f"{key}.{child}"
            if nearest(child, ["_target_"], likeness=0.8):
                return f"{path}{self._origin(path)} is no setting: did you mean {key}._target_?"
            known = [each for each in known_keys(self.root, self.config_dir) if each != path]
            if meant := "." in key and nearest(path, known, likeness=0.8):
                return f"{path}{self._origin(path)} belongs to nothing{meant}"
        return f"{key} names no class: give {key}._target_=package.Class"

    def _origin(self, path: str) -> str:
        """The YAML that a key stands in, where no override has it: of those chosen, the last."""
        path = path.partition("[")[0]  # of a list's members
        parts = path.split(".")
        if any(".".join(parts[:end]) in self.given for end in range(1, len(parts) + 1)):
            return ""
        for name, group in self._files(parts[0]):
            if path in keys_of(name, group, self.config_dir):
                return f" in {name}.yaml"
        return ""

    def _files(self, first: str) -> Iterator[tuple[str, str]]:
        """The YAML files that may set a key which begins so, each with its group; the last comes first."""
        for group in reversed(default_choices(self.root, self.config_dir)):
            own = group.partition("/")[0] == first
            chosen = [str(self.choices.get(group))]
            if own and group not in self.choices:  # as with a list (`callbacks=[default,mine]`)
                chosen = choices(group, self.config_dir)
            for choice in chosen:
                name = f"{group}/{choice}"
                if config_file(name, self.config_dir) and (own or is_global(name, self.config_dir)):
                    for each in with_members(group, choice, self.config_dir):
                        yield f"{group}/{each}", group.replace("/", ".")
        yield from ((name, "") for name in (self.config_name, self.root))


def _is_node(value: Any) -> bool:
    return isinstance(value, DictConfig) and "_target_" in value


def _members(value: Any, path: str) -> Iterator[tuple[str, DictConfig]]:
    """A mapping, or those in a list, without a class of their own."""
    several = list(value) if isinstance(value, ListConfig) else [value]
    for number, each in enumerate(several):
        if isinstance(each, DictConfig) and "_target_" not in each:
            yield f"{path}[{number}]" if isinstance(value, ListConfig) else path, each


def _text(value: Any) -> str:
    """A value as one gives it in an override."""
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _references(settings: Any) -> Iterator[str]:
    """The keys that interpolations refer to; `${..x}` is that of the node above."""
    for key, value in walk(settings):
        for dots, name in re.findall(r"\$\{(\.*)(\w[\w.]*)\}", value) if isinstance(value, str) else ():
            above = key.split(".")[: -len(dots)] if dots else []
            yield ".".join((*above, name))
