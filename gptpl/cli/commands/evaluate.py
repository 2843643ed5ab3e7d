"""Evaluate a trained model on any data: its loss, or accuracy, F1 and calibration of a classifier.

examples:
  gptpl evaluate checkpoint=RUN                                    # on the run's own validation data
  gptpl evaluate checkpoint=RUN data=text_file data.path=my.txt split=all  # on your own text, all of it
  gptpl evaluate checkpoint=RUN/checkpoints/best.ckpt data=tale    # a specific checkpoint, on the tale
  gptpl evaluate checkpoint=CLASSIFIER split=test                  # a classifier on its test texts
  gptpl evaluate checkpoint=CLASSIFIER data=labelled data.path=my.csv split=all  # and on your own file
  gptpl evaluate init=gpt2_hf data=text_file data.path=my.txt split=all  # GPT-2 itself

Losses are in nats per token. The text is cut into sequences; gptpl inspect gives tokens more context, and so
measures a lower loss on the same text. Writes nothing.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from gptpl.cli.arguments import Arguments, configured
from gptpl.cli.model_input import given_model, settings_of
from gptpl.config.instantiate import instantiate
from gptpl.config.signatures import locate
from gptpl.data.sources import LabelledCorpus
from gptpl.errors import InputError
from gptpl.text import table

if TYPE_CHECKING:
    from gptpl.data.instructions.template import PromptTemplate
    from gptpl.evaluation.classifier import ClassifierEvaluation
    from gptpl.runs.models import Classifier, LanguageModel

PROGRESS = partial(tqdm, unit="batch", desc="evaluating", disable=None)


@configured("evaluate")
def run(given: Arguments) -> None:
    """Prints the scores."""
    from gptpl.runs.loaded import load
    from gptpl.runs.models import Classifier, LanguageModel

    cfg = settings_of(given)
    model, data = load(**given_model(cfg), precision=cfg["precision"]), cfg["data"]
    if data["batch_size"] == "auto":
        raise InputError("data.batch_size=auto is for training: give a whole number")
    if isinstance(model, Classifier):
        print("\n".join(_report(_classified(cfg, model), model.labels)))
        return
    assert isinstance(model, LanguageModel)
    if "_target_" not in data:
        result = model.evaluate(split=cfg["split"], progress=PROGRESS, **data)
    else:
        # In the model's template, unless another one is given.
        keys = {override.partition("=")[0].lstrip("+") for override in given.overrides}
        asked = keys & {"data.template", "data.response_marker"}
        datamodule = _datamodule(data, model, None if asked else model.template)
        result = model.evaluate(datamodule, split=cfg["split"], progress=PROGRESS)
    print(f"data        {result.data}")
    print(f"scored      {result.context}")
    print(f"tokens      {result.tokens:,}")
    print(f"loss        {result.loss:.4f} nats per token")
    print(f"perplexity  {result.perplexity:.2f}")
    if result.bits_per_byte is not None:
        print(f"bits/byte   {result.bits_per_byte:.4f}")


def _datamodule(data: dict[str, Any], model: "LanguageModel", template: "PromptTemplate | None") -> Any:
    from gptpl.model.protocol import context_length
    from gptpl.runs.evaluation_data import make_datamodule, with_corpora

    if data.get("stride") not in (None, data["max_length"]):
        raise InputError(
            f"data.stride={data['stride']} has no effect here, the sequences do not overlap: leave it out"
        )
    length = context_length(model.net) if data["max_length"] is None else data["max_length"]
    return make_datamodule(
        locate(data["_target_"], "data._target_"),
        {**with_corpora(data), "max_length": length},
        tokenizer=model.tokenizer,
        template=None if template is None else template.state(),
        batch_size=data["batch_size"],
    )


def _classified(cfg: dict[str, Any], model: "Classifier") -> "ClassifierEvaluation":
    data, split = cfg["data"], cfg["split"]
    settings = {"batch_size": data["batch_size"], "progress": PROGRESS}
    if data["max_length"] is not None:
        raise InputError(
            f"data.max_length={data['max_length']} cannot change, a classifier reads texts as in training:"
            " leave it out"
        )
    if "_target_" not in data:
        return model.evaluate(split=split, **settings)
    corpus = instantiate(data.get("corpus"))
    if not isinstance(corpus, LabelledCorpus):
        raise InputError(
            f"checkpoint={cfg['checkpoint']} is a classifier, but these data have no labels: give"
            " data=labelled data.path=FILE, or leave data= out for the run's own texts"
        )
    if split != "all":
        raise InputError(f"split={split}: a given file is not split, give split=all")
    return model.evaluate(corpus, **settings)


def _report(found: "ClassifierEvaluation", labels: Sequence[str]) -> Iterator[str]:
    """The scores in lines, and the confusion matrix."""
    yield f"data               {found.data}, {found.texts:,} texts of {len(labels)} classes"
    yield f"loss               {found.loss:.4f} nats per text"
    yield f"accuracy           {found.scores.accuracy:.2%}"
    yield f"F1, mean           {found.scores.macro_f1:.4f}"
    yield f"calibration error  {found.scores.calibration_error:.4f}"
    yield ""
    classes = zip(labels, found.confusion, found.scores.f1, strict=True)
    rows = [[label, *(f"{count:,.0f}" for count in counts), f"{f1:.4f}"] for label, counts, f1 in classes]
    yield from table([["true \\ predicted", *labels, "F1"], *rows])
