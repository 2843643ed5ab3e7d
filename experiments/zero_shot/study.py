"""Five kinds of prompt through any models, greedily: a table of what each one writes.

python experiments/zero_shot/study.py gpt2:124M gpt2:355M runs/tale/...   # GPT-2 is fetched once
python experiments/zero_shot/study.py random:124M                         # random weights: what chance writes
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from gptpl.checkpoints.files import checkpoint_file
from gptpl.checkpoints.loading import load_foreign, load_model, load_published
from gptpl.errors import InputError
from gptpl.generation import SamplingRules, complete
from gptpl.model import GPTModel
from gptpl.tokenizers import GPT2Tokenizer, Tokenizer
from gptpl.weights.formats import is_foreign, open_model
from gptpl.weights.published import checked_size
from gptpl.weights.starting import PublishedWeights

HERE = Path(__file__).parent
NEW_TOKENS, SEED = 24, 123


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="gpt2:SIZE, random:SIZE, a run, or an exported folder")
    parser.add_argument("--output", type=Path, default=HERE / "result.json")
    options = parser.parse_args()
    kinds: dict[str, list[str]] = json.loads((HERE / "prompts.json").read_text(encoding="utf-8"))
    try:
        record = {name: answers(*model(name), kinds) for name in tqdm(options.models, unit="model")}
    except InputError as error:
        raise SystemExit(f"study.py: error: {error}") from error
    written = {Path(name).name: found for name, found in record.items()}
    options.output.write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table(written))


def model(name: str) -> tuple[GPTModel, Tokenizer]:
    kind, _, size = name.partition(":")
    if kind == "gpt2":
        loaded = load_published(PublishedWeights(source="hf", size=size))
    elif kind == "random":
        torch.manual_seed(SEED)
        return GPTModel(checked_size(size).config), GPT2Tokenizer()
    elif is_foreign(Path(name)):
        loaded = load_foreign(open_model(Path(name)))
    else:
        loaded = load_model(checkpoint_file(name))
    return loaded.net, loaded.tokenizer


def answers(net: GPTModel, tokenizer: Tokenizer, kinds: dict[str, list[str]]) -> list[dict[str, Any]]:
    prompts = [prompt for prompts in kinds.values() for prompt in prompts]
    names = [kind for kind, prompts in kinds.items() for _ in prompts]
    rules = SamplingRules(temperature=0.0)
    texts = complete(net.eval(), tokenizer, prompts, rules=rules, max_new_tokens=NEW_TOKENS)
    return [
        {"kind": kind, "prompt": prompt, "text": text.text}
        for kind, prompt, text in zip(names, prompts, texts, strict=True)
    ]


def table(record: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: a row a prompt, a column a model."""

    def cell(text: str) -> str:
        return text.strip().replace("\n", " ⏎ ").replace("|", "\\|")

    lines = ["| kind | prompt | " + " | ".join(record) + " |", "|---|---" + "|---" * len(record) + "|"]
    for rows in zip(*record.values(), strict=True):
        first = rows[0]
        texts = [f"`{cell(row['text'])}`" for row in rows]
        lines.append(" | ".join([f"| {first['kind']}", f"`…{cell(first['prompt'])[-45:]}`", *texts]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
