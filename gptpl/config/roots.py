"""Names and types of the settings at the root of each command's config.

A type is inferred from the default in the YAML: `port: 8000` is an int, `prompt: null` a str or null. `TYPES`
declares what a default does not tell. Settings of config groups are left out: their classes declare them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import make_dataclass
from functools import cache
from types import NoneType
from typing import Annotated, Any, Literal

from pydantic import PositiveInt

from gptpl.config.groups import content, default_choices, said_by
from gptpl.settings import FREE, INEXACT, NEXT_STEP, NOT_NEGATIVE, POSITIVE, SEED, SIZE

TYPES: dict[str, dict[str, Any]] = {
    "train": {
        "name": Annotated[str | None, FREE],
        "resume": Annotated[str | None, FREE],
        "trust": Annotated[Sequence[str], FREE],
        "tags": Annotated[Sequence[str], FREE],
        "notes": Annotated[str | None, FREE],
        "seed": Annotated[int, SEED],
        "deterministic": Annotated[bool, INEXACT],
        "on_nonfinite": Annotated[Literal["stop", "rollback"], NEXT_STEP],
        "skip_steps": Annotated[Sequence[int], NEXT_STEP],
        "eval_every_n_steps": Annotated[int, NEXT_STEP, POSITIVE],
        "eval_train_batches": Annotated[int | None, NEXT_STEP],
        "eval_val_batches": Annotated[int | None, NEXT_STEP],
    },
    "submit": {
        "submit": {
            "nodes": PositiveInt,
            "gpus_per_node": Annotated[int, NOT_NEGATIVE],
            "time": str | int | None,
            "cpus_per_task": PositiveInt | None,
            "mem": str | int | None,
            "max_requeues": Annotated[int, NOT_NEGATIVE],
        },
    },
    "plan": {
        "plan": {
            "timed_steps": int | None,
            "nodes": int | None,  # limits of these: gptpl.runs.parallel_plan.Cluster
            "devices_per_node": int | None,
            "memory_gb": float | None,
            "tflops": float | None,
            "gb_per_second_within": float | None,
            "gb_per_second_between": float | None,
            "microseconds_per_hop": float | None,
        },
    },
    "data_show": {
        "output": str | None,
        "sequences": Annotated[int, NOT_NEGATIVE],
        "sample_bytes": Annotated[int | None, SIZE],
    },
    "find_batch_size": {"find": {"max_batch_size": int | None}},
    "verify_resume": {"verify": {"stops": Sequence[int] | None}},
    "generate": {"num_beams": int | None, "seed": Annotated[int | None, SEED], "alternatives": int | None},
    "respond": {
        "split": Literal["train", "val", "test"] | None,
        "input_column": str | None,
        "too_long": Literal["refuse", "skip"],
        "max_new_tokens": PositiveInt,
        "batch_size": PositiveInt,
        "seed": Annotated[int | None, SEED],
    },
    "serve": {  # limits of these: gptpl.serving.server.ServerSettings
        "names": Sequence[str] | None,
        "requests_per_minute": int | None,
        "timeout_s": float,
        "grace_s": float,
    },
    "classify": {"columns": Sequence[str] | None, "batch_size": PositiveInt},
    "evaluate": {"data": {"max_length": int | None}},  # of the model's own run
    "inspect": {"tabs": Sequence[str] | None},
    "sweep": {
        "sweep": {
            "n_trials": int | None,
            "params": dict[str, Any],  # settings to sweep over, each with its values in Hydra's grammar
            "mode": Literal["min", "max"] | None,
        },
    },
    "tokenizer_train": {"tokenizer": {"vocab_size": PositiveInt, "sample_bytes": PositiveInt | None}},
    "doctor": {"doctor": {"seconds": Annotated[float, POSITIVE], "megabytes": PositiveInt}},
}
"""Types of settings by root, those of a node such as `find` in `find.steps` below its name."""
_OF_DEFAULTS: dict[type, Any] = {NoneType: str | None, list: Sequence[str]}
"""The inferred type by the type of the default, where they differ."""


@cache
def settings_of_root(root: str) -> type:
    """A dataclass of the settings of a root, also of one that it extends; its nodes are dataclasses, too."""
    bases, defaults = content(root)
    types = TYPES.get(root, {})
    for base in bases:
        types, defaults = TYPES[base] | types, content(base)[1] | defaults
    for group, choice in default_choices(root).items():
        own = defaults.pop(group, {})
        if group in types:  # its node has no class: `sweep`, `data` of the model's own run
            defaults[group] = said_by(group, choice) | own
    return _settings(root, types, defaults)


def _settings(name: str, types: Mapping[str, Any], defaults: Mapping[str, Any]) -> type:
    fields: list[tuple[str, Any]] = []
    for key in {**defaults, **types}:
        kind, default = types.get(key), defaults.get(key)
        if isinstance(kind, dict) or (kind is None and isinstance(default, dict)):
            kind = _settings(key, kind or {}, default or {})
        elif kind is None:
            kind = _OF_DEFAULTS.get(type(default), type(default))
        fields.append((key, kind))
    return make_dataclass(name, fields, kw_only=True)
