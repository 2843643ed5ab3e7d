"""LAMBADA and HellaSwag for GPT-2 or any checkpoint, scored as EleutherAI's LM Evaluation Harness does.

python experiments/pretrained_gpt2/benchmarks.py lambada lambada_test.jsonl --size 124M
python experiments/pretrained_gpt2/benchmarks.py hellaswag hellaswag_val.jsonl --size 124M
python experiments/pretrained_gpt2/benchmarks.py lambada lambada_test.jsonl --checkpoint RUN
"""

import argparse
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from gptpl.checkpoints.files import checkpoint_file
from gptpl.checkpoints.loading import LoadedCheckpoint, load_foreign, load_model, load_published
from gptpl.errors import InputError
from gptpl.evaluation.surprisal import ContinuationScore, Pair, score_continuations
from gptpl.tokenizers import Tokenizer
from gptpl.weights.formats import is_foreign, open_model
from gptpl.weights.starting import PublishedWeights


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("benchmark", choices=("lambada", "hellaswag"))
    parser.add_argument("data", type=Path, help="the benchmark's JSON lines")
    parser.add_argument("--size", help="124M, 355M, 774M, 1558M; default: 124M")
    parser.add_argument("--source", default="hf", help="hf or openai")
    parser.add_argument("--checkpoint", type=Path, help="a run or another program's folder, instead of GPT-2")
    parser.add_argument("--limit", type=int, help="only the first LIMIT items")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    try:
        items = read(options.data)[: options.limit]
        loaded = model(options)
        score = {"lambada": lambada, "hellaswag": hellaswag}[options.benchmark]
        print(json.dumps({"items": len(items)} | score(loaded, items)))
    except InputError as error:
        raise SystemExit(f"benchmarks.py: error: {error}") from error


def model(options: argparse.Namespace) -> LoadedCheckpoint:
    if options.checkpoint is None:
        weights = PublishedWeights(source=options.source, size=options.size or "124M")
        return load_published(weights, device=options.device)
    if is_foreign(options.checkpoint):
        return load_foreign(open_model(options.checkpoint), device=options.device)
    return load_model(checkpoint_file(str(options.checkpoint)), device=options.device)


def read(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a JSON Lines file ({error}): see this study's README") from error


def pair(tokenizer: Tokenizer, text: str, continuation: str) -> Pair:
    """Tokens of both, cut where the text's own tokens end."""
    whole = [int(token) for token in tokenizer.encode(text + continuation)]
    length = len(tokenizer.encode(text))
    return whole[:length], whole[length:]


def scores(loaded: LoadedCheckpoint, pairs: list[Pair]) -> Iterator[ContinuationScore]:
    found = score_continuations(loaded.net.eval(), pairs)
    return iter(tqdm(found, total=len(pairs), unit="text", disable=None))


def lambada(loaded: LoadedCheckpoint, items: list[dict[str, Any]]) -> dict[str, float]:
    """The last word of each passage, after the rest of it."""
    pairs = []
    for item in items:
        text, _, word = item["text"].rpartition(" ")
        pairs.append(pair(loaded.tokenizer, text, f" {word}"))
    found = list(scores(loaded, pairs))
    return {
        "accuracy_percent": 100 * sum(score.is_greedy for score in found) / len(found),
        "perplexity": math.exp(-sum(score.log_probability for score in found) / len(found)),
    }


def hellaswag(loaded: LoadedCheckpoint, items: list[dict[str, Any]]) -> dict[str, float]:
    """The most likely of four endings, by log-probability and by log-probability per character."""
    pairs, endings = [], []
    for item in items:
        text = clean(f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}")
        endings.append([clean(ending) for ending in item["endings"]])
        pairs += [pair(loaded.tokenizer, text, f" {ending}") for ending in endings[-1]]
    right = right_by_length = 0
    found = scores(loaded, pairs)
    for item, four in zip(items, endings, strict=True):
        sums = [next(found).log_probability for _ in four]
        by_length = [value / len(ending) for value, ending in zip(sums, four, strict=True)]
        right += sums.index(max(sums)) == int(item["label"])
        right_by_length += by_length.index(max(by_length)) == int(item["label"])
    return {
        "accuracy_percent": 100 * right / len(items),
        "accuracy_norm_percent": 100 * right_by_length / len(items),
    }


def clean(text: str) -> str:
    """Without the marks that WikiHow's articles have."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


if __name__ == "__main__":
    main()
