"""`data.batch_size=auto` and `data.global_batch_size`: the same training, by batches that fit."""

import pytest
from omegaconf import OmegaConf

from gptpl.runs import parts as batch

TRAIN = (
    *("train", "experiment=quick", "model.n_layers=1", "model.emb_dim=16", "scheduler.warmup_steps=1"),
    "model.drop_rate=0",  # what is dropped depends on the shape of a batch
    *("callbacks=checkpoint_last", "trainer.max_steps=6", "eval_val_batches=1", "run_dir=run"),
)


def losses(outcome, gptpl_run) -> list[float]:
    assert outcome.status == 0, outcome.err
    return [float(row["train/loss"]) for row in gptpl_run(outcome.folder / "run").rows if row["train/loss"]]


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory) -> list[float]:
    """Losses of the run whose batches are whole ones."""
    outcome = command(*TRAIN, "data.batch_size=8", cwd=tmp_path_factory.mktemp("whole"))
    assert outcome.status == 0, outcome.err
    return [float(row["train/loss"]) for row in outcome.run.rows if row["train/loss"]]


@pytest.mark.parametrize(("fits", "times"), [(8, 1), (2, 4)])
def test_auto_trains_as_whole_batches_do(gptpl, run_folder, whole, monkeypatch, fits, times):
    """Memory is told to be just enough for so many windows."""
    seen: dict[str, object] = {}

    def largest(config, path, *, max_length, sequences, low, free, **memory):
        seen.update(max_length=max_length, sequences=sequences, low=low)
        return fits

    monkeypatch.setattr(batch, "largest_batch_size", largest)
    outcome = gptpl(*TRAIN, "data.batch_size=auto", "data.global_batch_size=8")
    assert losses(outcome, run_folder) == pytest.approx(whole, abs=1e-5)
    assert seen == {"max_length": 64, "sequences": 8, "low": False}
    config = OmegaConf.load(outcome.folder / "run/config.yaml")
    assert config.data.batch_size == fits
    assert config.trainer.accumulate_grad_batches == times
    assert f"batch: 8 sequences a step: {fits} at a time, on 1 x cpu, {times} times" in outcome.err


def test_auto_takes_the_whole_batch_where_memory_allows_and_can_be_resumed(gptpl, run_folder, whole):
    outcome = gptpl(*TRAIN, "data.batch_size=auto", "data.global_batch_size=8", "trainer.stop_at_step=3")
    assert outcome.status == 0, outcome.err
    outcome = gptpl("train", "resume=run")
    assert losses(outcome, run_folder) == pytest.approx(whole, abs=1e-5)


def test_a_contradiction_is_refused(refused):
    line = refused(*TRAIN, "data.global_batch_size=16", "trainer.accumulate_grad_batches=3")
    assert line == (
        "data.global_batch_size=16 and data.batch_size=8 make trainer.accumulate_grad_batches=2, not 3:"
        " leave it out"
    )
