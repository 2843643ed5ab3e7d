"""Any argument of `lightning.Trainer` is a setting `trainer.X`, but what gptpl decides itself."""

import pytest
import torch

QUICK = (
    *("train", "experiment=quick", "trainer=cpu", "scheduler=constant", "logger=csv", "run_dir=run"),
    *("trainer.max_epochs=1", "trainer.limit_train_batches=3", "model.n_layers=1", "model.emb_dim=16"),
)


@pytest.mark.parametrize(
    ("given", "steps", "evaluated"),
    [
        ("trainer.limit_val_batches=1", [0, 1, 2, 3], [0, 3]),
        ("trainer.overfit_batches=2", [0, 1, 2], [0, 2]),
        ("trainer.limit_train_batches=4", [0, 1, 2, 3, 4], [0, 4]),
        ("trainer.num_sanity_val_steps=0", [1, 2, 3], [3]),
        ("trainer.profiler=simple", [0, 1, 2, 3], [0, 3]),
        ("trainer.detect_anomaly=true", [0, 1, 2, 3], [0, 3]),
        ("trainer.enable_model_summary=true", [0, 1, 2, 3], [0, 3]),
        ("trainer.fast_dev_run=true", None, None),
    ],
)
def test_an_argument_of_lightning_works(given, steps, evaluated, gptpl):
    key = given.partition("=")[0]
    kept = [each for each in QUICK if not each.startswith(key)]
    if key == "trainer.overfit_batches":
        kept.remove("trainer.limit_train_batches=3")
    outcome = gptpl(*kept, "callbacks=none", given)
    assert outcome.status == 0, outcome.err
    if steps is None:  # one batch of each, and nothing is logged
        assert not (outcome.run.path / "metrics.csv").exists()
        assert not (outcome.run.path / "checkpoints").exists()
        return
    assert outcome.run.steps == steps
    assert [int(row["step"]) for row in outcome.run.rows if row["val/loss"]] == evaluated
    said = outcome.out + outcome.err
    assert ("Profiler Report" in said) == ("profiler" in given)
    assert ("GPTModel" in said) == ("summary" in given)
    assert not torch.is_anomaly_enabled()


@pytest.mark.parametrize(
    ("given", "instead"),
    [
        ("trainer.callbacks=[]", "give callbacks="),
        ("trainer.logger=false", "give logger="),
        ("trainer.deterministic=true", "give deterministic"),
        ("trainer.val_check_interval=2", "give eval_every_n_steps"),
        ("trainer.enable_progress_bar=false", "give ~callbacks.progress_bar"),
        ("trainer.use_distributed_sampler=true", "leave it out"),
    ],
)
def test_what_gptpl_decides_is_refused_by_name(given, instead, refused):
    key = given.partition("=")[0]
    assert refused(*QUICK, given) == f"{key} is set by gptpl: {instead}"


def test_a_misspelt_argument_of_lightning(refused):
    assert "did you mean trainer.limit_val_batches?" in refused(*QUICK, "trainer.limit_val_batch=2")
