"""Starting from other weights, evaluating them, and handing models on: the commands, on a tiny GPT-2."""

# T tokens in a window

import copy
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from gptpl.data.sources import Tale
from gptpl.model import GPTModel
from gptpl.tokenizers import GPT2Tokenizer
from gptpl.weights import published
from gptpl.weights.formats import FORMATS

TINY = ("model=gpt2_small", "model.emb_dim=16", "model.n_heads=2", "model.n_layers=2")
"""GPT-2 small but for its width and depth: vocabulary, context, biases and tied head are the real ones."""
SHORT = (
    *("trainer=cpu", "trainer.precision=32-true", "scheduler.warmup_steps=1", "trainer.max_steps=2"),
    *("data.max_length=64", "data.batch_size=8", "data.stride=256", "callbacks=checkpoint_last"),
    *("eval_val_batches=1", "eval_train_batches=1"),
)
HUB = "openai-community/gpt2/resolve/607a30d783dfa663caf39e06633721c8d4cfcd7e"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A `GPT2LMHeadModel` of transformers, and a folder that is laid out as the hub, with its files."""
    transformers = pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("hub")
    torch.manual_seed(5)
    config = transformers.GPT2Config(n_embd=16, n_head=2, n_layer=2, resid_pdrop=0.1)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(root / HUB)
    return model, root


@pytest.fixture
def mirror(theirs: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The address of a server with those files as GPT-2 "124M", and an empty cache."""
    size = published.Size(name="124M", emb_dim=16, n_heads=2, n_layers=2, choice="gpt2_small")
    monkeypatch.setitem(published.SIZES, "124M", size)
    hub = ("openai-community/gpt2", HUB.rpartition("/")[2])
    monkeypatch.setitem(published._HUB, "124M", hub)
    monkeypatch.setattr(published, "_PINNED", {})
    monkeypatch.setenv("GPTPL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "*")
    handler = partial(Quiet, directory=str(theirs[1]))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def plain_loss(model: Any, tokens: list[int], T: int) -> float:
    """Mean nats a token of transformers' model, each token scored once, in windows of T."""
    losses: list[float] = []
    for start in range(0, len(tokens) - 1, T):
        window = torch.tensor(tokens[start : start + T + 1])
        with torch.no_grad():
            logits = model(window[None, :-1]).logits[0]
        losses += F.cross_entropy(logits, window[1:], reduction="none").tolist()
    return sum(losses) / len(losses)


def tale() -> list[int]:
    """The tokens of its validation part."""
    corpus = Tale()
    text = corpus.read(corpus.files()[0])
    cut = int(len(text) * 0.9)
    return [int(token) for token in GPT2Tokenizer().encode(text[cut:])]


def number(out: str, name: str) -> float:
    [line] = [line for line in out.splitlines() if line.startswith(name)]
    return float(line.split()[1].replace(",", ""))


# ---------------------------------------------------------------------------------------- published weights


def test_fetch_list_then_no_network(gptpl, mirror, theirs, tmp_path):
    fetched = gptpl("weights", "fetch", f"mirror={mirror}")
    assert fetched.status == 0, fetched.err
    folder = Path(fetched.out.strip())
    assert folder == tmp_path / "cache/weights/hf/124M"
    assert (folder / "model.safetensors").read_bytes() == (theirs[1] / HUB / "model.safetensors").read_bytes()
    listed = gptpl("weights", "list").out.splitlines()
    assert listed[1].split()[:3] == ["124M", "hf", "complete"]
    assert listed[2].split() == ["355M", "hf", "-", "0"]
    nowhere = "init.mirror=http://127.0.0.1:9"
    assert gptpl("evaluate", "init=gpt2_hf", nowhere, "data=tale", "data.max_length=64").status == 0


def test_evaluating_gpt2_gives_transformers_loss(gptpl, mirror, theirs):
    outcome = gptpl(
        *("evaluate", "init=gpt2_hf", f"init.mirror={mirror}", "data=tale", "data.max_length=64", "split=val")
    )
    assert outcome.status == 0, outcome.err
    assert number(outcome.out, "loss") == pytest.approx(plain_loss(theirs[0], tale(), 64), abs=1e-4)


def test_training_goes_on_from_gpt2(gptpl, mirror, theirs):
    arguments = ("init=gpt2_hf", f"init.mirror={mirror}", *TINY, *SHORT, "eval_val_batches=null")
    outcome = gptpl("train", *arguments, "data.stride=64")
    assert outcome.status == 0, outcome.err
    before_the_first_step = float(outcome.run.rows[0]["val/loss"])
    tokens = tale()
    whole_windows = (len(tokens) - 1) // 64 * 64 + 1  # a window that is not full is left out
    wanted = plain_loss(theirs[0], tokens[:whole_windows], 64)
    assert before_the_first_step == pytest.approx(wanted, abs=1e-4)
    start = outcome.run.record["start"]
    assert (start["init"], start["size"]) == ("gpt2_hf", "124M")
    assert list(start["sha256"]) == ["model.safetensors"]
    assert outcome.run.checkpoint("last")["gptpl"]["start"] == start


def test_a_run_from_gpt2_is_resumed_without_its_weights_or_a_network(gptpl, mirror, tmp_path):
    arguments = ("init=gpt2_hf", f"init.mirror={mirror}", *TINY, *SHORT)
    stopped = gptpl("train", *arguments, "trainer.stop_at_step=1", "run_dir=run")
    assert stopped.status == 0, stopped.err
    for file in (tmp_path / "cache/weights/hf/124M").iterdir():
        file.unlink()
    assert gptpl("train", "resume=run").status == 0
    unbroken = gptpl("train", *arguments, "run_dir=unbroken")
    assert unbroken.status == 0, unbroken.err
    ends = [torch.load(tmp_path / f"{name}/checkpoints/last.ckpt") for name in ("run", "unbroken")]
    for name, tensor in ends[0]["state_dict"].items():
        assert torch.equal(tensor, ends[1]["state_dict"][name]), name
    assert ends[0]["gptpl"]["start"]["init"] == "gpt2_hf"


def test_init_cannot_change_when_a_run_is_resumed(gptpl, refused, quick, tmp_path):
    shutil.copytree(quick.run.path, tmp_path / "run")
    said = refused("train", "resume=run", "init=gpt2_hf")
    assert "init" in said
    assert "cannot change when a run is resumed" in said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (("model=tiny",), "no weights for emb_dim=64"),
        (("model.qkv_bias=false",), "model.qkv_bias=false, they have true: set model.qkv_bias=true"),
        (("model.context_length=128",), "model.context_length=128, they have 1024"),
        (("tokenizer=bytes",), "this run has tokenizer=bytes: set tokenizer=gpt2"),
        (("init.size=125M",), "size=125M is unknown: choose one of 124M, 355M, 774M, 1558M"),
    ],
)
def test_a_mismatch_is_refused_before_anything_is_fetched(refused, mirror, changes, words):
    model = () if "model=tiny" in changes else TINY
    said = refused("train", "init=gpt2_hf", f"init.mirror={mirror}", *model, *SHORT, *changes)
    assert words in said


def test_a_shorter_context_when_asked_for(gptpl, mirror):
    arguments = ("init=gpt2_hf", f"init.mirror={mirror}", "init.crop_context=true", *TINY, *SHORT)
    outcome = gptpl("train", *arguments, "model.context_length=128")
    assert outcome.status == 0, outcome.err
    assert outcome.run.checkpoint("last")["state_dict"]["net.pos_emb.weight"].shape == (128, 16)


def test_no_network_and_nothing_cached(gptpl, mirror):
    outcome = gptpl("generate", "init=gpt2_hf", f"init.mirror={mirror}/nowhere")
    assert outcome.status == 2
    last = outcome.err.splitlines()[-1]
    assert "(HTTP 404" in last
    assert "gptpl weights fetch size=124M source=hf on a machine with one" in last


# ------------------------------------------------------------------------------------------------- lineage


def test_a_run_starts_from_another_and_remembers_it(gptpl, quick, run_folder):
    data = ("experiment=quick", "trainer.max_steps=2", "eval_every_n_steps=1", *SHORT[:3])
    first = gptpl("train", "init=run", f"init.checkpoint={quick.run.path}", *data, "run_dir=runs/a", "seed=1")
    assert first.status == 0, first.err
    last = quick.run.record["metrics"]["val/loss"]
    assert float(run_folder(first.folder / "runs/a").rows[0]["val/loss"]) == pytest.approx(last, abs=1e-6)
    second = gptpl("train", "init=run", "init.checkpoint=a/latest", *data, "run_dir=b", "seed=2")
    assert second.status == 0, second.err
    record = json.loads((second.folder / "b/run.json").read_text())
    assert record["start"]["checkpoint"].startswith(str(first.folder / "runs/a/checkpoints"))
    parent = record["start"]["parent"]
    assert (parent["step"], parent["data"]["corpus"]) == (2, "Tale")
    grandparent = parent["start"]["parent"]
    assert (grandparent["step"], grandparent["start"]) == (8, {"init": "random"})
    assert grandparent["tokens_seen"] == quick.run.record["tokens_seen"]
    assert grandparent["losses"]["val/loss"] == pytest.approx(last)


def test_another_shape_or_tokenizer_than_the_runs_is_refused(refused, quick):
    init = ("init=run", f"init.checkpoint={quick.run.path}", "trainer.max_steps=20")
    said = refused("train", "experiment=quick", *init, "model.n_layers=3")
    assert "model.n_layers=3, they have 2: set model.n_layers=2" in said
    assert "was trained with tokenizer=bytes" in refused("train", "model=tiny", *init)
    assert "init.checkpoint is not set" in refused("train", "experiment=quick", "init=run")


def test_a_checkpoint_that_was_changed_is_not_started_from(gptpl, quick, tmp_path):
    shutil.copytree(quick.run.path, tmp_path / "run", symlinks=True)
    last = (tmp_path / "run/checkpoints/last.ckpt").resolve()
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1
    last.write_bytes(data)
    outcome = gptpl("train", "experiment=quick", "init=run", "init.checkpoint=run", "trainer.max_steps=20")
    assert outcome.status == 2
    assert "is damaged" in outcome.err.splitlines()[-1]


def test_a_line_of_metrics_that_is_being_written_disturbs_nobody(gptpl, quick, quick_text, tmp_path):
    shutil.copytree(quick.run.path, tmp_path / "run", symlinks=True)
    with (tmp_path / "run/metrics.csv").open("a") as file:
        file.write("4x,2.0\n\x00,")
    assert greedy(gptpl, "run") == quick_text
    (tmp_path / "run/metrics.csv").write_bytes(b"\xff\xfe")
    assert greedy(gptpl, "run") == quick_text


def test_the_losses_of_a_past_are_those_of_its_checkpoint(gptpl, tmp_path):
    """Of a checkpoint in the middle of a run, not of the run's end."""
    saving = ("callbacks=checkpoint_last", "callbacks.checkpoint_last.every_n_steps=2")
    steps = ("trainer.max_steps=4", "eval_every_n_steps=2")
    ran = gptpl("train", "experiment=quick", *SHORT[:3], *saving, *steps, "run_dir=run")
    assert ran.status == 0, ran.err
    convert(gptpl, "checkpoint=run/checkpoints/step-00000002.ckpt", "format=book", "output=x")
    lineage = json.loads((tmp_path / "x/gptpl.json").read_text())["lineage"]
    [row] = [row for row in ran.run.rows if row["step"] == "2" and row["val/loss"]]
    assert lineage["losses"]["val/loss"] == float(row["val/loss"])


# --------------------------------------------------------------------------------- other programs' files


def convert(gptpl: Callable[..., Any], *arguments: str) -> Any:
    outcome = gptpl("weights", "convert", *arguments)
    assert outcome.status == 0, outcome.err
    assert "verified: the logits of 64 tokens differ by 0.0e+00 at most" in outcome.err
    return outcome


def greedy(gptpl: Callable[..., Any], checkpoint: str | Path) -> str:
    settings = ("prompt=The sea", "sampling=greedy", "max_new_tokens=40")
    outcome = gptpl("generate", f"checkpoint={checkpoint}", *settings)
    assert outcome.status == 0, outcome.err
    return str(outcome.out)


@pytest.fixture(scope="module")
def exports(command, quick, tmp_path_factory) -> Callable[[str], Path]:
    """The quick run in a format, converted at its first use. Copy the folder before changing anything."""
    folder = tmp_path_factory.mktemp("exports")

    @cache
    def made(name: str) -> Path:
        here = partial(command, cwd=folder)
        convert(here, f"checkpoint={quick.run.path}", f"format={name}", f"output=my {name}")
        return folder / f"my {name}"

    return made


@pytest.fixture
def export(exports, tmp_path) -> Callable[[str, str], Path]:
    """A copy of it in the test's folder: `export("book", "mine")`."""
    return lambda name, output: Path(shutil.copytree(exports(name), tmp_path / output))


@pytest.fixture(scope="module")
def quick_text(command, quick) -> str:
    """The greedy text of the quick run."""
    return greedy(partial(command, cwd=quick.folder), quick.run.path)


def test_a_trained_run_opens_in_transformers_and_writes_the_same_greedy_text(export, quick_text, tmp_path):
    transformers = pytest.importorskip("transformers")
    export("hf", "hf")
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    prompt = tokenizer("The sea", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=40, do_sample=False)
    assert quick_text.rstrip("\n") == tokenizer.decode(ids[0])
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {
        "README.md", "config.json", "generation_config.json", "gptpl.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "hf").iterdir()}
    usual = tmp_path / "usual"
    usual.touch()
    assert modes == {usual.stat().st_mode & 0o777}, "what a user can read"


@pytest.mark.parametrize("name", ["hf", "book", "nanogpt", "openai-tf", "gguf", "gptpl"])
def test_there_and_back_again(gptpl, quick_text, name, export):
    if name == "openai-tf":
        pytest.importorskip("tensorflow", reason="TensorFlow is installed on Linux x86-64 only")
    export(name, "there")
    assert greedy(gptpl, "there") == quick_text, "gptpl reads the folder as it is"
    convert(gptpl, "checkpoint=there", "format=gptpl", "output=back")
    assert greedy(gptpl, "back/model.ckpt") == quick_text


@pytest.mark.parametrize("name", ["hf", "gptpl"])
def test_the_model_card_says_where_the_weights_come_from(exports, quick, name):
    card = (exports(name) / "README.md").read_text()
    record = quick.run.record
    assert card.startswith("---\n")
    assert f"# my {name}\n\nExported by gptpl" in card
    assert f"for 8 optimizer steps, {record['tokens_seen']:,} tokens, on `Tale`" in card
    assert record["data"]["sha256"] in card
    assert f"val/loss {record['metrics']['val/loss']:.4f}" in card
    assert "First weights: random." in card
    assert "## Intended use and limits" in card
    assert "## How to load it" in card
    assert ("GPT2LMHeadModel.from_pretrained" in card) == (name == "hf")


def test_the_past_survives_a_way_through_another_format(gptpl, tmp_path, export):
    export("nanogpt", "a")
    convert(gptpl, "checkpoint=a", "format=gptpl", "output=b")
    convert(gptpl, "checkpoint=b", "format=book", "output=c")
    lineages = [json.loads((tmp_path / f"{name}/gptpl.json").read_text())["lineage"] for name in "ac"]
    assert lineages[0] == lineages[1]
    assert lineages[0]["step"] == 8


def test_training_starts_from_an_export(gptpl, quick, run_folder, export):
    export("book", "export")
    data = ("experiment=quick", "trainer.max_steps=2", *SHORT[:3], "callbacks=none")
    outcome = gptpl("train", "init=state_dict", "init.path=export", *data, "run_dir=a")
    assert outcome.status == 0, outcome.err
    run = run_folder(outcome.folder / "a")
    assert float(run.rows[0]["val/loss"]) == pytest.approx(quick.run.record["metrics"]["val/loss"], abs=1e-6)
    start = run.record["start"]
    assert (start["init"], start["format"], start["parent"]["step"]) == ("state_dict", "book", 8)


def test_an_export_that_was_trained_on_elsewhere_is_read_as_it_is_now(gptpl, tmp_path, export):
    """transformers saves over it: a bias where there was none, and gptpl.json is out of date."""
    transformers = pytest.importorskip("transformers")
    export("hf", "hf")
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    model.save_pretrained(tmp_path / "hf")
    outcome = convert(gptpl, "checkpoint=hf", "format=book", "output=book")
    assert "gptpl.json: the weights next to it were damaged or edited since" in outcome.err
    record = json.loads((tmp_path / "book/gptpl.json").read_text())
    assert record["model"]["qkv_bias"] is True
    assert record["lineage"]["step"] == 0
    assert record["lineage"]["start"]["init"] == "file"
    assert record["tokenizer"]["name"] == "bytes"


def test_files_that_describe_themselves_take_no_model_or_tokenizer(refused, quick, export):
    rest = ("format=book", "output=x")
    for given in ("model=gpt2_xl", "tokenizer=gpt2"):
        assert "= out" in refused("weights", "convert", f"checkpoint={quick.run.path}", given, *rest)
    export("hf", "hf")
    for given in ("model=gpt2_xl", "tokenizer=gpt2"):
        assert "= out" in refused("weights", "convert", "checkpoint=hf", given, *rest)


def test_the_card_of_files_at_a_path_names_the_path(gptpl, refused, theirs, mirror, tmp_path):
    shutil.copytree(theirs[1] / HUB, tmp_path / "mine")
    convert(gptpl, "init=gpt2_hf", "init.path=mine", "format=book", "output=x")
    assert "First weights: the files at `mine`" in (tmp_path / "x/README.md").read_text()
    said = refused("generate", "init=gpt2_hf", "init.path=mine", "init.size=355M")
    assert "init.path=mine: GPT-2 355M's weights do not fit the model: model.emb_dim=16" in said


def test_gptpls_own_folders_are_for_init_run(refused, export):
    export("gptpl", "own")
    said = refused("train", "experiment=quick", "init=state_dict", "init.path=own")
    assert said.endswith("use init=run init.checkpoint=own")


def test_remedies_are_settings_that_are_there(gptpl, refused, tmp_path, export):
    export("hf", "hf")
    (tmp_path / "hf/gptpl.json").unlink()
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps(config | {"n_positions": 32}))
    said = refused("generate", "checkpoint=hf")
    assert said.endswith("the model wants (32, 64): restore what describes it, or fetch it again")
    export("book", "book")
    (tmp_path / "book/model.pth").rename(tmp_path / "bare.pth")
    told = ("model=tiny", "tokenizer=bytes", "model.context_length=32", "format=gptpl", "output=x")
    assert refused("weights", "convert", "checkpoint=bare.pth", *told).endswith("set model.context_length=64")


def test_a_bare_state_dict_needs_to_be_told_its_model(gptpl, refused, quick_text, tmp_path, export):
    export("book", "export")
    bare = tmp_path / "bare"
    bare.mkdir()
    (tmp_path / "export/model.pth").rename(bare / "model.pth")
    said = refused("generate", "checkpoint=bare/model.pth")
    assert "holds weights without a model configuration: convert it once" in said
    convert(
        gptpl, "checkpoint=bare/model.pth", "model=tiny", "tokenizer=bytes", "format=gptpl", "output=told"
    )
    assert greedy(gptpl, "told") == quick_text


def test_gpt2_into_another_format(gptpl, mirror, theirs, tmp_path):
    convert(gptpl, "init=gpt2_hf", f"init.mirror={mirror}", "format=nanogpt", "output=nano")
    tensors = torch.load(tmp_path / "nano/ckpt.pt", weights_only=True)["model"]
    weight = theirs[0].transformer.h[1].mlp.c_proj.weight
    assert torch.equal(tensors["transformer.h.1.mlp.c_proj.weight"], weight.T)
    assert "OpenAI's GPT-2 124M from the Hugging Face hub" in (tmp_path / "nano/README.md").read_text()


def test_a_model_of_gpt2s_shape_with_another_tokenizer_is_refused(refused, theirs, mirror, tmp_path):
    """As the German or Chinese GPT-2s of the hub."""
    folder = tmp_path / "german"
    shutil.copytree(theirs[1] / HUB, folder)
    (folder / "vocab.json").write_text(json.dumps({f"Wort{number}": number for number in range(50257)}))
    words = "german has another tokenizer than GPT-2's"
    assert words in refused("evaluate", "checkpoint=german")
    for init in ("state_dict", "gpt2_hf"):
        assert words in refused("train", f"init={init}", "init.path=german", *TINY, *SHORT)


def test_a_folder_of_another_size_than_the_model_is_refused(gptpl, theirs, mirror, tmp_path):
    shutil.copytree(theirs[1] / HUB, tmp_path / "other")
    config = json.loads((tmp_path / "other/config.json").read_text())
    (tmp_path / "other/config.json").write_text(json.dumps(config | {"n_head": 4}))
    outcome = gptpl("train", "init=gpt2_hf", "init.path=other", *TINY, *SHORT)
    assert outcome.status == 2
    assert "model.n_heads=2, they have 4" in outcome.err.splitlines()[-1]


def test_a_padded_vocabulary_stays_padded(gptpl, tmp_path):
    """257 bytes in a table of 320 rows, as for speed: no token that the tokenizer lacks is ever written."""
    transformers = pytest.importorskip("transformers")
    settings = ("experiment=quick", "model.vocab_size=320", *SHORT[:4], "callbacks=checkpoint_last")
    assert gptpl("train", *settings, "run_dir=run").status == 0
    convert(gptpl, "checkpoint=run", "format=hf", "output=hf")
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf")
    assert model.transformer.wte.weight.shape == (320, 64)
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")) == 257
    pytest.importorskip("tensorflow", reason="TensorFlow is installed on Linux x86-64 only")
    convert(gptpl, "checkpoint=hf", "format=openai-tf", "output=tf")
    assert json.loads((tmp_path / "tf/hparams.json").read_text())["n_vocab"] == 320
    outcome = gptpl(
        "train", "init=state_dict", "init.path=hf", "init.crop_vocabulary=true", "experiment=quick",
        *SHORT[:4], "callbacks=checkpoint_last", "run_dir=cut",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    weights = torch.load(tmp_path / "cut/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert weights["net.tok_emb.weight"].shape == (257, 64)


def test_half_precision_exports(gptpl, quick, tmp_path):
    for dtype in ("bfloat16", "float16"):
        convert(gptpl, f"checkpoint={quick.run.path}", "format=hf", f"output={dtype}", f"dtype={dtype}")
        assert json.loads((tmp_path / dtype / "config.json").read_text())["dtype"] == dtype
    size = (tmp_path / "bfloat16/model.safetensors").stat().st_size
    assert size < quick.run.record["parameters"] * 2 + 20_000


def test_weights_too_large_for_half_precision(refused, tmp_path, export):
    export("book", "large")
    tensors = torch.load(tmp_path / "large/model.pth", weights_only=True)
    tensors["trf_blocks.0.ff.layers.0.weight"][0, 0] = 1e6
    torch.save(tensors, tmp_path / "large/model.pth")
    said = refused("weights", "convert", "checkpoint=large", "format=hf", "output=x", "dtype=float16")
    assert "dtype=float16 cannot hold the weights of blocks.0.ff.up_proj.weight: use bfloat16" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("format=hf",), "output is not set: give output=VALUE"),
        (("output=x",), "format is not set: give format=VALUE"),
        (
            ("format=onnx", "output=x"),
            "format=onnx is unknown: choose one of hf, book, openai-tf, nanogpt, gguf, gptpl",
        ),
        (
            ("format=hf", "output=x", "dtype=int8"),
            "dtype=int8: format=hf has float32, bfloat16, float16 only",
        ),
        (("format=hf", "output=there"), "output=there is there already"),
        (("format=hf", "output=no/x"), "is in a folder that does not exist: make it first"),
        (("format=hf", "output=x", "init=gpt2_hf"), "and init= are both set: give one of them"),
        (("format=openai-tf", "output=x", "dtype=float16"), "format=openai-tf has float32 only"),
    ],
)
def test_bad_settings_leave_nothing_behind(refused, quick, tmp_path, arguments, words):
    (tmp_path / "there").mkdir()
    assert words in refused("weights", "convert", f"checkpoint={quick.run.path}", *arguments)


def test_an_export_that_does_not_come_back_the_same_is_not_kept(refused, gptpl, quick, monkeypatch):
    right = FORMATS["book"]

    def write(net: GPTModel, folder: Path, **given: Any) -> None:
        changed = copy.deepcopy(net)
        with torch.no_grad():
            changed.get_parameter("blocks.1.ff.up_proj.weight")[3, 4] += 0.5
        right.write(changed, folder, **given)

    monkeypatch.setitem(FORMATS, "book", replace(right, write=write))
    arguments = ("weights", "convert", f"checkpoint={quick.run.path}", "format=book", "output=x")
    assert "came back with logits that differ by" in refused(*arguments)
    assert gptpl(*arguments, "verify=false").status == 0


@pytest.mark.parametrize("command", ["evaluate", "generate", "inspect"])
def test_weights_that_say_nothing(refused, command):
    for init in ("random", "cooccurrence"):
        assert f"init={init} is not trained yet" in refused(command, f"init={init}", *_text(command))
    assert "checkpoint is not set" in refused(command, *_text(command))


def _text(command: str) -> tuple[str, ...]:
    return {"inspect": ("text=a",), "generate": ("prompt=a",)}.get(command, ())


def test_cropping_is_for_training(refused, mirror):
    said = refused("evaluate", "init=gpt2_hf", f"init.mirror={mirror}", "init.crop_context=true")
    assert "init.crop_context=true is for training" in said


def test_the_words_for_the_group_of_commands(gptpl, refused):
    assert "weights convert" in gptpl("weights").out
    assert "gptpl weights fetch: Download GPT-2 ahead of time" in gptpl("weights", "fetch", "--help").out
    assert "gptpl has no command 'weights sell'" in refused("weights", "sell")
    assert "gptpl weights fetch has no setting sizes: did you mean size?" in refused(
        "weights", "fetch", "sizes=124M"
    )
    assert "has no settings" in refused("weights", "list", "size=124M")
    assert "size=1M is unknown" in refused("weights", "fetch", "size=1M")
    assert "source=ftp is unknown" in refused("weights", "fetch", "source=ftp")
