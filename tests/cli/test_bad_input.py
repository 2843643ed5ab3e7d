"""Every kind of bad input: one line that names the value and the remedy, status 2, nothing left behind."""

from pathlib import Path

import pytest

SMALL = (
    "train",
    "model=tiny",
    "tokenizer=bytes",
    "trainer=cpu",
    "trainer.max_epochs=1",
    "trainer.compile=off",
)


# --- numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        ("model.emb_dim=65", "multiple of n_heads"),
        ("model.n_layers=0", "positive"),
        ("model.drop_rate=1", "below 1"),
        ("model.init=zeros", "must be 'torch' or 'gpt2'"),
        ("model.vocab_size=100", "257"),
        ("tokenizer.vocab_size=100", "257"),
        ("data.batch_size=0", "at least 1"),
        ("data.batch_size=-1", "at least 1"),
        ("data.batch_size=100000", "lower data.batch_size"),
        ("data.batch_size=auto", "data.global_batch_size=N"),
        ("data.batch_size=many", "must be a valid integer or 'auto'"),
        ("data.batch_size=1.5", "must be a valid integer or 'auto'"),
        ("data.global_batch_size=13", "data.batch_size=auto"),
        ("data.global_batch_size=0", "data.batch_size=auto"),
        ("data.max_length=65", "data.max_length=64"),
        ("data.train_ratio=1", "between 0 and 1"),
        ("data.num_workers=-1", "at least 0"),
        ("seed=99999999999", "from 0 to"),
        ("eval_every_n_steps=0", "positive"),
        ("eval_train_batches=0", "at least 1"),
        ("trainer.max_epochs=0", "positive"),
        ("trainer.max_epochs=null", "give one"),
        ("trainer.accumulate_grad_batches=0", "positive"),
        ("trainer.gradient_clip_val=0", "positive"),
        ("trainer.compile=perhaps", "must be 'auto', 'on' or 'off'"),
        ("trainer.attention=flash", "must be 'auto', 'blocked', 'sdpa' or 'explicit'"),
        ("trainer.head=liger", "must be 'auto', 'fused' or 'plain'"),
        ("trainer.precision=13", "13"),
        ("trainer.max_time=soon", "DD:HH:MM:SS"),
        ("trainer.devices=0", "Lightning"),
        ("trainer.strategy=magic", "magic"),
        ("trainer.accelerator=tpu", "auto, cpu, gpu"),
        ("optimizer.lr=-1", "positive"),
        ("optimizer.lr=0", "positive"),
        ("optimizer.decay=some", "must be 'matrices' or 'all'"),
        ("scheduler.warmup_steps=-1", "0 or more"),
        ("scheduler.warmup_steps=100000", "train longer"),
        ("scheduler.min_lr=1", "optimizer.lr"),
        ("callbacks.sample_text.max_new_tokens=0", "1 or more"),
        ("callbacks.sample_text.prompts=[]", "one or more"),
        ("callbacks.checkpoint_last.every_n_minutes=0", "positive"),
        ("callbacks.checkpoint_best.monitor=val/accuracy", "val/loss"),
        ("callbacks.progress_bar.log_every_seconds=0", "must be positive"),
    ],
)
def test_a_number_or_name_out_of_range(given, remedy, refused):
    line = refused(*SMALL, given)
    key, _, value = given.partition("=")
    assert key.rpartition(".")[2] in line or value in line, line
    assert remedy in line, line


@pytest.mark.parametrize(
    ("strategy", "said"),
    [("temperature: -1", "0 (greedy)"), ("top_k: 0", "positive"), ("temprature: 1", "temperature?")],
)
def test_a_sampling_strategy_that_is_none(strategy, said, refused):
    line = refused(*SMALL, f"callbacks.sample_text.strategies=[{{{strategy}}}]")
    assert strategy.partition(":")[0] in line
    assert said in line


def test_a_prompt_without_a_token_is_refused_before_there_is_a_run_folder(refused):
    # Only the tokenizer knows: that of words sees nothing in a blank.
    line = refused(*SMALL, "tokenizer=words", "callbacks.sample_text.prompts=[' ']")
    assert "prompt ' ' has no tokens" in line


# --- texts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.txt", None, ["missing.txt", "does not exist"]),
        ("empty.txt", b"", ["empty.txt", "empty"]),
        ("blank.txt", b" \n\t\n", ["blank.txt", "empty"]),
        ("binary.txt", b"text\0more", ["binary.txt", "binary"]),
        ("latin1.txt", "café".encode("latin-1") * 100, ["latin1.txt", "not UTF-8", "iconv"]),
        ("utf16.txt", "coffee".encode("utf-16"), ["utf16.txt", "UTF-16", "iconv"]),
        ("no window.txt", b"short", ["training", "data.max_length"]),
        ("no validation.txt", b"a" * 400, ["validation", "data.max_length"]),
        ("few windows.txt", b"a" * 1000, ["data.batch_size=99"]),
    ],
)
def test_a_text_that_is_none(name, content, words, refused, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    size = "data.batch_size=99" if name == "few windows.txt" else "data.batch_size=1"
    line = refused(*SMALL, "data=text_file", f"data.path={name}", size)
    assert all(word in line for word in words), line


def test_a_folder_or_glob_without_texts(refused, tmp_path):
    (tmp_path / "texts").mkdir()
    assert "data.path=texts" in refused(*SMALL, "data=text_file", "data.path=texts")
    assert "data.path=texts/*.md" in refused(*SMALL, "data=text_file", "data.path=texts/*.md")
    assert "data.path is not set" in refused(*SMALL, "data=text_file")


# --- machines -------------------------------------------------------------------------------------------


def test_no_gpu_where_one_is_asked_for(refused, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    small = ("train", "model=tiny", "tokenizer=bytes")
    for trainer, accelerator in (("gpu", "gpu"), ("fsdp", "gpu"), ("mps", "mps")):
        line = refused(*small, f"trainer={trainer}")
        assert f"trainer.accelerator={accelerator}" in line
        assert "use trainer.accelerator=cpu" in line


def test_a_head_alone_is_not_fused_where_it_is_spread_over_processes(refused):
    """FSDP2 would not sum its gradient, and nothing would train."""
    line = refused(*SMALL, "trainer=fsdp", "trainer.accelerator=cpu", "tune=head", "model.tie_weights=false")
    assert "tune=head with trainer.strategy=fsdp needs trainer.head=plain" in line


def test_embeddings_whose_bits_depend_on_the_machine_are_not_sharded(refused):
    line = refused(*SMALL, "trainer=fsdp", "trainer.accelerator=cpu", "init=cooccurrence")
    assert "the bits of CooccurrenceWeights depend on the machine" in line
    assert line.endswith("use init=random, or trainer=ddp")


def test_no_compiler_where_one_is_asked_for(refused, monkeypatch):
    monkeypatch.setattr("gptpl.training.performance.missing_tool", lambda device: "a C++ compiler")
    line = refused(*SMALL, "trainer.compile=on")
    assert "trainer.compile=on needs a C++ compiler" in line
    assert "trainer.compile=off" in line


# --- folders --------------------------------------------------------------------------------------------


def test_a_run_folder_that_is_a_file_or_below_one(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert f"run_dir={tmp_path / 'file'} is a file" in refused(*SMALL, "run_dir=file")
    assert f"run_dir={tmp_path / 'file/run'}" in refused(*SMALL, "run_dir=file/run")


def test_a_run_folder_without_permission(refused, tmp_path, monkeypatch):
    # Not by permission bits: they do not hold back root.
    monkeypatch.setattr("os.access", lambda path, mode, **rest: Path(path) != tmp_path / "run")
    line = refused(*SMALL, "run_dir=run")
    assert f"run_dir={tmp_path / 'run'} cannot be written" in line


def test_a_run_folder_that_the_system_refuses_to_make(refused, tmp_path, monkeypatch):
    make = Path.mkdir

    def mkdir(path: Path, *given: object, **named: object) -> None:
        if path == tmp_path / "run":
            raise OSError(30, "Read-only file system", str(path))
        make(path, *given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr("pathlib.Path.mkdir", mkdir)
    monkeypatch.setattr("logging.Logger.info", lambda *given, **named: None)
    line = refused(*SMALL, "run_dir=run")
    assert f"run_dir={tmp_path / 'run'} cannot be made (Read-only file system)" in line
