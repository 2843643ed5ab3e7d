"""What a command imports late: the same objects, and the same training, as imported at once."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from gptpl.cli.main import main

POSTPONED = ("torch._dynamo.eval_frame", "torchmetrics.functional", "transformers")


def run(program: str, folder: Path) -> Any:
    """What the program assigns to `found`, in a fresh process that imports as a command does."""
    start = "import json, sys\nfrom gptpl.cli.main import main\nmain(['--version'])\n"
    end = "\nprint(json.dumps(found))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", start + textwrap.dedent(program) + end],
        cwd=folder, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},  # as the tests
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_lightning_is_imported_without_them(tmp_path):
    found = run(f"import lightning\nfound = [name for name in {POSTPONED} if name in sys.modules]", tmp_path)
    assert found == []


def test_an_optimizer_and_the_compiler_work_after_one_another(tmp_path):
    found = run(
        """
        import torch
        from torch import nn
        from lightning.fabric.wrappers import OptimizedModule
        net = nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(net.parameters())
        net(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        before = "torch._dynamo.eval_frame" in sys.modules
        isinstance(net, OptimizedModule)
        compiled = torch.compile(net, backend="eager")
        same = torch.equal(compiled(torch.ones(1, 2)), net(torch.ones(1, 2)))
        optimizer.zero_grad()
        optimizer.step()
        found = [before, isinstance(net, OptimizedModule), isinstance(compiled, OptimizedModule), same]
        """,
        tmp_path,
    )
    assert found == [False, False, True, True]


def test_a_submodule_is_imported_once_and_after_its_package(tmp_path):
    found = run(
        """
        import torch
        from torch._dynamo.utils import counters
        import torch._dynamo
        import torch._dynamo.config as config
        utils = sys.modules["torch._dynamo.utils"]
        own = utils.__spec__.loader is utils.__loader__
        found = [torch._dynamo.utils.counters is counters, config is torch._dynamo.config, own]
        """,
        tmp_path,
    )
    assert found == [True, True, True]


def test_the_metrics_are_there_when_asked_for(tmp_path):
    found = run(
        """
        import torch, torchmetrics
        from torchmetrics import Metric, MetricCollection
        early = "torchmetrics.functional" in sys.modules
        accuracy = torchmetrics.Accuracy(task="binary")
        value = accuracy(torch.tensor([1, 0]), torch.tensor([1, 1])).item()
        from torchmetrics.utilities.plot import _AX_TYPE, plot_curve
        import matplotlib.axes
        same = [Metric is torchmetrics.metric.Metric, MetricCollection is torchmetrics.MetricCollection]
        found = [early, isinstance(accuracy, Metric), value, _AX_TYPE is matplotlib.axes.Axes, *same]
        """,
        tmp_path,
    )
    assert found == [False, True, 0.5, True, True, True]


def test_a_run_has_the_same_losses_either_way(tmp_path, monkeypatch):
    """In this process the tests have imported everything at once."""
    monkeypatch.chdir(tmp_path)
    settings = ["experiment=quick", "trainer=cpu", "trainer.max_steps=4", "eval_every_n_steps=2"]
    late = run(
        f"status = main(['train', *{settings}, 'run_dir=late'])\n"
        f"found = [status, [name for name in {POSTPONED} if name in sys.modules]]",
        tmp_path,
    )
    assert late == [0, []]
    assert main(["train", *settings, "run_dir=once"]) == 0
    runs = [tmp_path / name / "evaluations.jsonl" for name in ("late", "once")]
    first, second = (file.read_text() for file in runs)
    assert first == second
    assert len(first.splitlines()) == 3
