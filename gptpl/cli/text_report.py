"""What `gptpl generate` says of the texts it made: statistics, and what they share with the training text."""

import logging
from collections.abc import Callable, Sequence

from gptpl.data import corpora
from gptpl.data.datamodule import TextDataModule
from gptpl.errors import InputError
from gptpl.generation import Completion
from gptpl.generation.memorisation import TrainingText, memorisation
from gptpl.generation.statistics import text_statistics
from gptpl.training.checkpoint import LoadedCheckpoint

log = logging.getLogger(__name__)


def statistics_lines(completions: Sequence[Completion]) -> list[str]:
    """A line a statistic; the completions must have details."""
    samples = [completion.tokens for completion in completions]
    chances = [[each.log_probability for each in completion.details or ()] for completion in completions]
    found = text_statistics(samples, chances)
    alike = "-" if found.self_bleu is None else f"{found.self_bleu:.3f}"
    return [
        f"statistics of {len(samples)} texts, {sum(map(len, samples))} tokens",
        f"  distinct-1, -2, -3  {found.distinct_1:.3f}  {found.distinct_2:.3f}  {found.distinct_3:.3f}",
        f"  repeated 4-grams    {found.repetition:.3f}",
        f"  self-BLEU           {alike}",
        f"  log-probability     {found.mean_log_probability:.3f} nats per token",
        f"  perplexity          {found.perplexity:.2f}",
    ]


def memorisation_report(loaded: LoadedCheckpoint) -> Callable[[Sequence[Completion]], list[str]]:
    """Reads the training text; returns what makes a line a text of its longest run of tokens in it.

    Raises InputError as `training_text`.
    """
    training, name = training_text(loaded)

    def lines(completions: Sequence[Completion]) -> list[str]:
        said = [f"in the training text of {name} word for word:"]
        for number, completion in enumerate(completions, start=1):
            found = memorisation(completion.tokens, training)
            start, end = found.longest_start, found.longest_start + found.longest_run
            run = loaded.tokenizer.decode(completion.tokens[start:end])
            shares = [f", {share:.0%} of its {n}-grams" for n, share in found.shares.items() if share >= 0]
            said.append(f"  text {number}: {found.longest_run} tokens in a row ({run!r}){''.join(shares)}")
        return said

    return lines


def training_text(loaded: LoadedCheckpoint) -> tuple[TrainingText, str]:
    """The training text of the checkpoint's run, indexed, and the name of its corpus; see `training_data`."""
    datamodule = training_data(loaded)
    return TrainingText(datamodule.encoded.train), datamodule.corpus.name


def training_data(loaded: LoadedCheckpoint) -> TextDataModule:
    """The text that the checkpoint's run was trained on, split as there, in windows of one token.

    Raises InputError where the run's text is gone, or was read by a class that is not gptpl's own: a
    checkpoint never decides what code runs.
    """
    data = loaded.run_config.get("data")
    settings = dict(data["corpus"]) if isinstance(data, dict) and isinstance(data.get("corpus"), dict) else {}
    module, _, name = str(settings.pop("_target_", "")).rpartition(".")
    known = module == corpora.__name__ and name in corpora.__all__
    if not isinstance(data, dict) or not known or "train_ratio" not in data:
        raise InputError(
            f"memorisation needs the training text, and checkpoint={loaded.path} names no corpus of gptpl's"
            " own: leave memorisation out"
        )
    try:
        corpus = getattr(corpora, name)(**settings)
    except TypeError as error:
        raise InputError(
            f"checkpoint={loaded.path} describes its training text otherwise than this gptpl ({error}):"
            " use the gptpl that wrote it, or leave memorisation out"
        ) from error
    return TextDataModule(
        corpus=corpus,
        tokenizer=loaded.tokenizer,
        max_length=1,
        stride=1,
        batch_size=1,
        train_ratio=data["train_ratio"],
    )
