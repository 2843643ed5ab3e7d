"""Trains a run in one process and by the workers of Ray Train; prints by how much the losses differ."""

import argparse
import csv
from pathlib import Path

from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

import gptpl

SETTINGS = [
    *("experiment=quick", "model.drop_rate=0", "trainer.max_steps=30", "optimizer.lr=1e-3"),
    *("data.batch_size=2", "data.global_batch_size=4", "eval_every_n_steps=10", "eval_val_batches=null"),
    # What "auto" measures may differ from run to run.
    *("trainer.precision=32-true", "trainer.attention=sdpa", "trainer.head=fused"),
]


def train(overrides: list[str]) -> None:
    """Train a run; each worker calls this, with `run_dir` in a folder that all of them see."""
    gptpl.build(*overrides).fit()


def losses(run_dir: Path) -> dict[tuple[int, str], float]:
    """By step and name."""
    with (run_dir / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = ("train/loss", "val/loss")
    return {(int(row["step"]), name): float(row[name]) for row in rows for name in names if row.get(name)}


def main() -> None:
    """Train twice, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/ray_train"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="one for each worker")
    given = parser.parse_args()
    folder = given.folder.absolute()  # a worker starts in a folder of its own
    settings = [*SETTINGS, f"trainer={'gpu' if given.gpu else 'cpu'}"]
    train([*settings, f"run_dir={folder / 'one_process'}"])
    trainer = TorchTrainer(
        train,
        train_loop_config=[*settings, f"run_dir={folder / 'ray'}"],
        scaling_config=ScalingConfig(num_workers=given.workers, use_gpu=given.gpu),
    )
    trainer.fit()
    one, ray = losses(folder / "one_process"), losses(folder / "ray")
    for step, name in one:
        if step % 10 == 0:
            print(f"step {step:2}  {name:10}  {one[step, name]:.6f}  {ray[step, name]:.6f}")
    print(f"largest relative difference: {max(abs(ray[key] / one[key] - 1) for key in one):.1e}")


if __name__ == "__main__":
    main()
