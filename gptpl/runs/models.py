"""Loaded models in use: continue text, answer instructions, classify, be evaluated."""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from gptpl.checkpoints.loading import LoadedCheckpoint, LoadedClassifier
from gptpl.data.instructions.records import PromptTemplate
from gptpl.data.sources.records import Record, read_records, text_rows
from gptpl.data.splits import SPLITS, Split, split_file
from gptpl.errors import InputError
from gptpl.evaluation.answers import Answer, Answerer, answer_all, answer_generator
from gptpl.evaluation.likelihood import Evaluation, evaluate, surprisals
from gptpl.evaluation.memorisation import Memorisation, TrainingText, memorisation, training_corpus
from gptpl.evaluation.statistics import TextStatistics, text_statistics
from gptpl.files.run_record import CHECKPOINT_FOLDER, is_run
from gptpl.filters import Filter
from gptpl.generation import Completion, Piece, SamplingRules, search_text, stream_text
from gptpl.generation.sampling import seeded_generator
from gptpl.inspection.page import Inspection
from gptpl.model.protocol import device_of, vocab_size
from gptpl.weights.adapter import FORMAT as ADAPTER

if TYPE_CHECKING:  # these import Lightning, which `generate` does not need
    from gptpl.evaluation.classifier import ClassifierEvaluation, Prediction
    from gptpl.evaluation.suite import Progress as SuiteProgress
    from gptpl.evaluation.suite import Suite, SuiteResult
    from gptpl.runs.evaluation_data import LabelledData, TextData

log = logging.getLogger(__name__)

CHAT: Mapping[str, Any] = {"temperature": 0.7, "top_k": 40}
"""The default sampling rules: `sampling=chat` of the command."""
Progress = Callable[[Iterable[Any]], Iterable[Any]]
"""Wraps batches to show progress, such as `tqdm.tqdm`."""


@dataclass(frozen=True, kw_only=True)
class _OfRun:
    """`trust` are packages of the user's whose classes the model's run may use."""

    path: Path
    trust: tuple[str, ...] = ()

    @property
    def run_dir(self) -> Path | None:
        """The folder of the model's run, by its checkpoint or adapter; None for weights elsewhere."""
        path = self.path
        run_dir = path.parent if path.name == ADAPTER else path.parent.parent
        own = path.name == ADAPTER or path.parent.name == CHECKPOINT_FOLDER
        return run_dir if own and is_run(run_dir) else None


def _check_one(prompt: str) -> None:
    if not isinstance(prompt, str):
        raise InputError(f"prompt must be one text, got {type(prompt).__name__}: several are for complete")


# --- language models ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LanguageModel(_OfRun, LoadedCheckpoint):
    """A model that continues text; `template` is that of its tuning to follow instructions, if any.

    `**rules` of a method are fields of `gptpl.generation.SamplingRules` (temperature, top_k, top_p, min_p,
    ...), those left out as in `CHAT`. `seed` makes a text reproducible; with None each text is another one.
    """

    template: PromptTemplate | None = None

    def generate(self, prompt: str, **settings: Any) -> str:
        """The continuation of the prompt; settings as for `complete`, for one text."""
        _check_one(prompt)
        return self.complete([prompt], **settings)[0].text

    def stream(self, prompt: str, **settings: Any) -> Iterator[str]:
        """The text of `generate` piece by piece, as it is made; settings as for `pieces`, for one text."""
        _check_one(prompt)
        return (piece.text for piece in self.pieces([prompt], **settings))

    def complete(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 50,
        num_samples: int = 1,
        stop: Sequence[str] = (),
        seed: int | None = None,
        num_beams: int | None = None,
        alternatives: int | None = None,
        filter: Filter | None = None,
        **rules: Any,
    ) -> list[Completion]:
        """`num_samples` continuations of every prompt, made together, in the order of prompts and samples.

        An empty prompt starts from end-of-text; `stop` are texts that end a continuation. With `num_beams`
        the most likely texts are searched for instead of sampled: the best `num_samples` of them. With
        `alternatives` every token has its log-probability and that of so many likelier ones, as `details`.
        With a `filter` the texts are those that may be shown, each with its `verdict`.

        Raises InputError for a number out of range, and for an unknown rule.
        """
        if isinstance(prompts, str):
            raise InputError("prompts is one text: give a list of texts, or use generate")
        if num_beams is None:
            pieces = self.pieces(
                prompts, max_new_tokens=max_new_tokens, num_samples=num_samples, stop=stop, seed=seed,
                alternatives=alternatives, filter=filter, **rules,
            )  # fmt: skip
            done = [piece.completion for piece in pieces if piece.completion is not None]
            return sorted(done, key=lambda each: (each.prompt, each.sample))
        self.rules(**rules)  # refuses an unknown one
        if num_samples > num_beams:
            raise InputError(f"num_samples={num_samples} exceeds num_beams={num_beams}: raise num_beams")
        if stop or alternatives is not None:
            raise InputError("num_beams works without stop, alternatives and statistics: leave them out")
        limits: dict[str, Any] = {"num_beams": num_beams, "max_new_tokens": max_new_tokens, "filter": filter}
        return [
            dataclasses.replace(beam, prompt=number)
            for number, prompt in enumerate(prompts)
            for beam in search_text(self.net, self.tokenizer, prompt, **limits)[:num_samples]
        ]

    def pieces(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 50,
        num_samples: int = 1,
        stop: Sequence[str] = (),
        seed: int | None = None,
        alternatives: int | None = None,
        filter: Filter | None = None,
        **rules: Any,
    ) -> Iterator[Piece]:
        """The completions of `complete` piece by piece, all of them growing at the same time."""
        generator = seeded_generator(seed, device_of(self.net))
        return stream_text(
            self.net, self.tokenizer, prompts, rules=self.rules(**rules), max_new_tokens=max_new_tokens,
            num_samples=num_samples, stop=stop, generator=generator, alternatives=alternatives,
            filter=filter,
        )  # fmt: skip

    def rules(self, **rules: Any) -> SamplingRules:
        """`CHAT` with these sampling rules in its place, for the model's vocabulary."""
        return SamplingRules.of({**CHAT, **rules}).within(vocab_size(self.net))

    def evaluate(
        self,
        data: "TextData" = None,
        *,
        split: str | None = None,
        max_length: int | None = None,
        batch_size: int | None = None,
        progress: Progress = iter,
    ) -> Evaluation:
        """Loss, perplexity and, of text, bits per byte.

        `data` is None: the data of the model's own run, which must be what it was trained on; a path: a text
        file, folder or glob (for a model that follows instructions also a JSON or JSON Lines file); a corpus;
        or a datamodule with the model's tokenizer. `split` is train, val, test (of examples) or all (of a
        text); None: all of a path or corpus, else val. Sequences have `max_length` tokens; None: as in the
        own run, of a path or corpus the model's context.

        Raises InputError for data that cannot be read, have changed since, or have no such split.
        """
        from gptpl.runs.evaluation_data import language_data

        given = language_data(self, data, split=split, max_length=max_length, batch_size=batch_size)
        lengths = self.tokenizer.token_bytes() if given.is_text else None
        found = evaluate(self.net, progress(given.batches), token_bytes=lengths)
        return dataclasses.replace(found, data=given.name, context=given.context)

    def benchmark(
        self,
        suite: "Suite | str" = "core",
        *,
        output: str | Path | None = None,
        progress: "SuiteProgress | None" = None,
        **settings: Any,
    ) -> "SuiteResult":
        """What a suite of benchmarks says: `model.benchmark("core", limit=200)`.

        `suite` is a choice of the config group, with settings as in its YAML, or an object. See `run_suite`.
        """
        from gptpl.runs.suites import run_suite, suite_of

        name = suite if isinstance(suite, str) else "suite"
        if isinstance(suite, str):
            suite = suite_of(suite, **settings)
        elif settings:
            raise InputError(f"{', '.join(settings)}: give settings with a suite's name, not with an object")
        return run_suite([self], suite, name=name, output=output, progress=progress)[0]

    def inspect(
        self, text: str, *, alternatives: int = 5, progress: Progress = iter, **settings: int
    ) -> Inspection:
        """A look at the text through the model: the surprisal of each token, and everything inside.

        `settings` are those of `Inspection`.
        """
        ids = [int(token) for token in self.tokenizer.encode(text)]
        if not ids:
            raise InputError(f"text={text!r} has no tokens: give at least one word")
        found = surprisals(self.net, ids, eot_id=self.tokenizer.eot_id, alternatives=alternatives)
        return Inspection(self.net, self.tokenizer, progress(found), **settings)

    def statistics(self, completions: Sequence[Completion]) -> TextStatistics:
        """How varied, repetitive and likely texts are; `complete` them with `alternatives=0` or more."""
        if any(each.details is None for each in completions):
            raise InputError("statistics need each token's probability: complete(..., alternatives=0)")
        return text_statistics(
            [each.tokens for each in completions],
            [[token.log_probability for token in each.details or ()] for each in completions],
        )

    def memorisation(self, completions: Sequence[Completion], data: "TextData" = None) -> list[Memorisation]:
        """What each has word for word from the text of `training_text`."""
        training = self.training_text(data)
        return [memorisation(each.tokens, training) for each in completions]

    def training_text(self, data: "TextData" = None) -> TrainingText:
        """A text to look for memorised parts in, `data` as for `evaluate`; None: the own training text."""
        from gptpl.runs.evaluation_data import training_tokens

        own = data is None
        return TrainingText(np.asarray(training_corpus(self).train) if own else training_tokens(self, data))

    def with_template(self, template: str | None, response_marker: str | None = None) -> "InstructionModel":
        """The model asked in a template: alpaca, phi3, a file or a Jinja text; None: its own."""
        own = self.template
        if template is not None:
            asked = PromptTemplate.named(template, response_marker)
            if own is not None and asked.state() != own.state():
                log.warning("the model was tuned with template=%s, not %s", own.name, asked.name)
        elif own is not None:
            marker = own.response_marker if response_marker is None else response_marker
            asked = PromptTemplate(own.name, own.source, marker)
        else:
            raise InputError(
                f"checkpoint={self.path} was not tuned to follow instructions (task={self.task['name']}):"
                " give template=alpaca to ask it all the same"
            )
        return InstructionModel(**(vars(self) | {"template": asked}))


@dataclass(frozen=True, kw_only=True)
class InstructionModel(LanguageModel):
    """A language model that answers instructions, by default with the most likely tokens."""

    template: PromptTemplate

    def respond(self, instruction: str, input: str = "", **settings: Any) -> str:
        """The text of `answer`, with the same settings."""
        return self.answer(instruction, input, **settings).text

    def answer(
        self, instruction: str, input: str = "", *, seed: int | None = None, **settings: Any
    ) -> Answer:
        """The answer, what ended it, whether it is well-formed, and the verdict of a filter on it.

        `settings` are those of `answerer`. Raises InputError for too long a prompt.
        """
        answerer = self.answerer(**settings)
        prompt = answerer.prompt(instruction, input, place="the instruction")
        [answer] = answerer.answers([prompt], answer_generator(seed, device_of(self.net)))
        return answer

    def stream_response(self, instruction: str, input: str = "", **settings: Any) -> Iterator[str]:
        """The answer of `respond` piece by piece, white space at its end included."""
        return (piece.text for piece in self.response_pieces(instruction, input, **settings))

    def response_pieces(
        self, instruction: str, input: str = "", *, seed: int | None = None, **settings: Any
    ) -> Iterator[Piece]:
        """The pieces of `stream_response`; the last one has the completion, with the verdict of a filter."""
        answerer = self.answerer(**settings)
        prompt = answerer.prompt(instruction, input, place="the instruction")
        pieces = answerer.stream(prompt, answer_generator(seed, device_of(self.net)))

        def without_leading_space() -> Iterator[Piece]:
            begun = False
            for piece in pieces:
                text = piece.text if begun else piece.text.lstrip()
                begun = begun or bool(text)
                yield dataclasses.replace(piece, text=text)

        return without_leading_space()

    def respond_all(
        self,
        records: Sequence[Mapping[str, Any]] | str | Path,
        *,
        output: str | Path,
        instruction_column: str = "instruction",
        input_column: str | None = "input",
        skip_too_long: bool = False,
        batch_size: int = 8,
        seed: int | None = None,
        progress: Progress = iter,
        **settings: Any,
    ) -> list[dict[str, Any]]:
        """Answer many instructions into a JSON file, and return its contents; `settings` as for `answerer`.

        Every record is kept, with `instruction`, `input`, `model_response` and `well_formed` added; with a
        filter also `filtered`, the number of findings of each rule.
        Interrupted and called again in the same way, it resumes after the last batch.

        `records` are mappings, a JSON or JSON Lines file of them, or "train", "val" or "test": that split of
        the model's own run. With `skip_too_long` a record whose prompt fills the model's context is left out;
        else it is an error.

        Raises InputError for records or an output that cannot be used.
        """
        if isinstance(records, str) and records in SPLITS:
            records = self.split_file(cast(Split, records))
        placed = (
            read_records(Path(records).expanduser())
            if isinstance(records, str | Path)
            else [Record(place=f"record {i}", number=i, fields=fields) for i, fields in enumerate(records, 1)]
        )
        return answer_all(
            self.answerer(**settings), placed, output=Path(output).expanduser(),
            instruction_column=instruction_column, input_column=input_column,
            skip_too_long=skip_too_long, batch_size=batch_size, seed=seed, progress=progress,
        )  # fmt: skip

    def answerer(self, *, max_new_tokens: int = 256, filter: Filter | None = None, **rules: Any) -> Answerer:
        """Asks the model, and judges the form of its answers, and by a filter their content.

        An answer has at most `max_new_tokens`. Raises InputError for an unknown rule.
        """
        return Answerer(
            net=self.net,
            tokenizer=self.tokenizer,
            template=self.template,
            rules=SamplingRules.of(rules).within(vocab_size(self.net)),
            max_new_tokens=max_new_tokens,
            filter=filter,
        )

    def split_file(self, split: Split) -> Path:
        """The file of a split of the model's own run. Raises InputError if it does not exist."""
        found = None if self.run_dir is None else split_file(self.run_dir, split, ".json")
        if found is None or not found.is_file():
            raise InputError(
                f"split={split}: {self.path} is not in a run of task=instruct with that split: give file=FILE"
            )
        return found


# --- classifiers ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Classifier(_OfRun, LoadedClassifier):
    """A model that gives each text one of its labels."""

    def classify(self, texts: str | Iterable[str], *, batch_size: int = 16) -> list["Prediction"]:
        """A prediction for each text, in order; for a single text a list of one."""
        return list(self.predictions([texts] if isinstance(texts, str) else texts, batch_size=batch_size))

    def predictions(self, texts: Iterable[str], *, batch_size: int = 16) -> Iterator["Prediction"]:
        """The predictions of `classify`, one by one: only a few texts are in memory."""
        from gptpl.evaluation.classifier import predictions

        return predictions(self, texts, batch_size=batch_size)

    def classify_file(
        self,
        file: str | Path,
        *,
        output: str | Path,
        text_column: str = "text",
        format: str | None = None,
        columns: Sequence[str] | None = None,
        batch_size: int = 16,
        progress: Progress = iter,
    ) -> Path:
        """Classify every text of a file into a `.csv` or `.jsonl` file, which is returned.

        The file is CSV, TSV, JSON Lines, or a text on each line, and may be larger than the memory;
        `format` and `columns` as for `text_rows`. Raises InputError for a file that cannot be read, and for
        an output that exists.
        """
        from gptpl.evaluation.classifier import prediction_file

        path = Path(output).expanduser()
        with prediction_file(path, self.labels) as write:
            rows = text_rows(Path(file).expanduser(), text_column, format=format, columns=columns, keys="")
            texts = (row.text for row in rows)
            for prediction in progress(self.predictions(texts, batch_size=batch_size)):
                write(prediction)
        return path

    def evaluate(
        self,
        data: "LabelledData" = None,
        *,
        split: str = "test",
        batch_size: int = 8,
        progress: Progress = iter,
    ) -> "ClassifierEvaluation":
        """Accuracy, F1, confusion and calibration.

        `data` is None: the texts of the model's own run; a CSV, TSV or JSONL file with the columns text and
        label, or a corpus, all of it; or a datamodule. `split` is train, val or test, of the own texts and of
        a datamodule.

        Raises InputError for texts that cannot be read, and for a label that the model does not know.
        """
        from gptpl.evaluation.classifier import evaluate_classifier
        from gptpl.runs.evaluation_data import labelled_data

        given = labelled_data(self, data, split=split, batch_size=batch_size)
        found = evaluate_classifier(self.net, progress(given.batches))
        return dataclasses.replace(found, data=given.name)
