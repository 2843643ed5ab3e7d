"""The validation loss after the same number of tokens, for changes to `experiment=fast_recipe` one by one.

    python experiments/fast_recipe/search.py [--tokens 327680] [--seed 7] [--tries NAME ...]

The text is torch's own Python source, the seed none of study.py's: what is chosen here is measured there.
As many runs as there are cores train at once, with one thread each. Runs go to search/ next to this file, or
in --output, where a finished one is not trained again; search.json is made of all that lie there.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from study import NANOGPT, nanogpt, run_record

HERE = Path(__file__).parent
T = 256
EVALUATED = 320
"""Sequences of the validation text."""
FIRST = {"muon_lr": 5e-3, "lr": 6e-3, "momentum": 0.95, "betas": [0.9, 0.95], "weight_decay": 0.1}
"""The optimizer of the first recipe, with batches of 8 sequences: each try differs in what it names."""
TRIES: dict[str, dict[str, Any]] = {
    "first": {},
    "batch_4": {"batch_size": 4},
    "batch_4_lower_rates": {"batch_size": 4, "muon_lr": 3.5e-3, "lr": 4e-3},
    "muon_1e-2": {"muon_lr": 1e-2},
    "adamw_1e-2": {"lr": 1e-2},
    "momentum_0.9": {"momentum": 0.9},
    "beta2_0.99": {"betas": [0.9, 0.99]},
    "beta2_0.999": {"betas": [0.9, 0.999]},
    "beta2_0.99_muon_3.5e-3": {"betas": [0.9, 0.99], "muon_lr": 3.5e-3},
    "beta2_0.99_adamw_1e-2_momentum_0.9": {"betas": [0.9, 0.99], "lr": 1e-2, "momentum": 0.9},
    "beta2_0.99_cooccurrence_0.02": {"betas": [0.9, 0.99], "cooccurrence": 0.02},
    "beta2_0.99_cooccurrence_0.06": {"betas": [0.9, 0.99], "cooccurrence": 0.06},
    "beta2_0.99_cooccurrence_0.1": {"betas": [0.9, 0.99], "cooccurrence": 0.1},
    "beta2_0.99_cooccurrence_0.12": {"betas": [0.9, 0.99], "cooccurrence": 0.12},
}


def main() -> None:
    """Trains what has not been trained, writes the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=327_680, help="of a run (default 327680)")
    parser.add_argument("--seed", type=int, default=7, help="(default 7)")
    parser.add_argument(
        "--tries",
        nargs="+",
        choices=(*TRIES, NANOGPT),
        default=tuple(TRIES),
        help="(default: all but nanogpt)",
    )
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the record (default: here)")
    options = parser.parse_args()
    names = [f"{name}_{options.tokens}_{options.seed}" for name in options.tries]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(partial(train, options.output / "search"), names))
    losses = {
        path.name: final_loss(path)
        for path in sorted((options.output / "search").iterdir())
        if "finished" in run_record(path)
    }
    record = {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "validation_loss": losses}
    (options.output / "search.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, loss in sorted(losses.items(), key=lambda item: item[1]):
        print(f"{loss:.4f} {name}")


def train(folder: Path, name: str) -> None:
    """`gptpl train` for "try_tokens_seed", unless a finished run lies there."""
    if "finished" in run_record(folder / name):
        return
    what, tokens, seed = name.rsplit("_", 2)
    if what == NANOGPT:
        batch, overrides = 4, list(nanogpt())
    else:
        settings = FIRST | TRIES[what]
        batch = settings.pop("batch_size", 8)
        overrides = ["experiment=fast_recipe", f"data.batch_size={batch}"]
        std = settings.pop("cooccurrence", None)
        overrides += ["init=random"] if std is None else [f"init.std={std}"]
        overrides += [f"optimizer.{key}={value}" for key, value in settings.items()]
    steps = int(tokens) // (batch * T)
    command = [
        sys.executable, "-m", "gptpl", "train", *overrides, f"data.corpus.root={Path(torch.__file__).parent}",
        f"trainer.max_steps={steps}", f"seed={seed}", f"eval_every_n_steps={steps}", "eval_train_batches=1",
        f"eval_val_batches={EVALUATED // batch}", "callbacks=none", f"run_dir={folder / name}",
    ]  # fmt: skip
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def final_loss(run: Path) -> float:
    """The validation loss after the last step."""
    last = (run / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    return float(json.loads(last)["metrics"]["val/loss"])


if __name__ == "__main__":
    main()
