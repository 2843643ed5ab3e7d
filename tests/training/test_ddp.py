"""Two processes with batches of 4 train as one process with batches of 8: through the command, for real."""

import json

import pytest
import torch
from safetensors.torch import load_file

from gptpl.checkpoints.format import read_checkpoint
from gptpl.checkpoints.loading import load_model

STEPS = 6  # as many as `train` makes
RUN_FILES = {
    "checkpoints/best.ckpt",
    "checkpoints/best.ckpt.sha256",
    "checkpoints/last.ckpt",
    "checkpoints/step-00000006.ckpt",
    "checkpoints/step-00000006.ckpt.sha256",
    "config.yaml",
    "diagnostics.jsonl",
    "diagnostics.png",
    "evaluations.jsonl",
    "loss.png",
    "metrics.csv",
    "run.json",
    "samples.jsonl",
    "train.log",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, train, launched):
    """The folders of the run of one process and of the run of two, which the command starts."""
    folder = tmp_path_factory.mktemp("ddp")
    (folder / "one").mkdir()
    (folder / "two").mkdir()
    looks = ("callbacks=[default,diagnostics]", "callbacks.diagnostics.every_n_steps=1")
    one = train(folder / "one", *looks, "trainer=cpu", "data.batch_size=8")
    two = launched(
        folder / "two",
        *looks,
        "trainer=ddp",
        "trainer.accelerator=cpu",
        "trainer.devices=2",
        "data.batch_size=4",
    )
    return one, two


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_losses_are_the_same_at_every_step(runs, logged):
    one, two = (logged(run_dir) for run_dir in runs)
    assert list(one) == list(two) == list(range(STEPS + 1))
    for name in ("train/loss", "val/loss", "eval/train_loss", "train/grad_norm", "lr", "train/tokens_seen"):
        steps = [step for step, row in one.items() if name in row]
        assert steps == [step for step, row in two.items() if name in row]
        assert steps == ([0, 3, 6] if name in ("val/loss", "eval/train_loss") else [1, 2, 3, 4, 5, 6])
        expected = [one[step][name] for step in steps]
        assert [two[step][name] for step in steps] == pytest.approx(expected, abs=1e-5), name
    assert one[1]["train/loss"] - one[STEPS]["train/loss"] > 0.1


@pytest.mark.slow
def test_gradients_and_updates_of_each_layer_are_the_same(runs, logged):
    """The first process has them after they are averaged."""
    one, two = (logged(run_dir) for run_dir in runs)
    for kind, count in (("gradient_norm", 6), ("update_ratio", 5)):
        names = [name for name in one[1] if name.startswith(f"diagnostics/{kind}/")]
        assert len(names) == count
        for step in range(1, STEPS + 1):
            expected = {name: one[step][name] for name in names}
            assert {name: two[step][name] for name in names} == pytest.approx(expected, rel=1e-2), step


@pytest.mark.slow
def test_the_weights_are_the_same_at_the_end(runs):
    one, two = (load_model(run_dir / "checkpoints" / "last.ckpt") for run_dir in runs)
    assert one.step == two.step == STEPS
    for name, weight in one.net.state_dict().items():
        # Adam makes whole steps of a gradient that is rounding noise; 1e-5 is 1/300 of one step.
        torch.testing.assert_close(two.net.state_dict()[name], weight, atol=1e-5, rtol=0, msg=name)


@pytest.mark.slow
def test_two_processes_leave_one_run_folder(runs):
    """One set of files, one row a step, and each line of the log once."""
    for run_dir in runs:
        files = {file.relative_to(run_dir).as_posix() for file in run_dir.rglob("*") if file.is_file()}
        events = {name for name in files if name.startswith("tensorboard/events.out.tfevents.")}
        assert len(events) == 1
        assert {name for name in files if not name.startswith("tensorboard/")} == RUN_FILES
        assert [path.name for path in run_dir.parent.iterdir()] == ["run"]
        log = (run_dir / "train.log").read_text().splitlines()
        assert sum("plan: 6 optimizer steps" in line for line in log) == 1


@pytest.mark.slow
def test_both_runs_can_be_resumed(runs):
    """Their last checkpoints hold the same optimizer state and the same count of tokens."""
    one, two = (read_checkpoint(run_dir / "checkpoints" / "last.ckpt") for run_dir in runs)
    assert one["gptpl"]["tokens_seen"] == two["gptpl"]["tokens_seen"]
    ours, theirs = one["optimizer_states"][0], two["optimizer_states"][0]
    for key, state in ours["state"].items():
        torch.testing.assert_close(theirs["state"][key]["exp_avg"], state["exp_avg"], atol=1e-6, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_lora_trains_the_same_and_leaves_the_same_adapter(runs, train, logged, tmp_path):
    """From the run of one process; its weights stay, so all that comes of it is in the small matrices."""
    lora = ("tune=lora", "init=run", f"init.checkpoint={runs[0]}", "optimizer.lr=1e-2")
    two = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "data.batch_size=4")
    found = []
    for name, processes in (("one", ("trainer=cpu", "data.batch_size=8")), ("two", two)):
        (tmp_path / name).mkdir()
        found.append(train(tmp_path / name, *lora, *processes))
    ours, theirs = (logged(run_dir) for run_dir in found)
    assert ours[1]["train/loss"] - ours[STEPS]["train/loss"] > 0.01
    for name in ("train/loss", "val/loss", "train/grad_norm"):
        expected = [row[name] for row in ours.values() if name in row]
        assert [row[name] for row in theirs.values() if name in row] == pytest.approx(expected, abs=1e-5)
    one, other = (load_file(run_dir / "adapter/adapter_model.safetensors") for run_dir in found)
    assert one.keys() == other.keys()
    # The products: of a gradient that is rounding noise, Adam makes whole steps in one matrix or the other.
    for name in [name for name in one if name.endswith("lora_A.weight")]:
        of_b = name.replace("lora_A", "lora_B")
        product = one[of_b] @ one[name]
        assert (other[of_b] @ other[name] - product).norm() < 0.01 * product.norm(), name


@pytest.mark.slow
def test_every_target_of_a_step_counts_alike(train, logged, tmp_path):
    """Of instructions, whose answers give each process another number of targets."""
    entries = [{"instruction": f"Say {i}", "output": "y" * (1 + 7 * i % 13)} for i in range(60)]
    (tmp_path / "entries.json").write_text(json.dumps(entries))
    own = (
        *("task=instruct", "data=instruction_file", f"data.path={tmp_path / 'entries.json'}"),
        *("data.template='{{ instruction }}'", "data.response_marker='>'", "data.mask_instruction=true"),
        *("data.input_column=null", "trainer.precision=32-true", "callbacks=none", "~callbacks.sample_text"),
    )
    rows = []
    for name, more in (
        ("one", ("trainer=cpu", "data.batch_size=4")),
        ("two", ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "data.batch_size=2")),
    ):
        (tmp_path / name).mkdir()
        rows.append(logged(train(tmp_path / name, *own, *more)))
    for step in range(1, STEPS + 1):
        for key in ("train/loss", "train/grad_norm"):
            assert rows[1][step][key] == pytest.approx(rows[0][step][key], rel=1e-5), (step, key)
