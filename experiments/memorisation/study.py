"""One prompt across all checkpoints of a run: what is continued from understanding, and what by heart.

python experiments/memorisation/study.py             # trains a run that keeps 10 checkpoints: about 8 minutes
python experiments/memorisation/study.py --run RUN   # uses the checkpoints of a run that is there
"""

import argparse
import csv
import html
import json
import subprocess
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch.nn import functional as F
from tqdm import tqdm

from gptpl.checkpoints.loading import LoadedCheckpoint, load_model
from gptpl.evaluation.likelihood import surprisals
from gptpl.evaluation.memorisation import Memorisation, TrainingText, memorisation, training_corpus
from gptpl.generation import SamplingRules, complete

HERE = Path(__file__).parent
OWN_RUN = Path("runs/memorisation")
EPOCHS, STEPS_PER_EPOCH = 30, 9  # the default run has 10 epochs, too few to know a text by heart
CHECKPOINTS = 10
PROMPT_TOKENS, PASSAGE_TOKENS, NEW_TOKENS, SEED = 8, 200, 60, 123
RULES = {"greedy": SamplingRules(), "temperature 1": SamplingRules(temperature=1.0)}
PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>Memorisation</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 70rem; margin: 1rem auto; padding: 0 1rem }}
td, th {{ vertical-align: top; text-align: left; padding: .3rem .8rem .3rem 0; border-top: 1px solid #8884 }}
mark {{ background: #f5c76a; color: #1d1d1f; border-radius: .2rem }}
</style>
<h1>One prompt across the checkpoints of a run</h1>
<p>Prompt: <b>{prompt}</b>. Marked: the longest run of tokens that is in the training text word for word.</p>
<table><tr><th>step</th>{heads}</tr>{rows}</table></html>
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", type=Path, help="a run's folder with several checkpoints; default: trains one"
    )
    run = parser.parse_args().run or trained()
    files = sorted((run / "checkpoints").glob("step-*.ckpt"))
    if not files:
        raise SystemExit(f"--run {run} holds no checkpoints/step-*.ckpt: give a run that kept them")
    first = load_model(files[0])
    training, name = TrainingText(training_corpus(first).train), first.lineage["data"]["corpus"]
    passage = training_passage(first)
    rows = [row(load_model(file), training, passage) for file in tqdm(files, unit="checkpoint")]
    prompt = first.tokenizer.decode(passage[:PROMPT_TOKENS])
    record = {"prompt": prompt, "training_text": name, "rows": rows}
    (HERE / "result.json").write_text(
        json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    (HERE / "checkpoints.html").write_text(page(prompt, rows), encoding="utf-8")
    draw_figure(rows, losses(run))
    for each in rows:
        lengths = ", ".join(f"{kind} {each[kind]['longest_run']} tokens" for kind in RULES)
        print(
            f"step {each['step']:3d}: by heart {lengths}; passage {each['passage_loss']:.2f} nats per token"
        )


def trained() -> Path:
    """The default model on the default text, keeping its checkpoints; taken as it is where it is there."""
    if not (OWN_RUN / "checkpoints/last.ckpt").exists():
        settings = [
            f"run_dir={OWN_RUN}",
            f"trainer.max_epochs={EPOCHS}",
            f"callbacks.checkpoint_last.every_n_steps={EPOCHS * STEPS_PER_EPOCH // CHECKPOINTS}",
            f"callbacks.checkpoint_last.keep={CHECKPOINTS}",
        ]
        subprocess.run(["gptpl", "train", *settings], check=True)
    return OWN_RUN


def training_passage(loaded: LoadedCheckpoint) -> list[int]:
    """The first tokens of the training text: its beginning is the prompt, all of it is scored."""
    return [int(token) for token in training_corpus(loaded).train[:PASSAGE_TOKENS]]


def row(loaded: LoadedCheckpoint, training: TrainingText, passage: list[int]) -> dict[str, Any]:
    """The continuations of one checkpoint, and its loss on the passage itself.

    The passage is scored at its positions in training, and one position later, after end-of-text.
    """
    prompt = loaded.tokenizer.decode(passage[:PROMPT_TOKENS])
    tokens = torch.tensor([passage])
    with torch.inference_mode():
        in_place = F.cross_entropy(loaded.net(tokens[:, :-1])[0], tokens[0, 1:])
    later = list(surprisals(loaded.net, passage, eot_id=loaded.tokenizer.eot_id, alternatives=0))[1:]
    found: dict[str, Any] = {
        "step": loaded.step,
        "passage_loss": round(float(in_place), 4),
        "passage_loss_one_place_later": round(sum(each.surprisal for each in later) / len(later), 4),
    }
    for kind, rules in RULES.items():
        (text,) = complete(
            loaded.net,
            loaded.tokenizer,
            [prompt],
            rules=rules,
            max_new_tokens=NEW_TOKENS,
            generator=torch.Generator().manual_seed(SEED),
        )
        known = memorisation(text.tokens, training, n_values=(4, 8))
        found[kind] = {"longest_run": known.longest_run, **shares(known), **parts(loaded, text.tokens, known)}
    return found


def shares(known: Memorisation) -> dict[str, float]:
    return {f"share_of_{n}_grams": round(share, 3) for n, share in known.shares.items()}


def parts(loaded: LoadedCheckpoint, tokens: tuple[int, ...], known: Memorisation) -> dict[str, str]:
    """The text before, in and after the longest run."""
    start, end = known.longest_start, known.longest_start + known.longest_run
    decode = loaded.tokenizer.decode
    return {
        "before": decode(tokens[:start]),
        "by_heart": decode(tokens[start:end]),
        "after": decode(tokens[end:]),
    }


def losses(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Evaluated losses by step, from the run's metrics.csv."""
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = ("eval/train_loss", "val/loss")
    return {name: [(int(row["step"]), float(row[name])) for row in rows if row.get(name)] for name in names}


def page(prompt: str, rows: list[dict[str, Any]]) -> str:
    def cell(text: dict[str, Any]) -> str:
        before, by_heart, after = (html.escape(text[part]) for part in ("before", "by_heart", "after"))
        return (
            f"<td>{before}<mark>{by_heart}</mark>{after} <small>({text['longest_run']} tokens)</small></td>"
        )

    lines = [f"<tr><td>{row['step']}</td>{''.join(cell(row[kind]) for kind in RULES)}</tr>" for row in rows]
    heads = "".join(f"<th>{kind}</th>" for kind in RULES)
    return PAGE.format(prompt=html.escape(prompt), heads=heads, rows="".join(lines))


def draw_figure(rows: list[dict[str, Any]], evaluated: dict[str, list[tuple[int, float]]]) -> None:
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    for name, label in (("eval/train_loss", "training loss"), ("val/loss", "validation loss")):
        top.plot(*zip(*evaluated[name], strict=True), label=label)
    steps = [row["step"] for row in rows]
    top.plot(steps, [row["passage_loss"] for row in rows], "o--", label="the passage")
    shifted = [row["passage_loss_one_place_later"] for row in rows]
    top.plot(steps, shifted, "s--", label="the passage, one position later")
    for kind, marker in zip(RULES, "os", strict=True):
        bottom.plot(steps, [row[kind]["longest_run"] for row in rows], marker=marker, label=kind)
    top.set_ylabel("nats per token")
    bottom.set_ylabel(f"tokens by heart, of {NEW_TOKENS}")
    bottom.set_xlabel("optimizer steps")
    for axes in (top, bottom):
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(HERE / "memorisation.png", dpi=120)


if __name__ == "__main__":
    main()
