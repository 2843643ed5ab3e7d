"""Folders claimed for runs, by processes that race for them."""

import contextlib
import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gptpl.errors import InputError
from gptpl.files.durable import is_locked
from gptpl.runs.claims import PROCESS_CHECKPOINT, RunClaim, claim_new_run, process_checkpoint, run_to_continue

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="folders cannot be locked on Windows")

BEGIN = """
import sys, time
from pathlib import Path
from gptpl.errors import InputError
from gptpl.runs import claims
go = Path(sys.argv[1])
print("ready", flush=True)
while not go.exists():
    time.sleep(0.001)
"""


def race(tmp_path: Path, code: str, *, processes: int) -> list[str]:
    """Runs the code in processes that begin it at the same moment; returns what each printed."""
    go = tmp_path / "go"
    started = [
        subprocess.Popen([sys.executable, "-c", BEGIN + code, go], stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    go.touch()
    outputs = [process.communicate(timeout=60)[0].strip() for process in started]
    assert [process.returncode for process in started] == [0] * processes
    return outputs


def test_runs_of_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTPL_RUNS", str(tmp_path / "runs"))
    code = """
claims._moment = lambda: "2026-11-26_02-14-00"
claim = claims.claim_new_run(None, name="quick")
(claim.path / "config.yaml").write_text("")
print(claim.path.name)
"""
    names = race(tmp_path, code, processes=4)
    first = "2026-11-26_02-14-00"
    assert sorted(names) == [first, f"{first}_2", f"{first}_3", f"{first}_4"]
    assert sorted(path.name for path in (tmp_path / "runs/quick").iterdir()) == sorted(names)


@pytest.mark.parametrize("there", [False, True])
def test_of_two_runs_with_one_folder_one_is_refused(tmp_path, there):
    if there:
        (tmp_path / "a/b").mkdir(parents=True)
    code = """
import os
try:
    with claims.claim_new_run(go.parent / "a/b", name="x") as claim:
        while len(list(go.parent.glob("refused-*"))) < 2:
            time.sleep(0.01)  # encoding the text
        (claim.path / "config.yaml").write_text("")
    print("trained")
except InputError as error:
    (go.parent / f"refused-{os.getpid()}").touch()
    print(error)
"""
    outputs = race(tmp_path, code, processes=3)
    assert outputs.count("trained") == 1
    assert sum(f"another process is training in {tmp_path}/a/b" in output for output in outputs) == 2
    assert list((tmp_path / "a/b").iterdir()) == [tmp_path / "a/b/config.yaml"]


def test_nobody_shares_a_folder_that_comes_and_goes(tmp_path):
    """Each release removes what it made, up to the folder that was there before, while others claim it."""
    code = """
had = 0
for _ in range(60):
    try:
        with claims.claim_new_run(go.parent / "new/a/b", name="x") as claim:
            (claim.path / "mine").touch(exist_ok=False)
            (claim.path / "mine").unlink()
            had += 1
    except InputError as error:
        assert "another process is training" in str(error), error
print(had)
"""
    outputs = race(tmp_path, code, processes=2)
    assert all(int(output) > 0 for output in outputs)
    with claim_new_run(tmp_path / "new/a/b", name="x"):
        pass


def test_a_run_that_was_refused_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTPL_RUNS", str(tmp_path / "runs"))
    with pytest.raises(InputError, match="warmup"), claim_new_run(tmp_path / "a/b", name="x"):
        raise InputError("warmup_steps=10 leaves nothing")
    with claim_new_run(None, name="quick") as claim:
        assert claim.path.parent == tmp_path / "runs/quick"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_there_stays_and_so_do_files(tmp_path):
    (tmp_path / "mine").mkdir()
    with claim_new_run(tmp_path / "mine", name="x"):
        pass
    with claim_new_run(tmp_path / "new", name="x") as claim:
        (claim.path / "train.log").touch()
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "new"}


def test_a_claim_ends_with_its_last_reference(tmp_path):
    claim = claim_new_run(tmp_path / "a", name="x")
    assert is_locked(claim.path)
    del claim
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_a_claim_ends_with_its_process_however_it_does(tmp_path):
    code = """
claim = claims.claim_new_run(go.parent / "a", name="x")
print("claimed", flush=True)
time.sleep(60)
"""
    (tmp_path / "go").touch()
    other = subprocess.Popen(
        [sys.executable, "-c", BEGIN + code, tmp_path / "go"], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert [other.stdout.readline() for _ in range(2)] == ["ready\n", "claimed\n"]
    with pytest.raises(InputError, match="another process is training"):
        claim_new_run(tmp_path / "a", name="x")
    other.send_signal(signal.SIGKILL)
    other.communicate()
    with claim_new_run(tmp_path / "a", name="x") as claim:
        assert claim.path.is_dir()


def test_a_child_neither_ends_the_claim_nor_outlives_it(tmp_path):
    (tmp_path / "a").mkdir()
    claim = claim_new_run(tmp_path / "a", name="x")
    context = multiprocessing.get_context("fork")
    child = context.Process(target=claim.release)
    child.start()
    child.join()
    assert is_locked(claim.path)
    assert claim.path.is_dir()
    child = context.Process(target=time.sleep, args=(60,))  # as a loader's process does
    child.start()
    claim.release()
    claim_new_run(tmp_path / "a", name="x").release()
    child.kill()
    child.join()


@pytest.mark.parametrize("name", ["config.yaml", "run.json", "metrics.csv", "checkpoints/step-1.ckpt"])
def test_a_folder_with_a_run_is_refused(tmp_path, name):
    (tmp_path / "a" / name).parent.mkdir(parents=True)
    (tmp_path / "a" / name).touch()
    with pytest.raises(InputError, match=r"run_dir=.*/a holds .* a?\w* ?run.*choose another"):
        claim_new_run(tmp_path / "a", name="x")
    assert not is_locked(tmp_path / "a")


def test_what_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for name, words in {
        "file": "is a file: give a folder",
        "nowhere": "is a file: give a folder",
        "file/a": r"cannot be made \(Not a directory\)",
    }.items():
        with pytest.raises(InputError, match=words):
            claim_new_run(tmp_path / name, name="x")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the system's own user may do all")
def test_a_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match=r"cannot be made \(Permission denied\)"):
        claim_new_run(tmp_path / "a/b", name="x")


def test_a_resumed_run_is_claimed_as_it_is(tmp_path, make_run):
    run = make_run(tmp_path / "a")
    before = sorted(run.rglob("*"))
    with RunClaim(run):
        assert is_locked(run)
        with pytest.raises(InputError, match="another process is training"):
            RunClaim(run)
    assert sorted(run.rglob("*")) == before


# --- resume=auto ----------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """What a run with a checkpoint has left."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints/step-00000004.ckpt").touch()
    given = ["experiment=quick", "optimizer.lr=1e-3", "+callbacks.mine._target_=mine.Watch"]
    (folder / "run.json").write_text(json.dumps({"overrides": given}))
    return folder


def test_where_nothing_is_saved_a_run_begins(tmp_path):
    given = ["experiment=quick", f"run_dir={tmp_path / 'run'}"]
    assert run_to_continue(given) == (given, None)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").touch()
    assert run_to_continue(given) == (given, None)


def test_the_same_command_continues_with_the_same_settings(saved):
    """Given again they change nothing, but say that they are meant: addresses, and where to stop."""
    same = ["experiment=quick", "optimizer.lr=1e-3", "data.path=hf://x/y", f"run_dir={saved}"]
    assert run_to_continue(same) == (["optimizer.lr=1e-3", "data.path=hf://x/y"], str(saved))


def test_a_choice_that_the_run_was_not_started_with_is_a_change(saved):
    more = ["experiment=quick", "scheduler=linear", "trainer.max_steps=9", f"run_dir='{saved}'"]
    assert run_to_continue(more) == (["scheduler=linear", "trainer.max_steps=9"], str(saved))


@pytest.mark.parametrize("record", ["{}", '{"overrides": 5}', "no JSON"])
def test_a_record_without_overrides_leaves_all_of_them(saved, record):
    (saved / "run.json").write_text(record)
    with contextlib.suppress(InputError):  # it is damaged: said where the run is resumed
        assert run_to_continue(["experiment=quick", f"run_dir={saved}"])[0] == ["experiment=quick"]


def test_a_class_that_is_given_again_is_trusted(saved):
    mine = "+callbacks.mine._target_=mine.Watch"
    assert run_to_continue([mine, f"run_dir={saved}"])[0] == ["trust=[mine]"]
    whole = "+callbacks.mine={_target_: mine.Watch, every: 2}"
    assert run_to_continue([whole, f"run_dir={saved}"])[0] == [whole, "trust=[mine]"]
    assert run_to_continue([mine, "trust=[]", f"run_dir={saved}"])[0] == ["trust=[]"]


@pytest.mark.parametrize("given", [[], ["run_dir=null"], ["run_dir=runs/${name}"]])
def test_without_a_folder_there_is_nothing_to_continue(given):
    with pytest.raises(InputError, match=r"resume=auto needs (run_dir=FOLDER|the folder itself)"):
        run_to_continue(given)


RECORD = '{"started": "2026-01-31T12:00:00+00:00", "versions": {}, "overrides": []}'


def test_what_an_unfinished_run_left_is_moved_aside(tmp_path, caplog):
    folder = tmp_path / "run"
    for _ in range(2):
        with claim_new_run(folder, name="x", again=True):
            (folder / "config.yaml").write_text("a: 1")
            (folder / "run.json").write_text(RECORD)
            (folder / "train.log").write_text("began")
            (folder / "mine.txt").write_text("no file of a run")
    with claim_new_run(folder, name="x", again=True):
        assert sorted(path.name for path in folder.iterdir() if path.name[0] != ".") == [
            "mine.txt", "unfinished_1", "unfinished_2",
        ]  # fmt: skip
    assert (folder / "unfinished_1/train.log").read_text() == "began"
    assert "held a run that had not saved anything yet" in caplog.text


def test_checkpoints_are_never_moved_aside(tmp_path, saved):
    """A run may save its first one between the look and the claim."""
    with pytest.raises(InputError, match="holds checkpoints that were not there a moment ago"):
        claim_new_run(saved, name="x", again=True)
    assert (saved / "checkpoints/step-00000004.ckpt").exists()


def test_a_folder_that_is_no_run_of_gptpl_is_left_alone(tmp_path):
    (tmp_path / "config.yaml").write_text("of something else: 1")
    with pytest.raises(InputError, match=r"holds config\.yaml, of a run or of another program: choose"):
        claim_new_run(tmp_path, name="x", again=True)
    assert [path.name for path in tmp_path.iterdir() if path.name[0] != "."] == ["config.yaml"]


def test_a_folder_of_runs_is_not_that_of_a_run(tmp_path):
    """Which would hide the others: `find_runs` does not look into a run."""
    (tmp_path / "quick/one").mkdir(parents=True)
    (tmp_path / "quick/one/config.yaml").touch()
    for folder, first in ((tmp_path, "quick/one"), (tmp_path / "quick", "one")):
        with pytest.raises(InputError, match=rf"holds runs \({first}\): .*give run_dir={folder}/NAME"):
            claim_new_run(folder, name="x")


@pytest.mark.parametrize(
    ("rank", "own", "told"), [("1", True, True), ("0", True, False), ("1", False, False)]
)
def test_the_checkpoint_that_the_first_process_verified_is_known_to_those_it_starts(
    monkeypatch, tmp_path, rank, own, told
):
    """Not to a first process, which has it from elsewhere, and not of another run."""
    for name in ("RANK", "NODE_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "run/checkpoints"
    checkpoint = folder / "step-00000002.ckpt"
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setenv(PROCESS_CHECKPOINT, str(checkpoint))
    asked = folder if own else tmp_path
    assert process_checkpoint(asked) == (checkpoint if told else None)
