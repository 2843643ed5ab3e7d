"""GPT-2 1558M on 1 to 1,024 H100s, on paper: the best strategy by the functions of `gptpl plan`.

    python experiments/data_parallel/scaling.py

Allocates nothing, takes seconds. Prints the tables of the README and draws scaling.png next to this file.
"""

import argparse
from pathlib import Path

from gptpl.files.figures import figure_pixels, new_figure, write_png
from gptpl.model import GPTConfig
from gptpl.runs.parallel_plan import Cluster, ParallelPlan, Strategy, parallel_plan, work_of
from gptpl.training.performance import choose_fast_path

HERE = Path(__file__).parent
XL = GPTConfig(
    vocab_size=50257, context_length=1024, emb_dim=1600, n_heads=25, n_layers=48, drop_rate=0.0,
    qkv_bias=True, tie_weights=True, init="gpt2",
)  # fmt: skip
SEQUENCES = {"0.5M": 512, "4M": 4096}  # of 1,024 tokens in an optimizer step
DEVICES = [2**power for power in range(11)]
PER_NODE = 8
NAMES = ("DDP", "FSDP", "HSDP")
TRAINED_TOKENS = 20 * XL.n_parameters


def planned(devices: int, sequences: int) -> ParallelPlan:
    """The strategies for so many H100s, eight in a node."""
    path = choose_fast_path(
        device_type="cpu",
        precision="bf16-mixed",
        total_steps=1,
        attention="sdpa",
        head="fused",
        compile="off",
    )
    work = work_of(XL, path, sequences=sequences, max_length=XL.context_length, low=True)
    nodes = -(-devices // PER_NODE)
    return parallel_plan(work, Cluster(nodes=nodes, devices_per_node=min(PER_NODE, devices)))


def main() -> None:
    """Prints the tables and draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=HERE, help="folder of scaling.png (default: here)")
    options = parser.parse_args()
    plans = {
        name: [planned(devices, sequences) for devices in DEVICES if devices <= sequences]
        for name, sequences in SEQUENCES.items()
    }
    for name, of_size in plans.items():
        print(f"\n{name} tokens a step\n")
        print("\n".join(table(of_size)))
    draw(plans, options.output / "scaling.png")


def table(plans: list[ParallelPlan]) -> list[str]:
    """Markdown: a row for each number of devices, the strategies with memory and step side by side."""
    heads = [f"{name}: GB, batch, ms" for name in NAMES]
    lines = [
        f"| GPUs | {' | '.join(heads)} | best | of ideal | 31B tokens take |",
        "|---|" + "---|" * (len(NAMES) + 3),
    ]
    for plan in plans:
        best = plan.strategies[0]
        steps = TRAINED_TOKENS / (plan.work.sequences * plan.work.max_length)
        last = (best.layout.name, f"{best.efficiency:.0%}", f"{steps * best.step_seconds / 3600:,.1f} h")
        cells = [cell(named(plan, name)) for name in NAMES]
        lines.append(f"| {plan.cluster.devices:,} | {' | '.join((*cells, *last))} |")
    return lines


def named(plan: ParallelPlan, name: str) -> Strategy | None:
    """The strategy of a plan whose name begins so."""
    return next((each for each in plan.strategies if each.layout.name.startswith(name)), None)


def cell(strategy: Strategy | None) -> str:
    """Memory of a device, batch and milliseconds of a step."""
    if strategy is None:
        return "-"
    batch = f"{strategy.batch_size} x {strategy.accumulate}{', recomputed' if strategy.recompute else ''}"
    return f"{strategy.memory.peak / 1e9:.0f}, {batch}, {1e3 * strategy.step_seconds:,.0f}"


def draw(plans: dict[str, list[ParallelPlan]], path: Path) -> None:
    """The speed that remains of N times one device's, by strategy and tokens a step."""
    figure = new_figure()
    axes = figure.subplots()
    for tokens, line in zip(plans, ("--", "-"), strict=True):
        for name, colour in zip(NAMES, ("C0", "C1", "C2"), strict=True):
            found = [(plan.cluster.devices, named(plan, name)) for plan in plans[tokens]]
            points = [(devices, each.efficiency) for devices, each in found if each is not None]
            label = f"{name}, {tokens} tokens a step"
            axes.plot(*zip(*points, strict=True), line, color=colour, marker=".", label=label)
    axes.set(xlabel="GPUs", ylabel="Of N times one GPU's speed", ylim=(0, 1.02))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda number, _position: f"{number:,.0f}")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(frameon=False)
    figure.suptitle("GPT-2 1558M on H100s, on paper", fontweight="bold")
    write_png(figure_pixels(figure), path)


if __name__ == "__main__":
    main()
