"""Settings read from source files: the same as those of the imported classes, and no import."""

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gptpl.cli.main import main
from gptpl.cli.model_input import SHORT_KEYS
from gptpl.config.groups import config_folder
from gptpl.config.signatures import locate, read_signature, signature_of
from gptpl.errors import InputError
from gptpl.settings import check_limit

CONFIGS = "\n".join(file.read_text(encoding="utf-8") for file in config_folder().rglob("*.yaml"))
TARGETS = sorted(
    {
        *re.findall(r"_target_: ([\w.]+)", CONFIGS),
        *("gptpl.model.GPTConfig", "gptpl.generation.SamplingRules", "lightning.Trainer"),
        *("lightning.pytorch.callbacks.ModelCheckpoint", "lightning.pytorch.callbacks.Timer"),
        *("lightning.pytorch.loggers.CSVLogger", "lightning.pytorch.demos.WikiText2"),
        *("torch.optim.AdamW", "torch.optim.SGD", "torch.optim.lr_scheduler.OneCycleLR"),
    }
)


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_read_is_what_the_imported_class_takes(name):
    read, real = read_signature(name), signature_of(locate(name, "_target_"))
    if name == "gptpl.judging.JudgeModel":  # its fields have factories, which are not read
        assert read is None
        return
    assert read is not None
    assert [*read.parameters] == [*real.parameters]
    assert read.open == real.open
    for key, parameter in read.parameters.items():
        wanted = real.parameters[key]
        assert (parameter.required, parameter.positional) == (wanted.required, wanted.positional), key
        if parameter.annotation is not Any and "typing.Any" not in str(parameter.annotation):
            assert parameter.annotation == wanted.annotation, key


def test_types_and_limits_are_read_not_left_open():
    trainer = read_signature("lightning.Trainer")
    adamw = read_signature("gptpl.training.optimizers.adamw")
    assert trainer is not None
    assert adamw is not None
    assert "int" in str(trainer.parameters["max_steps"].annotation)
    assert adamw.parameters["decay"].resume == "never"
    check_limit(adamw.parameters["lr"].annotation, "lr", 0.1)
    with pytest.raises(InputError, match="lr must be positive"):
        check_limit(adamw.parameters["lr"].annotation, "lr", 0.0)


USER = """\
import nowhere.to.be.found
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Union, final
from elsewhere import Again

JSON = Union[dict[str, "JSON"], str]
class Prose:
    def __init__(self, every: Annotated[int, "steps between notes"]): ...
class Endless:
    def __init__(self, every: JSON): ...
class Again(Again):
    pass
@final
@dataclass
class Sealed:
    size: int
@dataclass
class Above(Sealed):
    more: int
@dataclass
class KeywordOnly:
    _: KW_ONLY
    size: int
@dataclass
class OwnInit:
    size: int
    def __init__(self, other): ...
@dataclass(init=False)
class NoInit:
    size: int
def init(self, other): ...
class Assigned:
    __init__ = init
@dataclass
class Plain:
    size: int
    name: str = "x"
class Child(Plain):
    pass
class Open(Child):
    def __init__(self, *, more: int, **rest): ...
class Two(Open, Plain):
    pass
class Made(metaclass=type):
    def __init__(self, size): ...
def decorated_by(function): return function
@decorated_by
def function(a): ...
def plain(a, /, b=1, *c, d, **e: int): ...
if nowhere:
    def sometimes(a): ...
"""


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Plain", "size name"),
        ("Child", "size name"),
        ("Open", "size name more"),
        ("plain", "a b d"),
        ("Prose", "every"),
        *((name, None) for name in ("Endless", "Again", "Above", "KeywordOnly")),
        *((name, None) for name in ("OwnInit", "NoInit", "Assigned")),
        ("Two", None),
        ("Made", None),
        ("function", None),
        ("sometimes", None),
        ("nothing", None),
    ],
)
def test_a_users_class_is_read_without_being_imported(name, settings, tmp_path, monkeypatch):
    package = f"mine_{name}".lower()
    (tmp_path / f"{package}.py").write_text(USER, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    read = read_signature(f"{package}.{name}")
    assert (None if read is None else [*read.parameters]) == (None if settings is None else settings.split())


# --- commands -------------------------------------------------------------------------------------------

PROGRAM = """\
import contextlib, io, json, sys
from gptpl.cli.main import main
seen = []
for arguments in json.loads(sys.argv[1]):
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        status = main(arguments)
    loaded = [name for name in ("torch", "lightning", "matplotlib") if name in sys.modules]
    seen.append([status, error.getvalue(), loaded])
print(json.dumps(seen))
"""


LIGHT = ["--help", "train --help", "completion words train mo", "runs list", "weights list"]
GENERATE = "generate checkpoint=run max_new_tokens=2"
WRONG = [
    "train model=tinny",
    "train optimizer.lr=-1",
    "train optimizer.betas=[0.9,1]",
    "train optimizer=muon optimizer.momentum=1.5",
    "train trainer.max_step=3",
    "train trainer.stop_at_step=0",
    "train trainer.compile=perhaps",
    "train trainer.limit_val_batches=few",
    "train model.drop_rate=1",
    "train model.init=zeros",
    "train scheduler.warmup_steps=-1",
    "train seed=-1",
    "train init=cooccurrence init.window=0",
    "train sed=1",
    "train data.batch_size=many",
    "train data=text_file data.pth=x",
    "train callbacks.sample_text.promts=[a]",
    "train 'callbacks=[default,early_stoping]'",
    "train logger.csv.savedir=x",
    "train optimizer.muon_lr=1",
    "plan model.wdth=3",
    "generate promt=x",
    "generate temprature=1",
    "evaluate checkpoint=x splitt=all",
    "respond checkpoint=x batch_size=0",
    "judge judge=olama",
    "weights convert formt=hf",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder, with a run of a step."""
    path = tmp_path_factory.mktemp("folder")
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(path):
        patch.setenv("GPTPL_CACHE", str(path / "cache"))
        small = ("model=tiny", "tokenizer=bytes", "trainer=cpu", "trainer.max_steps=1")
        short = ("callbacks=checkpoint_last", "eval_train_batches=1", "eval_val_batches=1", "run_dir=run")
        assert main(["train", *small, *short]) == 0
        yield path


@pytest.fixture(scope="module")
def apart(folder: Path) -> dict[str, tuple[int, str, list[str]]]:
    """Status, standard error and the heavy libraries loaded after each command, all in a new process."""
    lines = [*LIGHT, *WRONG, GENERATE]
    commands = json.dumps([words_of(line) for line in lines])
    done = subprocess.run([sys.executable, "-c", PROGRAM, commands], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {line: (*each,) for line, each in zip(lines, json.loads(done.stdout), strict=True)}


def words_of(line: str) -> list[str]:
    return [part.strip("'") for part in line.split()]


def test_a_refusal_imports_neither_torch_nor_lightning(apart, capsys):
    """And says what it says where they are imported: in this process, which checks the imported classes."""
    for line in WRONG:
        status, said, loaded = apart[line]
        assert (status, loaded) == (2, []), line
        assert main(words_of(line)) == 2
        assert said == capsys.readouterr().err, line


def test_what_needs_no_torch_does_not_import_it(apart):
    for line in LIGHT:
        status, _, loaded = apart[line]
        assert (status, loaded) == (0, []), line


def test_generate_does_not_import_lightning(apart):
    status, said, loaded = apart[GENERATE]
    assert status == 0, said
    assert loaded == ["torch"]


def test_the_rules_of_sampling_are_those_of_its_class():
    assert {*signature_of(locate("gptpl.generation.SamplingRules", "")).parameters} == SHORT_KEYS
