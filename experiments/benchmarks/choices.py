"""What "auto" chooses for `gptpl train`, compared with the best of all that can be chosen.

    python experiments/benchmarks/choices.py '{"text": ..., "tokens": ..., "batch": 2, "context": 256, ...}'

benchmark.py starts it, in the environment of the machine that is asked about. One process holds one model,
compiled and not; every combination of precision, compilation, attention and head trains it in turn, in a
bare loop. First each takes a step, and those more than a quarter slower than the fastest drop out; a
precision whose matrix products alone take longer than the other's whole step does not begin. The others take
turns. The best is found by one half of the turns, and compared with what was chosen by the other half: the
best of many noisy numbers would be too good. Compiling is counted, for the length of the run that "auto" was
told.
"""

import contextlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from contestants import DEVICE, Work, gptpl_run, gptpl_step, say
from measuring import config_of, noise, product_seconds
from torch import nn

from gptpl.model.gpt import MultiHeadAttention
from gptpl.model.protocol import blocks_of
from gptpl.training.performance import missing_tool

PLANNED = (90, 10_000)
HOPELESS = 1.25
LONG = 3.0  # seconds of a step that need no second one
TURNS, TURN_SECONDS, ALL_SECONDS = 8, 0.3, 150.0


@dataclass(frozen=True, order=True)
class Choice:
    """One way to train."""

    precision: str
    compile: str
    attention: str
    head: str

    def __str__(self) -> str:
        return " ".join((self.precision, *(["compiled"] * (self.compile == "on")), self.attention, self.head))


ALL = tuple(
    Choice(*each)
    for each in itertools.product(
        ("32-true", "bf16-mixed"), ("off", "on"), ("sdpa", "blocked"), ("fused", "plain")
    )
)


def main(work: Work, planned: tuple[int, ...] = PLANNED) -> dict[str, Any]:
    """Measures one shape: the record of what was chosen for each planned length, and of all steps."""
    chosen = {steps: chosen_by_itself(work, steps) for steps in planned}
    products = product_seconds(work.batch * work.context, config_of(work.size))
    steps = trainings(work)
    timed = screened(steps, products, keep={choice for choice, _ in chosen.values()})
    first = {str(choice): one["first"] for choice, one in timed.items()}
    rows = [
        row(choice, timed, planned_steps) | {"seconds_to_choose": seconds}
        for planned_steps, (choice, seconds) in chosen.items()
    ]
    return {
        "dropout": work.dropout,
        "products_seconds": products,
        "rows": rows,
        "noise": noise([one["turns"] for one in timed.values()]),
        "steps": {str(choice): one["turns"] or [one["once"]] for choice, one in sorted(timed.items())},
        "first": first,
    }


def chosen_by_itself(work: Work, planned: int) -> tuple[Choice, float]:
    """What a run of so many steps chooses, and the seconds it takes to build it."""
    began = time.perf_counter()
    run = gptpl_run(work, planned=planned)
    net = run.module.net
    # torch has no public way to ask whether a module is compiled in place.
    compiled = any(getattr(block, "_compiled_call_impl", None) for block in blocks_of(net) or [net])
    kernel = next(module.kernel for module in net.modules() if isinstance(module, MultiHeadAttention))
    choice = Choice(run.trainer.precision, "on" if compiled else "off", kernel, run.module.head)
    return choice, time.perf_counter() - began


def trainings(work: Work) -> dict[Choice, Callable[[], float]]:
    """For every choice a function that trains a step, of one model in two forms, compiled and not."""
    nets: dict[str, nn.Module] = {}
    for compile in ("off",) if missing_tool(DEVICE) else ("off", "on"):
        run = gptpl_run(
            work, f"trainer.compile={compile}", "trainer.precision=32-true", "trainer.attention=sdpa",
            "trainer.head=plain",
        )  # fmt: skip
        nets[compile] = run.module.net.to(DEVICE).train()
    if "on" in nets:
        nets["on"].load_state_dict(nets["off"].state_dict(keep_vars=True), assign=True)  # the same tensors
    optimizer = run.module.make_optimizer(nets["off"])
    batches = work.batches()

    def training(choice: Choice) -> Callable[[], float]:
        net = nets[choice.compile]
        attentions = [module for module in net.modules() if isinstance(module, MultiHeadAttention)]

        def step() -> float:
            for module in attentions:
                module.kernel = choice.attention  # type: ignore[assignment]
            inputs, targets = next(batches)
            began = time.perf_counter()
            gptpl_step(
                net, optimizer, inputs, targets, head=choice.head, low="bf16" in choice.precision,
                compiled=choice.compile == "on",
            )  # fmt: skip
            return time.perf_counter() - began

        return step

    on_cpu = DEVICE == "cpu"
    return {
        choice: training(choice)
        for choice in ALL
        if choice.compile in nets and (on_cpu or choice.attention == "sdpa")
    }


def screened(
    steps: dict[Choice, Callable[[], float]], products: dict[str, float], *, keep: set[Choice]
) -> dict[Choice, dict[str, Any]]:
    """Seconds of every choice that was not hopeless: its first step, one more, and its turns."""
    timed: dict[Choice, dict[str, Any]] = {}
    best = float("inf")
    bound = {"32-true": products["fp32"], "bf16-mixed": products["bf16"]}
    for choice in sorted(steps, key=lambda choice: (bound[choice.precision], choice.compile == "on")):
        if bound[choice.precision] > best and choice not in keep:
            continue
        if not timed:
            steps[choice]()  # warms up
        first = steps[choice]()
        long = choice.compile == "off" and first > LONG
        timed[choice] = {"first": first, "once": first if long else steps[choice](), "turns": []}
        best = min(best, timed[choice]["once"])
    hopeful = [choice for choice in timed if timed[choice]["once"] < HOPELESS * best or choice in keep]
    began = time.perf_counter()
    for turn in range(TURNS):
        if turn % 2 == 0 and turn >= 4 and time.perf_counter() - began > ALL_SECONDS:
            break
        for choice in hopeful if turn % 2 else reversed(hopeful):
            burst = max(1, round(TURN_SECONDS / timed[choice]["once"]))
            seconds = sum(steps[choice]() for _ in range(burst)) / burst
            timed[choice]["turns"].append(seconds)
    return timed


def row(choice: Choice, timed: dict[Choice, dict[str, Any]], planned: int) -> dict[str, Any]:
    """What was chosen, the best, and by how much a run of so many steps is longer than with the best."""

    def compiling(each: Choice) -> float:
        """Seconds that the first of those that share compiled blocks took more than a step."""
        others = [other for other in timed if replace(other, head=each.head) == each]
        first = max(timed[other]["first"] for other in others)
        return max(0.0, first - statistics.median(timed[each]["turns"])) * (each.compile == "on")

    def seconds(each: Choice, half: slice) -> list[float]:
        """Of the run, by each turn of that half."""
        return [planned * step + compiling(each) for step in timed[each]["turns"][half]]

    hopeful = [each for each in timed if timed[each]["turns"]]
    best = min(hopeful, key=lambda each: statistics.median(seconds(each, slice(0, None, 2))))
    other_half = slice(1, None, 2)
    pairs = zip(seconds(choice, other_half), seconds(best, other_half), strict=True)
    losses = [100 * (own / other - 1) for own, other in pairs]
    return {
        "planned": planned, "chosen": str(choice), "best": str(best),
        "loss_percent": statistics.median(losses), "least": min(losses), "most": max(losses),
    }  # fmt: skip


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        found = main(Work(**json.loads(sys.argv[1])))
    say(found)
