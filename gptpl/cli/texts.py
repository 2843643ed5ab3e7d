"""Texts at a terminal: shown while a model makes them, and a conversation, `gptpl generate -i`."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import platformdirs
import yaml
from tqdm import tqdm

from gptpl.config.groups import choices, config_folder
from gptpl.errors import InputError
from gptpl.generation import Completion, Piece, SamplingRules, stream_text
from gptpl.generation.sampling import check_seed, seeded_generator
from gptpl.model.protocol import cached_form, device_of, vocab_size
from gptpl.runs.models import LanguageModel

RULES = tuple(field.name for field in dataclasses.fields(SamplingRules))
HELP = f"""\
Type a text and it is continued. An empty line starts from end-of-text. Ctrl-C stops a text, Ctrl-D leaves.
  /temperature 0.7     set a rule: {", ".join(RULES)}
  /top_k null          null takes it away; a list is written 50256,198
  /sampling creative   take a preset: {", ".join(choices("sampling"))}
  /max_new_tokens 100  how long a text may be
  /seed 1              the same texts again; null: another one each time
  /show                the settings
  /help                this
  /quit                leave"""


def show(texts: Iterable[str]) -> None:
    """Prints a text bit by bit, and ends its line."""
    try:
        for text in texts:
            print(text, end="", flush=True)
    finally:
        print(flush=True)  # also after Ctrl-C: the shell's prompt begins a line of its own


def completed(
    model: LanguageModel, prompt: str, settings: dict[str, Any], *, streamed: bool
) -> list[Completion]:
    """Continuations in order: a single one is printed as it comes if `streamed`; else there is a bar."""
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


@dataclasses.dataclass
class Settings:
    """What the conversation can change."""

    rules: SamplingRules
    max_new_tokens: int
    seed: int | None

    def command(self, line: str) -> str:
        """Carries out `/name value`; returns what to answer. Raises InputError for what it does not know."""
        name, _, value = (part.strip() for part in line[1:].strip().partition(" "))
        if name == "help":
            return HELP
        if name == "sampling":
            self.rules = _preset(value)
        elif name in RULES:
            self.rules = dataclasses.replace(self.rules, **{name: _parsed(name, value)})
        elif name in ("max_new_tokens", "seed"):
            if not value.isdecimal() and (name, value) != ("seed", "null"):
                raise InputError(f"/{name} {value} is no number: give 0 or more")
            number = None if value == "null" else int(value)
            if name == "seed" and number is not None:
                check_seed(number)
            setattr(self, name, number)
        elif name != "show":
            known = ", ".join(f"/{each}" for each in ("help", "show", "sampling", "seed", "quit", *RULES))
            raise InputError(f"/{name} is no command: give one of {known}, /max_new_tokens")
        return f"{self.rules.name}; max_new_tokens {self.max_new_tokens}; seed {self.seed}"


def _preset(name: str) -> SamplingRules:
    """The rules of conf/sampling/<name>.yaml."""
    if name not in choices("sampling"):
        raise InputError(f"/sampling {name} is unknown: choose one of {', '.join(choices('sampling'))}")
    settings = yaml.safe_load((config_folder() / "sampling" / f"{name}.yaml").read_text(encoding="utf-8"))
    return SamplingRules(**{key: value for key, value in settings.items() if key in RULES})


def _parsed(name: str, value: str) -> Any:
    """The value of a rule as it is written in YAML; ids may be written without brackets."""
    if name.endswith("_tokens"):
        parts = [part for part in value.replace(",", " ").strip("[] ").split() if part != "null"]
        if wrong := [part for part in parts if not part.isdecimal()]:
            raise InputError(f"/{name} {wrong[0]} is no number: give 0 or more")
        return tuple(map(int, parts))
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(f"/{name} {value} is no value: give a number or null") from error


def converse(language_model: LanguageModel, cfg: Mapping[str, Any], rules: SamplingRules) -> None:
    """Reads lines until the input ends, and continues each or carries it out as a command."""
    settings = Settings(rules=rules, max_new_tokens=cfg["max_new_tokens"], seed=cfg["seed"])
    model = cached_form(language_model.net, rows=1) or language_model.net  # made once for all texts

    def pieces(line: str) -> Iterator[Piece]:
        return stream_text(
            model,
            language_model.tokenizer,
            [line],
            rules=settings.rules.within(vocab_size(model)),
            max_new_tokens=settings.max_new_tokens,
            stop=cfg["stop"],
            generator=seeded_generator(settings.seed, device_of(model)),
        )

    print(f"{rules.name}; /help lists what can be changed, Ctrl-D leaves")
    with _history() as read:
        while True:
            try:
                line = read(">>> ")
                if line.strip() in ("/quit", "/exit"):
                    return
                if line.startswith("/"):
                    print(settings.command(line))
                else:
                    with contextlib.suppress(KeyboardInterrupt):  # after which `show` ends the line
                        show(itertools.chain([line], (piece.text for piece in pieces(line))))
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()
            except InputError as error:
                print(f"error: {error}")


@contextlib.contextmanager
def _history() -> Iterator[Callable[[str], str]]:
    """`input`; with readline it edits lines and knows those of earlier conversations."""
    try:
        import readline
    except ImportError:  # Windows has none
        yield input
        return
    path = Path(platformdirs.user_state_dir("gptpl", appauthor=False)) / "generate_history"
    readline.set_history_length(1000)
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    try:
        yield input
    finally:
        with contextlib.suppress(OSError):  # a home that cannot be written: no history is kept
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)
