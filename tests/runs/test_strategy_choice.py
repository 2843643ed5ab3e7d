"""`trainer.strategy=auto`: FSDP where a whole model has no room on a device; memory is what a test says."""

import logging

import pytest

from gptpl.config.compose import compose
from gptpl.runs import build
from gptpl.runs.build import Settled, settle
from gptpl.training.costs import whole_memory
from gptpl.training.sharding import FullyShardedStrategy

DEEP = ("experiment=quick", "model.n_layers=40", "data.batch_size=1", "trainer=cpu", "trainer.devices=2")


@pytest.fixture
def settled(monkeypatch, tmp_path, caplog):
    """`settled(bytes, *overrides)`: a run on devices with such a memory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPTPL_CACHE", str(tmp_path / "cache"))
    caplog.set_level(logging.INFO)

    def make(memory: int | None, *overrides: str) -> Settled:
        monkeypatch.setattr(build, "whole_memory", lambda device_type: memory)
        return settle(compose(*DEEP, *overrides))

    return make


def is_sharded(of: Settled) -> bool:
    return isinstance(of.trainer.strategy, FullyShardedStrategy)


def states(of: Settled) -> int:
    """Of AdamW in fp32: each number with its gradient and two averages; its step counts are left out."""
    c = of.config
    block = 12 * c.emb_dim**2 + (3 * c.emb_dim if c.qkv_bias else 0) + 6 * c.emb_dim + 4 * c.emb_dim
    matrices = (1 if c.tie_weights else 2) * c.vocab_size * c.emb_dim
    return 16 * (c.n_layers * block + matrices + c.context_length * c.emb_dim + 2 * c.emb_dim)


def test_a_model_that_has_room_only_in_parts_is_sharded(settled, caplog):
    whole = states(settled(None))
    assert not is_sharded(settled(whole * 101 // 100))
    assert "strategy:" not in caplog.text
    found = settled(memory := whole * 99 // 100)
    assert is_sharded(found)
    assert found.cfg.trainer.strategy == "fsdp"  # as the record will say, for whoever resumes
    [line] = [each for each in caplog.messages if each.startswith("strategy:")]
    assert line.startswith("strategy: fsdp, as weights, gradients and optimizer state (")
    device = f"the memory of a device ({memory / 1e6:.1f} MB)"
    assert f"({whole / 1e6:.1f} MB) do not fit into {device}; divided among 2" in line


def test_a_model_that_has_no_room_in_parts_either_stays_as_it_was(settled, caplog):
    assert not is_sharded(settled(states(settled(None)) // 4))
    assert "strategy:" not in caplog.text


@pytest.mark.parametrize(
    "other",
    [
        ["trainer.strategy=ddp"],
        ["trainer.devices=1"],
        ["tune=head"],  # which FSDP does not train with the fused head
    ],
)
def test_what_is_asked_for_or_fits_is_not_changed(settled, other):
    assert not is_sharded(settled(states(settled(None)) - 1000, *other))


def test_ranks_of_a_launcher_take_the_smallest_memory(settled, monkeypatch):
    class Together:
        def gathered(self, value: int | None) -> list[int | None]:
            return [value, other]

    whole = states(settled(None))
    monkeypatch.setattr(build, "processes", Together)
    other: int | None = whole - 1000
    assert is_sharded(settled(whole * 2))
    other = None  # a process without a GPU
    assert not is_sharded(settled(whole - 1000))


def test_processes_that_a_notebook_forks_are_not_sharded(settled, monkeypatch):
    monkeypatch.setattr("sys.ps1", ">>> ", raising=False)
    assert not is_sharded(settled(states(settled(None)) - 1000))


def test_a_processor_has_no_memory_of_its_own():
    assert whole_memory("cpu") is None
