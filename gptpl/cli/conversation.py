"""`gptpl generate -i`: prompts typed at a terminal, with a history and rules that can be changed."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import platformdirs
import yaml
from torch import nn

from gptpl.config.groups import choices, config_folder
from gptpl.data.tokenizers import Tokenizer
from gptpl.errors import InputError
from gptpl.generation import SamplingRules, stream_text
from gptpl.generation.sampling import check_seed, seeded_generator
from gptpl.model.protocol import Cached, cached_form, device_of, vocab_size
from gptpl.runs.models import LanguageModel

PROMPT = ">>> "
HISTORY_LINES = 1000
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


@dataclasses.dataclass
class Settings:
    """What the conversation can change."""

    rules: SamplingRules
    max_new_tokens: int
    seed: int | None

    def command(self, line: str) -> str:
        """Carries out `/name value`; returns what to answer. Raises InputError for what it does not know."""
        name, _, value = line.removeprefix("/").strip().partition(" ")
        value = value.strip()
        if name == "help":
            return HELP
        if name == "sampling":
            self.rules = preset(value)
        elif name in RULES:
            self.rules = dataclasses.replace(self.rules, **{name: _parsed(name, value)})
        elif name == "max_new_tokens":
            self.max_new_tokens = _whole(name, value, least=0)
        elif name == "seed":
            self.seed = None if value == "null" else _whole(name, value, least=0)
            if self.seed is not None:
                check_seed(self.seed)
        elif name != "show":
            known = ", ".join(f"/{each}" for each in ("help", "show", "sampling", "seed", "quit", *RULES))
            raise InputError(f"/{name} is no command: give one of {known}, /max_new_tokens")
        return f"{self.rules.name}; max_new_tokens {self.max_new_tokens}; seed {self.seed}"


def converse(language_model: LanguageModel, cfg: Mapping[str, Any], rules: SamplingRules) -> None:
    """Reads lines until the input ends, and continues each or carries it out as a command."""
    settings = Settings(rules=rules, max_new_tokens=cfg["max_new_tokens"], seed=cfg["seed"])
    model = cached_form(language_model.net, rows=1) or language_model.net
    print(f"{rules.name}; /help lists what can be changed, Ctrl-D leaves")
    with _history() as read:
        while True:
            try:
                line = read(PROMPT)
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()
                continue
            if line.strip() in ("/quit", "/exit"):
                return
            _answer(model, language_model.tokenizer, settings, line, cfg["stop"])


def preset(name: str) -> SamplingRules:
    """The rules of conf/sampling/<name>.yaml. Raises InputError where there is none."""
    if name not in choices("sampling"):
        raise InputError(f"/sampling {name} is unknown: choose one of {', '.join(choices('sampling'))}")
    settings = yaml.safe_load((config_folder() / "sampling" / f"{name}.yaml").read_text(encoding="utf-8"))
    return SamplingRules(**{key: value for key, value in settings.items() if key in RULES})


def _answer(
    model: nn.Module | Cached, tokenizer: Tokenizer, settings: Settings, line: str, stop: list[str]
) -> None:
    try:
        if line.startswith("/"):
            print(settings.command(line))
            return
        pieces = stream_text(
            model,
            tokenizer,
            [line],
            rules=settings.rules.within(vocab_size(model)),
            max_new_tokens=settings.max_new_tokens,
            stop=stop,
            generator=seeded_generator(settings.seed, device_of(model)),
        )
        print(line, end="", flush=True)
        for piece in pieces:
            print(piece.text, end="", flush=True)
        print()
    except InputError as error:
        print(f"error: {error}")
    except KeyboardInterrupt:
        print()


@contextlib.contextmanager
def _history() -> Iterator[Callable[[str], str]]:
    """`input`; with readline it edits lines and knows those of earlier conversations."""
    try:
        import readline
    except ImportError:  # Windows has none
        yield input
        return
    path = Path(platformdirs.user_state_dir("gptpl", appauthor=False)) / "generate_history"
    readline.set_history_length(HISTORY_LINES)
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    try:
        yield input
    finally:
        with contextlib.suppress(OSError):  # a home that cannot be written: no history is kept
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)


def _parsed(name: str, value: str) -> Any:
    """The value of a rule as it is written in YAML; ids may be written without brackets."""
    if name.endswith("_tokens"):
        return tuple(
            _whole(name, part, least=0) for part in value.replace(",", " ").split() if part != "null"
        )
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(f"/{name} {value} is no value: give a number or null") from error


def _whole(name: str, value: str, *, least: int) -> int:
    if not value.isdecimal() or int(value) < least:
        raise InputError(f"/{name} {value} is no number: give {least} or more")
    return int(value)
