"""What size, dropout and epochs do to secrets that stand in the training text: exposure and extraction.

    python experiments/memorisation/canaries.py [--runs FOLDER]

Trains small models on the tale that comes with gptpl, with planted secrets, and asks each suite=memorisation.
A run that is there already is not trained again.
"""

import argparse
import json
import math
from importlib import resources
from pathlib import Path
from typing import Any

import gptpl
from experiments.training_runs import train_all

HERE = Path(__file__).parent
REPEATS = (0, 1, 8, 32)
COMMON = (
    *("model=tiny", "tokenizer=bytes", "trainer=cpu", "trainer.precision=32-true", "trainer.max_epochs=null"),
    *("data=canaries", "data.corpus.digits=4", f"data.corpus.repeats={list(REPEATS)}", "data.corpus.count=6"),
    *("optimizer.lr=3e-3", "data.batch_size=16", "callbacks=checkpoint_last", "eval_every_n_steps=1000000"),
)
RUNS = {
    "tiny, 300 steps": ("trainer.max_steps=300", "model.drop_rate=0"),
    "tiny, 600 steps": ("trainer.max_steps=600", "model.drop_rate=0"),
    "tiny, 1200 steps": ("trainer.max_steps=1200", "model.drop_rate=0"),
    "tiny, 600 steps, dropout 0.2": ("trainer.max_steps=600", "model.drop_rate=0.2"),
    "four times as wide, 600 steps": ("trainer.max_steps=600", "model.drop_rate=0", "model.emb_dim=256"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/canaries"))
    folder = parser.parse_args().runs
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "tale.txt"
    text.write_text((resources.files("gptpl.data") / "texts/tale.txt").read_text("utf-8"), "utf-8")
    runs = {name: (*COMMON, f"data.path={text.absolute()}", *own) for name, own in RUNS.items()}
    record = {name: figures(run) for name, run in train_all(runs, folder).items()}
    (HERE / "canaries.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    for name, each in record.items():
        print(name, each)


def figures(run: Path) -> dict[str, Any]:
    model = gptpl.load(run)
    found = model.benchmark("memorisation", **{"tasks.extraction.tokens": 24}).tasks
    exposure = {
        group: [
            None if math.isnan(each) else round(each, 2) for each in (metric.value, metric.low, metric.high)
        ]
        for group, (_, metric) in found["exposure"].groups.items()
    }
    extracted = {group: round(metric.value, 3) for group, (_, metric) in found["extraction"].groups.items()}
    return {
        "parameters": sum(each.numel() for each in model.net.parameters()),
        "validation loss": round(model.evaluate().loss, 3),
        "training loss": round(model.evaluate(split="train").loss, 3),
        "exposure in bits, at most 9.97": exposure,
        "extracted": extracted,
    }


if __name__ == "__main__":
    main()
