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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import torch

from gptpl import __version__
from gptpl.checkpoints.adapter import adapter_checkpoint, export_adapter
from gptpl.checkpoints.files import EXPORTED
from gptpl.checkpoints.format import LOSSES, generations, net_weights, read_header, task_of
from gptpl.checkpoints.loading import (
    LoadedCheckpoint,
    LoadedClassifier,
    load_foreign,
    load_foreign_classifier,
    load_model,
    write_model,
)
from gptpl.errors import InputError
from gptpl.evaluation.suite import weights_sha256
from gptpl.evaluation.suite_report import chance_text, interval
from gptpl.files.durable import check_new, share, write_atomically
from gptpl.files.template import package_templates
from gptpl.model import GPTModel, count_parameters
from gptpl.model.loss import perplexity
from gptpl.model.protocol import gpt_model
from gptpl.runs.suites import FOLDER, Figures, recorded
from gptpl.text import one_line, shortened
from gptpl.tokenizers import GPT2Tokenizer
from gptpl.tokenizers.gpt2 import vocabulary_files
from gptpl.tokenizers.hugging_face import write_tokenizer
from gptpl.weights.adapter import FORMAT as ADAPTER
from gptpl.weights.adapter import TARGETS, is_adapter
from gptpl.weights.formats import (
    FORMATS,
    cast,
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
Loaded = LoadedCheckpoint | LoadedClassifier


def export(
    loaded: Loaded, format: str, output: Path | str, *, dtype: str | None = None, verify: bool = True
) -> Path:
    """Write a model into a new folder, which appears whole or not at all; returns its path.

    Args:
        loaded: a language model in any format, or a classifier in the format `hf`.
        format: hf, book, openai-tf, nanogpt, gguf, gptpl; adapter: what the run of `loaded` learned by LoRA.
        output: a folder that does not exist yet.
        dtype: float32, bfloat16, float16, in gguf also q8_0; None: the model's own.
        verify: read the new files, and compare the logits of a fixed prompt (of an adapter: the weights).

    Raises InputError as `check_export`, for a model that the format cannot hold, and where the files do not
    give back the same model.
    """
    check_export(format, output, dtype=dtype)
    output = Path(output).expanduser()
    measured = [] if format == ADAPTER else _measured(loaded)  # of the weights as they are
    # In the same folder, to be moved when it is whole.
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.absolute().parent))
    try:
        if format == ADAPTER:
            _write_adapter(loaded, folder, verify=verify)
        elif isinstance(loaded, LoadedClassifier):
            _write_classifier(loaded, format, folder, dtype=dtype, verify=verify)
        else:
            loaded = _write_model(loaded, format, folder, dtype=dtype, verify=verify)
        card = _checked_card(loaded, format, folder, output.name, dtype, measured)
        (folder / "README.md").write_text(card, encoding="utf-8")
        share(folder)
        try:
            folder.rename(output)
        except OSError as error:
            if not output.exists():
                raise
            raise InputError(f"output={output} was made meanwhile: give another folder") from error
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
    check_new(Path(output).expanduser())


# --- the files ------------------------------------------------------------------------------------------


def _write_model(
    loaded: LoadedCheckpoint, format: str, folder: Path, *, dtype: str | None, verify: bool
) -> LoadedCheckpoint:
    """Write a language model; returns it as it was written."""
    net, tokenizer = gpt_model(loaded.net, f"format={format} holds GPT-2 models"), loaded.tokenizer
    if dtype is not None:
        net = (FORMATS[format].stored if format in FORMATS else cast)(net, dtype)
    loaded = replace(loaded, net=net)
    if format == OWN:
        write_model(loaded, folder / EXPORTED)
    else:
        FORMATS[format].write(net, folder, tokenizer=tokenizer, dtype=dtype or _dtype(net))
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
    return loaded


def _write_classifier(
    loaded: LoadedClassifier, format: str, folder: Path, *, dtype: str | None, verify: bool
) -> None:
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


def _write_adapter(loaded: Loaded, folder: Path, *, verify: bool) -> None:
    path = loaded.path
    if is_adapter(path) or is_foreign(path):
        raise InputError(f"checkpoint={path} is not a run of gptpl, as format=adapter needs: give another")
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


# --- the model card -------------------------------------------------------------------------------------

CARD = "model_card.md"
"""Of a run, in its folder."""


def write_card(
    loaded: Loaded, path: Path | str, *, intended_use: str | None = None, licence: str | None = None
) -> Path:
    """Write the model card of a run's model, with what suites of benchmarks have measured of these weights.

    `intended_use` and `licence` are texts of yours, Markdown; None: the card's own words. Raises InputError
    for a file that is there already, or cannot be written.
    """
    path = Path(path).expanduser()
    check_new(path)
    own = {"intended_use": intended_use, "licence": licence}
    write_atomically(path, _checked_card(loaded, OWN, None, str(loaded.path), None, _measured(loaded), **own))
    return path


def _checked_card(loaded: Loaded, *of_card: Any, **texts: Any) -> str:
    try:
        return _card(loaded, *of_card, **texts)
    except (jinja2.TemplateError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{loaded.path} records its past otherwise than this gptpl ({type(error).__name__}: {error}):"
            " use the gptpl that wrote it, or restore the file"
        ) from error


def _card(
    loaded: Loaded,
    format: str,
    folder: Path | None,
    name: str,
    dtype: str | None,
    measured: Sequence[Mapping[str, Any]],
    intended_use: str | None = None,
    licence: str | None = None,
) -> str:
    """Fill in `model_card.md`; errors of Jinja and of types come from a damaged past. No folder: a run."""
    quoted = json.dumps(name, ensure_ascii=False)[1:-1]  # within double quotes
    runs = generations(loaded.lineage)
    facts: dict[str, Any] = {
        "kind": "classifier" if isinstance(loaded, LoadedClassifier) else "model",
        "name": name,
        "folder": quoted,
        "checkpoint": shlex.quote(f"checkpoint={name}"),
        "version": __version__,
        "format": format,
        "loaded": loaded,
        "past": [{**run, "losses": _losses(run)} for run in runs if run["step"]],
        "first_weights": _start(runs[-1]["start"]),
        "exported": folder is not None,
        "intended_use": intended_use,
        "licence": licence,
        "evaluations": measured,
    }
    if format == ADAPTER:
        assert folder is not None
        header = read_header(loaded.path)
        base = str(read_json(folder / "adapter_config.json")["base_model_name_or_path"])
        facts |= {
            "kind": "adapter",
            "tune": header["tune"],
            "targets": [target for target in TARGETS if target in header["tune"]["targets"]],
            "labels": task_of(header).get("labels"),
            "base": base,
            "on_hub": bool(re.fullmatch(r"openai-community/[\w.-]+", base)),
        }
    elif isinstance(loaded, LoadedCheckpoint):
        net = gpt_model(loaded.net, "a model card describes GPT-2 models")
        reader = FORMATS[format].reader if format in FORMATS else ""
        facts |= {"config": net.config, "parameters": count_parameters(net.config).total}
        facts |= {"dtype": dtype or _dtype(net), "reader": reader.replace("{folder}", quoted)}
    environment = package_templates(keep_trailing_newline=True)
    environment.filters |= {"text": _text, "code": _code, "thousands": "{:,d}".format, "cell": _cell}
    return environment.get_template("runs/model_card.md").render(facts)


def _measured(loaded: Loaded) -> list[dict[str, Any]]:
    """What the run's suites say of these weights, in fp32 or bf16, by command, ready to be shown."""
    run_dir = getattr(loaded, "run_dir", None)
    if run_dir is None or not isinstance(loaded, LoadedCheckpoint) or not (run_dir / FOLDER).is_dir():
        return []  # without hashing the weights
    types = (None, torch.bfloat16)
    found: dict[tuple[str, str], list[Figures]] = {}
    for each in recorded(run_dir, [weights_sha256(loaded.net, loaded.tokenizer, dtype) for dtype in types]):
        found.setdefault((each.date, each.command), []).append(each)
    return [
        {
            "date": date,
            "command": command,
            "rows": [row for each in figures for row in _rows(each)],
            "limits": [f"{each.task}: {each.limits}" for each in figures if each.limits],
        }
        for (date, command), figures in sorted(found.items())
    ]


def _rows(of: Figures) -> Iterator[list[str]]:
    metric = of.metric
    yield [of.task, of.primary, interval(metric), chance_text(metric), f"{of.questions:,d}", of.licence]
    for group, (count, own) in of.groups.items():
        yield [f"{of.task}: {group}", "", interval(own), chance_text(own), f"{count:,d}", ""]


def _dtype(net: GPTModel) -> str:
    return str(next(net.parameters()).dtype).removeprefix("torch.")


def _losses(run: Mapping[str, Any]) -> str:
    losses = {name: float(run["losses"][name]) for name in LOSSES if name in run["losses"]}
    return ", ".join(
        f"{name} {loss:.4f} (perplexity {perplexity(loss):.2f})" for name, loss in losses.items()
    )


def _start(start: Mapping[str, Any]) -> str:
    """Where the weights of the first run came from."""
    kind = start.get("init")
    if kind == "random":
        return "random"
    if kind == "cooccurrence":
        return "random, token embeddings from co-occurrence counts of the training text"
    if "path" not in start:
        return f"those of {_code(kind)}"
    hashes = ", ".join(
        f"{_code(name)} SHA-256 {_code(value)}" for name, value in start.get("sha256", {}).items()
    )
    if kind in ("gpt2_hf", "gpt2_openai") and not start.get("path"):
        origin = "the Hugging Face hub" if kind == "gpt2_hf" else "OpenAI's TensorFlow checkpoint"
        return f"OpenAI's GPT-2 {checked_size(start['size']).name} from {origin} ({hashes})"
    return f"the files at {_code(start.get('path'))} ({hashes})"


def _text(name: str) -> str:
    """A name as Markdown that means nothing but itself, on one line."""
    return re.sub(r"[\\`*\[\]#]|(?<!\w)_|_(?!\w)", r"\\\g<0>", html.escape(one_line(name), quote=False))


def _cell(text: object) -> str:
    return _text(str(text)).replace("|", "\\|")


def _code(value: object) -> str:
    """The text of a file as a span of code, which it cannot end."""
    text = shortened(str(value), 500) or "?"
    fence = "`" * (max((len(ticks) for ticks in re.findall("`+", text)), default=0) + 1)
    pad = " " if len(fence) > 1 else ""
    return f"{fence}{pad}{text}{pad}{fence}"
