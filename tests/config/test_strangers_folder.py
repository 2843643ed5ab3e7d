"""A run folder or checkpoint of a stranger: nothing of it is imported, called, opened or written outside."""

import contextlib
import io
import json
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import gptpl
from gptpl.checkpoints.format import HEADER_KEY
from gptpl.cli.main import main
from gptpl.config.instantiate import check_paths_inside
from gptpl.errors import InputError
from gptpl.runs.loaded import load_language_model

Edit = Callable[[dict[str, Any]], None]
OUT = "OUT"
"""Stands for a folder outside of the run's."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps that is as good as any."""
    folder = tmp_path_factory.mktemp("run") / "run"
    made = gptpl.build(
        *("experiment=quick", "trainer=cpu", "trainer.max_steps=3", "scheduler.warmup_steps=1"),
        *("callbacks.checkpoint_last.every_n_steps=1", f"run_dir={folder}"),
    )
    made.fit()
    return folder


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, list[str]]]:
    """The address of a server, and what it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(404)
            self.end_headers()

        do_POST = do_HEAD = do_GET  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}", asked
        running.shutdown()
        thread.join()


class Folder:
    """A stranger's copy of the run beside things of value, and what came of using it."""

    def __init__(self, run: Path, here: Path, asked: list[str]) -> None:
        self.path, self.here, self.asked, self.original = here / "theirs", here, asked, run
        (here / "outside").mkdir()
        for name in ("precious.txt", "outside/precious"):
            (here / name).write_text("precious")
        shutil.copytree(run, self.path, symlinks=True)

    def edit(self, edit: Edit) -> None:
        """Changes the settings, in config.yaml and in every checkpoint."""
        path = self.path / "config.yaml"
        path.write_text(yaml.safe_dump(self._edited(yaml.safe_load(path.read_text()), edit)))
        for file in (self.path / "checkpoints").glob("step-*.ckpt"):
            checkpoint = torch.load(file, weights_only=True)
            checkpoint[HEADER_KEY]["config"] = self._edited(checkpoint[HEADER_KEY]["config"], edit)
            torch.save(checkpoint, file)
            file.with_name(f"{file.name}.sha256").unlink(missing_ok=True)

    def _edited(self, settings: dict[str, Any], edit: Edit) -> dict[str, Any]:
        moved = json.loads(json.dumps(settings).replace(str(self.original), str(self.path)))
        edit(moved)
        return json.loads(json.dumps(moved).replace(OUT, str(self.here / "outside")))

    def refused(self, *command: str) -> str:
        """The one line of a command that must refuse it and leave everything as it was."""
        before = self._files()
        error = io.StringIO()
        with contextlib.chdir(self.here), contextlib.redirect_stderr(error):
            status = main(list(command))
        *_, last = error.getvalue().splitlines()
        assert status == 2, error.getvalue()
        assert "Traceback" not in error.getvalue()
        assert self._files() == before
        assert not self.asked
        assert (self.here / "precious.txt").read_text() == "precious"
        return last

    def resumed(self) -> str:
        return self.refused("train", "resume=theirs", "trainer.max_steps=5")

    def _files(self) -> dict[str, int]:
        paths = [path for path in self.here.rglob("*") if not path.is_dir()]
        return {str(path): path.stat().st_mtime_ns for path in paths}


@pytest.fixture
def theirs(
    run: Path, tmp_path: Path, server: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Folder]:
    monkeypatch.setenv("GPTPL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "evil_package.py").write_text("import pathlib; pathlib.Path('imported').touch()")
    monkeypatch.syspath_prepend(str(tmp_path))
    server[1].clear()
    yield Folder(run, tmp_path, server[1])
    assert "evil_package" not in sys.modules


def at(path: str, value: Any) -> Edit:
    """Puts a value in its place."""

    def edit(settings: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for name in parents:
            settings = settings[name]
        settings[last] = value

    return edit


def evil(target: Any, **settings: Any) -> Edit:
    return at("callbacks.evil", {"_target_": target, **settings})


COPY = {"_args_": ["precious.txt", "outside/copy"]}
SYSTEM = {"_target_": "os.system", "_args_": ["touch outside/touched"]}

LAMBDA = "lightning.pytorch.callbacks.LambdaCallback"
PROFILER = "lightning.pytorch.profilers.AdvancedProfiler"
PLUGIN = "lightning.pytorch.plugins.io.TorchCheckpointIO"
MNIST = "lightning.pytorch.demos.mnist_datamodule.MNISTDataModule"
BORING = "lightning.pytorch.demos.boring_classes.BoringModel"


@pytest.mark.parametrize(
    "target",
    [
        *("shutil.copyfile", "pathlib.Path.touch", "urllib.request.urlopen", "numpy.load"),
        *("evil_package.Callback", "hydra.utils.instantiate", "", ["os.system"], "\x1b[2Jevil.X"),
    ],
)
def test_a_class_of_another_package_is_refused_by_name(target, theirs):
    theirs.edit(evil(target, **COPY))
    said = theirs.resumed()
    assert "callbacks.evil._target_=" in said
    assert "trust=[" in said
    assert said.isprintable()


@pytest.mark.parametrize(
    "target",
    [
        *("torch.load", "torch.serialization.os.system", "torch.nn.Linear", "lightning.Trainer"),
        *("gptpl.files.download.download", "lightning.LightningModule.load_from_checkpoint"),
    ],
)
def test_of_our_own_packages_only_what_its_place_expects(target, theirs):
    theirs.edit(evil(target, **COPY))
    assert "which is not a Callback: it is not used" in theirs.resumed()


BENCHMARKS = "gptpl.callbacks.benchmarks.Benchmarks"
HARNESS = {"_target_": "gptpl.evaluation.harness.Harness", "tasks": ["evil"], "include_path": "."}
FETCHED = {"_target_": "gptpl.tokenizers.TiktokenTokenizer", "encoding": "o200k_base"}


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (evil(LAMBDA, on_train_start=SYSTEM | {"_partial_": True}), "on_train_start._target_=os.system"),
        (at("callbacks.sample_text.prompts", [SYSTEM]), "callbacks.sample_text.prompts.0._target_=os.system"),
        (at("data.corpus.evil", SYSTEM), "data.corpus.evil._target_=os.system"),
        (at("optimizer.betas", [SYSTEM, 0.9]), "optimizer.betas.0._target_=os.system"),
        (at("model._target_", "evil_package.Model"), "model._target_=evil_package.Model"),
        (at("trainer.profiler", {"_target_": PROFILER, "dirpath": OUT}), "trainer.profiler._target_"),
        (at("trainer.plugins", [{"_target_": PLUGIN}]), "trainer.plugins.0._target_"),
        (at("callbacks.evil", '${oc.create:"{_target_: os.system}"}'), "os.system"),
        (at("callbacks.evil", "${data.corpus}"), "gptpl.data.sources.Tale, which is not a Callback"),
        (at("data._target_", MNIST), "which is not a TrainingData"),
        (at("task._target_", BORING), "which is not a TrainingModule"),
        (at("tokenizer.x", FETCHED), "tokenizer.x._target_=gptpl.tokenizers.TiktokenTokenizer"),
        (at("data.corpus.x", FETCHED), "data.corpus.x._target_=gptpl.tokenizers.TiktokenTokenizer"),
        (at("callbacks.asked", {"_target_": BENCHMARKS, "path": "a.jsonl", "suite": HARNESS}),
         "Harness, which runs code that its settings name: it is not used"),
    ],
)  # fmt: skip
def test_classes_in_settings_and_in_lists(edit, named, theirs):
    theirs.edit(edit)
    assert named in theirs.resumed()


def test_what_it_says_of_trust_itself_counts_for_nothing(theirs):
    theirs.edit(at("trust", ["evil_package", "shutil"]))
    theirs.edit(evil("shutil.copyfile", **COPY))
    assert "trust=[shutil]" in theirs.resumed()


CHECKPOINT = "lightning.pytorch.callbacks.ModelCheckpoint"
CSV = "lightning.pytorch.loggers.CSVLogger"


@pytest.mark.parametrize(
    ("edit", "key"),
    [
        (evil(CHECKPOINT, dirpath=OUT), "callbacks.evil.dirpath"),
        (evil(CHECKPOINT, dirpath="outside"), "callbacks.evil.dirpath"),
        (evil(CHECKPOINT, dirpath="~/outside"), "callbacks.evil.dirpath"),
        (evil(CHECKPOINT, dirpath="~nobody-at-all/x"), "callbacks.evil.dirpath"),
        (evil(CHECKPOINT, dirpath="a\0b"), "callbacks.evil.dirpath"),
        (evil(CHECKPOINT, _args_=["outside"]), "callbacks.evil._args_"),
        (evil(CHECKPOINT, filename="../../outside/x"), "callbacks.evil.filename"),
        (at("callbacks.loss_curve.path", "precious.txt"), "callbacks.loss_curve.path"),
        (at("callbacks.sample_text.path", "OUT/../precious.txt"), "callbacks.sample_text.path"),
        (at("logger.csv.save_dir", "outside"), "logger.csv.save_dir"),
        (at("logger.evil", {"_target_": CSV, "save_dir": "."}), "logger.evil.save_dir"),
        (at("logger.evil", {"_target_": CSV, "save_dir": None, "name": "../outside"}), "logger.evil.name"),
        (at("trainer.default_root_dir", OUT), "trainer.default_root_dir"),
        (at("data.cache_dir", OUT), "data.cache_dir"),
    ],
)
def test_a_path_stays_inside(edit, key, theirs):
    theirs.edit(edit)
    said = theirs.resumed()
    assert f"has {key}" in said
    assert "outside the run's folder" in said or "settings without names" in said


def test_whoever_resumes_may_write_wherever_they_like(theirs):
    theirs.edit(at("callbacks.loss_curve.path", "elsewhere.png"))
    with contextlib.chdir(theirs.here):
        run = gptpl.resume("theirs", "callbacks.loss_curve.path=mine.png", "trainer.max_steps=4")
        run.fit()
    assert (theirs.here / "mine.png").is_file()
    assert not (theirs.here / "elsewhere.png").exists()


MLFLOW = "gptpl.training.tracking.RunMLFlowLogger"
WANDB = "gptpl.training.tracking.RunWandbLogger"


@pytest.mark.parametrize(
    ("key", "node", "named"),
    [
        ("logger.evil", {"_target_": MLFLOW, "tracking_uri": "URL"}, "logger.evil.tracking_uri"),
        ("logger.evil", {"_target_": MLFLOW, "tracking_uri": "sqlite:///OUT/db"}, "logger.evil.tracking_uri"),
        (
            "logger.evil",
            {"_target_": WANDB, "settings": {"base_url": "URL"}},
            "logger.evil.settings.base_url",
        ),
        (
            "data.corpus",
            {"_target_": "gptpl.data.sources.Downloaded", "url": "URL/a", "name": "a", "sha256": "0" * 64},
            "data.corpus.url",
        ),
        (
            "data.corpus",
            {"_target_": "gptpl.data.sources.HuggingFaceDataset", "path": "hf://datasets/OWNER/NAME"},
            "data.corpus.path",
        ),
    ],
)
def test_an_address_is_not_opened(key, node, named, theirs, server):
    theirs.edit(at(key, json.loads(json.dumps(node).replace("URL", server[0]))))
    assert f"has {named}=" in theirs.resumed()
    if key.startswith("data"):
        assert f"has {named}=" in theirs.refused("evaluate", "checkpoint=theirs")


def test_an_address_that_was_given_is_good_wherever_it_stands(theirs):
    address, settings = "hf://datasets/owner/stories", {"data": {"path": "", "corpus": {"path": ""}}}
    at("data.path", address)(settings)
    at("data.corpus.path", address)(settings)
    check_paths_inside(settings, theirs.path, source="theirs", given=["data.path"])
    at("data.corpus.path", f"{address}2")(settings)
    with pytest.raises(InputError, match=r"theirs has data\.corpus\.path=hf://datasets/owner/stories2"):
        check_paths_inside(settings, theirs.path, source="theirs", given=["data.path"])


def test_a_filter_may_read_a_word_list_from_elsewhere(theirs):
    outside = str(theirs.here / "words.txt")
    words = {"_target_": "gptpl.filters.WordList", "path": outside}
    settings: dict[str, Any] = {"callbacks": {"sample_text": {"filter": words}}}
    check_paths_inside(settings, theirs.path, source="theirs")
    for callbacks in ({"filter": {"path": outside}}, {"sample_text": {"path": outside, "filter": words}}):
        with pytest.raises(InputError, match="outside the run's folder"):
            check_paths_inside({"callbacks": callbacks}, theirs.path, source="theirs")


@pytest.mark.parametrize("name", ["train.log", "metrics.csv", "evaluations.jsonl", "run.json"])
def test_a_link_in_the_folder_is_not_followed(name, theirs):
    there = theirs.here / "outside" / name
    shutil.move(theirs.path / name, there)
    (theirs.path / name).symlink_to(there)
    assert f"has a link out of the run's folder, {name}" in theirs.resumed()


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard"])
def test_a_linked_folder_is_not_written_to(name, theirs):
    there = theirs.here / "outside" / name
    shutil.move(theirs.path / name, there)
    (theirs.path / name).symlink_to(there)
    assert f"folder, {name}: replace it" in theirs.resumed()


@pytest.mark.parametrize("run_dir", [None, "OUT", "/"])
def test_its_folder_is_where_it_lies(run_dir, theirs):
    theirs.edit(at("run_dir", run_dir))
    with contextlib.chdir(theirs.here):
        run = gptpl.resume("theirs", "trainer.max_steps=4")
        assert run.run_dir == theirs.path
        assert run.claim is not None
        run.claim.release()
    assert [path.name for path in (theirs.here / "outside").iterdir()] == ["precious"]


# --- using the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (at("data.corpus._target_", "evil_package.Corpus"), "data.corpus._target_=evil_package.Corpus"),
        (at("data.corpus.evil", SYSTEM), "data.corpus.evil._target_=os.system"),
        (at("data.cache_dir", OUT), "data.cache_dir"),
        (
            at("data._target_", MNIST),
            "is not a TrainingData",
        ),
    ],
)
def test_evaluating_its_model_makes_nothing_of_its_data(edit, named, theirs):
    theirs.edit(edit)
    assert named in theirs.refused("evaluate", "checkpoint=theirs")
    with pytest.raises(InputError, match=named.replace(".", r"\.")):
        load_language_model(theirs.path).evaluate()


def test_generating_needs_none_of_it(theirs):
    theirs.edit(evil("shutil.copyfile", **COPY))
    theirs.edit(at("data.corpus._target_", "evil_package.Corpus"))
    assert isinstance(load_language_model(theirs.path).generate("a", max_new_tokens=2), str)
    assert not (theirs.here / "outside/copy").exists()


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "os.system", "command": "touch outside/touched"},
        {"_target_": "torch.nn.Sequential", "_args_": [SYSTEM]},
        {"_target_": "torch.nn.Identity", "evil": SYSTEM},
        {"_target_": "gptpl.data.sources.Tale"},
    ],
)
def test_the_class_of_its_model_is_checked_before_it_is_called(node, theirs):
    for file in (theirs.path / "checkpoints").glob("step-*.ckpt"):
        checkpoint = torch.load(file, weights_only=True)
        checkpoint[HEADER_KEY]["model"] = node
        torch.save(checkpoint, file)
        file.with_name(f"{file.name}.sha256").unlink(missing_ok=True)
    for command in ("generate", "evaluate"):
        assert "model" in theirs.refused(command, "checkpoint=theirs")
    with contextlib.chdir(theirs.here), pytest.raises(InputError, match=r"_target_=|_args_"):
        gptpl.load(theirs.path)
    assert [path.name for path in (theirs.here / "outside").iterdir()] == ["precious"]
