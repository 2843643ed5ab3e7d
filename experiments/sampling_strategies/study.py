"""Ten texts for each of twenty pairs of temperature and top-k: how varied, how likely, how much by heart.

python experiments/sampling_strategies/study.py              # trains the default run first: about 7 minutes
python experiments/sampling_strategies/study.py --run RUN    # uses a run that is there: about 2 minutes
"""

import argparse
import json
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from tqdm import tqdm

from gptpl.checkpoints.files import checkpoint_file
from gptpl.checkpoints.loading import load_model
from gptpl.evaluation.memorisation import TrainingText, memorisation, training_corpus
from gptpl.evaluation.statistics import text_statistics
from gptpl.generation import Completion, SamplingRules, complete

HERE = Path(__file__).parent
OWN_RUN = Path("runs/sampling_strategies")
PROMPT = "Every effort moves you"
TEMPERATURES = (0.1, 0.5, 1.0, 1.5, 2.0)
TOP_KS = (1, 10, 50, 100)
SAMPLES, NEW_TOKENS, SEED = 10, 50, 123
N = 8  # of the n-grams that are looked for in the training text
PANELS = {
    "distinct_2": "distinct-2: different pairs of tokens",
    "self_bleu": "self-BLEU: how alike the ten are",
    "perplexity": "perplexity under the model",
    "longest_run": "tokens in a row from the training text",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="a run's folder, or a .ckpt file; default: trains one")
    options = parser.parse_args()
    run = options.run or trained()
    loaded = load_model(checkpoint_file(str(run)))
    data = training_corpus(loaded)
    training = TrainingText(data.train)
    rows = []
    for rules in tqdm(
        [SamplingRules(temperature=t, top_k=k) for t in TEMPERATURES for k in TOP_KS], unit="pair"
    ):
        texts = complete(
            loaded.net,
            loaded.tokenizer,
            [PROMPT],
            rules=rules,
            max_new_tokens=NEW_TOKENS,
            num_samples=SAMPLES,
            generator=torch.Generator().manual_seed(SEED),
            alternatives=0,
        )
        rows.append({"temperature": rules.temperature, "top_k": rules.top_k} | measured(texts, training))
    record = {
        "prompt": PROMPT,
        "training_text": loaded.lineage["data"]["corpus"],
        "step": loaded.step,
        "seed": SEED,
        "longest_run_of_held_out_text": held_out_run(data.val, training),
        "rows": rows,
    }
    (HERE / "result.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    draw_figure(rows)
    print(table(rows))


def trained() -> Path:
    """The default run, in its own folder; taken as it is where it is there."""
    if not (OWN_RUN / "checkpoints/last.ckpt").exists():
        subprocess.run(["gptpl", "train", f"run_dir={OWN_RUN}"], check=True)
    return OWN_RUN


def held_out_run(tokens: Sequence[int], training: TrainingText) -> float:
    """What common phrases give: the mean of pieces of validation text as long as the samples."""
    pieces = [tokens[start : start + NEW_TOKENS] for start in range(0, len(tokens) - NEW_TOKENS, NEW_TOKENS)]
    return round(statistics.fmean(memorisation(piece, training).longest_run for piece in pieces), 2)


def measured(texts: list[Completion], training: TrainingText) -> dict[str, Any]:
    samples = [text.tokens for text in texts]
    found = text_statistics(
        samples, [[each.log_probability for each in text.details or ()] for text in texts]
    )
    known = [memorisation(sample, training, n_values=(N,)) for sample in samples]
    shares = [each.shares[N] for each in known if each.shares[N] >= 0]
    return {
        "distinct_1": round(found.distinct_1, 3),
        "distinct_2": round(found.distinct_2, 3),
        "distinct_3": round(found.distinct_3, 3),
        "repetition": round(found.repetition, 3),
        "self_bleu": round(found.self_bleu or 0.0, 3),
        "mean_log_probability": round(found.mean_log_probability, 3),
        "perplexity": round(found.perplexity, 2),
        "longest_run": statistics.fmean(each.longest_run for each in known),
        f"share_of_{N}_grams": round(statistics.fmean(shares), 3) if shares else None,
        "first_text": texts[0].text,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, without the texts."""
    names = [name for name in rows[0] if name != "first_text"]
    lines = ["| " + " | ".join(name.replace("_", " ") for name in names) + " |", "|---" * len(names) + "|"]
    return "\n".join(
        [*lines, *("| " + " | ".join(f"{row[name]:g}" for name in names) + " |" for row in rows)]
    )


def draw_figure(rows: list[dict[str, Any]]) -> None:
    figure, grid = plt.subplots(2, 2, figsize=(9, 6.5), sharex=True, layout="constrained")
    for axes, (name, title) in zip(grid.flat, PANELS.items(), strict=True):
        for top_k, marker in zip(TOP_KS, "osD^", strict=True):
            values = [row[name] for row in rows if row["top_k"] == top_k]
            axes.plot(TEMPERATURES, values, marker=marker, label=f"top-k {top_k}")
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xticks(TEMPERATURES)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[1]:
        axes.set_xlabel("temperature")
    grid[0, 0].legend(frameon=False, fontsize=9)
    figure.savefig(HERE / "strategies.png", dpi=120)


if __name__ == "__main__":
    main()
