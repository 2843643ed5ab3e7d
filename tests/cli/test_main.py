"""The program itself: help, version, exit statuses, tracebacks, and what it leaves in the process."""

import logging
import os
import re
import subprocess
import sys
import warnings

import pytest

import gptpl as package
from gptpl.cli.help import commands
from gptpl.cli.main import main
from gptpl.config.groups import choices, default_choices


def test_help_lists_the_commands(gptpl):
    for arguments in ([], ["--help"], ["-h"], ["help"]):
        outcome = gptpl(*arguments)
        assert outcome.status == 0
        assert all(f"\n  {command} " in outcome.out for command in ("train", "generate", "evaluate"))


@pytest.mark.parametrize("command", commands())
def test_help_of_a_command_shows_groups_defaults_and_examples(command, gptpl):
    outcome = gptpl(*command.split(), "--help")
    assert (outcome.status, outcome.err) == (0, "")
    examples = outcome.out.partition("examples:\n")[2].partition("\n\n")[0].splitlines()
    assert len(examples) >= 3
    assert all(f"gptpl {command}" in line and "  # " in line for line in examples)
    root = command.replace(" ", "_").replace("-", "_")
    for group, default in default_choices(root).items() if "\ngroups" in outcome.out else ():
        section = outcome.out.partition(f"\n  {group}\n")[2]
        lines = section.splitlines()[: len(choices(group))]
        assert [line[5:].split()[0] for line in lines] == choices(group)
        assert [line[5:].split()[0] for line in lines if line[3] == "*"] == [default] * (default != "null")
        assert all(len(line.split(maxsplit=2 if line[3] == "*" else 1)[-1]) > 20 for line in lines)


def test_help_shows_the_choices_of_a_folder_of_the_users(gptpl, tmp_path):
    (tmp_path / "conf/callbacks").mkdir(parents=True)
    (tmp_path / "conf/callbacks/mine.yaml").write_text("# Counts batches: choose it to see them.\nmine: {}\n")
    out = gptpl("train", "--config-dir", "conf", "--help").out
    assert re.search(r"\n     mine +Counts batches: choose it to see them\.\n", out)
    assert "Counts batches" not in gptpl("train", "--help").out


def test_help_of_train_names_settings_and_groups(gptpl):
    out = gptpl("train", "--help").out
    assert "  seed: 123" in out
    assert "\n   * gpt_124m " in out
    groups = (
        "tokenizer",
        "model",
        "data",
        "task",
        "optimizer",
        "scheduler",
        "trainer",
        "logger",
        "callbacks",
    )
    assert all(f"\n  {group}\n" in out for group in (*groups, "experiment"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["generate", "-h"],
        ["weights"],
        ["weights", "list", "-h"],
        ["--version"],
    ],
)
def test_help_comes_without_the_heavy_packages(arguments):
    code = (
        "import sys; from gptpl.cli.main import main; main(sys.argv[1:])\n"
        "loaded = {'torch', 'lightning', 'hydra', 'omegaconf', 'numpy', 'tiktoken'} & set(sys.modules)\n"
        "sys.exit(f'loaded {loaded}' if loaded else 0)"
    )
    finished = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_the_version_is_the_packages(gptpl):
    outcome = gptpl("--version")
    assert (outcome.status, outcome.out) == (0, f"gptpl {package.__version__}\n")


def test_the_config_can_be_shown_without_a_run(gptpl, tmp_path):
    outcome = gptpl("train", "model=tiny", "--cfg", "job")
    assert outcome.status == 0
    assert "emb_dim: 64" in outcome.out
    assert "lr: 0.0004" in outcome.out
    resolved = gptpl("train", "model=tiny", "--cfg", "job", "--resolve")
    assert resolved.status == 0
    assert "max_length: 64" in resolved.out
    part = gptpl("train", "model=tiny", "--cfg", "job", "--package", "optimizer.lr")
    assert (part.status, part.out) == (0, "0.0004\n")
    assert gptpl("train", "model=tiny", "--cfg", "job", "--package", "optimizer.lr.x").status == 2
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_command_is_refused(refused):
    assert (
        refused("tran")
        == "gptpl has no command 'tran': choose one of train, submit, sweep, plan, find-lr, find-batch-size,"
        " autotune, verify-resume, generate, respond, serve, classify, inspect, evaluate, judge, report,"
        " runs list,"
        " runs show, runs diff, runs tag, runs note, runs rm, data encode, data show, tokenizer train,"
        " weights fetch,"
        " weights list, weights convert, card, doctor: did you mean train?"
    )


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("run", "runs"),
        ("run list", "runs list"),
        ("run name=x", "runs"),
        ("runs lst", "runs list"),
        ("weight", "weights"),
        ("convert", "weights convert"),
        ("encode data=x", "data encode"),
        ("evalute", "evaluate"),
        ("find_lr", "find-lr"),
        ("xyzzy", None),
    ],
)
def test_the_nearest_command_is_found_by_its_words(refused, given, meant):
    words = refused(*given.split())
    assert words.partition("did you mean ")[2] == ("" if meant is None else f"{meant}?")


def test_a_long_message_is_cut(refused):
    assert len(refused("x" * 10**5)) == 2_000


BAD = ("train", "model=tiny", "tokenizer=bytes", "model.n_layers=0")


def test_bad_input_shows_a_traceback_only_when_asked_for(gptpl, monkeypatch):
    plain = gptpl(*BAD)
    debugged = [gptpl(*BAD, "--debug"), gptpl("--debug", *BAD)]
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    debugged.append(gptpl(*BAD))
    for outcome in debugged:
        assert outcome.status == 2
        assert outcome.err.startswith("Traceback (most recent call last):")
        assert "gptpl.errors.InputError" in outcome.err
        assert outcome.err.endswith(plain.err)
    assert plain.err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device", "run.json"), 1, "No space left on device (run.json)"),
    ],
)
def test_what_is_nobodys_mistake_has_a_status_of_its_own(error, status, words, gptpl, monkeypatch):
    def fit(*given: object) -> None:
        raise error

    monkeypatch.setattr("gptpl.runs.fit._fit", fit)
    outcome = gptpl("train", "experiment=quick", "trainer=cpu")
    assert outcome.status == status
    assert words in outcome.err.splitlines()[-1]
    assert "Traceback" not in outcome.err


def test_a_reader_that_leaves_early_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "gptpl", "train", "--help"]
    finished = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (finished.returncode, finished.stderr) == (1, b"")


def test_an_error_of_the_program_is_not_hidden(gptpl, monkeypatch):
    def fit(*given: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("gptpl.runs.fit._fit", fit)
    with pytest.raises(ValueError, match="a bug"):
        gptpl("train", "experiment=quick", "trainer=cpu")


def test_a_command_leaves_the_process_as_it_was(quick, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["caller", "its argument"])
    root = logging.getLogger()
    before = (root.level, list(root.handlers), dict(os.environ), warnings.showwarning)
    assert main(["generate", f"checkpoint={quick.run.path}", "max_new_tokens=1"]) == 0
    assert main(["train", "sed=1"]) == 2
    assert (root.level, list(root.handlers), dict(os.environ), warnings.showwarning) == before
    assert sys.argv == ["caller", "its argument"]


@pytest.mark.parametrize(
    ("given", "count"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_threads_that_wait_sleep_soon_unless_the_user_says_otherwise(given, count):
    """OpenMP reads it when torch is imported, so it must be there before."""
    program = (
        "import os, sys; from gptpl.cli.main import main; main(['--version']);"
        "print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    )
    free = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", program], env=free | given, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == f"{count} False"
