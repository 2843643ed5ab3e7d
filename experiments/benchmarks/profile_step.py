"""Where the time of gptpl's training step goes, operation by operation.

    python experiments/benchmarks/profile_step.py [BATCH CONTEXT]

Writes profile.txt beside this file.
"""

import sys
from pathlib import Path

import contestants
import torch
from torch import nn
from torch.profiler import profile

from gptpl.training.head_loss import head_loss

ROWS = 25


def main() -> None:
    """Profiles one step after two that warm up."""
    batch, context = map(int, sys.argv[1:] or (8, 256))
    net, path = contestants.gptpl_model(0.0)
    optimizer = contestants.gptpl_optimizer(net)
    tokens = torch.randint(0, contestants.V, (batch, context + 1), device=contestants.DEVICE)

    def step() -> None:
        with torch.autocast(contestants.DEVICE, torch.bfloat16):
            loss = head_loss(net.hidden(tokens[:, :-1]), net.out_head.weight, tokens[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

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
