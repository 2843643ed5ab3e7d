"""The commands that measure what a trained model does: evaluate, inspect, classify, judge."""

import json
import math
import shlex
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from gptpl.cli.arguments import Arguments, configured
from gptpl.cli.model_input import NOT_SET, given_filter, given_model, given_text, only_one, settings_of
from gptpl.config.compose import plain
from gptpl.config.instantiate import instantiate
from gptpl.config.overrides import key_of
from gptpl.data.sources import LabelledCorpus
from gptpl.data.sources.records import text_rows
from gptpl.errors import InputError
from gptpl.files.durable import write_atomically
from gptpl.text import shortened, table

if TYPE_CHECKING:
    from gptpl.data.instructions.records import PromptTemplate
    from gptpl.evaluation.classifier import ClassifierEvaluation, Prediction
    from gptpl.judging import Comparison, Scores
    from gptpl.runs.models import Classifier, LanguageModel


# --- gptpl evaluate -------------------------------------------------------------------------------------


PROGRESS = partial(tqdm, unit="batch", desc="evaluating", disable=None)


@configured("evaluate")
def evaluate(given: Arguments) -> None:
    """Evaluate a trained model on any data or by benchmarks: its loss, right answers, or a classifier's scores.

    examples:
      gptpl evaluate checkpoint=RUN                                    # on the run's own validation data
      gptpl evaluate checkpoint=RUN data=text_file data.path=my.txt split=all  # on your own text, all of it
      gptpl evaluate checkpoint=RUN/checkpoints/best.ckpt data=tale    # a specific checkpoint, on the tale
      gptpl evaluate checkpoint=CLASSIFIER split=test                  # a classifier on its test texts
      gptpl evaluate checkpoint=CLASSIFIER data=labelled data.path=my.csv split=all  # and on your own file
      gptpl evaluate init=gpt2_hf data=text_file data.path=my.txt split=all  # GPT-2 itself
      gptpl evaluate checkpoint=RUN suite=core suite.limit=200         # benchmarks, 200 questions of each
      gptpl evaluate checkpoint=RUN suite=core compare_with=[RUN2,RUN3]  # the same questions to several models
      gptpl evaluate checkpoint=RUN suite=bold filter=words filter.path=FILE  # what it writes about groups of people
      gptpl evaluate checkpoint=RUN suite=harness suite.tasks=[lambada_openai]  # the LM Evaluation Harness's tasks

    Losses are in nats per token. The text is cut into sequences; gptpl inspect gives tokens more context, and so
    measures a lower loss on the same text. Writes nothing; a suite writes results.json and report.html, and keeps
    every score: the same command continues where it was interrupted.
    """
    from gptpl.runs.loaded import load
    from gptpl.runs.models import Classifier, LanguageModel

    cfg = settings_of(given)
    if cfg.get("suite") is not None:
        _benchmarks(given, cfg)
        return
    for name in ("compare_with", "output"):
        if cfg[name]:
            raise InputError(f"{name}= is for benchmarks: give suite=NAME, or leave it out")
    if given_filter(cfg) is not None:
        raise InputError("filter= judges what a model writes: give suite=bold or honest, or leave it out")
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
        asked = {"data.template", "data.response_marker"} & {*map(key_of, given.overrides)}
        datamodule = _datamodule(data, model, None if asked else model.template)
        result = model.evaluate(datamodule, split=cfg["split"], progress=PROGRESS)
    print(f"data        {result.data}")
    print(f"scored      {result.context}")
    print(f"tokens      {result.tokens:,}")
    print(f"loss        {result.loss:.4f} nats per token")
    print(f"perplexity  {result.perplexity:.2f}")
    if result.bits_per_byte is not None:
        print(f"bits/byte   {result.bits_per_byte:.4f}")


def _benchmarks(given: Arguments, cfg: dict[str, Any]) -> None:
    from gptpl.evaluation.continuations import Continuations
    from gptpl.evaluation.suite_report import result_lines
    from gptpl.runs.listing import find_run
    from gptpl.runs.loaded import load_language_model, names_classifier
    from gptpl.runs.suites import FOLDER, PAGE, run_suite

    for override in given.overrides:
        key = key_of(override)
        if key.partition(".")[0] in ("data", "split"):
            raise InputError(f"{key}= and suite= are both set: a suite has data of its own, give one of them")
    suite = instantiate(given.config.suite)
    if (filter := given_filter(cfg)) is not None:
        if not isinstance(suite, Continuations):
            raise InputError("filter= judges what a model writes: give suite=bold or honest, or leave it out")
        suite.filter = filter
    suites = (each.partition("=")[2] for each in given.overrides if key_of(each) == "suite")
    name = next(suites, "suite")
    others = [find_run(each, key="compare_with") for each in cfg["compare_with"]]
    if classifiers := [each for each in others if names_classifier(each)]:
        raise InputError(f"compare_with={classifiers[0]} is a classifier: a suite asks language models")
    first = given_model(cfg)
    shared = {"device": cfg["device"], "trust": cfg["trust"], "precision": cfg["precision"]}
    model = load_language_model(**{**first, **shared})
    own = Path(FOLDER) if model.run_dir is None else model.run_dir / FOLDER
    output = own / name if cfg["output"] is None else Path(cfg["output"]).expanduser()

    def models() -> "Iterator[LanguageModel]":
        yield model
        for other in others:
            yield load_language_model(other, **shared)

    progress = partial(tqdm, unit="question", disable=None)
    folder = [] if given.config_dir is None else ["--config-dir", given.config_dir]
    command = shlex.join(["gptpl", "evaluate", *folder, *given.overrides])
    results = run_suite(models(), suite, name=name, output=output, progress=progress, command=command)
    print("\n".join(result_lines(results)))
    print(f"page        {output / PAGE}")


def _datamodule(data: dict[str, Any], model: "LanguageModel", template: "PromptTemplate | None") -> Any:
    from gptpl.model.protocol import context_length
    from gptpl.runs.evaluation_data import make_datamodule

    if data.get("stride") not in (None, data["max_length"]):
        raise InputError(
            f"data.stride={data['stride']} has no effect here, the sequences do not overlap: leave it out"
        )
    length = context_length(model.net) if data["max_length"] is None else data["max_length"]
    settings = {**data, "max_length": length}
    return make_datamodule(model, settings, template=template, batch_size=data["batch_size"])


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


# --- gptpl inspect --------------------------------------------------------------------------------------


@configured("inspect")
def inspect(given: Arguments) -> None:
    """Show what a trained model makes of a text, part by part, as a web page.

    examples:
      gptpl inspect checkpoint=RUN text='Every effort moves you'          # writes inspect.html
      gptpl inspect checkpoint=RUN text_file=my.txt output=my.html        # a whole file
      gptpl inspect checkpoint=RUN text='Every effort' tabs=[attention]   # one part only
      gptpl inspect checkpoint=RUN beside=RUN2 text='Every effort'        # two models side by side
      gptpl inspect init=gpt2_hf text='Every effort moves you'            # GPT-2 itself

    Prints loss and perplexity. The page has tabs: the surprisal of each token, where each head attends, what the
    model would say after each block, how the text was cut into tokens, embeddings and what is near them, sizes
    of activations, the loss without each part, and one prediction step by step. It needs no network.
    """
    from gptpl.inspection.page import check_tabs
    from gptpl.model.protocol import context_length
    from gptpl.runs.listing import find_run
    from gptpl.runs.loaded import load_language_model

    cfg = settings_of(given)
    output = Path(cfg["output"]).expanduser()
    if output.is_dir() or not output.parent.is_dir():
        raise InputError(f"output={cfg['output']} must be a file in a folder that exists")
    text = given_text(cfg["text"], cfg["text_file"], key="text")
    if not text:
        origin = "" if cfg["text_file"] is None else f" of text_file={cfg['text_file']}"
        wrong = "text is not set" if text is None else f"the text{origin} is empty"
        raise InputError(f"{wrong}: give text='...', text_file=FILE, or pipe one in")
    if cfg["tabs"] is not None:
        check_tabs(cfg["tabs"])
    given_models = [load_language_model(**given_model(cfg))]
    if cfg["beside"] is not None:
        other = {"device": cfg["device"], "trust": cfg["trust"]}
        given_models.append(load_language_model(find_run(cfg["beside"], key="beside"), **other))
    settings = {name: cfg[name] for name in ("alternatives", "max_tokens", "ablation_tokens")}
    looks = []
    for model in given_models:
        total = len(model.tokenizer.encode(text))
        progress = partial(tqdm, total=total, unit="token", desc="reading", disable=None)
        inspected = model.inspect(text, progress=progress, **settings)
        looks.append((inspected, {"checkpoint": str(model.path), "step": f"{model.step:,}"}))
    model, (inspected, facts) = given_models[0], looks[0]
    page = inspected.page(
        facts=facts,
        tabs=cfg["tabs"],
        beside=looks[1] if len(looks) > 1 else None,
        progress=partial(tqdm, unit="tab", desc="looking", disable=None),
    )
    write_atomically(output, page)
    T = context_length(model.net)
    print(f"tokens      {len(inspected.tokens):,}")
    print(
        f"scored      every token once, from all tokens before it, in a long text from the last {T // 2:,} to"
        f" {T:,} (more context than gptpl evaluate gives)"
    )
    print(f"loss        {inspected.loss:.4f} nats per token")
    print(f"perplexity  {inspected.perplexity:.2f}" if inspected.perplexity < math.inf else "perplexity  inf")
    print(f"page        {output}")


# --- gptpl classify -------------------------------------------------------------------------------------


@configured("classify", flags=["--json"])
def classify(given: Arguments) -> None:
    """Classify texts with a trained classifier.

    examples:
      gptpl classify checkpoint=RUN text='You have won a prize'        # each class with its probability
      gptpl classify checkpoint=RUN file=messages.csv output=labels.csv  # a whole file, of any size
      gptpl classify checkpoint=RUN file=messages.txt --json           # a text on each line, JSON lines
      echo 'See you at six' | gptpl classify checkpoint=RUN            # a piped text

    flags:
      --json    print a JSON object for each text

    RUN is a run of task=classify; its best weights are used. The model reads the beginning of a long text.
    """
    from gptpl.evaluation.classifier import check_prediction_file, prediction_file
    from gptpl.runs.loaded import load_classifier

    cfg = settings_of(given)
    output = None if cfg["output"] is None else Path(cfg["output"]).expanduser()
    only_one({"text": cfg["text"], "file": cfg["file"]})
    if output is not None and given.flags:
        raise InputError(f"--json and output={output} are both set: give one of them")
    if output is not None:
        check_prediction_file(output)
    alone = cfg["file"] is None
    if alone:
        text = given_text(cfg["text"], key="text")
        if not text or text.isspace():
            wrong = "is not set" if text is None else "is empty"
            raise InputError(f"text {wrong}: give text='...', or file=FILE, or pipe a text in")
        texts = iter([text])
    else:
        path = Path(cfg["file"]).expanduser()
        rows = text_rows(path, cfg["text_column"], format=cfg["format"], columns=cfg["columns"], keys="")
        texts = (row.text for row in rows)  # read as they are asked for
    model = load_classifier(**given_model(cfg))
    predictions = model.predictions(texts, batch_size=cfg["batch_size"])
    bar = partial(tqdm, unit="text", desc="classifying", disable=alone or None)
    if output is not None:
        with prediction_file(output, model.labels) as write:
            for prediction in bar(predictions):
                write(prediction)
        print(cfg["output"])
        return
    for prediction in bar(predictions):
        record = prediction.record() if given.flags else None
        tqdm.write(json.dumps(record, ensure_ascii=False) if record else _shown(prediction, alone=alone))


def _shown(prediction: "Prediction", *, alone: bool) -> str:
    """Every class with its probability, the most likely first; of many texts the first line of each."""
    width = max(map(len, prediction.labels))
    pairs = zip(prediction.labels, prediction.probabilities, strict=True)
    ranked = sorted(pairs, key=lambda pair: -pair[1])
    lines = [f"{label:<{width}}  {probability:.4f}" for label, probability in ranked]
    return "\n".join(lines) if alone else f"{lines[0]}  {shortened(prediction.text, 80)}"


# --- gptpl judge ----------------------------------------------------------------------------------------


@configured("judge")
def judge(given: Arguments) -> None:
    """Score a model's answers: against references, by a judge model, or against another model's answers.

    examples:
      gptpl judge responses=responses.json                      # scores from 0 to 100 by llama3 on Ollama
      gptpl judge responses=responses.json judge=none           # exact match, F1, ROUGE-L; no server
      gptpl judge responses=A.json compare=B.json both_orders=true  # which of two models is better?
      gptpl judge responses=A.json judge=openai judge.model=NAME  # the key from OPENAI_API_KEY
      gptpl judge responses=A.json judge=openai judge.address=URL judge.api_key_env=null  # a server without a key

    Writes scores.json or comparison.json next to the responses, or output=, and a picture of the same name.
    Replies are kept as they come: the same command again resumes.
    """
    from gptpl.judging import compare, score

    cfg = plain(given.config)
    responses, other, both_orders = cfg["responses"], cfg["compare"], cfg["both_orders"]
    if responses == NOT_SET:
        raise InputError("responses is not set: give responses=FILE, written by gptpl respond")
    if both_orders and other is None:
        raise InputError("both_orders=true needs two answers to swap: give compare=FILE, or leave it out")
    name = "scores.json" if other is None else "comparison.json"
    output = Path(cfg["output"] or Path(responses).with_name(name)).expanduser()
    settings: dict[str, Any] = {
        "judge": instantiate(cfg["judge"]),
        "output": output,
        "progress": partial(tqdm, unit="answer", disable=None, leave=False),
        **{key: cfg[key] for key in ("seed", "bootstrap_samples", "markers")},
    }
    result: Scores | Comparison
    if other is None:
        result = score(responses, **settings)
    else:
        result = compare(responses, other, both_orders=both_orders, **settings)
    files = [str(Path(path).expanduser()) for path in (responses, other) if path is not None]
    print(f"answers     {' against '.join(files)}, {len(result.entries)} entries")
    if result.judge is not None:
        print(f"judge       {result.judge.settings.model} at {result.judge.client.address}")
    print("\n" + "\n".join(result.lines()) + "\n")
    print(f"result      {output}")
    print(f"picture     {output.with_suffix('.png')}")
    result.check_readable()
