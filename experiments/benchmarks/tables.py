"""The tables and plots of all records: of each in its folder, and of all side by side in README.md."""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from measuring import config_of, noise, product_flops

from gptpl.training.costs import training_flops_per_token

OWN = ("gptpl", "gptpl bare")
TITLES = {
    "fastest_peer_2x256": "speed-up over the fastest peer, 2 x 256",
    "fastest_peer_8x256": "the same, 8 x 256",
    "fastest_peer_4x1024": "the same, 4 x 1024",
    "bound_8x256": "fraction of the products' bound, 8 x 256",
    "choices": "default choice over the best of all choices, worst case",
    "default_run": "`make train` over the book's loop in fp32",
    "busy": "slower beside one busy process, worst case",
}
TARGETS = {
    "fastest_peer_2x256": (1.05, True),
    "fastest_peer_8x256": (1.05, True),
    "fastest_peer_4x1024": (1.15, True),
    "bound_8x256": (0.85, True),
    "choices": (1.03, False),
    "default_run": (0.7, False),
    "busy": (2.5, False),
}
"""What is aimed at, and whether more is better."""
BEGIN, END = "<!-- written by benchmark.py: begin -->", "<!-- end -->"


def write(folder: Path) -> str:
    """Writes a table and a plot next to every record, and README.md; returns all tables."""
    found = records(folder)
    texts = []
    for name, record in found.items():
        text = table(record)
        (folder / name / "table.md").write_text(text, encoding="utf-8")
        if record["shapes"]:
            plot(record).savefig(folder / name / "speed.png", dpi=80)
        texts.append(text)
    readme = folder.parent / "README.md"
    if readme.exists():
        readme.write_text(filled(readme.read_text(encoding="utf-8"), found), encoding="utf-8")
    return "\n".join([*texts, overview(found)])


def records(folder: Path) -> dict[str, dict[str, Any]]:
    """All records by the names of their folders."""
    return {
        path.parent.name: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("*/result.json"))
    }


def filled(readme: str, found: dict[str, dict[str, Any]]) -> str:
    """README.md with the tables of these records between its two marks."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n\n{overview(found)}\n\n{END}{rest.split(END)[1]}"


# --- all machines side by side ------------------------------------------------------------------------------


def overview(found: dict[str, dict[str, Any]]) -> str:
    """Speeds and targets, a line and a column for each machine."""
    lines = [
        "| | | gptpl, tokens/s | fastest peer | tokens/s | speed-up (min - max) |"
        " products, fp32 / bf16 GFLOP/s | of the bound | noise |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, record in found.items():
        for shape, measured in record["shapes"].items():
            own, peer = measured["contestants"]["gptpl"], fastest_peer(measured)
            ratios = measured["contestants"][peer]["ratios"]
            tokens, rates = tokens_of(shape), product_rates(record, shape)
            lines.append(
                f"| [{name}](records/{name}/table.md) | {spelt(shape)}"
                f" | {tokens / statistics.median(own['seconds']):.0f} | {peer}"
                f" | {tokens / statistics.median(measured['contestants'][peer]['seconds']):.0f}"
                f" | {statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"
                f" | {rates['fp32']:.0f} / {rates['bf16']:.0f} | {fraction_of_bound(measured):.0%}"
                f" | {noise_of(measured):.0%} |"
            )
    lines += [
        "",
        f"| | target | {' | '.join(found)} |",
        f"|---|---|{'---|' * len(found)}",
    ]
    reached = {name: reach(record) for name, record in found.items()}
    for key, title in TITLES.items():
        target, more = TARGETS[key]
        cells = [verdict(each.get(key), target, more=more) for each in reached.values()]
        lines.append(f"| {title} | {'at least' if more else 'at most'} {target:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(value: float | None, target: float, *, more: bool) -> str:
    """A figure, and whether it is on the right side."""
    if value is None:
        return "not measured"
    return f"{value:.2f}, {'reached' if (value >= target) == more or value == target else 'not reached'}"


def reach(record: dict[str, Any]) -> dict[str, float]:
    """The figures that have targets."""
    found = {}
    for shape, measured in record["shapes"].items():
        peer = measured["contestants"][fastest_peer(measured)]
        found[f"fastest_peer_{shape}"] = statistics.median(peer["ratios"])
        found[f"bound_{shape}"] = fraction_of_bound(measured)
    if rows := [row for one in record.get("choices", []) for row in one["rows"]]:
        found["choices"] = 1 + max(row["loss_percent"] for row in rows) / 100
    if "default_run" in record:
        found["default_run"] = record["default_run"]["ratio"]
    if "busy" in record:
        found["busy"] = max(times_slower(row) for row in record["busy"])
    return found


# --- one machine --------------------------------------------------------------------------------------------


def fastest_peer(measured: dict[str, Any]) -> str:
    """By the median of the ratios to gptpl's step of the same turn."""
    peers = {name: one["ratios"] for name, one in measured["contestants"].items() if name not in OWN}
    return min(peers, key=lambda name: statistics.median(peers[name]))


def product_seconds_of(measured: dict[str, Any]) -> dict[str, float]:
    """Seconds of a step's matrix products by precision, medians over the measurement."""
    return {name: statistics.median(each) for name, each in measured["products_seconds"].items()}


def product_rates(record: dict[str, Any], shape: str) -> dict[str, float]:
    """GFLOP/s of the matrix products by precision."""
    flops = product_flops(tokens_of(shape), config_of(record["size"]))
    seconds = product_seconds_of(record["shapes"][shape])
    return {name: flops / each / 1e9 for name, each in seconds.items()}


def fraction_of_bound(measured: dict[str, Any]) -> float:
    """The products alone, in the faster precision, over gptpl's step."""
    bound = min(product_seconds_of(measured).values())
    return bound / statistics.median(measured["contestants"]["gptpl"]["seconds"])


def noise_of(measured: dict[str, Any]) -> float:
    """By how much two steps of a contestant, one turn apart, differ in the median."""
    return noise([one["seconds"] for one in measured["contestants"].values()])


def tokens_of(shape: str) -> int:
    """Tokens of a step."""
    batch, context = shape.split()[0].split("x")
    return int(batch) * int(context)


def spelt(shape: str) -> str:
    """2x256 as 2 x 256."""
    return shape.replace("x", " x ", 1)


def table(record: dict[str, Any]) -> str:
    """All that is known of a machine."""
    about = record["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    lines = [
        f"GPT-2 {record['size']}; {about['device']}, {about['threads']} threads, {versions}; {about['date']}."
        f" Rule: {record['rule']}.",
        "",
    ]
    for shape in record["shapes"]:
        lines += shape_table(record, shape)
    if record["shapes"]:
        lines += ["![tokens per second](speed.png)", ""]
    if choices := record.get("choices"):
        lines += [
            "**What `auto` chooses, and the best of all that can be chosen**",
            "",
            *choice_lines(choices),
            "",
        ]
    if found := record.get("default_run"):
        lines += [
            f"`make train`, the whole command: {found['seconds']:.0f} s for {found['steps']} steps,"
            " evaluations, samples and saving. The book's loop in fp32, from three of its ten epochs:"
            f" {found['book_seconds']:.0f} s with its evaluations and samples (gptpl takes"
            f" {found['ratio']:.2f} of it), {found['book_seconds_steps_alone']:.0f} s for its steps alone"
            f" ({found['ratio_steps_alone']:.2f}).",
            "",
        ]
    if rows := record.get("busy"):
        lines += ["**Beside one other busy process**", "", *busy_lines(rows), ""]
    return "\n".join(lines)


def shape_table(record: dict[str, Any], shape: str) -> list[str]:
    """The table of one shape, the fastest contestant first, with the measurements that they share."""
    measured, tokens = record["shapes"][shape], tokens_of(shape)
    contestants = measured["contestants"]
    lines = [
        f"**Batch {spelt(shape)}**",
        "",
        "| | seconds per step: median (min - max) | tokens/s | gptpl is faster by: median (min - max) |"
        " peak GB | first step after |",
        "|---|---|---|---|---|---|",
    ]
    for name in sorted(contestants, key=lambda name: statistics.median(contestants[name]["ratios"])):
        one = contestants[name]
        seconds, ratios = one["seconds"], one["ratios"]
        lines.append(
            f"| {name} | {spread(seconds)} | {tokens / statistics.median(seconds):.0f} | {spread(ratios)} |"
            f" {one['peak_gb']:.2f} | {one['first_step_seconds']:.0f} s |"
        )
    own = contestants["gptpl"]
    bound, rates = product_seconds_of(measured), product_rates(record, shape)
    context = int(shape.split()[0].split("x")[1])
    flops = tokens * training_flops_per_token(config_of(record["size"]), context)
    leanest = min(one["peak_gb"] for name, one in contestants.items() if name not in OWN)
    lines += [
        "",
        f"Matrix products of the linear layers alone: fp32 {rates['fp32']:.0f} GFLOP/s"
        f" ({bound['fp32']:.2f} s), bf16 {rates['bf16']:.0f} ({bound['bf16']:.2f} s). gptpl's step runs at"
        f" {fraction_of_bound(measured):.0%} of the bound in {min(bound, key=lambda name: bound[name])},"
        f" {flops / statistics.median(own['seconds']) / 1e9:.0f} GFLOP/s by 6 N + 12 L T D. Peak memory"
        f" {own['peak_gb'] / leanest:.2f} of the smallest of the peers. A step of gptpl: "
        + ", ".join(f"{part} {seconds:.3f} s" for part, seconds in own["parts"].items())
        + f". Noise, a step to the next of the same contestant: {noise_of(measured):.1%}.",
        "",
    ]
    if screening := measured["screening"]:
        lines += [f"Screening, seconds of the faster of two steps: {'; '.join(screened(screening))}.", ""]
    return lines


def screened(screening: dict[str, dict[str, list[float]]]) -> Iterator[str]:
    """Each peer's variants, the fastest first."""
    for peer, variants in screening.items():
        if len(variants) == 1:
            yield f"{peer}: {next(iter(variants))}, by far the fastest at the smaller shape"
            continue
        order = sorted(variants, key=lambda name: min(variants[name]))
        yield f"{peer}: " + ", ".join(f"{name} {min(variants[name]):.2f}" for name in order)


def choice_lines(choices: list[dict[str, Any]]) -> list[str]:
    """What "auto" chose, for each machine, number of threads, shape and planned length."""
    lines = [
        "| machine | threads | | steps | chosen | best | longer by %: median (min - max) | noise |"
        " fp32 / bf16 products, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in choices:
        products = one["products_seconds"]
        for row in one["rows"]:
            lines.append(
                f"| {one['machine']} | {one['threads']} | {one['shape']} | {row['planned']:,}"
                f" | {row['chosen']} | {row['best']}"
                f" | {row['loss_percent']:.1f} ({row['least']:.1f} - {row['most']:.1f})"
                f" | {one['noise']:.1%} | {products['fp32']:.3g} / {products['bf16']:.3g} |"
            )
    return lines


def times_slower(row: dict[str, Any]) -> float:
    """Beside the other process than alone."""
    return statistics.median(row["alone"]) / statistics.median(row["beside"])


def busy_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Medians of tokens per second, and the slowest and fastest turn."""
    lines = [
        "| | threads | OpenMP | alone, tokens/s | beside the other | times slower |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        speeds = f"{spread(row['alone'], 0)} | {spread(row['beside'], 0)}"
        threads = row["threads"] or "auto"
        lines.append(f"| {row['size']} | {threads} | {row['setting']} | {speeds} | {times_slower(row):.1f} |")
    return lines


def spread(values: list[float], digits: int = 2) -> str:
    """Median (min - max)."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:,.{digits}f} ({low:,.{digits}f} - {high:,.{digits}f})"


def plot(record: dict[str, Any]) -> Figure:
    """Tokens per second of every contestant, and the bound, a panel a shape."""
    shapes = record["shapes"]
    figure = Figure(figsize=(4.2 * len(shapes), 4), layout="constrained")
    panels = figure.subplots(1, len(shapes), squeeze=False)[0]
    for axes, (shape, measured) in zip(panels, shapes.items(), strict=True):
        tokens = tokens_of(shape)
        speeds = {
            who: [tokens / seconds for seconds in one["seconds"]]
            for who, one in measured["contestants"].items()
        }
        order = sorted(speeds, key=lambda who: statistics.median(speeds[who]))
        middles = [statistics.median(speeds[who]) for who in order]
        both = list(zip(order, middles, strict=True))
        reach_ = [[m - min(speeds[who]) for who, m in both], [max(speeds[who]) - m for who, m in both]]
        colours = ["tab:blue" if who in OWN else "tab:gray" for who in order]
        axes.barh(order, middles, xerr=reach_, color=colours, ecolor="black", capsize=2)
        for name, seconds in product_seconds_of(measured).items():
            line = "--" if name == "bf16" else ":"
            axes.axvline(tokens / seconds, color="tab:red", linestyle=line, label=f"{name} products alone")
        axes.set_title(f"batch {spelt(shape)}")
        axes.set_xlabel("training tokens per second")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower right", fontsize="small")
    return figure
