"""gptpl's training compared with other libraries', with all it could choose, and with the products' speed.

    pip install --no-deps litgpt llms-from-scratch && pip install transformers accelerate
    python experiments/benchmarks/benchmark.py                            # all parts, on a quiet machine
    python experiments/benchmarks/benchmark.py --parts speed --shapes 2x256 --turns 3
    python experiments/benchmarks/benchmark.py --parts choices --emulate  # as if it were other machines
    python experiments/benchmarks/benchmark.py --size 1558M --shapes 16x1024 --parts speed --machine a100

Every contestant trains GPT-2, small unless --size is given, in a process of its own; they take turns, step by
step, so that a machine whose speed drifts slows all of them. A screening finds the precision and compilation
in which a peer is fastest here; in that it takes part in the heat. Each part goes into
records/MACHINE/result.json as soon as it is measured; README.md and the tables are written from all records
(`--parts` without any: only that).
"""

import argparse
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import busy
import default_run
import tables
from contestants import SIZES, Work
from measuring import (
    HERE,
    Contestant,
    config_of,
    free_gb,
    machine,
    others_load,
    prepare_text,
    processes,
    product_seconds,
)
from tqdm import tqdm

from gptpl.model import count_parameters

RULE = "every peer in its fastest precision and compilation"
MODELS = ("transformers", "transformers Trainer", "litgpt", "plain", "book")
VARIANTS = ("fp32", "fp32 compiled", "bf16", "bf16 compiled")
NEEDS = {"transformers": "transformers", "litgpt": "litgpt", "book": "llms_from_scratch"}
PARTS = ("default_run", "busy", "choices", "speed")
HOPELESS_PRODUCTS = 4.0
"""A precision whose matrix products alone take so many times longer than the other's is not tried at all."""
HOPELESS = 1.2
"""A variant that is so many times slower than the best of its model at one shape is not tried at the next."""
SLOW, SLOW_TURNS = 2.0, 3
"""A contestant so many times slower than gptpl takes only so many turns."""
EMULATED: dict[str, dict[str, str]] = {
    "as it is": {},
    "bf16 without its units": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "oneDNN AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "MKL AVX2": {"MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "all AVX2": {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
    },
}
CHOICE_SHAPES = {"tiny": ("tiny", 2, 64), "2x256": ("124M", 2, 256), "8x256": ("124M", 8, 256)}
Shape = tuple[int, int]
Steps = dict[str, list[dict[str, Any]]]


def main() -> None:
    """Measures, writes the record, prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--machine", help="name of the record (default: from the processor's)")
    parser.add_argument("--shapes", nargs="+", default=["2x256", "8x256", "4x1024"], help="batch x context")
    parser.add_argument("--turns", type=int, default=5, help="timed steps of each contestant (default 5)")
    parser.add_argument("--dropout", type=float, default=0.0, help="of all, without litgpt's (default 0)")
    parser.add_argument("--size", choices=SIZES, default="124M", help="of the model")
    parser.add_argument("--peers", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--choice-shapes", nargs="+", choices=CHOICE_SHAPES, default=list(CHOICE_SHAPES))
    parser.add_argument("--emulate", action="store_true", help="choices: as other machines, 1 and 2 threads")
    parser.add_argument("--environments", nargs="+", choices=EMULATED, help="choices: as these only")
    parser.add_argument("--threads", nargs="+", type=int, help="choices: with so many (default: gptpl's own)")
    parser.add_argument("--records", type=Path, default=HERE / "records", help="folder of all records")
    options = parser.parse_args()
    peers = [peer for peer in options.peers if not (options.dropout and peer == "litgpt")]
    wanted = {NEEDS[name] for peer in peers if (name := peer.split()[0]) in NEEDS}
    missing = {package for package in wanted if not importlib.util.find_spec(package)}
    if missing and {"speed", "default_run"} & set(options.parts):
        parser.error(f"not installed: {', '.join(sorted(missing))} (see above)")
    if options.parts:
        about = machine()
        record = Record(
            options.records / (options.machine or slug(about)) / "result.json", about, options.size
        )
        with tempfile.TemporaryDirectory() as folder:
            os.environ["GPTPL_CACHE"] = str(Path(folder) / "cache")
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder) / "compiled")  # nothing stale
            files = prepare_text(Path(folder))
            work = Work(**files, batch=0, context=0, dropout=options.dropout, size=options.size)
            if "default_run" in options.parts:  # the short parts first
                record.keep(default_run=default_run.measure())
            if "busy" in options.parts:
                record.keep(busy=busy.measure(list(busy.SHAPES), [None], ["default"], 3, files))
            if "choices" in options.parts:
                environments = options.environments or (list(EMULATED) if options.emulate else ["as it is"])
                threads = options.threads or ([1, 2] if options.emulate else [None])
                measure_choices(record, files, options.choice_shapes, environments, threads)
            if "speed" in options.parts:
                measure_speed(record, work, options.shapes, peers, options.turns)
    print(tables.write(options.records))


def slug(about: dict[str, Any]) -> str:
    """A folder's name for such a machine."""
    words = f"{about['device']} {about['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "_", words.lower()).strip("_")


class Record:
    """result.json of a machine: what was measured by another rule is left behind."""

    def __init__(self, path: Path, about: dict[str, Any], size: str) -> None:
        self.path = path
        self.content: dict[str, Any] = {}
        if path.exists():
            self.content = json.loads(path.read_text(encoding="utf-8"))
        if self.content.get("rule") != RULE or self.content.get("size") != size:
            self.content = {"rule": RULE, "size": size}
        self.content["machine"] = about
        self.content.setdefault("shapes", {})

    def keep(self, **parts: Any) -> None:
        """Adds parts and writes the file."""
        self.content |= parts
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(compact(self.content), encoding="utf-8")


def compact(content: dict[str, Any]) -> str:
    """JSON with a list of numbers on one line, numbers to four digits or so."""
    text = json.dumps(
        json.loads(json.dumps(content), parse_float=lambda number: round(float(number), 4)), indent=1
    )
    return re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


# --- speed: every contestant at every shape -----------------------------------------------------------------


def measure_speed(
    record: Record, work: Work, shapes: Sequence[str], peers: Sequence[str], turns: int
) -> None:
    """The screening and the heats of every shape, smaller ones first."""
    hopeful = {peer: list(VARIANTS) for peer in peers}
    for name in sorted(shapes, key=lambda name: rows_of(name)):
        batch, context = map(int, name.split("x"))
        at = Work(**asdict(work) | {"batch": batch, "context": context})
        products = [product_seconds(batch * context, config_of(work.size))]
        slow = max(products[0], key=lambda precision: products[0][precision])
        if products[0][slow] > HOPELESS_PRODUCTS * min(products[0].values()):
            hopeful = {peer: [one for one in left if slow not in one] for peer, left in hopeful.items()}
        screening: dict[str, dict[str, list[float]]] = {}
        for peer, variants in hopeful.items():
            screening[peer] = screen(peer, variants, at, label=f"{name}: which {peer}")
        fastest = {peer: {one: min(each) for one, each in found.items()} for peer, found in screening.items()}
        for peer, found in fastest.items():
            hopeful[peer] = [one for one in found if found[one] <= HOPELESS * min(found.values())]
        best = {peer: min(found, key=lambda one: found[one]) for peer, found in fastest.items()}
        load = others_load()
        contestants = ["gptpl bare", *(f"{peer} {one}" for peer, one in best.items()), "book loop fp32"]
        measured: dict[str, dict[str, Any]] = {}
        heats = list(heats_of(contestants, at))
        for number, heat in enumerate(heats, start=1):
            add(measured, run_heat(["gptpl", *heat], at, turns, f"{name}: heat {number}/{len(heats)}"))
            products.append(product_seconds(batch * context, config_of(work.size)))
        shape = f"{name} dropout {work.dropout:g}" if work.dropout else name
        shapes_kept = record.content["shapes"]
        shapes_kept[shape] = {
            "others_load": load,
            "products_seconds": {key: [each[key] for each in products] for key in products[0]},
            "screening": screening,
            "variants": best,
            "contestants": measured,
        }
        record.keep(shapes=dict(sorted(shapes_kept.items(), key=lambda item: rows_of(item[0]))))


def rows_of(name: str) -> tuple[int, str]:
    """Tokens of a step, as the order of shapes."""
    batch, context = map(int, name.split()[0].split("x"))
    return batch * context, name


def screen(peer: str, variants: Sequence[str], work: Work, *, label: str) -> dict[str, list[float]]:
    """Two steps of every variant of a peer, in turn."""
    if len(variants) == 1:
        return {variants[0]: [0.0]}  # nothing to find out
    found: dict[str, list[float]] = {}
    for group in groups([f"{peer} {variant}" for variant in variants], work):
        with processes() as started:
            started += [Contestant(name, work) for name in group]  # they warm up together
            for each in started:
                each.answer()
            for _ in tqdm(range(2), desc=label, unit="turn"):
                for each in started:
                    found.setdefault(each.name.removeprefix(f"{peer} "), []).append(each.turn()["seconds"])
    return found


def heats_of(names: Sequence[str], work: Work) -> Iterable[list[str]]:
    """Groups that fit into memory beside gptpl."""
    return groups(names, work, beside=gb_of("gptpl", work))


def groups(names: Sequence[str], work: Work, *, beside: float = 0.0) -> Iterable[list[str]]:
    """Names whose processes fit into memory together; one that does not fit is left out."""
    room = free_gb() - beside - 0.5
    group: list[str] = []
    for name in names:
        if gb_of(name, work) > room:
            print(f"{name} is left out: {room:.1f} GB of memory are too few", file=sys.stderr)
            continue
        if sum(gb_of(each, work) for each in (*group, name)) > room:
            yield group
            group = []
        group.append(name)
    if group:
        yield group


def gb_of(name: str, work: Work) -> float:
    """Memory that a contestant takes, about: libraries, weights, gradients, averages, activations."""
    small, model = (config_of(size) for size in ("124M", work.size))
    activations = model.n_layers * model.emb_dim / (small.n_layers * small.emb_dim)
    weights = 4 * count_parameters(model).fp32_bytes / 2**30
    compiled, book = "compiled" in name, name.startswith("book")
    a_thousand_tokens = 0.5 if name in tables.OWN else 0.9 if compiled else 2.75 if book else 1.3
    return 0.8 + 1.2 * weights + a_thousand_tokens * activations * work.batch * work.context / 1000


def run_heat(names: list[str], work: Work, turns: int, label: str) -> dict[str, dict[str, Any]]:
    """Every contestant's steps, and its seconds over gptpl's in the same turn."""
    steps: Steps = {name: [] for name in names}
    first: dict[str, float] = {}
    bar = tqdm(total=len(names) * (1 + turns), desc=label, unit="turn")
    with bar, processes() as started:
        for name in names:  # one after the other: the time to the first step is a time alone on the machine
            started.append(Contestant(name, work))
            first[name] = started[-1].answer()["first_step_seconds"]
            bar.update()
        for turn in range(turns):
            slowest = SLOW * statistics.median(one["seconds"] for one in steps["gptpl"]) if turn else 0
            for each in started if turn % 2 else reversed(started):
                mine = steps[each.name]
                slow = len(mine) >= SLOW_TURNS and mine[-1]["seconds"] > slowest
                if not slow:
                    mine.append(each.turn())
                bar.update()
    own = [one["seconds"] for one in steps["gptpl"]]
    return {
        name: {
            "first_step_seconds": first[name],
            "peak_gb": max(one["peak_gb"] for one in mine),
            "seconds": [one["seconds"] for one in mine],
            "ratios": [one["seconds"] / seconds for one, seconds in zip(mine, own, strict=False)],
            "parts": {
                part: statistics.median(one["parts"][part] for one in mine) for part in mine[0]["parts"]
            },
        }
        for name, mine in steps.items()
    }


def add(contestants: dict[str, dict[str, Any]], heat: dict[str, dict[str, Any]]) -> None:
    """Adds a heat's steps; gptpl is in every heat."""
    for name, measured in heat.items():
        known = contestants.setdefault(name, measured)
        if known is not measured:
            known["seconds"] += measured["seconds"]
            known["ratios"] += measured["ratios"]


# --- choices: what "auto" chooses, and what would have been best --------------------------------------------


def measure_choices(
    record: Record,
    files: dict[str, str],
    shapes: Sequence[str],
    environments: Sequence[str],
    threads: Sequence[int | None],
) -> None:
    """Every environment, number of threads and shape, each in a process of its own."""
    for environment in environments:
        for count in threads:
            for shape in shapes:
                size, batch, context = CHOICE_SHAPES[shape]
                work = Work(**files, batch=batch, context=context, dropout=0.1, size=size)
                with tempfile.TemporaryDirectory() as cache:
                    variables = EMULATED[environment] | {
                        "GPTPL_CACHE": cache,
                        "TORCHINDUCTOR_CACHE_DIR": cache,
                    }
                    if count is not None:
                        variables["OMP_NUM_THREADS"] = str(count)
                    done = subprocess.run(
                        [sys.executable, "-W", "ignore", str(HERE / "choices.py"), json.dumps(asdict(work))],
                        env=os.environ | variables, stdout=subprocess.PIPE, text=True, check=True,
                    )  # fmt: skip
                key = {"machine": environment, "threads": count or "auto", "shape": shape}
                others = [
                    one
                    for one in record.content.get("choices", [])
                    if {name: one[name] for name in key} != key
                ]
                found = key | {"others_load": others_load()} | json.loads(done.stdout)
                record.keep(choices=[*others, found])
                print("\n".join(tables.choice_lines([found])), file=sys.stderr)


if __name__ == "__main__":
    main()
