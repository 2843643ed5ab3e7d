"""`gptpl weights convert format=hf` of a classifier, for transformers' `GPT2ForSequenceClassification`."""

import json
import logging
import shlex
from pathlib import Path

from omegaconf import DictConfig

from gptpl import __version__
from gptpl.cli.classifier_input import loaded_classifier
from gptpl.cli.model_card import lineage_paragraphs
from gptpl.data.tokenizers.hugging_face import write_tokenizer
from gptpl.errors import InputError
from gptpl.training.classifier_checkpoint import LoadedClassifier, load_foreign_classifier
from gptpl.weights.comparison import compare_logits, prompt_class_logits
from gptpl.weights.hugging_face_classifier import write_classifier
from gptpl.weights.model_files import RECORD_FILE, record_of

log = logging.getLogger(__name__)

_CARD = """\
---
library_name: transformers
pipeline_tag: text-classification
tags:
- gpt2
- gptpl
---

# {name}

Exported by gptpl {version} as `hf`: a classifier that reads up to {max_length} tokens of a text.

Labels: {labels}.

## Where the weights come from

{lineage}

## Intended use and limits

A classifier for study and research: it gives each text one of the labels above, also a text that fits none of
them. Nobody has checked it for errors or for bias against groups of people; the texts it was trained on show
in both. Measure it on texts of your own before anyone relies on it.

No licence is given here: the terms of the texts and of the first weights hold. Add the one that you give.

## How to load it

```python
from transformers import AutoTokenizer, GPT2ForSequenceClassification

model = GPT2ForSequenceClassification.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

or, with gptpl,

```
gptpl classify {given} text='See you at six'
```
"""


def convert_classifier(cfg: DictConfig, folder: Path, *, shown_as: str) -> None:
    """Fills a folder that is there. Raises InputError for what a classifier's export does not have."""
    if cfg.format != "hf":
        raise InputError(f"format={cfg.format} holds no classifiers: give format=hf")
    if cfg.dtype not in (None, "float32"):
        raise InputError(f"dtype={cfg.dtype}: a classifier is written in float32, leave dtype out")
    if cfg.model is not None or cfg.tokenizer is not None:
        raise InputError(
            f"checkpoint={cfg.checkpoint} says itself which model it is: leave model= and tokenizer= out"
        )
    loaded = loaded_classifier(cfg)
    config, tokenizer = loaded.net.config, loaded.tokenizer
    write_classifier(loaded.net, folder, labels=loaded.labels, pad_id=loaded.pad_id)
    record = record_of(folder, config, tokenizer.state(), loaded.lineage) | {"task": loaded.task_state}
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    write_tokenizer(tokenizer, folder, context_length=config.context_length)
    (folder / "README.md").write_text(_card(loaded, shown_as), encoding="utf-8")
    if cfg.verify:
        _verify(loaded, folder)


def _card(loaded: LoadedClassifier, shown_as: str) -> str:
    return _CARD.format(
        name=shown_as,
        version=__version__,
        max_length=f"{loaded.max_length:,}",
        labels=", ".join(f"`{label}`" for label in loaded.labels),
        lineage="\n\n".join(lineage_paragraphs(loaded.lineage)),
        given=shlex.quote(f"checkpoint={shown_as}"),
    )


def _verify(loaded: LoadedClassifier, folder: Path) -> None:
    """Reads what was written, and compares the logits of fixed prompts of several lengths."""
    again = load_foreign_classifier(folder)
    before, after = (prompt_class_logits(each.net, pad_id=each.pad_id) for each in (loaded, again))
    difference = compare_logits(before, after, name="hf")
    log.info("verified: the logits of %d padded texts differ by %.1e at most", len(before), difference)
