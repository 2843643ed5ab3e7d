"""What README.md and the guides show: their Python and a stranger's classes run, their settings exist."""

import contextlib
import io
import os
import re
import shlex
import sys
import warnings
from pathlib import Path

import pytest

import gptpl
from gptpl.cli.help import commands

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/guides/*.md"))]
BLOCKS = [
    block
    for page in PAGES
    for block in re.findall(
        r"^```([^\s`]*)[^\n]*\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
]
PYTHON = [text for language, text in BLOCKS if language == "python"]
FILES = {
    match[1]: text
    for language, text in BLOCKS
    if language in ("python", "yaml") and (match := re.match(r"# ([\w/]+\.\w+)", text))
}
LINES = [
    line.split("  #")[0].strip()
    for language, text in BLOCKS
    if not language
    for line in text.replace("\\\n", "").splitlines()
]
COMMANDS = [shlex.split(line)[1:] for line in LINES if line.startswith("gptpl ")]
OWN = [words for words in COMMANDS if "my_conf" in words or "trust=[mine]" in words]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a short text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text("The sea kept its hour, and so did she. " * 60)
    (tmp_path / "poems").mkdir()
    (tmp_path / "poems/1.txt").write_text("Every effort moves you, and the sea. " * 60)
    return tmp_path


def run_python(code: str) -> str:
    """What the code prints; in this process, as another one would take seconds to import its packages."""
    before, out = dict(os.environ), io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(out):
            warnings.simplefilter("ignore")
            exec(compile(code, "a page", "exec"), {"__name__": "__main__"})
    finally:
        os.environ.clear()
        os.environ.update(before)
    return out.getvalue()


@pytest.mark.slow
def test_the_library_in_a_script(folder: Path, fake_train: None) -> None:
    [code] = [text for text in PYTHON if "gptpl.build(" in text]
    assert code.count('"experiment=quick"') == 3
    small = '"experiment=quick", "data=text_file", "data.path=my.txt", "trainer.accelerator=cpu"'
    small += ', "callbacks.sample_text.max_new_tokens=3"'
    out = run_python(code.replace('"experiment=quick"', small))
    assert "parameters" in out
    assert len(list((folder / "runs").rglob("run.json"))) == 3
    assert (folder / "report/report.html").is_file()


def test_the_stock_trainer(folder: Path) -> None:
    [code] = [text for text in PYTHON if "L.Trainer(" in text]
    short = code.replace("max_steps=100", "max_steps=3, accelerator='cpu'")
    assert short != code
    assert run_python(short + "print(trainer.global_step)").splitlines()[-1] == "3"


@pytest.mark.slow
def test_classes_of_ones_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    assert len(FILES) == 6
    assert [words[0] for words in OWN] == ["train", "train", "generate"]
    monkeypatch.syspath_prepend(folder)
    short = {"resume=latest": ["trainer.max_epochs=2"], "model=gru": ["trainer.max_epochs=1"]}
    for words in OWN:
        more = [each for key, added in short.items() if key in words for each in added]
        kept = [word for word in words if word.partition("=")[0] not in {a.partition("=")[0] for a in more}]
        own = ["trainer=cpu", "callbacks.sample_text.max_new_tokens=3"] if "model=gru" in words else []
        run_python(f"from gptpl.cli.main import main\nassert main({[*kept, *more, *own]}) == 0")
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(folder)):
            del sys.modules[name]
    [metrics] = folder.glob("runs/poems/*/metrics.csv")
    assert "embedding_norm" in metrics.read_text().splitlines()[0]
    with pytest.raises(gptpl.InputError, match=r"did you mean model\.width"):
        gptpl.compose("model=gru", "model.wdth=3", config_dir=folder / "my_conf")


def test_the_commands_are_commands() -> None:
    for words in COMMANDS:
        assert {words[0], " ".join(words[:2])} & {*commands(), "completion"}, words


COMPOSED = {
    "serve": "serve",
    "train": "train",
    "submit": "submit",
    "plan": "plan",
    "find-lr": "find_lr",
    "find-batch-size": "find_batch_size",
    "autotune": "autotune",
    "data encode": "data_encode",
    "data show": "data_show",
    "tokenizer train": "tokenizer_train",
    "doctor": "doctor",
}


def root_of(words: list[str]) -> str:
    """The name of a command's root config; empty for one that is not checked."""
    return COMPOSED.get(words[0], COMPOSED.get(" ".join(words[:2]), ""))


@pytest.mark.parametrize(
    "words",
    [
        words
        for words in COMMANDS
        if root_of(words) and words not in OWN and not any(w.startswith("resume=") for w in words)
    ],
    ids=" ".join,
)
def test_their_settings_exist(words: list[str]) -> None:
    swept = "-m" in words
    of_sweep = ("sweep", "hydra/launcher", "hydra.launcher.")
    overrides = [word for word in words[1:] if "=" in word and not (swept and word.startswith(of_sweep))]
    one_value = [re.sub(r"(?<==)([^\[,(]+),.*", r"\1", word) if swept else word for word in overrides]
    one_value = [word for word in one_value if "tag(" not in word]
    gptpl.compose(*one_value, config_name=root_of(words))
