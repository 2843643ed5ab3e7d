"""`import gptpl`: runs are composed, built, changed, trained, stopped and resumed from Python."""

import logging
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

import gptpl
from gptpl import InputError
from gptpl.checkpoints.format import read_checkpoint

SMALL = (
    *("experiment=quick", "model.n_layers=1", "trainer.max_steps=4", "scheduler.warmup_steps=1"),
    *("callbacks=[checkpoint_last]", "logger=csv", "eval_every_n_steps=2"),
)


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPTPL_CACHE", str(tmp_path / "cache"))


def weights(run_dir: Path) -> dict[str, Any]:
    state: dict[str, Any] = read_checkpoint(run_dir / "checkpoints/last.ckpt")["state_dict"]
    return state


def test_importing_is_instant_and_loads_no_library():
    program = "import gptpl, sys; dir(gptpl); print({'torch', 'hydra', 'lightning'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_every_name_of_the_package_is_there():
    for name in gptpl.__all__:
        found = getattr(gptpl, name)
        assert callable(found) or found is sys.modules["gptpl.filters"]
    with pytest.raises(AttributeError, match="no attribute 'buidl'"):
        _ = gptpl.buidl


def test_a_config_is_composed_and_may_be_changed_before_it_is_built():
    cfg = gptpl.compose(*SMALL, "optimizer.lr=1e-3")
    assert cfg.optimizer.lr == 1e-3
    cfg.model.n_layers = 2
    run = gptpl.build(cfg)
    assert (run.config["optimizer"]["lr"], run.config["model"]["n_layers"]) == (1e-3, 2)
    assert len(list(run.module.net.get_submodule("blocks").children())) == 2
    assert isinstance(run.trainer, L.Trainer)
    assert isinstance(run.datamodule, L.LightningDataModule)
    run.close()
    assert not Path("runs").exists()  # nothing was trained, nothing is left


def test_overrides_in_a_list_are_refused():
    with pytest.raises(InputError, match="overrides one by one, got list: give build"):
        gptpl.build(list(SMALL))  # type: ignore[arg-type]


def test_several_runs_in_one_process_leave_nothing_behind():
    root = logging.getLogger()
    before = (list(root.handlers), root.level, list(sys.argv))
    first, second = gptpl.build(*SMALL, "seed=1"), gptpl.build(*SMALL, "seed=1")
    assert first.run_dir != second.run_dir
    losses = [run.fit()["val/loss"] for run in (second, first)]
    assert losses[0] == losses[1]
    assert (list(root.handlers), root.level, list(sys.argv)) == before
    assert not GlobalHydra.instance().is_initialized()
    assert not HydraConfig.initialized()


def test_what_was_built_is_what_trains():
    """Parts are Lightning's own objects: a callback is added and the optimizer replaced."""
    seen = []

    class Counts(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *others: Any) -> None:
            seen.append(trainer.global_step)

    run = gptpl.build(*SMALL)
    run.trainer.callbacks.append(Counts())  # type: ignore[attr-defined]
    run.module.make_optimizer = lambda net: torch.optim.SGD(net.parameters(), lr=0.0)
    start = {name: tensor.clone() for name, tensor in run.module.state_dict().items()}
    run.fit()
    assert seen == [1, 2, 3, 4]
    assert all(torch.equal(tensor, start[name]) for name, tensor in weights(run.run_dir).items())


def test_a_folder_is_one_runs_until_it_is_closed():
    run = gptpl.build(*SMALL, "run_dir=mine")
    with pytest.raises(InputError, match="mine"):
        gptpl.build(*SMALL, "run_dir=mine")
    run.close()
    gptpl.build(*SMALL, "run_dir=mine").close()


def test_a_run_is_stopped_from_a_thread_and_resumed_to_the_same_bits():
    straight = gptpl.build(*SMALL, "trainer.max_steps=6")
    straight.fit()
    run = gptpl.build(*SMALL, "trainer.max_steps=6")

    class AsksAtTheThirdStep(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *others: Any) -> None:
            if trainer.global_step == 3:
                thread = threading.Thread(target=run.stop)
                thread.start()
                thread.join()

    run.trainer.callbacks.insert(0, AsksAtTheThirdStep())  # type: ignore[attr-defined]
    run.fit()
    assert gptpl.load(run.run_dir).step == 3
    gptpl.resume(run.run_dir).fit()
    expected, found = weights(straight.run_dir), weights(run.run_dir)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_key_nobody_knows_is_answered_with_the_nearest():
    with pytest.raises(InputError, match=r"did you mean optimizer\.lr\?"):
        gptpl.build(*SMALL, "lr=1e-3")
    with pytest.raises(InputError, match="limit_train_batches"):
        gptpl.build(*SMALL, "trainer.limit_train_batch=2")
