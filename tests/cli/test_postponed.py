"""What a command imports late: the same objects, and the same training, as imported at once."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

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


SETTINGS = ["experiment=quick", "trainer=cpu", "trainer.max_steps=4", "eval_every_n_steps=2"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What one process sees after importing Lightning, after training in `folder`, and with the compiler.

    And `alone`: what a copy of it sees that has imported only torch before.
    """
    folder = tmp_path_factory.mktemp("late")
    seen = run(
        f"""
        import os
        import torch
        reader, writer = os.pipe()
        if os.fork() == 0:
            from torch._dynamo.utils import counters
            import torch._dynamo
            import torch._dynamo.config as config
            utils = sys.modules["torch._dynamo.utils"]
            own = utils.__spec__.loader is utils.__loader__
            submodule = [torch._dynamo.utils.counters is counters, config is torch._dynamo.config, own]

            import torchmetrics
            from torchmetrics import Metric, MetricCollection
            early = "torchmetrics.functional" in sys.modules
            accuracy = torchmetrics.Accuracy(task="binary")
            value = accuracy(torch.tensor([1, 0]), torch.tensor([1, 1])).item()
            from torchmetrics.utilities.plot import _AX_TYPE, plot_curve
            import matplotlib.axes
            same = [Metric is torchmetrics.metric.Metric, MetricCollection is torchmetrics.MetricCollection]
            metrics = [early, isinstance(accuracy, Metric), value, _AX_TYPE is matplotlib.axes.Axes, *same]
            os.write(writer, json.dumps([submodule, metrics]).encode())
            os._exit(0)
        os.close(writer)

        import lightning
        loaded = lambda: [name for name in {POSTPONED} if name in sys.modules]
        found = {{"imported": loaded()}}
        found["trained"] = [main(["train", *{SETTINGS}, "run_dir=late"]), loaded()]
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
        kinds = [isinstance(each, OptimizedModule) for each in (net, compiled)]
        found["compiled"] = [before, *kinds, same]
        found["alone"] = json.loads(os.fdopen(reader).read())
        """,
        folder,
    )
    return seen | {"folder": folder}


def test_lightning_is_imported_without_them(found):
    assert found["imported"] == []


def test_an_optimizer_and_the_compiler_work_after_one_another(found):
    assert found["compiled"] == [False, False, True, True]


def test_a_submodule_is_imported_once_after_its_package_and_the_metrics_when_asked_for(found):
    assert found["alone"] == [[True, True, True], [False, True, 0.5, True, True, True]]


def test_a_run_has_the_same_losses_either_way(found, tmp_path, monkeypatch):
    """In this process the tests have imported everything at once."""
    monkeypatch.chdir(tmp_path)
    assert found["trained"] == [0, []]
    assert main(["train", *SETTINGS, "run_dir=once"]) == 0
    runs = [found["folder"] / "late", tmp_path / "once"]
    first, second = ((each / "evaluations.jsonl").read_text() for each in runs)
    assert first == second
    assert len(first.splitlines()) == 3
