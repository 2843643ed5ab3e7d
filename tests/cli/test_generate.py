"""`gptpl generate`: the prompt reaches the model as it was written, and nothing but text reaches stdout."""

import contextlib
import io
import json
import math
import os
import re
import shutil

import pytest
import torch
from omegaconf import OmegaConf

from gptpl.checkpoints.loading import load_model
from gptpl.cli.main import main
from gptpl.model.inference import can_multiply_int8

AWKWARD = [
    "'one,' she \"said\", f(x) = [1, {2: 3}]\\",
    "two\nlines\n",
    "  blanks on both sides  ",
    "${seed} and \\${seed} and \\\\${seed}",
    "über 日本語 🙂 e\u0301",
    "null",
    "true",
    "???",
    "12",
    "-m",
    "# no comment",
    "~/home",
]
"""What the command line or a config could take for something else; test_quoting.py tries any text."""


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


FILTER = ("filter=patterns", 'filter.patterns.vowels="[aeiou]+"')


def test_a_filter_marks_what_it_finds_and_counts_it(gptpl, quick):
    given = ("generate", f"checkpoint={quick.run.path}", "prompt=The sea", "max_new_tokens=40", "seed=1")
    written = gptpl(*given).out.removeprefix("The sea").removesuffix("\n")
    marked, count = re.subn("[aeiou]+", "[vowels]", written)
    outcome = gptpl(*given, *FILTER)
    assert (outcome.status, outcome.out) == (0, f"The sea{marked}\n"), outcome.err
    assert outcome.err.splitlines()[-1] == f"filter: 1 of 1 text: vowels {count}"
    record = json.loads(gptpl(*given, *FILTER, "--json").out)
    assert (record["text"], record["tokens"], record["filtered"]) == (marked, [], {"vowels": count})
    reported = gptpl(*given, *FILTER, "filter.action=report")
    assert reported.out == f"The sea{written}\n"
    assert reported.err.splitlines()[-1] == f"filter: 1 of 1 text: vowels {count}"
    withheld = gptpl(*given, *FILTER, "filter.action=withhold")
    assert withheld.out == "The sea[withheld: vowels]\n"


def test_a_filter_judges_each_of_several_texts(gptpl, quick):
    given = ("generate", f"checkpoint={quick.run.path}", "num_samples=4", "max_new_tokens=6", "seed=2")
    written = [json.loads(line)["text"] for line in gptpl(*given, "--json").out.splitlines()]
    first = next(character for character in "".join(written) if character.isalpha())
    expected = ["[withheld: first]" if first in text else text for text in written]
    one = ("filter=patterns", f"filter.patterns.first={first}", "filter.action=withhold")
    outcome = gptpl(*given, *one, "--json")
    assert [json.loads(line)["text"] for line in outcome.out.splitlines()] == expected
    found = [text.count(first) for text in written]
    assert f"filter: {sum(map(bool, found))} of 4 texts: first {sum(found)}" in outcome.err


def test_several_filters_are_one(gptpl, quick, tmp_path):
    (tmp_path / "words.txt").write_text("zebra\n")
    given = ("generate", f"checkpoint={quick.run.path}", "max_new_tokens=2")
    outcome = gptpl(*given, "filter=several", "filter.filters.words.path=words.txt")
    assert (outcome.status, outcome.err.splitlines()[-1]) == (0, "filter: 0 of 1 text"), outcome.err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("filter=wrods",), "did you mean words"),
        (("filter=words",), "word list is empty"),
        (("filter=words", "filter.path=none.txt"), r"word list cannot be read: No such file.*none\.txt"),
        (("filter=words", "filter.wrods=[a]"), r"did you mean filter\.words"),
        (("filter=patterns", 'filter.patterns.x="("'), r"patterns\.x=\( is not a regular expression"),
        (("filter=personal_data", "filter.action=hide"), r"must be 'mark', 'withhold' or 'report'"),
        (("filter=personal_data", "filter.kinds=[IBAM]"), r"filter\.kinds=\[IBAM\].*'IBAN'"),
        (("filter=personal_data", "statistics=true"), "statistics=true is about the model's own text"),
        (("filter=classifier",), "checkpoint of the filter is not set"),
        (("filter._target_=gptpl.model.GPTConfig",), "is not a Filter: filter needs one"),
    ],
)
def test_unsuitable_filters_are_refused(refused, quick, given, said):
    assert re.search(said, refused("generate", f"checkpoint={quick.run.path}", *given))


def test_settings_with_a_default_may_be_taken_away(gptpl, quick):
    given = ("generate", f"checkpoint={quick.run.path}", "prompt=The sea", "max_new_tokens=4", "seed=1")
    without = gptpl(*given, "~trust", "~device")
    assert (without.status, without.out) == (0, gptpl(*given).out)


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


def test_a_rule_has_a_short_name(generate):
    settings = ("seed=1", "max_new_tokens=30")
    assert generate("temperature=3", "top_k=5", *settings) == generate(
        "sampling.temperature=3", "sampling.top_k=5", *settings
    )


def test_presets_have_the_published_values(gptpl):
    presets = {
        "greedy": (0.0, "null"),
        "code": (0.1, 10),
        "technical": (0.3, 20),
        "chat": (0.7, 40),
        "creative": (1.0, 60),
        "experimental": (1.5, 100),
    }
    for name, (temperature, top_k) in presets.items():
        shown = gptpl("generate", f"sampling={name}", "--cfg", "job").out
        assert f"  temperature: {temperature}\n  top_k: {top_k}\n  top_p: null\n" in shown


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
    assert outcome.out.startswith("The old zebra sang,")
    assert len(outcome.out.split()) == 8 - outcome.out.count(",") + 1  # a comma sticks to its word
    assert "the model reads the prompt as: The old <|unk|> sang," in outcome.err


def test_text_can_be_piped_where_the_terminal_knows_no_unicode(quick):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="\n")
    with contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(io.StringIO()):
        assert main(["generate", f"checkpoint={quick.run.path}", "prompt=héllo", "max_new_tokens=0"]) == 0
    terminal.seek(0)
    assert terminal.read() == "h?llo\n"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("temperature=-1",), ["temperature must be", "got -1"]),
        (("temperature=nan",), ["temperature must be", "got nan"]),
        (("temperature=warm",), ["temperature=warm", "a valid number"]),
        (("top_k=0",), ["top_k must be", "got 0"]),
        (("max_new_tokens=-1",), ["max_new_tokens must be", "got -1"]),
        (("max_new_tokens=1.5",), ["max_new_tokens=1.5"]),
        (("seed=-1",), ["seed must be", "got -1"]),
        (("seed=99999999999999999999",), ["seed must be", "got 99999999999999999999"]),
        (("device=tpu",), ["device must be one of", "cuda", "got tpu"]),
        (("device=mps",), ["device=mps", "device=cpu"]),
        (("model=tiny",), ["gptpl generate has no setting model"]),
        (("promt=x",), ["did you mean prompt?"]),
        (("top_p=0",), ["top_p must be above 0", "got 0"]),
        (("top_p=1.5",), ["top_p must be", "got 1.5"]),
        (("sampling.min_p=2",), ["min_p must be", "got 2"]),
        (("repetition_penalty=0",), ["repetition_penalty must be", "got 0"]),
        (("banned_tokens=[257]",), ["banned_tokens must", "0 to 256, got 257"]),
        (("sampling=wild",), ["sampling=wild", "creative"]),
        (("num_samples=0",), ["num_samples must be", "got 0"]),
        (("alternatives=-1",), ["alternatives must be", "got -1"]),
        (("stop=['']",), ["stop must be", "got ['']"]),
        (("num_beams=0",), ["num_beams=0"]),
        (("num_beams=2", "num_samples=3"), ["num_samples=3", "num_beams=2"]),
        (("num_beams=2", "statistics=true"), ["num_beams", "statistics"]),
        (("precision=16",), ["precision=16", "bf16-true"]),
        (("prompt=x", "prompt_file=y"), ["prompt= and prompt_file= are both set"]),
        (("prompt_file=nowhere.txt",), ["prompt_file=nowhere.txt", "No such file"]),
        (("--json", "-i"), ["--json", "-i"]),
        (("--prompt", "x"), ["gptpl generate has no flag --prompt", "did you mean prompt="]),
    ],
)
def test_wrong_settings_are_refused(given, words, refused, quick):
    if given == ("device=mps",) and torch.backends.mps.is_available():
        pytest.skip("there is an Apple GPU")
    line = refused("generate", f"checkpoint={quick.run.path}", *given)
    assert all(word in line for word in words), line


# --- where the prompt comes from -----------------------------------------------------------------------


@pytest.fixture
def piped(gptpl, quick, monkeypatch):
    """Runs `gptpl generate` with bytes on its standard input, which is a pipe."""
    opened = []

    def run(data: bytes, *arguments: str):
        reader, writer = os.pipe()
        os.write(writer, data)
        os.close(writer)
        opened.append(os.fdopen(reader))
        monkeypatch.setattr("sys.stdin", opened[-1])
        return gptpl("generate", f"checkpoint={quick.run.path}", *arguments)

    yield run
    for each in opened:
        each.close()


def test_a_piped_prompt_is_continued_without_the_line_break_of_echo(piped):
    outcome = piped("Every effört\n".encode(), "sampling=creative", "max_new_tokens=3", "seed=1")
    assert outcome.status == 0, outcome.err
    assert outcome.out.startswith("Every effört")
    assert outcome.out[len("Every effört")] != "\n"
    assert "prompt: from standard input" in outcome.err


@pytest.mark.parametrize(
    ("data", "arguments", "words"),
    [
        (b"caf\xe9", (), "standard input is not UTF-8 (byte 3 is 0xe9)"),
        (b"caf\xe9", ("prompt_file=-",), "standard input is not UTF-8"),
        (b"", (os.fsdecode(b"prompt=caf\xe9"),), "is not UTF-8"),
    ],
)
def test_a_prompt_that_is_not_utf8_is_refused(data, arguments, words, piped):
    outcome = piped(data, *arguments)
    assert (outcome.status, outcome.out) == (2, "")
    assert words in outcome.err
    assert len(outcome.err.splitlines()) <= 2


def test_a_prompt_can_lie_in_a_file(generate, tmp_path):
    (tmp_path / "a, b.txt").write_bytes("über\r\n\n".encode())
    assert generate("prompt_file=a, b.txt", "max_new_tokens=0") == "über\r\n\n"


def test_a_file_that_is_not_utf8_is_refused(refused, quick, tmp_path):
    (tmp_path / "latin.txt").write_bytes("über".encode("latin-1"))
    line = refused("generate", f"checkpoint={quick.run.path}", "prompt_file=latin.txt")
    assert "prompt_file=latin.txt is not UTF-8 (byte 0 is 0xfc)" in line


def test_an_empty_prompt_starts_from_end_of_text(gptpl, quick):
    empty, end = (
        gptpl("generate", f"checkpoint={quick.run.path}", prompt, "temperature=0", "--json")
        for prompt in ("prompt=", "prompt=<|endoftext|>")
    )
    assert empty.status == 0
    assert "the prompt is empty: starting from end-of-text" in empty.err
    assert json.loads(empty.out)["tokens"] == json.loads(end.out)["tokens"]


# --- several texts, JSON, beams ------------------------------------------------------------------------


def test_json_lines_hold_texts_tokens_and_how_to_make_them_again(gptpl, quick):
    arguments = ("generate", f"checkpoint={quick.run.path}", "prompt=Ab", "temperature=2", "max_new_tokens=6")
    outcome = gptpl(*arguments, "num_samples=3", "alternatives=2", "--json")
    records = [json.loads(line) for line in outcome.out.splitlines()]
    assert [record["sample"] for record in records] == [0, 1, 2]
    for record in records:
        assert record["prompt"] == "Ab"
        assert bytes(record["tokens"]).decode(errors="replace") == record["text"]
        assert (record["finish"], record["step"]) == ("length", 8)
        assert record["sampling"] == {"temperature": 2.0, "top_k": 40}
        for token, details in zip(record["tokens"], record["details"], strict=True):
            assert bytes([token]).decode(errors="replace") == details["text"]
            assert details["log_probability"] < 0 < details["entropy"] <= math.log(257)
            assert len(details["alternatives"]) == 2
    again = gptpl(*arguments, "num_samples=3", f"seed={records[0]['seed']}", "--json")
    assert [json.loads(line)["text"] for line in again.out.splitlines()] == [r["text"] for r in records]
    assert len({record["text"] for record in records}) == 3


def test_several_texts_are_numbered_and_the_first_is_that_of_one_alone(generate):
    alone = generate("prompt=Ab", "seed=1", "temperature=2", "max_new_tokens=9")
    texts = generate("prompt=Ab", "seed=1", "temperature=2", "max_new_tokens=9", "num_samples=2")
    assert texts.startswith(f"--- 1 of 2\n{alone}--- 2 of 2\nAb")


def test_a_text_ends_at_a_stop_string(gptpl, quick):
    arguments = (
        "generate",
        f"checkpoint={quick.run.path}",
        "prompt=The sea",
        "temperature=0",
        "--json",
        "seed=1",
    )
    whole = json.loads(gptpl(*arguments).out)["text"]
    stop = whole[5:7]
    record = json.loads(gptpl(*arguments, f"stop=[{json.dumps(stop)}]").out)
    assert (record["text"], record["finish"]) == (whole[: whole.index(stop)], "stop")
    assert json.loads(gptpl(*arguments, f"stop={stop}").out) == record


@pytest.mark.parametrize("stop", ["### it's", "a, b", "${seed}", "\n\n", "x=y [1]"])
def test_a_single_stop_string_may_hold_anything(stop, gptpl, quick):
    outcome = gptpl("generate", f"checkpoint={quick.run.path}", f"stop={stop}", "--cfg", "job", "--resolve")
    assert OmegaConf.create(outcome.out).stop == [stop]


def test_the_best_beam_is_likelier_than_the_greedy_text(gptpl, quick):
    net = load_model(quick.run.path / "checkpoints/last.ckpt").net

    def log_probability(*settings: str) -> float:
        arguments = ("prompt=The sea", "max_new_tokens=12", "--json", *settings)
        (line,) = gptpl("generate", f"checkpoint={quick.run.path}", *arguments).out.splitlines()
        tokens = json.loads(line)["tokens"]
        ids = torch.tensor([[*b"The sea", *tokens]])
        with torch.no_grad():
            chances = net(ids)[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
        return float(chances[-len(tokens) :].sum())

    assert log_probability("num_beams=8") >= log_probability("temperature=0")


def test_statistics_and_memorisation_are_reported(gptpl, quick):
    outcome = gptpl(
        *("generate", f"checkpoint={quick.run.path}", "prompt=The ", "num_samples=3", "seed=1"),
        *("statistics=true", "memorisation=true", "max_new_tokens=30"),
    )
    assert outcome.status == 0, outcome.err
    lines = outcome.err.splitlines()
    assert "statistics of 3 texts, 90 tokens" in lines
    assert any(re.fullmatch(r"in the training text of [\d,]+ tokens word for word:", line) for line in lines)
    assert re.search(r"  text 3: \d+ tokens in a row \('.+'\), \d+% of its 4-grams", outcome.err)


@pytest.mark.parametrize("filename", ["../x", "x"])
def test_a_checkpoint_does_not_decide_what_is_read_for_memorisation(filename, refused, quick, tmp_path):
    checkpoint = torch.load(quick.run.path / "checkpoints/last.ckpt", weights_only=True)
    url = "http://127.0.0.1:9/story.txt"
    corpus = {"_target_": "gptpl.data.sources.Downloaded", "url": url, "filename": filename, "sha256": None}
    checkpoint["gptpl"]["config"]["data"]["corpus"] = corpus
    checkpoint["gptpl"]["data_sha256"] = "0" * 64
    torch.save(checkpoint, tmp_path / "changed.ckpt")
    line = refused("generate", "checkpoint=changed.ckpt", "memorisation=true", "max_new_tokens=0")
    assert "is not in this machine's cache of encoded texts: name it, training_text=FILE" in line
    assert url not in line


def test_a_checkpoint_without_a_tokenizer_is_refused(refused, quick, tmp_path):
    checkpoint = torch.load(quick.run.path / "checkpoints/last.ckpt", weights_only=True)
    del checkpoint["gptpl"]["tokenizer"]
    torch.save(checkpoint, tmp_path / "bare.ckpt")
    assert "bare.ckpt is damaged (tokenizer is missing)" in refused("generate", "checkpoint=bare.ckpt")


@pytest.mark.parametrize("precision", ["bf16-true", "int8"])
def test_other_precisions_are_nearly_the_same_model(precision, generate):
    if precision == "int8" and not can_multiply_int8():
        pytest.skip("int8 products are FBGEMM's, for x86 alone")
    settings = ("prompt=The sea", "temperature=0", "max_new_tokens=5")
    text = generate(*settings, f"precision={precision}")
    assert text.startswith("The sea")
    assert len(text) == len(generate(*settings))
