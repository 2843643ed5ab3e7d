"""Checks a composed config: a node with a `_target_` against the signature of its class, ours or the user's.

A key that the class does not take dies with the nearest right name, unless another setting refers to it: in
`data: {path: null, corpus: {path: ${data.path}}}` the first path is a short name of the second.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from hydra.core.override_parser.types import Override
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from gptpl.config.groups import Folder, choices, config_file, default_choices, is_global, members_of
from gptpl.config.instantiate import check_kind, locate, slot_of
from gptpl.config.messages import command_of, dotted, keys_of, known_keys, nearest_key
from gptpl.config.roots import NODES, ROOTS
from gptpl.config.signatures import Parameter, Signature, dataclass_in, signature_of, typed
from gptpl.errors import InputError
from gptpl.resuming import FREE, INEXACT, NEVER, NEXT_STEP, Resume
from gptpl.text import nearest

HYDRA_KEYS = ("_target_", "_partial_", "_convert_", "_recursive_", "_args_")


@dataclass(kw_only=True)
class TrainerExtras:
    """What gptpl decides itself of the node `trainer`; the other keys are those of `lightning.Trainer`."""

    precision: str
    max_epochs: int | None
    max_steps: int | None
    stop_at_step: int | None
    compile: Literal["auto", "on", "off"]
    attention: Literal["auto", "blocked", "sdpa"]
    head: Literal["auto", "fused", "plain"]
    recompute_activations: bool
    keep_freed_memory: bool | None


@dataclass(kw_only=True)
class DataExtras:
    """What the run decides of the node `data`."""

    batch_size: Annotated[int | Literal["auto"], INEXACT]
    global_batch_size: int | None
    max_length: int | None


@dataclass(kw_only=True)
class ModelExtras:
    """null until the tokenizer is known."""

    vocab_size: int | None


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A place in the config.

    Attributes:
        implicit: the class of a node that names none.
        extras: settings that are no class's, by a dataclass.
        at_runtime: what a run hands over when it builds the object.
        resume: what may become of a setting that does not say so itself.
    """

    implicit: str | None = None
    extras: type | None = None
    at_runtime: Sequence[str] = ()
    resume: Resume = NEVER


SLOTS: Mapping[str, Slot] = {
    "model": Slot(implicit="gptpl.model.GPTConfig", extras=ModelExtras),
    "tokenizer": Slot(extras=ModelExtras),
    "data": Slot(
        extras=DataExtras, at_runtime=("tokenizer", "seed", "eval_train_batches", "eval_val_batches")
    ),
    "task": Slot(at_runtime=("net", "tokenizer", "make_optimizer", "lr_factor", "total_steps", "run_config")),
    "optimizer": Slot(at_runtime=("net", "params"), resume=NEXT_STEP),
    "scheduler": Slot(at_runtime=("optimizer",), resume=NEXT_STEP),
    "trainer": Slot(implicit="lightning.Trainer", extras=TrainerExtras),
    "callbacks": Slot(resume=FREE),
    "logger": Slot(resume=FREE),
    "sampling": Slot(implicit="gptpl.generation.SamplingRules"),
    "hydra.launcher": Slot(at_runtime=("folder",)),
}
_RESUME_OF_TRAINER: Mapping[str, Resume] = {
    **dict.fromkeys(("max_epochs", "max_steps", "gradient_clip_val", "gradient_clip_algorithm"), NEXT_STEP),
    **dict.fromkeys(
        ("accelerator", "devices", "num_nodes", "strategy", "precision", "compile", "attention", "head"),
        INEXACT,
    ),
    **dict.fromkeys(
        (
            *("max_time", "stop_at_step", "log_every_n_steps", "recompute_activations", "keep_freed_memory"),
            *("profiler", "detect_anomaly", "num_sanity_val_steps", "enable_model_summary", "inference_mode"),
            *("limit_val_batches", "limit_test_batches", "limit_predict_batches"),
        ),
        FREE,
    ),
}
"""Of `lightning.Trainer`, whose signature cannot say it."""
MAY_BE_NULL = ("callbacks", "experiment", "init", "logger", "model", "sampling", "tokenizer")
"""Groups of which a command may have no choice."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What messages need beside the config."""

    root: str
    extended_by: str | None
    config_dir: Folder | None
    given: frozenset[str]
    used: frozenset[str]
    only: frozenset[str] | None
    choices: Mapping[str, Any]

    def is_right(self, path: str) -> bool:
        """Whether a key need not be checked."""
        if self.only is None:
            return False
        return not any(path == each or path.startswith(f"{each}.") for each in self.only)


def check(
    cfg: DictConfig,
    *,
    root: str,
    extended_by: str | None = None,
    overrides: Sequence[Override] = (),
    config_dir: Folder | None = None,
    only: frozenset[str] | None = None,
    written: DictConfig | None = None,
) -> None:
    """Raises InputError for a setting that nothing takes, of another type, or missing; settles number types.

    `root` is a command's; `extended_by` a root of the user's own that was taken. `overrides` are those of the
    command line, to tell its mistakes from those in a YAML. With `only`, what does not belong to one of
    these keys is right already: it is a run's own. `written` is the config before its interpolations were
    filled in.
    """
    groups = default_choices(root, config_dir)
    raw = OmegaConf.to_container(cfg if written is None else written, resolve=False)
    context = Context(
        root=root,
        extended_by=extended_by,
        config_dir=config_dir,
        given=frozenset(each.key_or_group for each in overrides) - set(groups),
        used=frozenset(_references(raw)),
        only=only,
        choices=cfg.get("choices") or {},
    )
    own = {name: kind for (of, name), kind in NODES.items() if of == root}
    _check_values(
        cfg, "", signature_of(ROOTS[root]).parameters, context, known={*groups, *own, "choices"}, open=False
    )
    for name, kind in own.items():
        _check_values(cfg[name], name, signature_of(kind).parameters, context, known=())
    for key in groups:
        if key in cfg and key not in own:
            check_node(cfg, key, context)


def check_launcher(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of hydra.launcher, checked against the signature of what they name."""
    cfg = OmegaConf.create({"hydra": {"launcher": dict(settings)}})
    none: frozenset[str] = frozenset()
    context = Context(
        root="sweep", extended_by=None, config_dir=None, given=none, used=none, only=None, choices={}
    )
    check_node(cfg, "hydra.launcher", context)
    found = OmegaConf.to_container(cfg.hydra.launcher)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def check_node(cfg: DictConfig, key: str, context: Context) -> None:
    """The node of a group, or of one callback or logger, and what is nested in it."""
    node = OmegaConf.select(cfg, key) if not OmegaConf.is_missing(cfg, key) else None
    slot = slot_of(key)
    if node is None and key in MAY_BE_NULL:
        if context.root == "train" and key in ("model", "tokenizer"):
            raise InputError(
                f"{key}=null leaves the run without a {key}: choose one of {_offer(key, context)}"
            )
        return
    if (
        key == "data"
        and context.root == "evaluate"
        and isinstance(node, DictConfig)
        and "_target_" not in node
    ):
        kept = ("batch_size", "max_length")
        settings = {name: each for name, each in signature_of(DataExtras).parameters.items() if name in kept}
        _check_values(node, key, settings, context, known=(), of="the run's own data")
        return
    if not isinstance(node, DictConfig):
        raise InputError(f"{key}={node} is no choice of {key}: choose one of {_offer(key, context)}")
    if key in ("callbacks", "logger"):
        for member in map(str, node):
            if node[member] is not None:
                check_node(cfg, f"{key}.{member}", context)
        return
    place = SLOTS.get(slot, Slot())
    name: Any = node.get("_target_") or place.implicit
    if name is None or name == MISSING:
        raise InputError(_no_class(key, node, context))
    target = locate(str(name), f"{key}._target_")
    check_kind(target, slot, f"{key}._target_={name}")
    signature = settings_of(target, slot)
    _check_values(
        node, key, signature.parameters, context, known=HYDRA_KEYS, open=signature.open, of=str(name)
    )
    _check_given(node, key, signature, place, context)
    for child in map(str, node):
        if OmegaConf.is_interpolation(node, child) or OmegaConf.is_missing(node, child):
            continue  # what it refers to is checked where it stands
        for path, nested in _nested(node[child], f"{key}.{child}"):
            if isinstance(nested, DictConfig):
                check_node(cfg, path, context)


def settings_of(target: Any, slot: str) -> Signature:
    """The settings that a node may have: its class's, with what the slot adds."""
    found = signature_of(target)
    extras = SLOTS.get(slot, Slot()).extras
    if extras is None:
        return found
    added = dict(signature_of(extras).parameters)
    if slot == "data":  # whether they must be given says the class that takes them
        of_class = {name: each.required for name, each in found.parameters.items()}
        added = {
            name: replace(each, required=of_class.get(name, False))
            for name, each in added.items()
            if name in of_class or name == "global_batch_size"
        }
    return Signature(parameters={**found.parameters, **added}, open=found.open)


def resume_of(key: str, settings: Mapping[str, Any]) -> Resume:
    """What may become of a setting on resume, by its dotted key in the settings of a run.

    The class that takes it says so; where its slot and class say nothing, it cannot change.
    """
    first, _, rest = key.partition(".")
    if not rest or first == "choices":
        of_root = signature_of(ROOTS["train"]).parameters.get(first)
        return FREE if first == "choices" else (of_root and of_root.resume) or SLOTS.get(first, Slot()).resume
    if first in ("callbacks", "logger"):
        return FREE
    if first == "trainer":
        return _RESUME_OF_TRAINER.get(rest.partition(".")[0], NEVER)
    if first == "tokenizer" or rest.endswith(HYDRA_KEYS):
        return NEXT_STEP if first == "scheduler" else NEVER
    parent, _, name = key.rpartition(".")
    holder: Any = settings
    for part in parent.split("."):
        holder = holder.get(part) if isinstance(holder, Mapping) else None
    if not isinstance(holder, Mapping):
        return SLOTS.get(first, Slot()).resume
    slot = slot_of(parent)
    target = holder.get("_target_") or SLOTS.get(slot, Slot()).implicit
    parameters = settings_of(locate(str(target), parent), slot).parameters if target else {}
    if name in parameters:
        return parameters[name].resume or SLOTS.get(slot, Slot()).resume
    # The short name of a nested setting.
    inner = [
        f"{parent}.{child}.{name}" for child, value in holder.items() if _is_node(value) and name in value
    ]
    kinds = {resume_of(each, settings) for each in inner}
    return kinds.pop() if len(kinds) == 1 else SLOTS.get(first, Slot()).resume


def _is_node(value: Any) -> bool:
    return isinstance(value, Mapping) and "_target_" in value


def _check_values(
    node: DictConfig,
    prefix: str,
    parameters: Mapping[str, Parameter],
    context: Context,
    *,
    known: Sequence[str] | set[str],
    open: bool = False,
    of: str = "",
) -> None:
    """Names and types of one node; writes a value back where its type settles it (1 for a float is 1.0)."""
    for key in map(str, list(node)):
        path = f"{prefix}.{key}" if prefix else key
        if key in known or context.is_right(path):
            continue
        if key not in parameters:
            if open or any(each == path or each.startswith(f"{path}.") for each in context.used):
                continue
            raise InputError(_unknown(path, key, [*parameters], of, context))
        if OmegaConf.is_missing(node, key):
            continue
        try:
            value = node[key]
            value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except OmegaConfBaseException as error:
            if path == "model.vocab_size" and isinstance(error, InterpolationKeyError):
                continue  # the tokenizer is the checkpoint's
            raise InputError(f"{path}: {' '.join(str(error).split())}{_origin(path, context)}") from error
        if value is None and OmegaConf.is_interpolation(node, key):
            continue  # known once there is a run: its folder, the size of a vocabulary
        _check_fields(value, parameters[key].annotation, path, context)
        try:
            found = typed(value, parameters[key].annotation)
        except ValueError as error:
            raise InputError(_ill_typed(path, value, str(error), _origin(path, context), context)) from error
        if (type(found) is not type(value) or found != value) and not OmegaConf.is_interpolation(node, key):
            node[key] = found


def _check_fields(value: Any, annotation: Any, path: str, context: Context) -> None:
    """Names and types in mappings that become a dataclass, such as the strategies of sampling."""
    kind = dataclass_in(annotation)
    if kind is None or _is_node(value):
        return
    fields = signature_of(kind).parameters
    for number, each in enumerate(value if isinstance(value, list) else [value]):
        place = f"{path}[{number}]" if isinstance(value, list) else path
        for name, inner in each.items() if isinstance(each, Mapping) else ():
            where = _origin(path, context)
            if name not in fields:
                offer = nearest(str(name), fields) or f": it takes {', '.join(fields)}"
                raise InputError(f"{place}.{name}{where} is no setting of {kind.__name__}{offer}")
            try:
                typed(inner, fields[name].annotation)
            except ValueError as error:
                raise InputError(_ill_typed(f"{place}.{name}", inner, str(error), where, context)) from error


def _check_given(node: DictConfig, key: str, signature: Signature, place: Slot, context: Context) -> None:
    for name, each in signature.parameters.items():
        if (
            each.required
            and name not in node
            and name not in place.at_runtime
            and not (each.positional and key.partition(".")[0] in ("optimizer", "scheduler"))
        ):
            if key == "task" or key.startswith("model") or context.is_right(f"{key}.{name}"):
                continue  # what the run hands over, or its own class asks for
            raise InputError(f"{key}.{name} is not set: give {key}.{name}=VALUE")


def _nested(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Nodes with a class inside a node."""
    if isinstance(value, DictConfig) and "_target_" in value:
        yield path, value


def _unknown(path: str, key: str, names: list[str], of: str, context: Context) -> str:
    """A key that nothing takes."""
    first, _, rest = path.partition(".")
    where = _origin(path, context)
    if not rest:
        known = known_keys(context.root, context.config_dir)
        everywhere = [*names, *(each for each in known if each != path)]
        return f"{path}{where} is no key of gptpl {command_of(context.root)}{nearest_key(path, everywhere)}"
    # A YAML's own mistake is no sign that the key is one of its choice.
    others = [] if where.startswith(f" in {first}/") else _choices_with(first, rest, context)
    if others:
        choice = " or ".join(others)
        if where:
            return f"{where[4:]} sets {path}, a key of {choice}: keep that choice, or leave the key out"
        return f"{path} is a key of {choice}: add that, or leave {path} out"
    prefix = path[: -len(key)]
    short = [each[len(prefix) :] for each in context.used if each.startswith(prefix)]
    meant = nearest(key, [*names, *short, *HYDRA_KEYS[:1]], prefix=prefix)
    taken = "" if meant else f": it takes {', '.join(names)}" if names else ": it takes none"
    owner = of.rpartition(".")[2] or f"gptpl {command_of(context.root)}"
    return f"{path}{where} is no setting of {owner}{meant or taken}"


def _choices_with(group: str, key: str, context: Context) -> list[str]:
    """The choices of a group whose YAML sets a key."""
    found = []
    for choice in choices(group, context.config_dir):
        file = config_file(f"{group}/{choice}", context.config_dir)
        content = OmegaConf.load(file) if file else None
        if isinstance(content, DictConfig) and key in dotted(OmegaConf.to_container(content)):
            found.append(f"{group}={choice}")
    return found


def _ill_typed(path: str, value: Any, reason: str, where: str, context: Context) -> str:
    if reason.startswith("choose one of"):
        return f"{path}={_text(value)}{where} is unknown: {reason}"
    return (
        f"{path}={_text(value)}{where} cannot be taken: {reason}; see gptpl {command_of(context.root)} --help"
    )


def _text(value: Any) -> str:
    """A value as one gives it in an override."""
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _no_class(key: str, node: DictConfig, context: Context) -> str:
    """A node without `_target_`: a callback or logger whose name is misspelt, or a misspelt `_target_`."""
    for child in map(str, node):
        path = f"{key}.{child}"
        if nearest(child, ["_target_"], likeness=0.8):
            return f"{path}{_origin(path, context)} is no setting: did you mean {key}._target_?"
        known = [each for each in known_keys(context.root, context.config_dir) if each != path]
        if meant := "." in key and nearest(path, known, likeness=0.8):
            return f"{path}{_origin(path, context)} belongs to nothing{meant}"
    return f"{key} names no class: give {key}._target_=package.Class"


def _origin(path: str, context: Context) -> str:
    """The YAML that a key stands in, where the command line does not have it: of those chosen, the last."""
    parts = path.split(".")
    if any(".".join(parts[:end]) in context.given for end in range(1, len(parts) + 1)):
        return ""
    for name, group in _files(parts[0], context):
        if path in keys_of(name, group, context.config_dir):
            return f" in {name}.yaml"
    return ""


def _files(first: str, context: Context) -> Iterator[tuple[str, str]]:
    """The YAML files that may set a key which begins so, each with its group; what comes last goes first."""
    for group in reversed(default_choices(context.root, context.config_dir)):
        own = group.partition("/")[0] == first
        chosen = context.choices.get(group)
        # The choices of a list (`callbacks=[default,mine]`) are not recorded.
        several = choices(group, context.config_dir) if own and group not in context.choices else [chosen]
        for choice in several:
            file = config_file(f"{group}/{choice}", context.config_dir)
            if file is not None and (own or is_global(file)):
                yield from (
                    (f"{group}/{name}", group.replace("/", "."))
                    for name in _with_bases(group, str(choice), context)
                )
    yield from ((name, "") for name in (context.extended_by, context.root) if name is not None)


def _with_bases(group: str, choice: str, context: Context) -> Iterator[str]:
    yield choice
    for name in members_of(group, choice, context.config_dir):
        yield from _with_bases(group, name, context)


def _offer(group: str, context: Context) -> str:
    return ", ".join(choices(group.partition(".")[0], context.config_dir))


def _references(value: Any) -> Iterator[str]:
    """The keys that interpolations refer to."""
    if isinstance(value, str):
        yield from re.findall(r"\$\{([\w.]+)\}", value)
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _references(each)
    elif isinstance(value, list):
        for each in value:
            yield from _references(each)
