"""The real datamodule, module and Trainer on a text of a thousand letters: runs of a fraction of a second."""

# B windows in a batch, T tokens in a window

import csv
import gc
import hashlib
import json
import multiprocessing
import os
import pickle
import random
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hydra
import hypothesis
import lightning as L
import numpy as np
import numpy.typing as npt
import psutil
import pytest
import torch
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hypothesis import HealthCheck
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.optim import Optimizer

from gptpl.callbacks.checkpoints import DurableCheckpointIO, ExactResume, return_loggers
from gptpl.checkpoints.format import read_checkpoint
from gptpl.checkpoints.resume_state import RESUME_KEY
from gptpl.cli.main import main
from gptpl.config.groups import config_folder
from gptpl.data.pretraining.datamodule import TextDataModule
from gptpl.data.sources import TextFiles
from gptpl.files.figures import figure_pixels
from gptpl.model import GPTConfig, GPTModel
from gptpl.sweeps.jobs import Command
from gptpl.tokenizers import BytesTokenizer
from gptpl.training import autotune
from gptpl.training.language_model import LanguageModelingModule
from gptpl.training.loggers import MetricsCSVLogger
from gptpl.training.optimizers import adamw
from gptpl.training.schedules import CosineSchedule

os.environ.pop("GPTPL_RUNS", None)  # of whoever runs the tests
# What has been imported is a million objects that stay: looking through them again and again takes time.
gc.freeze()
gc.set_threshold(50_000, 20, 20)
# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile("gptpl", deadline=None, suppress_health_check=[HealthCheck.too_slow])
hypothesis.settings.load_profile("gptpl")
torch.set_num_threads(1)  # the models are so small that threads only wait for each other, and some tests fork

SETTINGS = {"model": {"n_layers": 1}, "seed": 1, "name": None}
"""Stands for a run's resolved configuration."""


@pytest.fixture(scope="session", autouse=True)
def nothing_is_faster() -> Iterator[None]:
    """Every way to compute takes as long, so that the safe ones are chosen, and no test has to measure."""

    def equal(work: autotune.Workload, candidates: Sequence[autotune.Candidate]) -> dict[str, float]:
        return {each.name: each.positions / 1e6 for each in candidates}  # too short to try compiling

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autotune, "_measure", equal)
        yield


@pytest.fixture(scope="session", autouse=True)
def nothing_waits_for_the_disk() -> Iterator[None]:
    """A killed process leaves what it wrote to the kernel; only a power failure would show the difference."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(os, "fdatasync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def one_text_is_parsed_once() -> Iterator[None]:
    """Hydra reads two dozen files for every config that it composes; parsing them is a third of its time."""
    parsed: dict[str, bytes] = {}
    load = OmegaConf.load

    def loaded(file: Any) -> Any:
        opened = not isinstance(file, str | Path)
        start = file.tell() if opened else 0
        text = file.read() if opened else Path(file).read_text(encoding="utf-8")
        if text not in parsed:
            if opened:
                file.seek(start)
            parsed[text] = pickle.dumps(load(file))  # what is wrong with a file says its name
        return pickle.loads(parsed[text])  # noqa: S301 a fifth of the time of a deep copy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OmegaConf, "load", loaded)
        yield


@pytest.fixture(scope="session", autouse=True)
def the_same_choices_are_composed_once() -> Iterator[Callable[..., DictConfig]]:
    """Hydra takes a sixth of a second for gptpl's own configs of `train`; their settings are set in a copy.

    Returns what composes without that.
    """

    @lru_cache(maxsize=256)
    def once(name: str, choices: Sequence[str], hydra_too: bool) -> bytes:
        return pickle.dumps(compose(name, list(choices), return_hydra_config=hydra_too))

    def composed(
        config_name: str, overrides: Sequence[str] = (), *, return_hydra_config: bool = False
    ) -> DictConfig:
        sources = GlobalHydra.instance().config_loader().get_sources()
        main = next(source.path for source in sources if source.provider == "main")
        if main != own or any("searchpath" in text for text in overrides):  # files that a test may change
            return compose(config_name, list(overrides), return_hydra_config=return_hydra_config)
        given = OverridesParser.create().parse_overrides(list(overrides))
        settings = [each for each in given if is_setting(each)]
        choices = tuple(str(each.input_line) for each in given if not is_setting(each))
        found = pickle.loads(once(config_name, choices, return_hydra_config))  # noqa: S301
        assert isinstance(found, DictConfig)
        ConfigLoaderImpl._apply_overrides_to_config(settings, found)  # what Hydra 1.3 does last
        if return_hydra_config:
            found.hydra.overrides.task = [each.input_line for each in given if not each.is_hydra_override()]
            found.hydra.runtime.cwd = str(Path.cwd())
        return found

    def is_setting(override: Override) -> bool:
        key = override.key_or_group
        is_group = (config_folder() / key).is_dir()
        return not (is_group or override.is_hydra_override() or override.is_sweep_override())

    own = str(config_folder())
    compose = hydra.compose
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hydra, "compose", composed)
        yield compose


def _eight_pixels(figure: Figure) -> npt.NDArray[np.uint8]:
    lines = [np.asarray(line.get_xydata()).tobytes() for axes in figure.axes for line in axes.lines]
    return np.frombuffer(hashlib.sha256(b"".join(lines)).digest()[:24], dtype=np.uint8).reshape(2, 4, 3)


@pytest.fixture(scope="session", autouse=True)
def tiny_pictures() -> Iterator[None]:
    """Callbacks draw eight pixels, others for other curves; a curve is half the time of a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptpl.callbacks.after_step.figure_pixels", _eight_pixels)
        yield


@pytest.fixture
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`small_pictures("gptpl.runs.plan")`: that module draws eight pixels too."""
    return lambda module: monkeypatch.setattr(f"{module}.figure_pixels", _eight_pixels)


@pytest.fixture
def with_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of pictures: callbacks draw as they do for users."""
    monkeypatch.setattr("gptpl.callbacks.after_step.figure_pixels", figure_pixels)


class Pretraining:
    """Makes runs that all start from the same weights and see the same batches: 15 of (4, 16) in an epoch."""

    lr = 1e-2
    weight_decay = 0.1
    schedule = CosineSchedule(warmup_steps=3, min_lr=1e-4)

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "run"
        self.cache = folder / "cache"
        self.text = folder / "text.txt"
        draw = random.Random(0)
        self.text.write_text("".join(draw.choice("abcdefgh ") for _ in range(1100)))

    def data(self, **changes: Any) -> TextDataModule:
        settings: dict[str, Any] = {
            "corpus": TextFiles(self.text),
            "tokenizer": BytesTokenizer(),
            "max_length": 16,
            "stride": 16,
            "batch_size": 4,
            "eval_train_batches": 2,
            "eval_val_batches": None,
            "cache_dir": self.cache,
        }
        return TextDataModule(**(settings | changes))

    def net(self, **changes: Any) -> GPTModel:
        """Draws the weights from seed 1, and leaves the global generator where that left it."""
        settings: dict[str, Any] = {
            "vocab_size": 257,
            "context_length": 16,
            "emb_dim": 16,
            "n_heads": 2,
            "n_layers": 2,
            "drop_rate": 0.0,
            # A key's bias has no gradient but rounding noise, which Adam would blow up to whole steps.
            "qkv_bias": False,
        }
        torch.manual_seed(1)
        return GPTModel(GPTConfig(**(settings | changes)))

    def optimizer(self, net: nn.Module) -> Optimizer:
        return adamw(
            net, lr=self.lr, weight_decay=self.weight_decay, betas=(0.9, 0.999), eps=1e-8, decay="matrices"
        )

    def module(
        self,
        net: GPTModel | None = None,
        *,
        total_steps: int = 20,
        make_optimizer: Callable[[nn.Module], Optimizer] | None = None,
        **changes: Any,
    ) -> LanguageModelingModule:
        settings: dict[str, Any] = {"run_config": SETTINGS, "eval_every_n_steps": 3}
        return LanguageModelingModule(
            self.net() if net is None else net,
            tokenizer=BytesTokenizer(),
            make_optimizer=make_optimizer or self.optimizer,
            lr_factor=partial(self.schedule.factor, total_steps=total_steps, peak_lr=self.lr),
            total_steps=total_steps,
            **(settings | changes),
        )

    def trainer(self, *callbacks: L.Callback, **options: Any) -> L.Trainer:
        """A Trainer as `gptpl train` makes it."""
        defaults: dict[str, Any] = {
            "accelerator": "cpu",
            "callbacks": [ExactResume(), *callbacks],
            "check_val_every_n_epoch": None,
            "default_root_dir": self.folder,
            "devices": 1,
            "enable_checkpointing": any(isinstance(c, L.pytorch.callbacks.Checkpoint) for c in callbacks),
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "gradient_clip_val": 1.0,
            "log_every_n_steps": 1,
            "logger": [MetricsCSVLogger(save_dir=str(self.folder))],
            "max_epochs": -1,
            "max_steps": -1,
            "num_sanity_val_steps": -1,
            "plugins": [DurableCheckpointIO()],
            "use_distributed_sampler": False,
        }
        return L.Trainer(**(defaults | options))

    def fit(
        self,
        *callbacks: L.Callback,
        module: LanguageModelingModule | None = None,
        data: TextDataModule | None = None,
        resume: Path | None = None,
        **options: Any,
    ) -> L.Trainer:
        """Trains for the module's `total_steps`, which is 20 where no module is given."""
        module = self.module() if module is None else module
        trainer = self.trainer(*callbacks, **options)
        if resume is not None:
            return_loggers(trainer, read_checkpoint(resume)[RESUME_KEY])
        trainer.fit(module, datamodule=data or self.data(), ckpt_path=resume, weights_only=True)
        return trainer

    def column(self, name: str) -> dict[int, float]:
        """One metric of `metrics.csv` by step, where it was logged."""
        with (self.folder / "metrics.csv").open(newline="") as file:
            return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row[name]}


@pytest.fixture
def own_process_group() -> Iterator[None]:
    """Lightning leaves a group of processes and its variables behind: not for the tests that come after."""
    before = dict(os.environ)
    yield
    torch.distributed.destroy_process_group()
    for name in set(os.environ) - set(before):
        del os.environ[name]


@pytest.fixture
def pretraining(tmp_path: Path) -> Pretraining:
    return Pretraining(tmp_path)


HUGGING_FACE_LAYERS = {
    "norm1": ("ln_1", False),
    "attn.qkv": ("attn.c_attn", True),
    "attn.out_proj": ("attn.c_proj", True),
    "norm2": ("ln_2", False),
    "ff.up_proj": ("mlp.c_fc", True),
    "ff.down_proj": ("mlp.c_proj", True),
}
"""Ours: (theirs, whether that is a `Conv1D`, whose weight is (in, out); our linear layers' are (out, in))."""


def _from_hugging_face(theirs: Mapping[str, Tensor], *, layers: int, qkv_bias: bool) -> dict[str, Tensor]:
    """Tensors of their GPT-2 under our names and in our layout."""
    ours = {
        "tok_emb.weight": theirs["transformer.wte.weight"],
        "pos_emb.weight": theirs["transformer.wpe.weight"],
        "final_norm.weight": theirs["transformer.ln_f.weight"],
        "final_norm.bias": theirs["transformer.ln_f.bias"],
        # a tied head has no entry of its own among their parameters
        "out_head.weight": theirs.get("lm_head.weight", theirs["transformer.wte.weight"]),
    }
    for i in range(layers):
        for our_name, (their_name, is_conv1d) in HUGGING_FACE_LAYERS.items():
            weight = theirs[f"transformer.h.{i}.{their_name}.weight"]
            ours[f"blocks.{i}.{our_name}.weight"] = weight.T if is_conv1d else weight
            ours[f"blocks.{i}.{our_name}.bias"] = theirs[f"transformer.h.{i}.{their_name}.bias"]
        if not qkv_bias:
            del ours[f"blocks.{i}.attn.qkv.bias"]
    return ours


@pytest.fixture(scope="session")
def to_ours() -> Callable[..., dict[str, Tensor]]:
    """`to_ours(tensors, layers=, qkv_bias=)`: tensors of Hugging Face's GPT-2 under our names and layout."""
    return _from_hugging_face


@pytest.fixture(scope="session")
def fake_program() -> tuple[str, ...]:
    """A substitute for `gptpl train` that takes a tenth of a second: see fake_train.py."""
    # Without site-packages: it needs nothing of them, and looking them up is a third of Python's start.
    return sys.executable, "-E", "-S", str(Path(__file__).with_name("fake_train.py"))


@pytest.fixture
def fake_train(fake_program: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Has sweeps start that program for their trials."""
    monkeypatch.setattr("gptpl.sweeps.worker.PROGRAM", fake_program)


class ForkedJob:
    """A trial of a sweep in a copy of this process: a new one imports torch and Lightning for seconds."""

    def __init__(self, command: Command, environment: Mapping[str, str]) -> None:
        self._child = multiprocessing.get_context("fork").Process(target=_trial, args=(command, environment))
        self._child.start()
        self.process = (
            f"{socket.gethostname()} {self._child.pid} {psutil.Process(self._child.pid).create_time()}"
        )

    def poll(self) -> int | None:
        return self._child.exitcode

    def stop(self, *, at_once: bool = False) -> None:
        self._child.kill() if at_once else self._child.terminate()


def _trial(command: Command, environment: Mapping[str, str]) -> None:
    os.environ.clear()
    python, *words = command.arguments
    assert (python, *words[:3]) == (sys.executable, "-m", "gptpl", "train")
    _move(Path(command.cwd), Path(command.output), environment)
    sys.exit(main(words[2:]))


def _move(cwd: Path, output: Path, environment: Mapping[str, object]) -> None:
    """Give this process, which is a copy, a folder, an output and variables of its own."""
    sys.stdout.flush()
    file = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout, sys.stderr = (open(stream, "w", closefd=False) for stream in (1, 2))  # noqa: SIM115
    os.chdir(cwd)
    # Lightning would take a thread for each core.
    os.environ.update({"OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in environment.items()})


class Copy:
    """A copy of this process that runs `gptpl`: a new one imports torch and Lightning for seconds.

    In a folder, with more variables of the environment. `before` is called first.
    """

    def __init__(
        self,
        *arguments: str,
        cwd: Path,
        output: Path,
        before: Callable[[], object] = list,
        **variables: object,
    ) -> None:
        self.output = output
        output.touch()
        work = partial(_run, arguments, before, cwd, output, variables)
        self._child = multiprocessing.get_context("fork").Process(target=work)
        self._child.start()

    @property
    def pid(self) -> int:
        assert self._child.pid is not None
        return self._child.pid

    @property
    def said(self) -> str:
        return self.output.read_text()

    @property
    def status(self) -> int | None:
        return self._child.exitcode

    def wait(self, seconds: float) -> int | None:
        """Return the exit status, or None if it has not ended by then."""
        self._child.join(seconds)
        return self._child.exitcode

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def end(self) -> None:
        self._child.kill()
        self._child.join()


def _run(
    arguments: Sequence[str],
    before: Callable[[], object],
    cwd: Path,
    output: Path,
    variables: Mapping[str, object],
) -> None:
    _move(cwd, output, variables)
    # What Lightning starts for further processes, which run these words of the command line.
    sys.modules["__main__"].__spec__ = find_spec("gptpl.__main__")
    sys.argv = ["gptpl", *arguments]
    before()
    sys.exit(main())


@pytest.fixture(scope="session")
def copy() -> type[Copy]:
    """For fixtures of modules, which end it themselves."""
    return Copy


@pytest.fixture
def copies() -> Iterator[Callable[..., Copy]]:
    """`copies(*arguments, cwd=, output=, before=..., NAME=value)`: see `Copy`; they end with the test."""
    every: list[Copy] = []

    def start(*arguments: str, **settings: Any) -> Copy:
        every.append(Copy(*arguments, **settings))
        return every[-1]

    yield start
    for copy in every:
        copy.end()


@pytest.fixture(scope="session")
def forked_trials() -> Callable[[], AbstractContextManager[None]]:
    """A context in which sweeps train in copies of this process."""

    @contextmanager
    def patched() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("gptpl.sweeps.jobs.ProcessJob", ForkedJob)
            yield

    return patched


class JudgeServer(ThreadingHTTPServer):
    """Speaks as Ollama and OpenAI do. `script` holds what to do with the next requests; then it replies."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), JudgeHandler)
        self.script: list[Callable[[JudgeHandler], None]] = []
        self.reply: Callable[[str], str] = lambda prompt: "Score: 85"  # of the last message
        self.bodies: list[Any] = []
        self.headers: list[Mapping[str, str]] = []
        self.most_at_once = self.at_once = 0
        self.released = threading.Event()  # set at the end of a test: ends every wait

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay silent when a client hangs up."""


class JudgeHandler(BaseHTTPRequestHandler):
    """What a server does with one question, well or badly."""

    server: JudgeServer

    def do_POST(self) -> None:
        server = self.server
        server.at_once += 1
        server.most_at_once = max(server.most_at_once, server.at_once)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.bodies.append(body)
        server.headers.append(dict(self.headers))
        act = server.script.pop(0) if server.script else JudgeHandler.answer
        act(self)
        server.at_once -= 1

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self) -> None:
        self.say(self.server.reply(self.server.bodies[-1]["messages"][-1]["content"]))

    def say(self, text: str) -> None:
        message = {"role": "assistant", "content": text}
        shapes: dict[str, dict[str, Any]] = {
            "/api/chat": {"message": message},
            "/v1/chat/completions": {"choices": [{"message": message}]},
        }
        self.send(200, json.dumps(shapes[self.path] | {"model": "m", "done": True}))

    def send(self, status: int, text: str = "", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def fall_silent(self) -> None:
        self.server.released.wait(20)

    def cut(self) -> None:
        self.close_connection = True

    def cut_midway(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b'{"message": {"content": "Score: 1')
        self.close_connection = True


@pytest.fixture
def judge_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeServer]:
    # What the environment says of proxies must not matter for a server on this machine.
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with JudgeServer() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.released.set()
        running.shutdown()
        thread.join()


LONGEST = (
    *("test_launchers.py", "test_exact_resume.py", "test_submission.py", "test_fsdp.py"),
    *("test_verify_resume.py", "test_sharded_checkpoints.py", "test_autotune.py", "test_ddp_resume.py"),
)
"""Files that take half a minute or more."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that no process is left with one of them at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)
