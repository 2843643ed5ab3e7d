"""Settings of runs on one level, and which of them differ."""

from collections.abc import Mapping, Sequence
from typing import Any

LEFT_OUT = ("callbacks", "logger", "run_dir", "resume")
"""Settings that say where a run writes and what it shows, not what it learns."""

Setting = bool | int | float | str


def flat_settings(
    config: Mapping[str, Any], prefix: str = "", *, left_out: Sequence[str] = LEFT_OUT
) -> dict[str, Setting]:
    """A nested configuration as one level: `{"model": {"n_layers": 2}}` becomes `{"model.n_layers": 2}`.

    Left out are Hydra's own keys (`_partial_`) and, at the top, `left_out`; a class (`_target_`) becomes its
    last name.
    """
    flat: dict[str, Setting] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if name in left_out or key == "_partial_":
            continue
        if key == "_target_":
            flat[prefix.removesuffix(".")] = str(value).rpartition(".")[2]
        elif isinstance(value, Mapping):
            flat |= flat_settings(value, f"{name}.", left_out=left_out)
        else:
            flat[name] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat


def differing(settings: Sequence[Mapping[str, Setting]]) -> list[str]:
    """The names whose values are not the same in all, a missing one being a value of its own.

    In the order in which the first of them have these names.
    """
    names = list(dict.fromkeys(name for each in settings for name in each))
    return [name for name in names if len({repr(each.get(name)) for each in settings}) > 1]
