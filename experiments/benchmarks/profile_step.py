"""Where the time of gptpl's training step goes, operation by operation.

    python experiments/benchmarks/profile_step.py [BATCH CONTEXT]

Writes profile.txt next to this file.
"""

import sys
from functools import partial
from pathlib import Path

import contestants
import torch
from torch.profiler import profile

ROWS = 25


def main() -> None:
    """Profiles one step after two that warm up."""
    batch, context = map(int, sys.argv[1:] or (8, 256))
    net, path = contestants.gptpl_model(contestants.SIZES["124M"], 0.0)
    optimizer = contestants.gptpl_optimizer(net)
    tokens = torch.randint(0, contestants.V, (batch, context + 1), device=contestants.DEVICE)

    step = partial(contestants.gptpl_step, net, optimizer, tokens[:, :-1], tokens[:, 1:])
    for _ in range(2):
        step()
    with profile() as measured:
        step()
    table = measured.key_averages().table(
        sort_by=f"self_{contestants.DEVICE}_time_total", row_limit=ROWS, max_name_column_width=60
    )
    text = f"GPT-2 small, batch {batch} x {context}, {path}\n\n{table}"
    (Path(__file__).parent / "profile.txt").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
