"""Cross-entropy by hand, compared with torch's: from logits to probabilities, to a loss, to a perplexity.

    python experiments/loss_analysis/study.py

Takes seconds: nothing is trained. Draws the book's untrained 124M-parameter model from seed 123 for its
published first loss. Writes result.json and confidence.png next to this file, or into --output. `--quick`
leaves out that model, and with it the published number.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from gptpl.model import GPTConfig, GPTModel
from gptpl.model.loss import next_token_loss, perplexity

# B batch, T time, V vocabulary

HERE = Path(__file__).parent
VOCABULARY = 50257
INPUTS = torch.tensor([[16833, 3626, 6100], [40, 1107, 588]])  # "every effort moves", "I really like"
TARGETS = torch.tensor([[3626, 6100, 345], [1107, 588, 11311]])  # the same one token later
TARGET_TEXTS = (" effort", " moves", " you", " really", " like", " chocolate")
BOOK = {"context_length": 256, "emb_dim": 768, "n_heads": 12, "n_layers": 12}
SMALL = {"context_length": 8, "emb_dim": 16, "n_heads": 2, "n_layers": 1}
LEADS = (0.0, 2.0, 5.0, 8.0, 10.0, 12.0, 15.0, 20.0, 30.0)
CONFIDENCES = (0.99, 0.9, 0.5, 0.1, 0.01, 0.001, 1 / VOCABULARY)
LOSSES = (10.8249, 10.7940, 10.79, 5.0, 2.0, 1.0, 0.5, 0.0)


def main(arguments: list[str] | None = None) -> None:
    """Computes, draws, writes the record, prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="without the 124M-parameter model")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the record (default: here)")
    options = parser.parse_args(arguments)
    record: dict[str, Any] = {"versions": {"python": sys.version.split()[0], "torch": torch.__version__}}
    parts = {
        "model": lambda: untrained_model(SMALL if options.quick else BOOK),
        "predictions": lambda: [prediction(lead) for lead in LEADS],
        "confidences": lambda: [confidence(p) for p in CONFIDENCES],
        "perplexities": lambda: [{"loss": loss, "perplexity": perplexity(loss)} for loss in LOSSES],
        "huge_logits": huge_logits,
    }
    for name, compute in tqdm(parts.items(), unit="part"):
        record[name] = compute()
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "result.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    figure(record["predictions"]).savefig(options.output / "confidence.png", dpi=120)
    print_tables(record)


def softmax_by_hand(logits: Tensor) -> Tensor:
    """exp(z) / sum of exp(z), over the last dimension; nan where exp overflows."""
    powers = logits.exp()
    return powers / powers.sum(dim=-1, keepdim=True)


def probabilities_of(targets: Tensor, probabilities: Tensor) -> Tensor:
    """Of each target (B, T), the probability that (B, T, V) gives it: (B, T)."""
    return probabilities.gather(-1, targets[..., None])[..., 0]


def loss_by_hand(logits: Tensor, targets: Tensor) -> Tensor:
    """The negative mean of the logarithms of the targets' probabilities: cross-entropy in nats per token."""
    return -probabilities_of(targets, softmax_by_hand(logits)).log().mean()


def untrained_model(sizes: dict[str, int]) -> dict[str, Any]:
    """The steps of the loss on two texts of three tokens, under a model drawn from seed 123."""
    torch.manual_seed(123)
    model = GPTModel(GPTConfig(vocab_size=VOCABULARY, drop_rate=0.1, qkv_bias=False, **sizes)).eval()
    with torch.no_grad():
        logits = model(INPUTS)  # (B, T, V)
    chosen = probabilities_of(TARGETS, softmax_by_hand(logits)).flatten()
    by_hand = float(loss_by_hand(logits, TARGETS))
    return {
        "sizes": sizes,
        "targets": [
            {"text": text, "probability": float(p), "log_probability": float(p.log())}
            for text, p in zip(TARGET_TEXTS, chosen, strict=True)
        ],
        "loss_by_hand": by_hand,
        "loss_of_torch": float(next_token_loss(logits, TARGETS)),
        "perplexity": math.exp(by_hand),
        "loss_of_guessing": math.log(VOCABULARY),
    }


def prediction(lead: float) -> dict[str, float]:
    """One prediction whose target's logit is `lead` above all the others, which are equal."""
    logits = torch.zeros(1, 1, VOCABULARY, dtype=torch.float64)
    logits[..., 7] = lead
    target = torch.tensor([[7]])
    by_hand = float(loss_by_hand(logits, target))
    return {
        "lead": lead,
        "probability": float(probabilities_of(target, softmax_by_hand(logits))),
        "loss_by_hand": by_hand,
        "loss_of_torch": float(torch.nn.functional.cross_entropy(logits[0], target[0])),
        "perplexity": perplexity(by_hand),
    }


def confidence(p: float) -> dict[str, float]:
    """The loss of a probability of the target; base 10, which is not the loss, explains two misprints."""
    return {"probability": p, "loss": -math.log(p), "in_base_10": -math.log10(p), "gradient": p - 1}


def huge_logits() -> dict[str, float]:
    """Why torch's loss takes logits and not probabilities: exp(1000) is more than a float can hold."""
    logits, target = torch.tensor([[[1000.0, 999.0, 0.0]]]), torch.tensor([[1]])
    return {
        "loss_by_hand_is_nan": bool(loss_by_hand(logits, target).isnan()),
        "loss_of_torch": float(next_token_loss(logits, target)),
    }


def figure(predictions: list[dict[str, float]]) -> Figure:
    """Left: the loss against the target's probability. Right: both against the lead of its logit."""
    drawn = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = drawn.subplots(1, 2)
    probabilities = torch.logspace(math.log10(1 / VOCABULARY), 0, 500)
    left.plot(probabilities, -probabilities.log())
    for p in (0.9, 0.5, 0.1, 0.01, 0.001):
        left.plot(p, -math.log(p), "o", color="C0")
        left.annotate(f"{p:g}: {-math.log(p):.3f}", (p, -math.log(p)), (8, 4), textcoords="offset points")
    left.plot(1 / VOCABULARY, math.log(VOCABULARY), "o", color="C0")
    left.set(xlabel="probability of the target", ylabel="loss (nats)", xlim=(-0.02, 1.12))
    left.set_title("Certain and wrong costs without bound", loc="left", fontsize=10)
    leads = torch.linspace(0, 30, 61).tolist()
    fine = [prediction(lead) for lead in leads]
    right.plot(leads, [row["loss_by_hand"] for row in fine], label="loss (nats)")
    right.plot(leads, [10 * row["probability"] for row in fine], label="10 x its probability")
    points = [(row["lead"], row["loss_by_hand"]) for row in predictions]
    right.plot(*zip(*points, strict=True), "o", color="C0")
    right.set(xlabel="lead of the target's logit")
    right.set_title("From guessing to certain, among 50,257 tokens", loc="left", fontsize=10)
    right.legend(frameon=False, loc="center right")
    for axes, side in ((left, 1.08), (right, 30)):
        axes.axhline(math.log(VOCABULARY), color="tab:gray", linestyle="--", linewidth=0.8)
        axes.text(side, 10.95, "guessing: ln 50,257 = 10.825", ha="right", color="tab:gray")
        axes.set_ylim(0, 12)
        axes.spines[["top", "right"]].set_visible(False)
    return drawn


def print_tables(record: dict[str, Any]) -> None:
    """Markdown, as in the README."""
    model, huge = record["model"], record["huge_logits"]
    print_table("target", "probability", "logarithm")
    for row in model["targets"]:
        print_row(f"`{row['text']}`", f"{row['probability']:.3e}", f"{row['log_probability']:.4f}")
    print(f"\nby hand {model['loss_by_hand']:.6f}, torch {model['loss_of_torch']:.6f}")
    print(f"guessing {model['loss_of_guessing']:.4f}, perplexity {model['perplexity']:,.1f}")
    print_table("lead of the target's logit", "its probability", "loss by hand", "torch's", "perplexity")
    for row in record["predictions"]:
        hand, torchs = f"{row['loss_by_hand']:.6f}", f"{row['loss_of_torch']:.6f}"
        print_row(f"{row['lead']:g}", f"{row['probability']:.6f}", hand, torchs, f"{row['perplexity']:,.2f}")
    print_table("probability of the target", "loss", "gradient at its logit", "to base 10: not the loss")
    for row in record["confidences"]:
        numbers = (f"{row[name]:.3f}" for name in ("loss", "gradient", "in_base_10"))
        print_row(f"{row['probability']:.2g}", *numbers)
    print_table("loss", "perplexity")
    for row in record["perplexities"]:
        print_row(f"{row['loss']:g}", f"{row['perplexity']:,.2f}")
    print("\nlogits 1000, 999, 0, the second right: by hand not a number:", huge["loss_by_hand_is_nan"])
    print(f"torch's: {huge['loss_of_torch']:.4f}")


def print_table(*names: str) -> None:
    """The head of a table."""
    print()
    print_row(*names)
    print("|" + "---|" * len(names))


def print_row(*cells: str) -> None:
    """A row of a table."""
    print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
