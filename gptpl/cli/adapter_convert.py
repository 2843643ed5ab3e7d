"""`gptpl weights convert format=adapter`: what a run learned by LoRA, without the weights it began with."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from gptpl import __version__
from gptpl.cli.classifier_input import BEST
from gptpl.cli.model_card import lineage_paragraphs
from gptpl.errors import InputError
from gptpl.training.adapter import adapter_checkpoint, export_adapter
from gptpl.training.checkpoint import HEADER_KEY, check_intact, net_weights, read_checkpoint, task_of
from gptpl.training.checkpoint_files import checkpoint_file
from gptpl.training.classifier_checkpoint import is_classifier_checkpoint
from gptpl.training.lineage import lineage_of
from gptpl.weights.adapter import is_adapter
from gptpl.weights.formats import is_foreign
from gptpl.weights.model_files import read_json

log = logging.getLogger(__name__)

_USE = """\
## How to use it

Its base must be where it was, or be named by `init=`:

```
gptpl {command} checkpoint={folder}
```

or, with PEFT, on the base that `gptpl weights convert ... format=hf` wrote (or on the hub's GPT-2):

```python
from peft import PeftModel
from transformers import {model}

model = PeftModel.from_pretrained({model}.from_pretrained("BASE"{classes}), "{folder}")
```

No licence is given here: the terms of the texts and of the base hold. Add the one that you give."""


def convert_to_adapter(cfg: DictConfig, folder: Path, *, shown_as: str) -> None:
    """Fills a folder that is there. Raises InputError for what is no checkpoint of a run of LoRA."""
    if OmegaConf.is_missing(cfg, "checkpoint"):
        raise InputError("format=adapter is for a run of tune=lora: give checkpoint=RUN_FOLDER or FILE.ckpt")
    given = Path(cfg.checkpoint).expanduser()
    if is_adapter(given) or is_foreign(given):
        raise InputError(
            f"checkpoint={given} is no run of gptpl, which an adapter is made of: give another format"
        )
    path = _checkpoint(given)
    check_intact(path)
    export_adapter(path, folder)
    (folder / "README.md").write_text(_card(path, folder, shown_as), encoding="utf-8")
    if cfg.verify:
        _verify(path, folder)


def _checkpoint(given: Path) -> Path:
    """The file: of a folder of a classifier's run the best weights, as for every other use of it."""
    path = checkpoint_file(str(given))
    best = given / BEST
    if best.is_file() and is_classifier_checkpoint(read_checkpoint(path)):
        return best
    return path


def _verify(path: Path, folder: Path) -> None:
    """The base that the adapter names, with the adapter, must be the run's own merged weights."""
    before, after = net_weights(read_checkpoint(path)), net_weights(adapter_checkpoint(folder))
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after or not torch.equal(before[name], after[name]):
            raise InputError(
                f"format=adapter came back with another {name}: nothing was written; this is a mistake in"
                " gptpl"
            )
    log.info("verified: with its base it makes the same %d tensors", len(after))


def _card(path: Path, folder: Path, shown_as: str) -> str:
    checkpoint = read_checkpoint(path)
    header = checkpoint[HEADER_KEY]
    return "\n\n".join(_parts(header, lineage_of(checkpoint, path), folder, shown_as)) + "\n"


def _parts(
    header: Mapping[str, Any], lineage: Mapping[str, Any], folder: Path, shown_as: str
) -> Iterator[str]:
    said, tune, task = read_json(folder / "adapter_config.json"), header["tune"], task_of(header)
    base = said["base_model_name_or_path"]
    on_hub = f"base_model: {base}\n" if base.startswith("openai-community/") else ""
    yield f"---\nlibrary_name: peft\n{on_hub}tags:\n- lora\n- gptpl\n---"
    yield f"# {shown_as}"
    yield (
        f"An adapter by LoRA (rank {tune['rank']}, alpha {tune['alpha']:g}, {', '.join(tune['targets'])}),"
        f" exported by gptpl {__version__}. It needs its base: `{base}`."
    )
    yield "## Where the weights come from"
    yield from lineage_paragraphs(lineage)
    classifies = task["name"] == "classify"
    yield _USE.format(
        command="classify" if classifies else "generate",
        folder=shown_as,
        model="GPT2ForSequenceClassification" if classifies else "GPT2LMHeadModel",
        classes=f", num_labels={len(task.get('labels', ()))}" if classifies else "",
    )
