"""What temperature and top-k do to one distribution: the book's nine-token example, a table and a bar chart.

python experiments/temperature/study.py            # a second
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from gptpl.generation import SamplingRules, next_token, reshape_logits

HERE = Path(__file__).parent
WORDS = ["closer", "every", "effort", "forward", "inches", "moves", "pizza", "toward", "you"]
LOGITS = torch.tensor([4.51, 0.89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79])
RULES = {
    "temperature 0.1": SamplingRules(temperature=0.1),
    "temperature 1": SamplingRules(temperature=1.0),
    "temperature 5": SamplingRules(temperature=5.0),
    "temperature 5, top-k 3": SamplingRules(temperature=5.0, top_k=3),
    "temperature 5, top-p 0.8": SamplingRules(temperature=5.0, top_p=0.8),
    "temperature 5, min-p 0.5": SamplingRules(temperature=5.0, min_p=0.5),
}


def main() -> None:
    distributions = {
        name: reshape_logits(LOGITS[None], rules)[0].softmax(dim=-1) for name, rules in RULES.items()
    }
    torch.manual_seed(123)  # the book's thousand draws, one by one
    draws = [int(next_token(LOGITS[None], SamplingRules(temperature=1.0))) for _ in range(1000)]
    result = {
        name: {
            "probabilities": [round(float(p), 5) for p in distribution],
            "entropy_nats": round(float(torch.special.entr(distribution).sum()), 4),
        }
        for name, distribution in distributions.items()
    }
    counts = dict(zip(WORDS, torch.tensor(draws).bincount(minlength=9).tolist(), strict=True))
    record = {"draws of 1,000 at temperature 1, seed 123": counts, "distributions": result}
    (HERE / "result.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    draw_chart(distributions)
    print(f"{'':24}" + "".join(f"{word:>9}" for word in WORDS) + "  entropy")
    for name, row in result.items():
        print(
            f"{name:24}" + "".join(f"{p:9.4f}" for p in row["probabilities"]) + f"{row['entropy_nats']:9.3f}"
        )
    print(f"{'1,000 draws':24}" + "".join(f"{count:9d}" for count in counts.values()))


def draw_chart(distributions: dict[str, torch.Tensor]) -> None:
    figure, (left, right) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    for axes, names in ((left, list(distributions)[:3]), (right, list(distributions)[2:])):
        width = 0.8 / len(names)
        for place, name in enumerate(names):
            x = [word + (place - (len(names) - 1) / 2) * width for word in range(len(WORDS))]
            axes.bar(x, distributions[name], width, label=name)
        axes.set_ylabel("probability")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    left.set_title("Temperature sharpens or flattens; top-k, top-p and min-p cut the tail off", loc="left")
    right.set_xticks(range(len(WORDS)), WORDS)
    figure.savefig(HERE / "temperature.png", dpi=120)


if __name__ == "__main__":
    main()
