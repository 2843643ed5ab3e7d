"""`gptpl plan`: its numbers, against published ones and against a run that is really trained."""

import json
import sys
from functools import cache

import pytest
from matplotlib.image import imread

from gptpl.runs import plan as plan_module
from gptpl.runs import trial
from gptpl.runs.build import build
from gptpl.runs.plan import lr_curves

QUICK = ("trainer=cpu", "trainer.precision=32-true", "scheduler.warmup_steps=1", "experiment=quick")
RUN = ("trainer.max_steps=8", "eval_every_n_steps=4")


@pytest.fixture
def planned(gptpl, small_pictures):
    """`planned(*overrides)`: the plan as data, without timed steps."""
    small_pictures("gptpl.runs.plan")
    return lambda *overrides: read(gptpl("plan", "plan.timed_steps=0", *overrides, "--json"))


def read(outcome):
    assert outcome.status == 0, outcome.err
    return json.loads(outcome.out)


@pytest.fixture(scope="module")
def plans(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plans")
    return cache(
        lambda *overrides: read(command("plan", "plan.timed_steps=0", *overrides, "--json", cwd=folder))
    )


@pytest.fixture
def known(plans, small_pictures):
    """As `planned`; tests that ask for the same plan share it."""
    small_pictures("gptpl.runs.plan")
    return plans


def test_a_published_size_needs_no_memory(planned, monkeypatch):
    """On a machine with 100 MB free, where weights would be refused if they were asked for."""
    monkeypatch.setattr(trial, "free_memory", lambda device: 10**8)
    monkeypatch.setattr(plan_module, "build_module", lambda *args: pytest.fail("weights were made"))
    plan = planned("model=gpt2_xl", "data.max_length=128", "plan.timed_steps=3")
    assert plan["parameters"]["tied"] == plan["parameters"]["total"] == 1_557_611_200
    assert sum(plan["parameters"]["parts"].values()) == 1_557_611_200
    assert round(plan["memory_bytes"]["weights"] / 1e9, 1) == 6.2
    assert (plan["fits"], plan["largest_batch"], plan["timing"]) == (False, 0, None)
    assert plan["not_timed"] == "a step does not fit into the memory that is free"


def test_padding_is_not_counted_as_tokens(planned, tmp_path):
    entries = [{"instruction": f"Say {n}.", "input": "", "output": "Yes!"} for n in range(60)]
    (tmp_path / "e.json").write_text(json.dumps(entries))
    data = ("data=instruction_file", "data.path=e.json", "data.shuffle=false")
    given = ("task=instruct", *data, "model=tiny", "tokenizer=bytes")
    plan = planned(*given, "data.template='{{ instruction }}'", "data.response_marker=>", "trainer=cpu")
    # 51 examples, "Say 10.>Yes!" but for the first ten a character less; 6 batches of 8 in each of 2 epochs
    assert plan["tokens"] == round(2 * 6 * 8 * (51 * 12 - 10) / 51)
    assert plan["tokens_per_step"] == 8 * 64


SMALL = ("model=gpt2_small", "data.max_length=128")


def test_lora_needs_gradients_and_averages_for_its_matrices_alone(known):
    """GPT-2 small and matrices of rank 8 beside the four layers of its blocks."""
    whole, lora = known(*SMALL), known(*SMALL, "tune=lora")
    D, L = 768, 12
    matrices = L * 8 * (D + 3 * D + D + D + D + 4 * D + 4 * D + D)
    of_whole, of_lora = whole["memory_bytes"], lora["memory_bytes"]
    assert (of_whole["gradients"], of_lora["gradients"]) == (4 * 124_439_808, 4 * matrices)
    assert of_lora["weights"] == of_whole["weights"] + 4 * matrices
    assert of_lora["optimizer"] == 4 * (2 * matrices + L * 8)  # a count of steps beside each tensor
    assert f"{matrices:,} of {124_439_808 + matrices:,} parameters train" in lora["trained"]
    assert whole["trained"] is None
    # Forward and the way back, without the gradients of the large matrices.
    assert lora["flops"] / whole["flops"] == pytest.approx(2 / 3, rel=0.05)


def test_a_classifier_is_counted_with_its_own_head(planned, tmp_path, monkeypatch):
    """Against the sum over the model that a run of three classes trains."""
    rows = [f"{'abc'[i % 3]},text {i}" for i in range(60)]
    (tmp_path / "texts.csv").write_text("\n".join(["label,text", *rows]))
    data = ("data=labelled", f"data.path={tmp_path / 'texts.csv'}")
    given = (
        "task=classify",
        *data,
        "model=tiny",
        "tokenizer=bytes",
        "trainer=cpu",
        "model.tie_weights=false",
    )
    counted = planned(*given)["parameters"]
    monkeypatch.chdir(tmp_path)
    run = build(*given)
    run.close()
    assert counted["total"] == sum(p.numel() for p in run.module.net.parameters())
    assert counted["parts"]["head"] == 3 * 64 + 3
    assert sum(counted["parts"].values()) == counted["total"]


def test_parts_of_the_books_model_are_those_of_its_formulas(planned):
    parts = planned()["parameters"]["parts"]
    V, T, D, L = 50257, 256, 768, 12
    assert parts == {
        "token embedding": V * D,
        "position embedding": T * D,
        "attention": L * (4 * D * D + D),
        "feed-forward": L * (8 * D * D + 5 * D),
        "norms": (2 * L + 1) * 2 * D,
        "head": V * D,
    }
    assert sum(parts.values()) == 162_419_712


def test_parts_are_hugging_faces(known):
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs = GPT2LMHeadModel(
        GPT2Config(vocab_size=257, n_positions=64, n_embd=64, n_layer=2, n_head=4)
    ).transformer
    count = lambda *modules: sum(p.numel() for m in modules for p in m.parameters())  # noqa: E731
    parts = known(*HERE)["parameters"]["parts"]
    assert parts == {
        "token embedding": theirs.wte.weight.numel(),
        "position embedding": theirs.wpe.weight.numel(),
        "attention": count(*(b.attn for b in theirs.h)),
        "feed-forward": count(*(b.mlp for b in theirs.h)),
        "norms": count(theirs.ln_f, *(n for b in theirs.h for n in (b.ln_1, b.ln_2))),
        "head": 0,
    }


def test_a_run_is_what_was_planned(quick, known):
    plan = known(*QUICK, *RUN)
    [last] = [row for row in quick.run.rows if row["step"] == "8"]
    assert plan["steps"] == max(quick.run.steps) == 8
    assert plan["tokens"] == int(float(last["train/tokens_seen"]))
    assert plan["evaluations"] == sum(1 for row in quick.run.rows if row["val/loss"])
    assert plan["parameters"]["total"] == quick.run.record["parameters"]


def test_the_curve_drawn_is_what_a_run_logs(quick):
    from functools import partial

    from gptpl.training.schedules import CosineSchedule

    schedule = CosineSchedule(warmup_steps=1, min_lr=1e-6)
    updates, curves = lr_curves({"lr": 3e-3}, partial(schedule.factor, total_steps=8, peak_lr=3e-3), 8)
    logged = {int(row["step"]): float(row["lr"]) for row in quick.run.rows if row["lr"]}
    assert updates == list(logged)
    assert curves["lr"] == pytest.approx(list(logged.values()))


def test_the_last_step_of_an_epoch_may_have_fewer_windows(planned):
    """317 windows: 39 batches of 8, which are 4 steps of 10 batches, the last of 9."""
    plan = planned(
        *QUICK, "trainer.accumulate_grad_batches=10", "trainer.max_epochs=3", "trainer.max_steps=9"
    )
    assert (plan["train_sequences"], plan["steps_per_epoch"], plan["steps"]) == (317, 4, 9)
    assert plan["tokens"] == (2 * 39 + 10) * 8 * 64
    assert plan["tokens_per_step"] == 10 * 8 * 64


MUON = (*QUICK, *RUN, "optimizer=muon", "optimizer.muon_lr=0.02")


def test_every_group_has_its_rate(known):
    rates = known(*MUON)["learning_rate"]
    assert {name: group["peak"] for name, group in rates.items()} == {"lr/muon": 0.02, "lr": 3e-3}
    assert rates["lr/muon"]["first"] == pytest.approx(0.02)


def test_muon_keeps_less_and_recomputing_too(known):
    adamw, muon = (known(*given)["memory_bytes"] for given in ((*QUICK, *RUN), MUON))
    blocks = 2 * 12 * 64 * 64
    assert adamw["optimizer"] - muon["optimizer"] == pytest.approx(4 * blocks, rel=1e-3)
    kept, anew = (
        known(*SMALL, *more)["memory_bytes"] for more in ((), ("trainer.recompute_activations=true",))
    )
    assert anew["activations"] < kept["activations"]


MANY = ("trainer.num_nodes=2", "trainer.devices=4", "model.drop_rate=0", "trainer.precision=bf16-mixed")
SAME = (
    *("experiment=quick", "trainer.precision=bf16-mixed", "trainer.attention=sdpa", "trainer.head=fused"),
    "model.qkv_bias=true",
)
HERE = (*SAME, "trainer=cpu", "model.drop_rate=0", "trainer.compile=off")


def test_many_gpus_that_are_not_here(gptpl):
    """The first line of the table is the fastest, and torch calls what was computed."""
    outcome = gptpl("plan", "experiment=quick", "model.n_layers=1", *MANY, "plan.dry_run=true")
    assert outcome.status == 0, outcome.err
    lines = outcome.out.splitlines()
    assert max(map(len, lines)) <= 120, max(lines, key=len)
    text = outcome.out
    assert "8 = 2 nodes x 4, each of 80 GB, 396 TFLOP/s reached (40% of an H100's peak in bf16)" in text
    assert text.count("  as computed") == 3
    assert "COMPUTED" not in text
    assert "trainer.num_nodes=2 trainer.devices=4 trainer.precision=bf16-mixed" in text
    assert text.index("DDP ") < text.index("FSDP ")


def test_gpus_that_are_not_here_as_data(known):
    """One of them has the memory of the plan for the device that is here, many have it divided."""
    here = known(*HERE)
    gpu = ("trainer.accelerator=gpu", "model.drop_rate=0", "plan.memory_gb=40")
    [one] = known(*SAME, *gpu)["parallel"]["strategies"]
    parts = {
        name: one["memory"]["step"][name] for name in ("weights", "gradients", "optimizer", "activations")
    }
    assert parts == {name: here["memory_bytes"][name] for name in parts}
    assert one["memory"]["peak"] == here["memory_bytes"]["peak_of_step"]
    many = known(*SAME, *MANY, "trainer.accelerator=gpu", "plan.tflops=100")
    assert many["tokens_per_step"] == 8 * here["tokens_per_step"]
    assert many["parallel"]["cluster"]["tflops"] == 100
    strategies = {each["layout"]["name"]: each for each in many["parallel"]["strategies"]}
    assert next(iter(strategies)) == "DDP"
    assert strategies["FSDP"]["memory"]["step"]["weights"] < parts["weights"] / 7
    [gathered, *_] = strategies["FSDP"]["collectives"]
    assert gathered["sent_between"] == pytest.approx(gathered["bytes"] * 7 / 8 / 4)
    assert "parallel" not in here


@pytest.mark.skipif(sys.platform != "linux", reason="what malloc holds was measured with glibc")
def test_steps_are_timed_and_nothing_is_left_but_the_picture(gptpl, tmp_path):
    outcome = gptpl("plan", *QUICK, *RUN, "plan.timed_steps=2", "plan.output=sub/rate.png")
    assert outcome.status == 0, outcome.err
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["sub", "sub/rate.png"]
    assert imread(tmp_path / "sub/rate.png").std() > 0
    assert "2 timed" in outcome.out
    assert "sub/rate.png" in outcome.out
    lines = outcome.out.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("plan.outptu=a.png",), "gptpl plan has no setting plan.outptu: did you mean plan.output?"),
        (("plan.timed_steps=-1",), "plan.timed_steps must be 0 or more, got -1"),
        (("plan.output=a.jpg",), "plan.output=a.jpg must be a file whose name ends in .png"),
        (("plan.output=/proc/no/a.png",), "plan.output=/proc/no/a.png cannot be written"),
        (
            ("resume=runs/x",),
            "resume=runs/x is for gptpl train and gptpl.resume: this command looks at a new run",
        ),
        (("-m", "seed=1,2"), "-m sweeps over settings of gptpl train: run gptpl plan once for each value"),
        (("plan.nodes=0",), "plan.nodes must be a positive whole number, got 0"),
        (("plan.tflops=-1", "plan.nodes=2"), "plan.tflops must be positive, got -1.0"),
        (
            ("plan.nodes=2", "trainer.devices=auto"),
            "trainer.devices=auto is no number: give plan.devices_per_node",
        ),
        (("plan.dry_run=true",), "plan.dry_run=true is for several devices that need not be here"),
        (
            ("experiment=quick", "plan.nodes=2", "plan.devices_per_node=3", "data.global_batch_size=16"),
            "data.global_batch_size=16 must be a multiple of data.batch_size=8 on 6 devices",
        ),
        (
            ("experiment=quick", "plan.nodes=2", "trainer.precision=32-true"),
            "plan.tflops has no default for trainer.precision=32-true",
        ),
        (("modle=tiny",), "gptpl plan has no setting modle: did you mean model?"),
        (("experiment=quick", "data.train_ratio=0.9999"), "too short for one sequence of data.max_length=64"),
    ],
)
def test_bad_input_is_refused(refused, overrides, says):
    assert says in refused("plan", *overrides)
