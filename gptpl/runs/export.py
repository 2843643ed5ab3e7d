"""A model as files that another program, or gptpl, opens: written with a model card, then read back.

`export(load_model(Path("run/checkpoints/best.ckpt")), "hf", "my-model")` is `gptpl weights convert`.
"""

import html
import json
import logging
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gptpl import __version__
from gptpl.checkpoints.adapter import adapter_checkpoint, export_adapter
from gptpl.checkpoints.files import EXPORTED
from gptpl.checkpoints.format import (
    CLASSIFY,
    LOSSES,
    generations,
    net_weights,
    read_header,
    task_of,
)
from gptpl.checkpoints.loading import (
    LoadedCheckpoint,
    LoadedClassifier,
    load_foreign,
    load_foreign_classifier,
    load_model,
    write_model,
)
from gptpl.errors import InputError
from gptpl.files.durable import share
from gptpl.model import GPTModel, count_parameters, empty_model
from gptpl.model.loss import perplexity
from gptpl.model.protocol import gpt_model
from gptpl.text import one_line
from gptpl.tokenizers import GPT2Tokenizer
from gptpl.tokenizers.gpt2 import vocabulary_files
from gptpl.tokenizers.hugging_face import write_tokenizer
from gptpl.weights.adapter import FORMAT as ADAPTER
from gptpl.weights.adapter import TARGETS, is_adapter
from gptpl.weights.formats import (
    FORMATS,
    compare_logits,
    is_foreign,
    open_model,
    prompt_class_logits,
    prompt_logits,
)
from gptpl.weights.hugging_face import write_classifier
from gptpl.weights.model_files import DTYPES, RECORD_FILE, read_json, record_of, write_json
from gptpl.weights.published import checked_size

log = logging.getLogger(__name__)

OWN = "gptpl"


def export(
    loaded: LoadedCheckpoint | LoadedClassifier,
    format: str,
    output: Path | str,
    *,
    dtype: str | None = None,
    verify: bool = True,
) -> Path:
    """Writes a model into a new folder, which appears whole or not at all; returns its path.

    Args:
        loaded: a language model in any format, or a classifier in the format `hf`.
        format: hf, book, openai-tf, nanogpt, gptpl; adapter: what the run of `loaded` learned by LoRA.
        output: a folder that does not exist yet.
        dtype: float32, bfloat16 or float16; None: the model's own.
        verify: read the new files, and compare the logits of a fixed prompt (of an adapter: the weights).

    Raises InputError as `check_export`, for a model that the format cannot hold, and where the files do not
    give back the same model.
    """
    check_export(format, output, dtype=dtype)
    output = Path(output).expanduser()
    # Beside its place, so that a folder that is there is whole.
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.absolute().parent))
    try:
        if format == ADAPTER:
            card = _write_adapter(loaded, folder, output.name, verify=verify)
        elif isinstance(loaded, LoadedClassifier):
            card = _write_classifier(loaded, format, folder, output.name, dtype=dtype, verify=verify)
        else:
            card = _write_model(loaded, format, folder, output.name, dtype=dtype, verify=verify)
        try:
            text = "\n\n".join(card) + "\n"
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{loaded.path} records its past otherwise than this gptpl ({type(error).__name__}: {error}):"
                " use the gptpl that wrote it, or restore the file"
            ) from error
        (folder / "README.md").write_text(text, encoding="utf-8")
        share(folder)
        try:
            folder.rename(output)
        except OSError as error:
            if not output.exists():
                raise
            raise InputError(f"output={output} came into being meanwhile: give another folder") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return output


def check_export(format: str, output: Path | str, *, dtype: str | None = None) -> None:
    """Raises InputError for an unknown format, a dtype that it lacks, and a folder that cannot be made."""
    known = (*FORMATS, OWN, ADAPTER)
    if format not in known:
        raise InputError(f"format={format} is unknown: choose one of {', '.join(known)}")
    if format == ADAPTER and dtype is not None:
        raise InputError("format=adapter keeps what the run has: leave dtype= out")
    allowed = FORMATS[format].dtypes if format in FORMATS else DTYPES
    if dtype is not None and dtype not in allowed:
        raise InputError(f"dtype={dtype}: format={format} has {', '.join(allowed)} only, give one")
    path = Path(output).expanduser()
    if path.exists():
        raise InputError(f"output={output} is there already: give a folder that is not, or remove it")
    if not path.absolute().parent.is_dir():
        raise InputError(f"output={output} cannot be made: its parent folder does not exist, make it first")


# -------------------------------------------------------------------------------------------- language models


def _write_model(
    loaded: LoadedCheckpoint, format: str, folder: Path, name: str, *, dtype: str | None, verify: bool
) -> Iterator[str]:
    """All files but the card, whose parts are returned."""
    net, tokenizer = gpt_model(loaded.net, f"format={format} holds GPT-2 models"), loaded.tokenizer
    if dtype is not None:
        net = _cast(net, dtype)
    loaded = replace(loaded, net=net)
    if format == OWN:
        write_model(loaded, folder / EXPORTED)
    else:
        FORMATS[format].write(net, folder, eot_id=tokenizer.eot_id)
        record = record_of(folder, net.config, tokenizer.state(), loaded.lineage)
        write_json(folder / RECORD_FILE, record)
    if format == "hf":
        write_tokenizer(tokenizer, folder, context_length=net.config.context_length)
    if format == "openai-tf" and isinstance(tokenizer, GPT2Tokenizer):
        for file, content in vocabulary_files().items():
            (folder / file).write_bytes(content)
    if verify:
        before = prompt_logits(net)
        kind, device = next(net.parameters()).dtype, str(net.device)
        if format == OWN:
            again = load_model(folder / EXPORTED, device=device)
        else:
            again = load_foreign(open_model(folder), device=device, dtype=kind)
        difference = compare_logits(before, prompt_logits(again.net.to(kind)), name=format)
        log.info("verified: the logits of %d tokens differ by %.1e at most", before.shape[1], difference)
    return _model_card(loaded, net, format, name)


def _cast(net: GPTModel, dtype: str) -> GPTModel:
    """A copy in another data type. Raises InputError where a weight is too large for it."""
    copy = empty_model(net.config, device=str(net.device), dtype=DTYPES[dtype])
    copy.load_state_dict(net.state_dict())
    for name, parameter in copy.named_parameters():
        if not torch.isfinite(parameter).all():
            raise InputError(f"dtype={dtype} cannot hold the weights of {name}: use bfloat16 or float32")
    return copy.eval()


# ------------------------------------------------------------------------------------------------ classifiers


def _write_classifier(
    loaded: LoadedClassifier, format: str, folder: Path, name: str, *, dtype: str | None, verify: bool
) -> Iterator[str]:
    if format != "hf":
        raise InputError(f"format={format} holds no classifiers: give format=hf")
    if dtype not in (None, "float32"):
        raise InputError(f"dtype={dtype}: a classifier is written in float32, leave dtype out")
    config, tokenizer = loaded.net.config, loaded.tokenizer
    write_classifier(loaded.net, folder, labels=loaded.labels, pad_id=loaded.pad_id)
    record = record_of(folder, config, tokenizer.state(), loaded.lineage) | {"task": loaded.task}
    write_json(folder / RECORD_FILE, record)
    write_tokenizer(tokenizer, folder, context_length=config.context_length)
    if verify:
        again = load_foreign_classifier(folder, device=str(loaded.net.device))
        before, after = (prompt_class_logits(each.net, pad_id=each.pad_id) for each in (loaded, again))
        difference = compare_logits(before, after, name="hf")
        log.info("verified: the logits of %d padded texts differ by %.1e at most", len(before), difference)
    return _classifier_card(loaded, name)


# --------------------------------------------------------------------------------------------------- adapters


def _write_adapter(
    loaded: LoadedCheckpoint | LoadedClassifier, folder: Path, name: str, *, verify: bool
) -> Iterator[str]:
    path = loaded.path
    if is_adapter(path) or is_foreign(path):
        raise InputError(
            f"checkpoint={path} is no run of gptpl, which an adapter is made of: give another format"
        )
    export_adapter(path, folder)
    if verify:
        before, after = loaded.net.state_dict(), net_weights(adapter_checkpoint(folder))
        for each in sorted(before.keys() | after.keys()):
            if each not in before or each not in after or not torch.equal(before[each].cpu(), after[each]):
                raise InputError(
                    f"format=adapter came back with another {each}: nothing was written;"
                    " this is a mistake in gptpl"
                )
        log.info("verified: with its base it makes the same %d tensors", len(after))
    return _adapter_card(loaded, folder, name)


# ------------------------------------------------------------------------------------------------ model cards

_LICENCE = """\
No licence is given here: the terms of the texts and of the {first} hold. Add the one that you give."""
_MODEL_USE = """\
## Intended use and limits

A language model for study and research: it continues text. It was not trained to follow instructions or to
tell the truth, and nobody has checked what it writes for errors, for bias against groups of people, or for
text that it has learned by heart; what it was trained on shows in all of these. Check its output before
anyone relies on it."""
_CLASSIFIER_USE = """\
## Intended use and limits

A classifier for study and research: it gives each text one of the labels above, also a text that fits none of
them. Nobody has checked it for errors or for bias against groups of people; the texts it was trained on show
in both. Measure it on texts of your own before anyone relies on it."""
_CLASSIFIER_READER = """\
from transformers import AutoTokenizer, GPT2ForSequenceClassification

model = GPT2ForSequenceClassification.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")"""
_ADAPTER_READER = """\
from peft import PeftModel
from transformers import {model}

model = PeftModel.from_pretrained({model}.from_pretrained("BASE"{classes}), "{folder}")"""
_SHOWN_CHARACTERS = 500


def _head(name: str, settings: str, *, tags: str = "gpt2") -> str:
    return f"---\n{settings}tags:\n- {tags}\n- gptpl\n---\n\n# {_text(name)}"


def _use(reader: str, name: str, command: str, *, language: str = "python") -> Iterator[str]:
    yield "## How to load it"
    if reader:
        yield _block(reader, name, language=language)
        yield "or, with gptpl,"
    yield _block(command, name)


def _model_card(loaded: LoadedCheckpoint, net: GPTModel, format: str, name: str) -> Iterator[str]:
    library = "library_name: transformers\n" if format == "hf" else ""
    yield _head(name, f"{library}pipeline_tag: text-generation\n")
    yield f"Exported by gptpl {__version__} as `{format}`."
    config = net.config
    rows = {
        "parameters": f"{count_parameters(config).total:,}",
        "context": f"{config.context_length:,} tokens",
        "width, heads, blocks": f"{config.emb_dim}, {config.n_heads}, {config.n_layers}",
        "head": "tied to the token embedding" if config.tie_weights else "its own matrix",
        "bias of query, key, value": "yes" if config.qkv_bias else "no",
        "tokenizer": f"{loaded.tokenizer.name}, {loaded.tokenizer.vocab_size:,} tokens",
        "data type": str(next(net.parameters()).dtype).removeprefix("torch."),
    }
    yield "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])
    yield from _past(loaded.lineage)
    yield _MODEL_USE
    yield _LICENCE.format(first="first weights")
    reader = FORMATS[format].reader if format in FORMATS else ""
    command = f"gptpl generate {_checkpoint(name)} prompt='Every effort moves you'"
    yield from _use(reader, name, command, language="" if format == "nanogpt" else "python")


def _classifier_card(loaded: LoadedClassifier, name: str) -> Iterator[str]:
    yield _head(name, "library_name: transformers\npipeline_tag: text-classification\n")
    yield (
        f"Exported by gptpl {__version__} as `hf`: a classifier that reads up to {loaded.max_length:,} tokens"
        " of a text."
    )
    yield f"Labels: {', '.join(map(_code, loaded.labels))}."
    yield from _past(loaded.lineage)
    yield _CLASSIFIER_USE
    yield _LICENCE.format(first="first weights")
    yield from _use(_CLASSIFIER_READER, name, f"gptpl classify {_checkpoint(name)} text='See you at six'")


def _adapter_card(loaded: LoadedCheckpoint | LoadedClassifier, folder: Path, name: str) -> Iterator[str]:
    header = read_header(loaded.path)
    tune, task = header["tune"], task_of(header)
    base = str(read_json(folder / "adapter_config.json")["base_model_name_or_path"])
    on_hub = f"base_model: {base}\n" if re.fullmatch(r"openai-community/[\w.-]+", base) else ""
    yield _head(name, f"library_name: peft\n{on_hub}", tags="lora")
    targets = ", ".join(target for target in TARGETS if target in tune["targets"])
    yield (
        f"An adapter by LoRA (rank {tune['rank']:d}, alpha {tune['alpha']:g}, {targets}), exported by gptpl"
        f" {__version__}. It needs its base: {_code(base)}."
    )
    yield from _past(loaded.lineage)
    classifies = task["name"] == CLASSIFY
    yield "## How to use it"
    yield "Its base must be where it was, or be named by `init=`:"
    yield _block(f"gptpl {'classify' if classifies else 'generate'} {_checkpoint(name)}", name)
    yield "or, with PEFT, on its base as `gptpl weights convert ... format=hf` writes it (or on GPT-2):"
    model = "GPT2ForSequenceClassification" if classifies else "GPT2LMHeadModel"
    classes = f", num_labels={len(task.get('labels', ()))}" if classifies else ""
    reader = _ADAPTER_READER.replace("{model}", model).replace("{classes}", classes)
    yield _block(reader, name, language="python")
    yield _LICENCE.format(first="base")


def _past(lineage: Mapping[str, Any]) -> Iterator[str]:
    """A paragraph a run, the youngest first, and one for the weights that the first began with."""
    yield "## Where the weights come from"
    runs = generations(lineage)
    for number, run in enumerate(runs):
        if run["step"]:
            losses = {name: float(run["losses"][name]) for name in LOSSES if name in run["losses"]}
            shown = [
                f"{name} {value:.4f} (perplexity {perplexity(value):.2f})" for name, value in losses.items()
            ]
            corpus, sha256 = (_code(run["data"].get(key)) for key in ("corpus", "sha256"))
            yield (
                f"{number + 1}. Trained by gptpl for {run['step']:,d} optimizer steps,"
                f" {run['tokens_seen']:,d} tokens, on {corpus} (SHA-256 of the text {sha256})."
                f" Loss in nats per token: {', '.join(shown) or 'not recorded beside the checkpoint'}."
            )
    yield f"First weights: {_start(runs[-1]['start'])}."


def _start(start: Mapping[str, Any]) -> str:
    kind = start.get("init")
    if kind == "random":
        return "random"
    hashes = ", ".join(
        f"{_code(name)} SHA-256 {_code(value)}" for name, value in start.get("sha256", {}).items()
    )
    if kind in ("gpt2_hf", "gpt2_openai") and not start.get("path"):
        origin = "the Hugging Face hub" if kind == "gpt2_hf" else "OpenAI's TensorFlow checkpoint"
        return f"OpenAI's GPT-2 {checked_size(start['size']).name} from {origin} ({hashes})"
    return f"the files at {_code(start.get('path'))} ({hashes})"


def _block(code: str, name: str, *, language: str = "") -> str:
    """A block of code that loads the folder {folder}, whose name stands in double quotes there."""
    quoted = json.dumps(name, ensure_ascii=False)[1:-1]
    return f"```{language}\n{code.replace('{folder}', quoted)}\n```"


def _checkpoint(name: str) -> str:
    return shlex.quote(f"checkpoint={name}")


def _text(name: str) -> str:
    """A name as Markdown that means nothing but itself, on one line."""
    return re.sub(r"[\\`*\[\]#]|(?<!\w)_|_(?!\w)", r"\\\g<0>", html.escape(one_line(name), quote=False))


def _code(value: object) -> str:
    """What a file says as a span of code, which it cannot end."""
    text = one_line(str(value))[:_SHOWN_CHARACTERS] or "?"
    fence = "`" * (max((len(ticks) for ticks in re.findall("`+", text)), default=0) + 1)
    pad = " " if len(fence) > 1 else ""
    return f"{fence}{pad}{text}{pad}{fence}"
