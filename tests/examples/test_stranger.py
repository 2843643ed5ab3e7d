"""A stranger's classes in every place of the config: trained, resumed, swept, loaded.

`stranger_lab` is their package, `conf` their config folder.
"""

import csv
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import gptpl
from gptpl.checkpoints.format import read_checkpoint
from gptpl.checkpoints.resume_state import state_digest
from gptpl.config.groups import config_folder
from gptpl.errors import InputError

NOTES = ("experiment=lab", "data=csv_column", "data.path=notes.csv")
COUNTING = ("experiment=lab", "data=counting")
STEPS = 11
"""Of the runs that are compared: an epoch of `COUNTING` has 8."""
KEPT = (
    "trainer.max_steps=11",
    "callbacks.checkpoint_last.every_n_steps=1",
    "callbacks.checkpoint_last.keep=20",
)


def digest(run: Path, step: int | None = None) -> dict[str, str]:
    name = "last.ckpt" if step is None else f"step-{step:08d}.ckpt"
    return state_digest(read_checkpoint(run / "checkpoints" / name))


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def config_of(run: Path) -> Any:
    return yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))


def killed(whole: Path, copy: Path, step: int) -> Path:
    """What the run would have left if it had been killed after a step."""
    shutil.copytree(whole, copy, ignore=shutil.ignore_patterns("checkpoints"))
    (copy / "checkpoints").mkdir()
    for file in (whole / "checkpoints").glob(f"step-{step:08d}.ckpt*"):
        shutil.copy(file, copy / "checkpoints")
    record = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps({k: v for k, v in record.items() if k != "finished"}))
    return copy


@pytest.fixture(scope="module")
def notes(lab) -> Path:
    """A run of their corpus, by the command line and their config folder."""
    lab.done("train", "--config-dir", str(lab.conf), *NOTES, *KEPT, "run_dir=notes")
    return lab.folder / "notes"


@pytest.fixture(scope="module")
def counting(lab) -> Path:
    """A run of their LightningDataModule, in Python."""
    run = gptpl.build(*COUNTING, *KEPT, f"run_dir={lab.folder}/counting", config_dir=lab.conf)
    run.fit()
    return run.run_dir


# --- training -------------------------------------------------------------------------------------------


def test_nothing_in_gptpl_knows_of_them():
    package = Path(gptpl.__file__).parent
    files = [*package.rglob("*.py"), *config_folder().rglob("*.yaml")]
    assert len(files) > 200
    assert not [path for path in files if "stranger_lab" in path.read_text(encoding="utf-8")]


def test_a_run_has_their_classes_with_their_settings(notes, counting):
    node = config_of(notes)
    assert node["model"] == {
        "_target_": "stranger_lab.models.TinyGRU",
        "vocab_size": 257,
        "context_length": 32,
        "width": 24,
    }
    assert node["optimizer"] == {"_target_": "torch.optim.SGD", "lr": 0.5, "momentum": 0.9}
    assert node["data"]["corpus"] == {
        "_target_": "stranger_lab.data.CsvColumn",
        "path": f"{notes.parent}/notes.csv",
        "column": "text",
    }
    assert config_of(counting)["data"] == {
        "_target_": "stranger_lab.data.CountingData",
        "rows": 64,
        "length": 16,
        "batch_size": 8,
        "noise": 0.1,
    }
    record = json.loads((counting / "run.json").read_text())
    assert record["data"]["name"] == "CountingData"
    assert record["choices"]["data"] == "counting"


@pytest.mark.parametrize("name", ["notes", "counting"])
def test_what_their_classes_log(name, request):
    run = request.getfixturevalue(name)
    table = rows(run)
    assert float(table[1]["train/loss"]) - float(table[-1]["train/loss"]) > 0.05
    assert [int(row["step"]) for row in table if row["val/hit_rate"]] == [0, 3, 6, 9, 11]
    assert all(0.0 <= float(row["val/hit_rate"]) <= 1.0 for row in table if row["val/hit_rate"])
    norms = {int(row["step"]): float(row["lab/weight_norm"]) for row in table if row["lab/weight_norm"]}
    assert set(range(2, STEPS, 2)) <= set(norms)
    lines = [json.loads(line) for line in (run / "lines.jsonl").read_text().splitlines()]
    by_logger = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    assert by_logger == pytest.approx(
        {int(row["step"]): float(row["train/loss"]) for row in table if row["train/loss"]}, abs=1e-5
    )


def test_the_schedule_of_theirs_is_that_of_the_updates(lab):
    run = gptpl.build(
        *(
            *COUNTING,
            "trainer.max_steps=6",
            "callbacks=[checkpoint_best,early_stopping,learning_rate]",
            f"run_dir={lab.folder}/rates",
        ),
        config_dir=lab.conf,
    )
    run.fit()
    rates = [float(row["lr"]) for row in rows(run.run_dir) if row["lr"]]
    assert rates == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.5, 0.4])  # down to a fifth, every four steps


def test_best_checkpoint_and_early_stopping_follow_their_metric_upwards(lab, counting):
    found = [float(row["val/hit_rate"]) for row in rows(counting) if row["val/hit_rate"]]
    record = json.loads((counting / "run.json").read_text())
    assert record["metrics"]["best_val/hit_rate"] == max(found) > min(found)
    best = read_checkpoint(counting / "checkpoints/best.ckpt")
    assert best["global_step"] == [0, 3, 6, 9, 11][found.index(max(found))]

    run = gptpl.build(
        *(*COUNTING, "optimizer.lr=1e-12", "trainer.max_steps=20", f"run_dir={lab.folder}/stopped"),
        "callbacks.early_stopping.patience=2",
        config_dir=lab.conf,
    )
    run.fit()
    assert [row["step"] for row in rows(run.run_dir) if row["val/hit_rate"]] == ["0", "3", "6", "9"]


def test_a_callback_may_declare_what_is_monitored(lab):
    run = gptpl.build(
        *(*COUNTING, "callbacks.checkpoint_best.monitor=lab/largest_norm", "trainer.max_steps=3"),
        f"run_dir={lab.folder}/norm",
        config_dir=lab.conf,
    )
    assert "best_lab/largest_norm" in run.fit()


def test_a_root_of_their_own(lab):
    shown = yaml.safe_load(
        lab.done(
            "train", "--config-dir", str(lab.conf), "--config-name", "lab_train", "--cfg", "job", "--resolve"
        )
    )
    assert (shown["seed"], shown["data"]["_target_"]) == (7, "stranger_lab.data.CountingData")
    run = gptpl.build(
        "trainer.max_steps=1",
        f"run_dir={lab.folder}/root",
        config_dir=lab.conf,
        config_name="lab_train",
    )
    run.fit()
    assert config_of(run.run_dir)["seed"] == 7


def test_a_filter_of_their_own(lab, notes):
    out = lab.done(
        *("generate", "--config-dir", str(lab.conf), f"checkpoint={notes}", "prompt=A", "max_new_tokens=3"),
        *("filter=shouting", "filter.share=-1"),
    )
    assert out == "A[shouting]\n"


# --- resuming -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "step"), [("notes", 4), ("counting", 8), ("counting", 9)])
def test_a_resumed_run_repeats_the_bits(name, step, lab, request):
    """Within the first epoch, at its end, and within the second."""
    whole = request.getfixturevalue(name)
    broken_off = killed(whole, lab.folder / f"{name}-from-{step}", step)
    lab.done("train", "--config-dir", str(lab.conf), f"resume={broken_off}")
    assert digest(broken_off) == digest(whole)
    assert digest(broken_off, step + 1) == digest(whole, step + 1)
    assert [row["train/loss"] for row in rows(broken_off)] == [row["train/loss"] for row in rows(whole)]


@pytest.mark.parametrize(
    "changes",
    [
        ("scheduler=step_lr", "optimizer._target_=torch.optim.RMSprop", "optimizer.lr=1e-3"),
        ("optimizer=adamw", "model=tiny", "model.drop_rate=0.2", "task=pretrain", "data.noise=0.2"),
    ],
)
def test_a_run_that_stops_and_goes_on_repeats_the_bits_in_python(changes, lab, tmp_path):
    pretrains = ("callbacks.checkpoint_best.monitor=val/loss", "callbacks.early_stopping.monitor=val/loss")
    given = (*COUNTING, *changes, *(pretrains if "task=pretrain" in changes else ()), "trainer.max_steps=10")
    whole = gptpl.build(*given, f"run_dir={tmp_path}/whole", config_dir=lab.conf)
    whole.fit()
    part = gptpl.build(*given, "trainer.stop_at_step=5", f"run_dir={tmp_path}/part", config_dir=lab.conf)
    part.fit()
    assert digest(part.run_dir) != digest(whole.run_dir)
    gptpl.resume(part.run_dir, "trust=[stranger_lab]").fit()
    assert digest(part.run_dir) == digest(whole.run_dir)


# --- their folder and their package ---------------------------------------------------------------------


def test_a_sweep_has_their_choices_their_root_and_their_metric(lab, forked_trials):
    with forked_trials():
        out = lab.done(
            *("train", "-m", "--config-dir", str(lab.conf), "--config-name", "lab_train"),
            *("scheduler=sawtooth,step_lr", "trainer.max_steps=3", "sweep.metric=val/hit_rate"),
            "hydra.sweep.dir=sweep",
        )
    with (lab.folder / "sweep/results.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert {row["overrides"] for row in table} == {"scheduler=sawtooth", "scheduler=step_lr"}
    assert {row["state"] for row in table} == {"finished"}
    rates = [float(row["val/hit_rate"]) for row in table]
    assert rates == sorted(rates, reverse=True)  # the highest first
    assert "scheduler=step_lr" in out
    for row in table:
        trial = config_of(lab.folder / "sweep" / row["trial"])
        assert trial["seed"] == 7
        assert trial["data"]["_target_"] == "stranger_lab.data.CountingData"


def test_help_and_cfg_show_their_choices(lab):
    listed = lab.done("train", "--config-dir", str(lab.conf), "--help")
    for choice in (
        "csv_column",
        "counting",
        "sgd",
        "sawtooth",
        "step_lr",
        "tiny_gru",
        "hit_rate",
        "weight_norm",
    ):
        assert f" {choice} " in listed
    assert "choose it to read metrics with jq" in listed
    assert "csv_column" not in lab.done("train", "--help")
    shown = yaml.safe_load(
        lab.done("train", "--config-dir", str(lab.conf), *NOTES, "--cfg", "job", "--resolve")
    )
    assert shown["data"]["corpus"]["column"] == "text"
    assert shown["callbacks"]["weight_norm"]["every_n_steps"] == 2
    assert shown["logger"]["lines"]["save_dir"] == f"{lab.folder}/runs/lab/<date>_<time>"


@pytest.mark.parametrize(
    ("file", "old", "new", "given", "meant"),
    [
        ("callbacks/weight_norm", "every_n_steps", "evry_n_steps", (), "callbacks.weight_norm.every_n_steps"),
        ("data/csv_column", "  column", "  colum", ("data=csv_column", "data.path=x"), "data.corpus.column"),
        ("scheduler/step_lr", "gamma", "gama", ("scheduler=step_lr",), "scheduler.gamma"),
        ("model/tiny_gru", "width", "widht", (), "model.width"),
        ("task/hit_rate", "of_most_likely", "of_most_likly", (), "task.of_most_likely"),
    ],
)
def test_a_misspelt_key_in_their_yaml(file, old, new, given, meant, lab, tmp_path):
    folder = shutil.copytree(lab.conf, tmp_path / "conf")
    path = folder / f"{file}.yaml"
    path.write_text(path.read_text().replace(f"{old}:", f"{new}:"))
    said = lab.refused("train", "--config-dir", str(folder), *COUNTING, *given)
    assert f"{file}.yaml" in said
    assert f"did you mean {meant}?" in said


def test_a_value_of_another_type_in_their_yaml(lab):
    said = lab.refused("train", "--config-dir", str(lab.conf), *COUNTING, "data.rows=many")
    assert said.startswith("data.rows=many: must be a valid integer")
    said = lab.refused("train", "--config-dir", str(lab.conf), *COUNTING, "scheduler.period=1.5")
    assert said.startswith("scheduler.period=1.5: must be a valid integer")


TOYS = """
import lightning as L
from gptpl.data.sources import TextFiles

class Count(L.Callback):
    def __init__(self, *, step: int = 1) -> None:
        self.step, self.steps = step, 0

    def on_train_batch_end(self, *args) -> None:
        self.steps += self.step

    def on_train_end(self, trainer, pl_module) -> None:
        print("counted", self.steps)

class Halves:
    def factor(self, step: int, *, total_steps: int, peak_lr: float) -> float:
        return 0.5 ** step

class Shouted(TextFiles):
    def __init__(self, path: str, *, mark: str) -> None:
        super().__init__(path)
        self.mark = mark

    def read(self, path) -> str:
        return super().read(path).upper() + self.mark
"""


def test_toys_in_the_working_folder_need_no_installation(lab, tmp_path, monkeypatch):
    """One module and a YAML for each; `--config-dir` makes the folder that one is in importable."""
    (tmp_path / "toys.py").write_text(TOYS)
    (tmp_path / "story.txt").write_text("the sea sang. " * 200)
    for name, text in {
        "callbacks/count": "count: {_target_: toys.Count, step: 2}",
        "scheduler/halves": "_target_: toys.Halves",
        "data/shouted": "defaults: [_text, _self_]\n"
        "corpus: {_target_: toys.Shouted, path: story.txt, mark: '!'}",
    }.items():
        path = tmp_path / f"conf/{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    there = type(lab)(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    given = (
        *("train", "experiment=quick", "trainer=cpu", "trainer.max_steps=3", "run_dir=run", "logger=csv"),
        *("callbacks=[count,learning_rate,checkpoint_last]", "scheduler=halves", "data=shouted"),
    )
    said = there.refused("train", "experiment=quick", "+callbacks.count._target_=toys.Count")
    assert "install the package toys, or run gptpl in the folder that holds it" in said
    assert "counted 6" in there.done(*given, "--config-dir", "conf")
    rates = [float(row["lr"]) for row in rows(tmp_path / "run") if row["lr"]]
    assert rates == pytest.approx([3e-3, 1.5e-3, 7.5e-4])
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != str(tmp_path)])
    monkeypatch.delitem(sys.modules, "toys")
    there.done("train", "resume=run", "trust=[toys]", "trainer.max_steps=4")
    assert [float(row["lr"]) for row in rows(tmp_path / "run") if row["lr"]][3:] == [pytest.approx(3.75e-4)]


# --- using what was trained -----------------------------------------------------------------------------


def test_what_their_run_names_is_used_only_if_they_are_trusted(notes, lab, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "stranger_lab"]:
        monkeypatch.delitem(sys.modules, name)
    for command in (
        ("train", f"resume={notes}", "trainer.max_steps=12"),
        ("generate", f"checkpoint={notes}"),
        ("evaluate", f"checkpoint={notes}"),
        ("inspect", f"checkpoint={notes}", "text=sea"),
    ):
        said = lab.refused(*command)
        assert "trust=[stranger_lab]" in said
    for use in (gptpl.load, gptpl.resume):
        with pytest.raises(InputError, match=r"trust=\[stranger_lab\]"):
            use(notes)
    assert not [name for name in sys.modules if name.partition(".")[0] == "stranger_lab"]


@pytest.mark.parametrize("trust", ["trust=[stranger_lab]", "--config-dir"])
def test_trusted_they_resume_write_and_are_evaluated(trust, notes, counting, lab, tmp_path):
    given = (trust,) if "=" in trust else (trust, str(lab.conf))
    longer = tmp_path / "longer"
    shutil.copytree(notes, longer, symlinks=True)
    lab.done("train", f"resume={longer}", "trainer.max_steps=12", *given)
    assert rows(longer)[-1]["step"] == "12"
    wrote = lab.done(
        "generate", f"checkpoint={notes}", "prompt=the sea", "max_new_tokens=5", "seed=1", *given
    )
    assert wrote.startswith("the sea")
    assert "tokens      " in lab.done("evaluate", f"checkpoint={notes}", *given)
    last = [float(row["val/loss"]) for row in rows(counting) if row["val/loss"]][-1]
    assert f"loss        {last:.4f}" in lab.done("evaluate", f"checkpoint={counting}", *given)


def test_their_model_in_python(counting):
    model: Any = gptpl.load(counting, trust=["stranger_lab"])
    assert type(model.net).__name__ == "TinyGRU"
    text = model.generate("abc", max_new_tokens=4, seed=1)
    assert text == model.generate("abc", max_new_tokens=4, seed=1)
    last = [float(row["val/loss"]) for row in rows(counting) if row["val/loss"]][-1]
    assert model.evaluate().loss == pytest.approx(last, abs=1e-6)
    with pytest.raises(InputError, match=r"precision=int8 .*, this model is a stranger_lab\.models\.TinyGRU"):
        gptpl.load(counting, trust=["stranger_lab"], device="cpu", precision="int8")


def test_the_finders_and_what_only_a_gpt_has(lab):
    found = gptpl.find_lr(*COUNTING, "scheduler=step_lr", steps=10, config_dir=lab.conf)
    assert [row[0] for row in found.table[1:]] == list(range(1, 11))
    for command in ("plan", "find-batch-size"):
        said = lab.refused(command, "--config-dir", str(lab.conf), *COUNTING)
        assert "this model is a stranger_lab.models.TinyGRU" in said
    said = lab.refused("plan", "--config-dir", str(lab.conf), "--config-name", "lab_train")
    assert said.endswith("give gptpl plan a root that extends plan")
    said = lab.refused("train", "--config-dir", str(lab.conf), *COUNTING, "data.global_batch_size=16")
    assert "CountingData makes its own batches" in said
