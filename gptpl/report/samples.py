"""What runs made of the same prompt by the same strategy."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptpl.report.amounts import setting_text, whole
from gptpl.report.palette import COLOURS
from gptpl.report.ranking import Entry

MOST_TEXTS = len(COLOURS)
LEFT_OUT = "Left out: {} of lower rank."


@dataclass(frozen=True, kw_only=True)
class SharedPrompt:
    """A prompt, how it was continued, and the runs' last continuations, the best run first."""

    prompt: str
    strategy: str
    texts: Sequence[tuple[Entry, str, str]]
    """Run, when (such as `step 1,200`), continuation."""
    left_out: int
    """Runs with such a sample that are not among the first ones."""


def shared_prompts(entries: Sequence[Entry]) -> list[SharedPrompt]:
    """The prompts and strategies that two runs or more have, or all of a single run, in the runs' order."""
    runs = [entry for entry in entries if entry.run is not None]
    found: dict[str, list[tuple[Entry, Mapping[str, Any]]]] = {}
    for entry in runs:
        for key, sample in _last_samples(entry).items():
            found.setdefault(key, []).append((entry, sample))
    needed = min(2, len(runs))
    return [_shared(made) for made in found.values() if len(made) >= needed]


def _last_samples(entry: Entry) -> dict[str, Mapping[str, Any]]:
    samples = entry.run.samples() if entry.run is not None else []
    return {
        json.dumps([sample["prompt"], sample.get("strategy")], sort_keys=True): sample
        for sample in samples
        if isinstance(sample.get("prompt"), str) and isinstance(sample.get("continuation"), str)
    }


def _shared(made: Sequence[tuple[Entry, Mapping[str, Any]]]) -> SharedPrompt:
    first = made[0][1]
    return SharedPrompt(
        prompt=first["prompt"],
        strategy=_strategy_text(first.get("strategy")),
        texts=[(entry, _when(sample), sample["continuation"]) for entry, sample in made[:MOST_TEXTS]],
        left_out=max(len(made) - MOST_TEXTS, 0),
    )


def _when(sample: Mapping[str, Any]) -> str:
    step = sample.get("step")
    return f"step {whole(step)}" if isinstance(step, int) else ""


def _strategy_text(strategy: Any) -> str:
    if not isinstance(strategy, dict):
        return ""
    if strategy.get("temperature") == 0 and not any(
        value for name, value in strategy.items() if name != "temperature"
    ):
        return "greedy"
    given = {name: value for name, value in strategy.items() if value is not None}
    return ", ".join(
        f"{name} {setting_text(value if isinstance(value, bool | int | float) else str(value))}"
        for name, value in given.items()
    )
