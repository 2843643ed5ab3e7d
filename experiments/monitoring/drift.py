"""Planted degradations of a served model: how many outputs until the drift alarm, and how often it is false.

    python experiments/monitoring/drift.py [--quick] [--output FOLDER]

Trains a small model of bytes, serves it in this process and asks it with fixed sampling; then the weights
are damaged, rounded or older, or the requests change. The server's own monitor judges what comes; from what
it measured of every output many histories are drawn. Writes result.json and drift.png next to this file, or
into --output, and the run into runs/ there; a finished run is not trained again. `--quick` takes seconds.
"""

import argparse
import asyncio
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from tqdm import tqdm

import gptpl
from experiments.pretraining_text import library_prose
from experiments.training_runs import settings_of, table, train_all, write_result
from gptpl.runs.models import LanguageModel
from gptpl.serving.monitoring import Drift

HERE = Path(__file__).parent
CHARACTERS = 1_500_000  # of the training text
STEPS, CHECKPOINTS = 1000, 10
REFERENCE, WINDOW, THRESHOLD = 200, 50, 6.0  # as in conf/serve.yaml
PROMPT, NEW_TOKENS, TEMPERATURE = 24, 64, 0.8
THRESHOLDS = (3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
CODE = "for i in range({0}):\n    x[{0}] = {1} * y[i] + {2}\n"
Outputs = NDArray[np.float64]
"""Of each output its mean log-probability and its repetition (n, 2)."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured."""

    steps: int
    unchanged: int  # outputs recorded of the model as it was
    changed: int  # of each change
    histories: int
    length: int  # outputs of a history without change


FULL = Size(steps=STEPS, unchanged=2000, changed=400, histories=400, length=10_000)
QUICK = Size(steps=20, unchanged=300, changed=60, histories=20, length=400)


@dataclass(frozen=True, kw_only=True)
class Change:
    """What is different from the first outputs: the model, or what it is asked."""

    model: Callable[[Path], LanguageModel]
    temperature: float = TEMPERATURE
    prompts: Callable[[random.Random, str], str] | None = None
    share: float = 1.0  # of the requests that have changed


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="to see whether it runs")
    parser.add_argument("--output", type=Path, default=HERE)
    options = parser.parse_args(arguments)
    size = QUICK if options.quick else FULL
    folder = options.output / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    text = training_text(folder)
    settings = (
        *(
            "model=tiny",
            "model.context_length=128",
            "data.max_length=128",
            "tokenizer=bytes",
            "model.drop_rate=0",
        ),
        *("data=text_file", f"data.path={text.absolute()}", "data.batch_size=16", "optimizer.lr=3e-3"),
        *(
            "trainer=cpu",
            "trainer.precision=32-true",
            f"trainer.max_steps={size.steps}",
            "trainer.max_epochs=null",
        ),
        *("callbacks=checkpoint_last", f"callbacks.checkpoint_last.keep={CHECKPOINTS}"),
        *(
            f"callbacks.checkpoint_last.every_n_steps={size.steps // CHECKPOINTS}",
            "eval_every_n_steps=1000000",
        ),
    )
    runs = train_all({"model": settings}, folder)
    run = runs["model"]
    prompts = text.read_text("utf-8")[-CHARACTERS // 10 :]  # what the run validates on

    fresh = Recorder(reference=REFERENCE, window=WINDOW, threshold=THRESHOLD)
    unchanged = served(
        run, Change(model=gptpl.load), fresh, prompts, number=REFERENCE + WINDOW + size.unchanged
    )
    pool = np.array(unchanged.seen)
    rows, deviations = [], {}
    for name, change in tqdm(changes(size.steps).items(), unit="change"):
        found = served(run, change, learnt_until(pool), prompts, number=size.changed)
        outputs = np.array(found.seen[REFERENCE + WINDOW :])
        waits = simulated(pool, outputs, size.histories)
        loss = change.model(run).evaluate().loss
        rows.append(row(name, loss, outputs, found, waits))
        deviations[name] = typical(pool, outputs, size.histories)
    false = {str(each): false_alarms(pool, size, threshold=each) for each in THRESHOLDS}
    by_measure = {
        name: false_alarms(pool, size, threshold=THRESHOLD, measures=[number])
        for number, name in enumerate(Drift.MEASURES)
    }
    write_result(
        options.output,
        runs,
        settings=settings_of(settings),
        sampling={"temperature": TEMPERATURE, "new_tokens": NEW_TOKENS, "prompt_bytes": PROMPT},
        drift={"reference": REFERENCE, "window": WINDOW, "threshold": THRESHOLD},
        unchanged={
            "loss": round(gptpl.load(run).evaluate().loss, 4),
            "outputs": len(pool),
            "mean": [round(float(each), 4) for each in pool.mean(0)],
            "standard deviation": [round(float(each), 4) for each in pool.std(0)],
            "alarms while it was served": unchanged.alarms,
        },
        rows=rows,
        false_alarms={"by threshold": false, "by measure": by_measure},
    )
    figure(deviations, false).savefig(options.output / "drift.png", dpi=80)
    text = tables(
        rows, {**false, **{f"{THRESHOLD}, {name} alone": each for name, each in by_measure.items()}}
    )
    print(text)
    if options.output == HERE:
        fill(text)


def training_text(folder: Path) -> Path:
    """The beginning of Python's documentation of its own library."""
    path, found = folder / "library.txt", 0
    if not path.exists():
        parts = []
        for part in library_prose():
            parts.append(part)
            found += len(part)
            if found > CHARACTERS:
                break
        path.write_text("\n\n".join(parts)[:CHARACTERS], "utf-8")
    return path


# --- what changes ---------------------------------------------------------------------------------------


def changes(steps: int) -> dict[str, Change]:
    def checkpoint(tenths: int) -> Callable[[Path], LanguageModel]:
        return lambda run: gptpl.load(run / f"checkpoints/step-{steps * tenths // 10:08d}.ckpt")

    return {
        "nothing": Change(model=gptpl.load),
        **{
            f"noise of {share:.0%}": Change(model=noisy(share)) for share in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
        },
        "int8": Change(model=lambda run: gptpl.load(run, precision="int8")),
        "90 % of the steps": Change(model=checkpoint(9)),
        "50 % of the steps": Change(model=checkpoint(5)),
        "20 % of the steps": Change(model=checkpoint(2)),
        "temperature 0.9": Change(model=gptpl.load, temperature=0.9),
        "temperature 1.2": Change(model=gptpl.load, temperature=1.2),
        "temperature 1.2, one client in five": Change(model=gptpl.load, temperature=1.2, share=0.2),
        "other prompts: code": Change(model=gptpl.load, prompts=code),
        "other prompts: capitals": Change(
            model=gptpl.load, prompts=lambda draw, text: excerpt(draw, text).upper()
        ),
    }


def noisy(share: float) -> Callable[[Path], LanguageModel]:
    """Normal noise on every matrix, of this share of the standard deviation of its numbers."""

    def model(run: Path) -> LanguageModel:
        loaded = gptpl.load(run)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in loaded.net.parameters():
                if parameter.ndim == 2:
                    parameter += share * parameter.std() * torch.randn(parameter.shape, generator=generator)
        return loaded

    return model


def excerpt(draw: random.Random, text: str) -> str:
    start = draw.randrange(len(text) - PROMPT)
    return text[start : start + PROMPT]


def code(draw: random.Random, text: str) -> str:
    return CODE.format(*(draw.randrange(100) for _ in range(3)))[:PROMPT]


# --- what is served -------------------------------------------------------------------------------------


class Recorder(Drift):
    """A server's drift that remembers what it was told, and when its alarm went on."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.seen: list[tuple[float, float]] = []
        self.alarms: list[int] = []
        """Outputs at which the alarm went on."""

    def add(self, *, log_probability: float, repetition: float) -> None:
        before = self.state
        super().add(log_probability=log_probability, repetition=repetition)
        self.seen.append((log_probability, repetition))
        if self.state == "alarm" != before:
            self.alarms.append(self.outputs)


def learnt_until(pool: Outputs) -> Recorder:
    """A drift that has learnt from the first outputs of the pool, and has a window of those after them."""
    drift = Recorder(reference=REFERENCE, window=WINDOW, threshold=THRESHOLD)
    for log_probability, repetition in pool[: REFERENCE + WINDOW]:
        drift.add(log_probability=log_probability, repetition=repetition)
    return drift


def served(run: Path, change: Change, drift: Recorder, text: str, *, number: int) -> Recorder:
    """So many outputs of a server whose monitor continues this drift.

    A server learns anew when it starts: a drift that is handed over stands for a model that changed while it
    was served.
    """
    draw = random.Random(drift.outputs)

    async def ask_all(url: str) -> None:
        places = asyncio.Semaphore(8)

        async def ask(session: aiohttp.ClientSession, seed: int) -> None:
            changed = draw.random() < change.share
            make = change.prompts if changed and change.prompts is not None else excerpt
            body = {
                "prompt": make(draw, text),
                "max_tokens": NEW_TOKENS,
                "temperature": change.temperature if changed else TEMPERATURE,
                "seed": seed,
            }
            async with places, session.post(f"{url}/v1/completions", json=body) as response:
                response.raise_for_status()
                await response.read()

        async with aiohttp.ClientSession() as session:
            await asyncio.gather(*(ask(session, drift.outputs + seed) for seed in range(number)))

    with gptpl.serve(change.model(run), port=0, names=["model"], kept_mb=0) as server:
        server.monitor.drift["model"] = drift
        asyncio.run(ask_all(server.url))
    return drift


# --- many histories -------------------------------------------------------------------------------------


def deviations_of(first: Outputs, later: Outputs) -> Outputs:
    """What `Drift` computes at each output from the WINDOW-th of the later ones on: (n, 2), absolute."""
    apart = later - first.mean(0)
    windows = np.lib.stride_tricks.sliding_window_view(apart, WINDOW, axis=0)  # (n, 2, WINDOW)
    spread = np.sqrt(first.var(0, ddof=1) / len(first) + windows.var(axis=2, ddof=1) / WINDOW)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(np.abs(windows.mean(axis=2)) / spread, nan=0.0, posinf=np.inf)


def history(draw: np.random.Generator, pool: Outputs, outputs: Outputs, number: int) -> Outputs:
    """Deviations of a history: reference and a first window of the pool, and so many outputs after them."""
    first = draw.choice(pool, REFERENCE)
    later = np.concatenate([draw.choice(pool, WINDOW), draw.choice(outputs, number)])
    return deviations_of(first, later)


def simulated(pool: Outputs, outputs: Outputs, histories: int, *, most: int = 2000) -> list[int | None]:
    """Outputs after the change until the alarm, in each history; None: not within `most`."""
    draw = np.random.default_rng(0)
    waits = []
    for _ in range(histories):
        over = (history(draw, pool, outputs, most)[1:] > THRESHOLD).any(axis=1)
        waits.append(int(over.argmax()) + 1 if over.any() else None)
    return waits


def typical(pool: Outputs, outputs: Outputs, histories: int) -> Outputs:
    """The median of the larger deviation, by the outputs after the change."""
    draw = np.random.default_rng(1)
    each = [history(draw, pool, outputs, 200).max(axis=1) for _ in range(histories)]
    return np.median(each, axis=0)


def false_alarms(
    pool: Outputs, size: Size, *, threshold: float, measures: Sequence[int] = (0, 1)
) -> dict[str, float]:
    """Of histories without a change, by these measures alone."""
    draw = np.random.default_rng(2)
    each = [history(draw, pool, pool, size.length)[:, list(measures)] for _ in range(size.histories)]
    over = [(deviations > threshold).any(axis=1) for deviations in each]
    return {
        "histories with an alarm within 1,000 outputs": share([each[:1000].any() for each in over]),
        f"within {size.length:,}": share([each.any() for each in over]),
        "outputs at which it is on": share(np.concatenate(over)),
    }


def share(of: Sequence[bool] | NDArray[np.bool_]) -> float:
    return round(float(np.mean(of)), 5)


# --- what is told ---------------------------------------------------------------------------------------


def row(
    name: str, loss: float, outputs: Outputs, found: Recorder, waits: Sequence[int | None]
) -> dict[str, Any]:
    alarms = [alarm - REFERENCE - WINDOW for alarm in found.alarms if alarm > REFERENCE + WINDOW]
    seen = sorted(2001 if wait is None else wait for wait in waits)
    middle, late = statistics.median(seen), seen[int(0.95 * (len(seen) - 1))]
    return {
        "change": name,
        "validation loss": round(loss, 3),
        "log-probability": round(float(outputs[:, 0].mean()), 3),
        "repetition": round(float(outputs[:, 1].mean()), 3),
        f"served: outputs until the alarm, of {len(outputs)}": alarms[0] if alarms else "none",
        "histories: median": middle if middle <= 2000 else "over 2,000",
        "95 %": late if late <= 2000 else "over 2,000",
        "found within 200": round(sum(each <= 200 for each in seen) / len(seen), 2),
    }


def tables(rows: Sequence[dict[str, Any]], false: dict[str, dict[str, float]]) -> str:
    shown = [
        {"threshold": each, **{name: f"{100 * share:.3g} %" for name, share in numbers.items()}}
        for each, numbers in false.items()
    ]
    return f"{table(rows)}\n\nWithout a change:\n\n{table(shown)}"


def fill(text: str) -> None:
    """Put the tables into README.md, between its marks."""
    readme, begin, end = HERE / "README.md", "<!-- written by drift.py: begin -->", "<!-- end -->"
    before, _, rest = readme.read_text("utf-8").partition(begin)
    readme.write_text(f"{before}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}", "utf-8")


def figure(deviations: dict[str, Outputs], false: dict[str, dict[str, float]]) -> Figure:
    drawn = Figure(figsize=(13, 4.4), layout="constrained")
    left, right = drawn.subplots(1, 2, width_ratios=(3, 2))
    for number, (name, each) in enumerate(deviations.items()):
        left.plot(each, label=name, color=f"C{number % 10}", linestyle="-" if number < 10 else "--", lw=1.3)
    left.axhline(THRESHOLD, color="black", lw=0.8)
    left.text(198, THRESHOLD * 1.03, "alarm", ha="right", fontsize=8)
    left.set(xlabel="outputs after the change", ylabel="standard errors, median history", yscale="symlog")
    left.set_xlim(0, 200)
    left.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    left.set_title("How far the last 50 outputs are from the first 200", loc="left", fontsize=10)
    for name in next(iter(false.values())):
        values = [each[name] for each in false.values()]
        right.plot([float(each) for each in false], values, marker="o", label=name)
    right.set(xlabel="threshold, standard errors", ylabel="share", yscale="symlog")
    right.set_yscale("symlog", linthresh=1e-4)
    right.set_title("Alarms without a change", loc="left", fontsize=10)
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return drawn


if __name__ == "__main__":
    main()
