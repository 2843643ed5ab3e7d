"""Where the time of gptpl's training step goes, operation by operation.

    python experiments/benchmarks/profile_step.py [BATCH CONTEXT]

Writes profile.txt next to this file.
"""

import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from contestants import DEVICE, V, Work, gptpl_run, gptpl_step
from measuring import HERE, prepare_text
from torch.profiler import profile

ROWS = 25


def main() -> None:
    """Profiles one step after two that warm up."""
    batch, context = map(int, sys.argv[1:] or (8, 256))
    with tempfile.TemporaryDirectory() as folder:
        run = gptpl_run(Work(**prepare_text(Path(folder)), batch=batch, context=context))
    net = run.module.net.to(DEVICE).train()
    tokens = torch.randint(0, V, (batch, context + 1), device=DEVICE)
    step = partial(
        gptpl_step, net, run.module.make_optimizer(net), tokens[:, :-1], tokens[:, 1:],
        head=run.module.head, low="bf16" in run.trainer.precision, compiled=run.module.compiled,
    )  # fmt: skip
    for _ in range(2):
        step()
    with profile() as measured:
        step()
    table = measured.key_averages().table(
        sort_by=f"self_{DEVICE}_time_total", row_limit=ROWS, max_name_column_width=60
    )
    about = f"{run.trainer.precision}, head {run.module.head}"
    text = f"GPT-2 small, batch {batch} x {context}, {about}\n\n{table}"
    (HERE / "profile.txt").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
