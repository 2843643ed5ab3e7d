"""Texts at a terminal: printed while a model generates them, and the conversation of `gptpl generate -i`."""

import contextlib
import importlib
import itertools
import logging
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

from gptpl.cli.arguments import Arguments
from gptpl.cli.model_input import SHORT_KEYS, in_full
from gptpl.config.compose import composed, plain
from gptpl.config.groups import choices
from gptpl.errors import InputError
from gptpl.filters import Filter, Verdict, summary
from gptpl.generation import Completion, Piece, SamplingRules, stream_text
from gptpl.generation.sampling import check_seed, seeded_generator
from gptpl.model.protocol import cached_form, device_of, vocab_size
from gptpl.runs.models import LanguageModel

log = logging.getLogger(__name__)

HELP = f"""\
Type a text to have it continued. An empty line starts from end-of-text. Ctrl-C stops a text, Ctrl-D ends.
  /temperature 0.7     set a sampling rule: {", ".join(sorted(SHORT_KEYS))}
  /top_k null          remove one; a list is written [50256,198]
  /sampling creative   take a preset: {", ".join(choices("sampling"))}
  /max_new_tokens 100  set the length of a text; /stop END a string that ends it
  /seed 1              draw the same texts again; null: other ones each time
  /show                print the settings
  /help                print this
  /quit                end"""


def show(texts: Iterable[str]) -> None:
    """Print a text bit by bit, and end its line."""
    try:
        for text in texts:
            print(text, end="", flush=True)
    finally:
        print(flush=True)  # also after Ctrl-C: the shell's prompt begins a line of its own


def texts_of(pieces: Iterable[Piece], verdicts: list[Verdict]) -> Iterator[str]:
    """The text of each piece; the verdicts of a filter on the finished texts are added to the list."""
    for piece in pieces:
        yield piece.text
        if piece.completion is not None and piece.completion.verdict is not None:
            verdicts.append(piece.completion.verdict)


def completed(
    model: LanguageModel, prompt: str, settings: dict[str, Any], *, streamed: bool
) -> list[Completion]:
    """The continuations in order: a single one is printed meanwhile if `streamed`, else a bar is shown."""
    count, length = settings["num_samples"], settings["max_new_tokens"]
    pieces = model.pieces([prompt], **settings)  # refuses wrong settings before anything is printed
    found: list[Completion] = []
    tokens = [0] * count
    bar = tqdm(total=count * length, unit="token", desc="writing", disable=streamed or None, leave=False)

    def texts() -> Iterator[str]:
        yield prompt
        for piece in pieces:
            yield piece.text
            bar.update(piece.tokens - tokens[piece.sample])
            tokens[piece.sample] = piece.tokens
            if piece.completion is not None:
                found.append(piece.completion)
                bar.total -= length - piece.tokens

    with bar:
        if streamed:
            show(texts())
        else:
            for _ in texts():
                pass
    return sorted(found, key=lambda completion: completion.sample)


# --- a conversation -------------------------------------------------------------------------------------


class _Settings:
    """The settings of a conversation: those of the command line and those typed since, by its own grammar."""

    def __init__(self, given: Arguments) -> None:
        self._given, self._overrides = given, given.overrides
        self._take(self._overrides)

    def command(self, line: str) -> str:
        """Carry out `/name value`; returns the answer."""
        name, _, value = (part.strip() for part in line[1:].strip().partition(" "))
        if name == "help":
            return HELP
        if name in (*SHORT_KEYS, "sampling", "max_new_tokens", "seed", "stop"):
            override = in_full(f"{name}={value}")
            key = override.partition("=")[0]
            replaced = ("sampling=", "sampling.") if key == "sampling" else f"{key}="  # a preset: all rules
            self._take([each for each in self._overrides if not each.startswith(replaced)] + [override])
        elif name != "show":
            raise InputError(f"/{name} is unknown, see /help")
        return f"{self.rules.name}; max_new_tokens {self.max_new_tokens}; seed {self.seed}"

    def _take(self, overrides: list[str]) -> None:
        given = self._given
        cfg = plain(composed(overrides, given.config_name, config_dir=given.config_dir).cfg)
        rules = SamplingRules(**cfg["sampling"])
        if cfg["seed"] is not None:
            check_seed(cfg["seed"])
        self.rules, self._overrides, self.stop = rules, overrides, cfg["stop"]
        self.max_new_tokens, self.seed = cfg["max_new_tokens"], cfg["seed"]


def converse(language_model: LanguageModel, given: Arguments, filter: Filter | None) -> None:
    """Read lines until the input ends; continue each, or carry it out as a command.

    At the end, what the filter found in the texts is logged.
    """
    settings = _Settings(given)
    model = cached_form(language_model.net, rows=1) or language_model.net  # made once for all texts
    verdicts: list[Verdict] = []

    def pieces(line: str) -> Iterator[Piece]:
        return stream_text(
            model,
            language_model.tokenizer,
            [line],
            rules=settings.rules.within(vocab_size(model)),
            max_new_tokens=settings.max_new_tokens,
            stop=settings.stop,
            generator=seeded_generator(settings.seed, device_of(model)),
            filter=filter,
        )

    print(f"{settings.rules.name}; /help lists the commands, Ctrl-D ends")
    with contextlib.suppress(ImportError):  # on Windows
        importlib.import_module("readline")  # `input` then edits lines and recalls earlier ones
    while True:
        try:
            line = input(">>> ")
            if line.strip() in ("/quit", "/exit"):
                break
            if line.startswith("/"):
                print(settings.command(line))
            else:
                with contextlib.suppress(KeyboardInterrupt):  # after which `show` ends the line
                    show(itertools.chain([line], texts_of(pieces(line), verdicts)))
        except EOFError:
            print()
            break
        except KeyboardInterrupt:
            print()
        except InputError as error:
            print(f"error: {error}")
    if filter is not None:
        log.info("%s", summary(each.counts for each in verdicts))
