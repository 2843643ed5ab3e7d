"""gptpl's model in a loop as plain as the book's: does it print the published losses, digit for digit?

    python experiments/the_verdict/book_loop.py the-verdict.txt     # about 8 minutes on 2 cores

Everything that draws random numbers does so in the book's order: initial weights, the order of the batches,
which every pass over a loader draws anew, also those of an evaluation, and dropout, for which attention must
be written out (`kernel = "explicit"`): other kernels draw other masks.
"""

import argparse
import sys
from pathlib import Path

import torch
from compare import PUBLISHED
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from gptpl.inspection.measures import attention_layers
from gptpl.model import GPTConfig, GPTModel
from gptpl.tokenizers import GPT2Tokenizer

CONFIG = GPTConfig(
    vocab_size=50257, context_length=256, emb_dim=768, n_heads=12, n_layers=12, drop_rate=0.1, qkv_bias=False
)
EPOCHS, EVALUATED_STEPS, EVALUATED_BATCHES, T = 10, 5, 5, CONFIG.context_length
Loader = DataLoader[tuple[Tensor, ...]]


def loader(text: str, *, training: bool) -> Loader:
    """Batches of two sequences and their targets, each (2, T), that do not overlap."""
    tokens = torch.tensor(GPT2Tokenizer().encode(text).tolist())
    starts = range(0, len(tokens) - T, T)
    inputs, targets = (torch.stack([tokens[i + ahead : i + ahead + T] for i in starts]) for ahead in (0, 1))
    return DataLoader(TensorDataset(inputs, targets), batch_size=2, shuffle=training, drop_last=training)


def loss_of(model: GPTModel, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


@torch.no_grad()
def mean_loss(model: GPTModel, batches: Loader) -> float:
    """Of the first batches, in evaluation mode."""
    model.eval()
    losses = []
    for number, (inputs, targets) in enumerate(batches):
        if number == EVALUATED_BATCHES:
            break
        losses.append(loss_of(model, inputs, targets).item())
    model.train()
    return sum(losses) / len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path, help="the story, a text file")
    parser.add_argument("--kernel", default="explicit", choices=("explicit", "sdpa", "blocked"))
    options = parser.parse_args()
    text = options.text.read_text(encoding="utf-8")
    split = int(0.9 * len(text))
    training, validation = loader(text[:split], training=True), loader(text[split:], training=False)

    torch.manual_seed(123)
    model = GPTModel(CONFIG)
    for layer in attention_layers(model):
        layer.kernel = options.kernel
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1)
    published = iter(PUBLISHED)
    step, different = 0, 0
    print("| step | published train | published val | gptpl train | gptpl val | equal |")
    print("|---:|---:|---:|---:|---:|---|")
    model.train()
    for _ in range(EPOCHS):
        for inputs, targets in training:
            optimizer.zero_grad()
            loss_of(model, inputs, targets).backward()
            optimizer.step()
            if step % EVALUATED_STEPS == 0:
                ours = (mean_loss(model, training), mean_loss(model, validation))
                _, *theirs = next(published)
                equal = [f"{each:.3f}" for each in ours] == [f"{each:.3f}" for each in theirs]
                different += not equal
                cells = " | ".join(f"{each:.3f}" for each in (*theirs, *ours))
                said = "yes" if equal else f"no: {ours[0]:.5f}, {ours[1]:.5f}"
                print(f"| {step} | {cells} | {said} |", flush=True)
            step += 1
    sys.exit(f"{different} of {len(PUBLISHED)} rows differ" if different else 0)


if __name__ == "__main__":
    main()
