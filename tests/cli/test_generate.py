"""`gptpl generate`: the prompt reaches the model as it was written, and nothing but text reaches stdout."""

import contextlib
import io
import shutil

import pytest
import torch
import torch.nn.functional as F

from gptpl.cli.main import main
from gptpl.training.checkpoint import load_model

AWKWARD = [
    "plain",
    "a, b, c",
    'it\'s "quoted"',
    "'quoted'",
    '"quoted"',
    "'one,' she said, 'two'",
    "f(x) = [1, {2: 3}]",
    "a=b=c",
    "back\\slash \\' and \\\\",
    "ends in a backslash\\",
    "ends in a quote'",
    "two\nlines\n",
    "  blanks on both sides  ",
    "\ttab",
    "${seed} and \\${seed} and \\\\${seed}",
    "cost $5 {or} so",
    "über 日本語 🙂 e\u0301",
    "null",
    "true",
    "???",
    "12",
    "-m",
    "# no comment",
    "a: b",
    "~/home",
    "<tag> & | ; * ?",
]


@pytest.fixture
def generate(gptpl, quick):
    """Runs `gptpl generate` on the run of 8 steps; returns what it printed."""

    def run(*arguments: str) -> str:
        outcome = gptpl("generate", f"checkpoint={quick.run.path}", *arguments)
        assert outcome.status == 0, outcome.err
        return outcome.out

    return run


@pytest.mark.parametrize("prompt", AWKWARD)
def test_a_prompt_reaches_the_model_as_it_was_written(prompt, generate):
    assert generate(f"prompt={prompt}", "max_new_tokens=0") == f"{prompt}\n"


def test_only_text_goes_to_standard_output(gptpl, quick):
    outcome = gptpl(
        "generate", f"checkpoint={quick.run.path}", "prompt=Ab", "max_new_tokens=5", "temperature=0"
    )
    assert outcome.out.startswith("Ab")
    assert outcome.err.splitlines() == [f"checkpoint: {quick.run.path}/checkpoints/last.ckpt, step 8"]
    assert list(outcome.folder.iterdir()) == []


def test_greedy_text_is_what_the_model_thinks_most_likely(generate, quick):
    loaded = load_model(quick.run.path / "checkpoints/last.ckpt")
    ids = list(b"The sea ")
    for _ in range(20):
        with torch.no_grad():
            ids.append(int(loaded.net(torch.tensor([ids[-64:]]))[0, -1].argmax()))
    expected = bytes(ids).decode(errors="replace")
    assert generate("prompt=The sea ", "temperature=0", "max_new_tokens=20") == f"{expected}\n"
    assert generate("prompt=The sea ", "temperature=1", "top_k=1", "max_new_tokens=20") == f"{expected}\n"


def test_top_k_above_the_vocabulary_keeps_all_of_it(generate):
    assert generate("top_k=999", "seed=1") == generate("top_k=null", "seed=1")


def test_a_seed_makes_the_text_reproducible(generate):
    hot = ("temperature=5", "top_k=null", "max_new_tokens=40")
    assert generate(*hot, "seed=1") == generate(*hot, "seed=1")
    texts = {generate(*hot, "seed=2"), generate(*hot, "seed=1"), generate(*hot), generate(*hot, "seed=null")}
    assert len(texts) == 4


def test_the_default_prompt_is_that_of_the_samples(generate):
    assert generate("max_new_tokens=1").startswith("Every effort moves you")


def test_a_prompt_longer_than_the_context_keeps_its_end(generate):
    prompt = "abcdefghij" * 20
    text = generate(f"prompt={prompt}", "temperature=0", "max_new_tokens=3")
    assert text.startswith(prompt)


def test_end_of_text_is_not_printed(generate, monkeypatch):
    def ends_at_once(model, tokens, *, eot_id, **settings):
        return F.pad(F.pad(tokens, (0, 1), value=33), (0, 3), value=eot_id)

    monkeypatch.setattr("gptpl.cli.generate.generate", ends_at_once)
    assert generate("prompt=Hi") == "Hi!\n"


@pytest.mark.parametrize("file", ["checkpoints/best.ckpt", "checkpoints/last.ckpt"])
def test_a_file_can_be_named(file, gptpl, quick, tmp_path):
    (tmp_path / "a, b").mkdir()
    shutil.copy(quick.run.path / file, tmp_path / "a, b/my=model (1).ckpt")
    outcome = gptpl("generate", "checkpoint=a, b/my=model (1).ckpt", "max_new_tokens=1")
    assert outcome.status == 0
    assert "my=model (1).ckpt, step 8" in outcome.err


def test_a_run_without_a_last_checkpoint_takes_the_best(gptpl, quick, tmp_path):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    shutil.copy(quick.run.path / "checkpoints/best.ckpt", tmp_path / "run/checkpoints")
    assert "best.ckpt" in gptpl("generate", "checkpoint=run", "max_new_tokens=1").err


def test_words_come_from_a_model_of_words(gptpl, words):
    outcome = gptpl(
        *("generate", f"checkpoint={words.run.path}", "prompt=The old zebra sang,"),
        *("temperature=0", "max_new_tokens=4"),
    )
    assert outcome.status == 0, outcome.err
    assert outcome.out.startswith("The old <|unk|> sang,")
    assert len(outcome.out.split()) == 8 - outcome.out.count(",") + 1  # a comma sticks to its word


def test_text_can_be_piped_where_the_terminal_knows_no_unicode(quick):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="\n")
    with contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(io.StringIO()):
        assert main(["generate", f"checkpoint={quick.run.path}", "prompt=héllo", "max_new_tokens=0"]) == 0
    terminal.seek(0)
    assert terminal.read() == "h?llo\n"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("temperature=-1",), ["temperature=-1"]),
        (("temperature=nan",), ["temperature=nan"]),
        (("temperature=warm",), ["temperature=warm", "Float"]),
        (("top_k=0",), ["top_k=0"]),
        (("max_new_tokens=-1",), ["max_new_tokens=-1"]),
        (("max_new_tokens=1.5",), ["max_new_tokens=1.5"]),
        (("prompt=",), ["prompt=''"]),
        (("seed=-1",), ["seed=-1"]),
        (("seed=99999999999999999999",), ["seed=99999999999999999999"]),
        (("device=tpu",), ["device=tpu", "cuda"]),
        (("device=mps",), ["device=mps", "device=cpu"]),
        (("model=tiny",), ["model is no key of gptpl generate"]),
        (("promt=x",), ["did you mean prompt?"]),
    ],
)
def test_wrong_settings_are_refused(given, words, refused, quick):
    if given == ("device=mps",) and torch.backends.mps.is_available():
        pytest.skip("there is an Apple GPU")
    line = refused("generate", f"checkpoint={quick.run.path}", *given)
    assert all(word in line for word in words), line
