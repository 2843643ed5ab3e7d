"""`gptpl verify-resume`: it finds what differs, and says that nothing does where nothing does."""

import contextlib
import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptpl.checkpoints.files import write_checkpoint
from gptpl.cli.main import main
from gptpl.config.compose import compose
from gptpl.errors import InputError
from gptpl.runs import verify
from gptpl.runs.verify import compare, report

# --- what is asked for ----------------------------------------------------------------------------------


def checked(**own: Any) -> verify.Plan:
    return verify.Plan(overrides=["experiment=quick"], **own)


def test_stops_are_sorted_and_each_is_taken_once():
    plan = checked(stops=[7, 3, 7], steps=9)
    assert (plan.steps, plan.stops_before(9)) == (9, [3, 7])


def test_random_stops_are_three_within_the_run_and_the_seeds():
    drawn = [checked(seed=seed).stops_before(12) for seed in range(30)]
    assert all(len(set(stops)) == 3 and stops == sorted(stops) for stops in drawn)
    assert {stop for stops in drawn for stop in stops} == set(range(1, 12))
    assert checked(seed=7).stops_before(12) == drawn[7]
    assert checked(steps=2).stops_before(2) == [1]


def test_a_kill_comes_when_a_checkpoint_is_on_the_disk():
    """That of the step before may still be under way."""
    drawn = [checked(seed=seed, kill="node").stops_before(12) for seed in range(30)]
    assert {stop for stops in drawn for stop in stops} == set(range(2, 12))
    assert checked(steps=3, kill="process").stops_before(3) == [2]
    with pytest.raises(InputError, match=r"^verify\.stops must be steps from 2 to 11"):
        checked(kill="process", stops=[1])


def test_a_run_that_ends_early_is_stopped_before_its_end():
    """Stops that are never reached would verify nothing."""
    assert checked(steps=9, stops=[2, 5]).stops_before(6) == [2, 5]
    assert {stop for seed in range(30) for stop in checked(seed=seed).stops_before(4)} == {1, 2, 3}
    with pytest.raises(InputError, match=r"^verify\.stops must be steps from 1 to 4, .* got \[2, 5\]$"):
        checked(stops=[2, 5]).stops_before(5)
    with pytest.raises(InputError, match=r"^the run ends at step 1: train 2 steps or more"):
        checked().stops_before(1)


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"steps": 1}, "verify.steps must be 2 or more, got 1"),
        ({"stops": [12]}, r"verify.stops must be steps from 1 to 11, .* got \[12\]"),
        ({"stops": [0]}, r"verify.stops must be steps .* got \[0\]"),
        ({"stops": []}, r"verify.stops must be steps .* got \[\]"),
        ({"kill": "host"}, "verify.kill must be null, process or node, got host"),
    ],
)
def test_what_cannot_be_verified_is_refused(own, says):
    with pytest.raises(InputError, match=f"^{says}"):
        checked(**own)


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("verify.step=4", "verify.step"),
        ("verify.steps=few", "few"),
        ("verify.stops=[1.5]", "verify.stops"),
        ("verify.stops=3", "verify.stops"),
        ("verify.seed=-1", "verify.seed must be 0 or more"),
        ("resume=runs/a", "resume is set by verify-resume itself: leave it out"),
        ("run_dir=a", "run_dir is set by verify-resume itself"),
        ("+trainer.stop_at_step=3", "trainer.stop_at_step is set by verify-resume itself"),
        ("-m", "-m"),
    ],
)
def test_what_is_no_setting_of_it_is_refused_before_it_trains(refused, argument, says):
    assert says in refused("verify-resume", "experiment=quick", argument)


def test_a_folder_with_something_in_it_is_not_written_to(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(InputError, match=r"^verify\.keep=.* exists and is not empty: give a new folder"):
        verify.verify_resume("experiment=quick", keep=tmp_path)


def test_help_names_its_settings(gptpl):
    outcome = gptpl("verify-resume", "--help")
    assert outcome.status == 0
    for setting in ("verify.steps", "verify.stops", "verify.seed", "verify.keep", "Exit status"):
        assert setting in outcome.out


# --- what is compared -----------------------------------------------------------------------------------


def leave_run(folder: Path, **changes: Any) -> Path:
    """What a run of three steps leaves, with changes to its parts."""
    folder.mkdir()
    trace = [{"step": s, "batches": [f"b{s}"], "losses": [(5.0 / s).hex()]} for s in (1, 2, 3)]
    rows = [
        {"step": s, "train/loss": 5.0 / s, "train/tokens_per_second": changes.pop("speed", 9)} for s in (1, 2)
    ]
    state: dict[str, Any] = {
        "state_dict": {"net.weight": torch.ones(3)},
        "optimizer_states": [{"exp_avg": torch.ones(3)}],
        "lr_schedulers": [{"last_epoch": 3}],
        "callbacks": {"EarlyStopping": {"wait_count": 1}},
        "gptpl": {"format_version": 2, "model": {}, "tokenizer": {}, "config": {}},
        "gptpl_resume": {
            "step": 3,
            "epoch": 0,
            "batch": 3,
            "tokens_seen": 96,
            "random": [{"torch": torch.ones(2)}],
        },
    }
    if "trace" in changes:
        trace = changes["trace"](trace)
    if "rows" in changes:
        changes["rows"](rows)
    if "state" in changes:
        changes["state"](state)
    (folder / "steps.jsonl").write_text("".join(json.dumps(record) + "\n" for record in trace))
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    write_checkpoint(state, folder / "checkpoints" / "last.ckpt")
    return folder


def test_two_equal_runs_are_the_same_at_whatever_speed(tmp_path):
    comparison = compare(leave_run(tmp_path / "a"), leave_run(tmp_path / "b", speed=8), steps=3, stops=[2])
    assert comparison.same
    lines = report(comparison)
    assert lines[-1] == "identical: stopped after step 2 and resumed, the run has the same bits"
    assert "DIFFERENT" not in "\n".join(lines)
    assert re.fullmatch(r"2 +same +2\.5 +2\.5 +same, then stopped", lines[2])


def next_float(trace: list[Any]) -> list[Any]:
    """A loss that is another one in its last bit."""
    trace[1]["losses"] = [math.nextafter(float.fromhex(trace[1]["losses"][0]), 9.0).hex()]
    return trace


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "another batch": (
        {"trace": lambda t: [t[0], t[1] | {"batches": ["x"]}, t[2]]},
        r"^2 +DIFFERENT +2\.5 +2\.5",
    ),
    "a loss's last bit": ({"trace": next_float}, r"^2 +same +2\.5 +2\.50+\d+ +DIFFERENT"),
    "a missing step": ({"trace": lambda t: t[:2]}, r"^3 .*no such step +DIFFERENT"),
    "weights": (
        {"state": lambda s: s["state_dict"].update({"net.weight": torch.zeros(3)})},
        "^weights .*DIFFERENT",
    ),
    "the sign of a zero": (
        {"state": lambda s: s["optimizer_states"][0].update(exp_avg=torch.tensor([1.0, 1, -0.0]))},
        "^optimizer .*DIFFERENT",
    ),
    "a type": ({"state": lambda s: s["lr_schedulers"][0].update(last_epoch=3.0)}, "^schedule .*DIFFERENT"),
    "random states": (
        {"state": lambda s: s["gptpl_resume"].update(random=[{"torch": torch.zeros(2)}])},
        "^random states .*DIFFERENT",
    ),
    "position": ({"state": lambda s: s["gptpl_resume"].update(batch=2)}, "^position .*DIFFERENT"),
    "callbacks": ({"state": lambda s: s["callbacks"].update(Other={"n": 1})}, "^callbacks .*DIFFERENT"),
    "a logged number": (
        {"rows": lambda r: r[1].update({"train/loss": 1})},
        r"^metrics\.csv differs in train/loss$",
    ),
    "a row": ({"rows": lambda r: r.pop()}, r"^metrics\.csv differs in step, train/loss$"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_difference_is_found_and_shown(tmp_path, change):
    changes, shown = CHANGES[change]
    comparison = compare(leave_run(tmp_path / "a"), leave_run(tmp_path / "b", **changes), steps=3, stops=[2])
    assert not comparison.same
    lines = report(comparison)
    assert [line for line in lines if re.search(shown, line)], "\n".join(lines)
    assert any(line.startswith("DIFFERENT: stopped after step 2") for line in lines)


def test_a_run_that_ends_early_is_told(tmp_path):
    comparison = compare(leave_run(tmp_path / "a"), leave_run(tmp_path / "b"), steps=8, stops=[2])
    assert "the run ends at step 3, before verify.steps=8" in report(comparison)


@pytest.mark.parametrize(
    ("config", "hinted"),
    [
        ({"trainer": {"accelerator": "auto"}, "deterministic": False}, True),
        ({"trainer": {"accelerator": "auto"}, "deterministic": True}, False),
        ({"trainer": {"accelerator": "cpu"}, "deterministic": False}, False),
    ],
)
def test_deterministic_kernels_are_named_where_they_may_help(tmp_path, monkeypatch, config, hinted):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def of_config(state: dict[str, Any]) -> None:
        state["gptpl"]["config"] = config

    runs = [leave_run(tmp_path / "a", state=of_config), leave_run(tmp_path / "b", trace=lambda t: t[:2])]
    lines = report(compare(*runs, steps=3, stops=[2]))
    assert ("some GPU kernels add in no fixed order: try deterministic=true" in lines) == hinted


# --- the whole of it ------------------------------------------------------------------------------------

SMALL = (
    *("experiment=quick", "trainer=cpu", "model.n_layers=1", "model.emb_dim=16", "callbacks=checkpoint_last"),
    *("verify.steps=4", "verify.stops=[2]"),
)


@pytest.fixture
def parts_in_this_process(monkeypatch):
    """A process of its own takes seconds to import its packages; returns the overrides of each part."""
    parts: list[list[str]] = []

    def train(
        overrides: list[str], log: Path, plan: verify.Plan, say: Callable[[str], None], **more: Any
    ) -> bool:
        parts.append(overrides)
        with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            return main(["train", *overrides]) == 0

    monkeypatch.setattr(verify, "_train", train)
    return parts


def test_a_run_is_verified(gptpl, tmp_path, run_folder, parts_in_this_process):
    """Also one with a limit of time, which would end the parts at other steps; in a folder of any name."""
    kept = tmp_path / "it's, \\ kept = 1"
    outcome = gptpl("verify-resume", *SMALL, "trainer.max_time=00:00:00:01", f"verify.keep={kept}")
    assert outcome.status == 0, outcome.err
    assert outcome.out.endswith("identical: stopped after step 2 and resumed, the run has the same bits\n")
    assert "part 2/3: stopped, to step 2 ...\n" in outcome.err
    assert re.search(r"^  \d+ s$", outcome.err, re.MULTILINE)
    assert "part 3/3: resumed, to step 4 ..." in outcome.err
    names = {path.name for path in kept.iterdir()}
    assert names == {"straight", "stopped", "part_1.log", "part_2.log", "part_3.log"}
    assert "resuming at step 2 " in (kept / "part_3.log").read_text()
    for run in ("straight", "stopped"):
        assert run_folder(kept / run).config["trainer"]["max_time"] is None


def test_a_run_that_ends_before_the_stops_is_not_called_the_same(gptpl, parts_in_this_process):
    short = ("trainer.max_steps=3", "scheduler.warmup_steps=1", "verify.steps=9", "verify.stops=[6]")
    outcome = gptpl("verify-resume", *SMALL[:-2], *short)
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.splitlines()[-1] == (
        "gptpl: error: verify.stops must be steps from 1 to 2, before the run's end, got [6]"
    )


def test_a_run_that_is_resumed_wrongly_is_found(gptpl, monkeypatch, parts_in_this_process):
    """The random state in the checkpoint is another one."""
    train = verify._train

    def spoilt(overrides: list[str], log: Path, *others: Any, **more: Any) -> bool:
        if overrides[0].startswith("resume="):
            path = (Path(overrides[0].removeprefix("resume=")) / "checkpoints/last.ckpt").resolve()
            checkpoint = torch.load(path, weights_only=True)
            checkpoint["gptpl_resume"]["random"][0]["torch"] = torch.manual_seed(5).get_state()
            write_checkpoint(checkpoint, path)
        return train(overrides, log, *others, **more)

    monkeypatch.setattr(verify, "_train", spoilt)
    outcome = gptpl("verify-resume", *SMALL)
    assert outcome.status == 1
    assert "DIFFERENT: stopped after step 2 and resumed, the run has other bits" in outcome.out
    batches = [line.split()[1] for line in outcome.out.splitlines()[1:5]]
    assert batches == ["same"] * 4  # the order of the data does not depend on that state


@pytest.mark.slow
def test_a_signal_ends_the_part_too_and_removes_its_files(tmp_path, copies):
    """A process whose part is a shell that sleeps. Ctrl-C unwinds in the same way as SIGTERM."""
    part = tmp_path / "part"
    part.write_text('#!/bin/sh\n: > "$TMPDIR/started"\nexec sleep 100\n')
    part.chmod(0o755)
    command = ["verify-resume", "experiment=quick", "trainer.max_epochs=10000", "verify.steps=40000"]

    def before() -> None:
        os.setsid()  # the group that must be empty in the end
        sys.executable = str(part)
        tempfile.tempdir = None  # as in a new process, which asks TMPDIR

    process = copies(*command, cwd=tmp_path, output=tmp_path / "said", before=before, TMPDIR=tmp_path)
    try:
        wait_until((tmp_path / "started").exists)
        assert list(tmp_path.glob("gptpl-verify-*"))
        process.send(signal.SIGTERM)
        assert process.wait(20) == 128 + signal.SIGTERM, process.said
        assert not list(tmp_path.glob("gptpl-verify-*"))
        wait_until(lambda: not alive(process.pid))
    finally:
        if alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


def wait_until(true: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.05)


def alive(group: int) -> bool:
    """Whether a process of the group is left, other than a dead one that nobody has asked about."""
    listed = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True, check=True)
    states = [line.split() for line in listed.stdout.splitlines()]
    return any(int(pgid) == group and not state.startswith("Z") for pgid, state in states)


@pytest.mark.slow
def test_a_part_that_fails_shows_the_end_of_its_log(gptpl, tmp_path):
    """A part as a process of its own."""
    outcome = gptpl("verify-resume", *SMALL, "model.emb_dim=65")
    assert outcome.status == 1
    assert "failed with exit status 2:" in outcome.err
    assert "emb_dim must be a multiple of n_heads, got emb_dim=65" in outcome.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("callbacks", ["callbacks=none", "~callbacks.checkpoint_last"])
def test_a_run_without_checkpoints_is_refused_before_it_trains(refused, callbacks):
    assert refused("verify-resume", "experiment=quick", callbacks) == (
        "the run keeps no checkpoint to resume from: add checkpoint_last to callbacks, or callbacks=default"
    )


def test_a_misspelt_setting_of_the_run_is_refused_before_it_trains(refused):
    assert "optimizer.learning_rate" in refused("verify-resume", *SMALL, "optimizer.learning_rate=1")


def test_callbacks_of_ones_own_may_keep_the_checkpoints():
    own = ("callbacks=none", "+callbacks.mine._target_=lightning.pytorch.callbacks.ModelCheckpoint")
    verify.check_keeps_checkpoints(compose("experiment=quick", *own))


LAUNCHED = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.hosts
def test_under_torchrun_one_of_two_processes_is_killed(tmp_path):
    """Real processes: torchrun starts two that verify, each of which starts those of the runs, in turn."""
    environment = os.environ | {
        "GPTPL_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = [*LAUNCHED, "-m", "gptpl", "verify-resume", *SMALL, "data.batch_size=2", "verify.kill=process"]
    done = subprocess.run(
        [*command, "verify.keep=kept"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "identical: killed after step 2 and resumed, the run has the same bits" in done.stdout
    assert done.stdout.count("identical") == 1
    killed = json.loads((tmp_path / "kept" / "stopped" / "run.json").read_text())
    assert killed["resumed"][0]["step"] in (1, 2)  # the file of step 2 may have been under way
    log = (tmp_path / "kept" / "part_2.log").read_text()
    assert "stopped by trainer.stop_at_step" not in log


def test_under_torchrun_it_needs_a_folder_that_all_share(refused, monkeypatch):
    torchrun = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    addresses = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1, "TORCHELASTIC_RUN_ID": "none"}
    for name, value in (torchrun | addresses).items():
        monkeypatch.setenv(name, str(value))
    said = refused("verify-resume", *SMALL, "data.batch_size=2", "verify.kill=process")
    assert said.startswith("verify.keep is not set: 1 node x 2 processes, by torchrun need a folder")
