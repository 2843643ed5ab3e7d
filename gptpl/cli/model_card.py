"""The README.md of an exported model: where it comes from, what it is for, and how it is loaded."""

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from gptpl import __version__
from gptpl.model import count_parameters
from gptpl.training.checkpoint import LoadedCheckpoint
from gptpl.training.lineage import generations
from gptpl.training.loss import perplexity
from gptpl.weights.formats import FORMATS

_FRONT_MATTER = """\
---
{library}pipeline_tag: text-generation
tags:
- gpt2
- gptpl
---"""
_USE = """\
## Intended use and limits

A language model for study and research: it continues text. It was not trained to follow instructions or to
tell the truth, and nobody has checked what it writes for errors, for bias against groups of people, or for
text that it has learned by heart; what it was trained on shows in all of these. Check its output before
anyone relies on it.

No licence is given here: the terms of the texts and of the first weights hold. Add the one that you give."""


def model_card(loaded: LoadedCheckpoint, name: str, *, shown_as: str) -> str:
    """The card of a model in a format, in Markdown; `shown_as` is the name of its folder."""
    library = "library_name: transformers\n" if name == "hf" else ""
    parts = [
        _FRONT_MATTER.format(library=library),
        f"# {shown_as}",
        f"Exported by gptpl {__version__} as `{name}`.",
        "\n".join(_model_lines(loaded)),
        "## Where the weights come from",
        "\n\n".join(lineage_paragraphs(loaded.lineage)),
        _USE,
        "## How to load it",
        _loading(name, shown_as),
    ]
    return "\n\n".join(parts) + "\n"


def _model_lines(loaded: LoadedCheckpoint) -> Iterator[str]:
    config = loaded.net.config
    yield "| | |"
    yield "|---|---|"
    yield f"| parameters | {count_parameters(config).total:,} |"
    yield f"| context | {config.context_length:,} tokens |"
    yield f"| width, heads, blocks | {config.emb_dim}, {config.n_heads}, {config.n_layers} |"
    yield f"| head | {'tied to the token embedding' if config.tie_weights else 'its own matrix'} |"
    yield f"| bias of query, key, value | {'yes' if config.qkv_bias else 'no'} |"
    yield f"| tokenizer | {loaded.tokenizer.name}, {loaded.tokenizer.vocab_size:,} tokens |"
    yield f"| data type | {str(next(loaded.net.parameters()).dtype).removeprefix('torch.')} |"


def lineage_paragraphs(lineage: Mapping[str, Any]) -> Iterator[str]:
    """A paragraph a run, the youngest first, and one for the weights that the first began with."""
    runs = generations(lineage)
    for number, run in enumerate(runs):
        if run["step"]:
            losses = ", ".join(
                f"{name} {value:.4f} (perplexity {perplexity(value):.2f})"
                for name, value in run["losses"].items()
            )
            text = run["data"]
            yield (
                f"{number + 1}. Trained by gptpl for {run['step']:,} optimizer steps, {run['tokens_seen']:,}"
                f" tokens, on `{text.get('corpus')}` (SHA-256 of the text `{text.get('sha256')}`)."
                f" Loss in nats per token: {losses or 'not recorded beside the checkpoint'}."
            )
    yield f"First weights: {_start(runs[-1]['start'])}."


def _start(start: Mapping[str, Any]) -> str:
    kind = start.get("init")
    if kind == "random":
        return "random"
    hashes = ", ".join(f"`{name}` SHA-256 `{value}`" for name, value in start.get("sha256", {}).items())
    if kind in ("gpt2_hf", "gpt2_openai") and not start.get("path"):
        origin = "the Hugging Face hub" if kind == "gpt2_hf" else "OpenAI's TensorFlow checkpoint"
        return f"OpenAI's GPT-2 {start['size']} from {origin} ({hashes})"
    return f"the files at `{start.get('path')}` ({hashes})"


def _loading(name: str, shown_as: str) -> str:
    command = f"gptpl generate {shlex.quote(f'checkpoint={shown_as}')} prompt='Every effort moves you'"
    lines = ["```", command, "```"]
    if name in FORMATS:
        code = FORMATS[name].reader.replace("{folder}", shown_as)
        lines = [
            f"```{'' if name == 'nanogpt' else 'python'}",
            code,
            "```",
            "",
            "or, with gptpl,",
            "",
            *lines,
        ]
    return "\n".join(lines)
