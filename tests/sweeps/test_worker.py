"""Trials that finish, fail, are killed, pruned and interrupted, and what a second start does about them."""

import math
import os
import signal
import threading
import time
from dataclasses import replace

import pytest

from gptpl.errors import InputError
from gptpl.files import run_record
from gptpl.files.durable import locked_folder
from gptpl.sweeps import jobs, outcomes, worker
from gptpl.sweeps.jobs import Command, Processes
from gptpl.sweeps.study import Search, SweepStudy


def states(results):
    return {folder: result.state for folder, result in results.items()}


def numbers(count):
    return tuple(str(number) for number in range(count))


def search(sampler, n_trials, pruner="none", **metric):
    return Search(sampler=sampler, n_trials=n_trials, pruner=pruner, seed=0, **metric)


# --- trials that end in different ways ------------------------------------------------------------------


def test_of_six_trials_three_finish_and_a_second_start_goes_on_with_the_killed_one(sweep):
    six = sweep(seed=numbers(6), shared=("name=1:fail_3:kill_5:fail",))
    results = six.work()
    assert six.started == list(numbers(6))
    assert [each.state for each in results.values()].count("finished") == 3
    assert {folder for folder, state in states(results).items() if state == "failed"} == {"1", "5"}
    assert results["1"].error == results["5"].error == "name=fail is refused"
    assert results["3"].state == "interrupted"
    assert results["3"].error == "killed by SIGKILL (the system does so when memory runs out)"

    results = six.work()
    [again] = six.starts
    assert again["arguments"] == [f"resume={six.folder / '3'}"]
    assert sorted(states(results).values()) == ["failed"] * 2 + ["finished"] * 4
    assert six.work() == results
    assert six.started == []


def test_failed_trials_are_tried_again_when_that_is_asked_for(sweep):
    three = sweep(seed=numbers(3), shared=("name=1:fail",))
    three.work()
    assert three.started == ["0", "1", "2"]
    results = three.work(retry=True)
    [again] = three.starts
    assert again["arguments"] == ["name=1:fail", "seed=1", f"run_dir={three.folder / '1'}"]
    assert states(results) == {"0": "finished", "1": "failed", "2": "finished"}


@pytest.mark.parametrize(("name", "measured"), [("nan", "train/loss, val/loss"), ("none", "nothing")])
def test_a_trial_without_a_loss_that_is_a_number_has_failed(sweep, name, measured):
    results = sweep(seed=("1",), shared=(f"name={name}",)).work()
    assert results["0"].state == "failed"
    assert results["0"].error == f"no val/loss that is a number: it measured {measured}"


def test_trials_need_no_metrics_csv(sweep):
    """As with logger=tensorboard; 9 to what the seed says in four evaluations."""
    three = sweep(seed=("1", "5"), shared=("record=own",))
    assert [each.value for each in three.work().values()] == [1.0, 5.0]


def test_trials_are_compared_by_any_metric_and_its_highest(sweep):
    given = search("grid", None, metric="val/f1", mode="max")
    three = sweep(given, seed=("5", "1", "9.5"), shared=("record=own",))
    results = three.work()
    assert [each.value for each in results.values()] == pytest.approx([0.5, 0.9, 1 - 9.125 / 10])
    found = outcomes.ranked(three.folder, list(results.values()), given)
    assert [row.result.folder for row in found] == ["1", "0", "2"]
    assert outcomes.header(given)[3:5] == ["best_val/f1", "val/f1"]
    assert [row.cells()[3:5] for row in found] == [["0.9000"] * 2, ["0.5000"] * 2, ["0.0875", "0.0500"]]


def test_a_metric_that_no_trial_measures_is_named_with_those_that_it_does(sweep):
    given = search("grid", None, metric="val/f2", mode="max")
    results = sweep(given, seed=("1",), shared=("record=own",)).work()
    assert results["0"].error == "no val/f2 that is a number: it measured val/f1, val/loss"


def test_the_run_of_a_trial_that_has_ended_is_read_once(sweep, monkeypatch):
    """Of n trials that end one by one each is read a fixed number of times, not n."""
    four = sweep(seed=numbers(4), shared=("name=1:fail",))
    results = list(four.work().values())
    read: list[str] = []

    def read_run(folder):
        read.append(folder.name)
        return original(folder)

    original = run_record.read_run
    monkeypatch.setattr("gptpl.sweeps.outcomes.read_run", read_run)
    known: dict[str, outcomes.RankedTrial] = {}
    waiting = [replace(each, state="waiting", value=math.nan) for each in results]
    for ended in range(1, 5):
        now = results[:ended] + waiting[ended:]
        known = {row.result.folder: row for row in outcomes.ranked(four.folder, now, four.search, known)}
    assert [read.count(name) for name in numbers(4)] == [1] * 4
    assert [each.best for each in known.values()] == pytest.approx([0, 2, 3, math.nan], nan_ok=True)
    running = [replace(results[0], state="running", value=math.nan)]
    for _ in range(2):  # there may be more to read of one that runs
        known = {"0": outcomes.ranked(four.folder, running, four.search, known)[0]}
    assert read.count("0") == 3


def test_a_trial_that_was_killed_before_it_saved_begins_anew(sweep):
    one = sweep(seed=("1",), shared=("name=kill",))
    one.work()
    (one.folder / "0/checkpoints/last.ckpt").unlink()
    assert one.starts
    one.work()
    [again] = one.starts
    assert again["arguments"] == ["name=kill", "seed=1", f"run_dir={one.folder / '0'}"]


def test_a_trial_whose_process_outlived_its_worker_is_left_alone(sweep):
    """As after `kill -9` of the worker: the run's folder is locked by the process that trains in it."""
    two = sweep(seed=numbers(2), shared=("name=0:kill",))
    two.work()
    assert two.started
    with locked_folder(two.folder / "0"):
        results = two.work()
    assert two.started == []
    assert results["0"].state == "interrupted"
    assert results["0"].error == "a process of an earlier start is still training it"
    assert states(two.work())["0"] == "finished"


def test_a_trial_whose_newest_checkpoint_lost_its_link_is_resumed(sweep):
    """As in a copy of the folder that was made without links."""
    one = sweep(seed=("1",), shared=("name=kill",))
    one.work()
    checkpoints = one.folder / "0/checkpoints"
    (checkpoints / "last.ckpt").rename(checkpoints / "step-00000020.ckpt")
    assert one.started
    one.work()
    assert [each["arguments"] for each in one.starts] == [[f"resume={one.folder / '0'}"]]


def test_the_loss_of_a_trial_is_one_that_it_has_learned(sweep):
    """The stand-in begins at 9 and gets to 20: it is worse than when it began, and that is what counts."""
    results = sweep(seed=("20",)).work()
    assert results["0"].value == 9 + (20 - 9) / 4


def test_a_trial_whose_process_has_not_locked_its_folder_yet_is_left_alone(sweep):
    """After `kill -9` of the worker, while the trial still reads its text: a lock that nobody holds."""
    two = sweep(seed=numbers(2), shared=("name=0:wait",))
    with two.study() as study:
        claim = study.next()
        assert claim is not None
        arguments = [*worker.PROGRAM, "name=0:wait", *claim.overrides, f"run_dir={two.folder / '0'}"]
        output = two.folder / "0.log"
        job = Processes().start(Command(arguments=arguments, cwd=two.folder, output=output))
        study.begun(claim, job.process)
        locks = list((two.folder / ".workers").glob("*.lock"))
    for lock in locks:
        lock.touch()
    results = two.work()
    assert states(results) == {"0": "running", "1": "finished"}
    (two.folder / "go").touch()
    while not (two.folder / "0/run.json").exists():
        time.sleep(0.02)
    assert sorted(two.started) == ["0", "1"]
    while job.poll() is None:
        time.sleep(0.02)
    assert states(two.work())["0"] == "finished"


def test_an_error_of_the_workers_own_lets_the_trials_save(sweep, new_seen):
    def look(running):
        if running and running[0].step == 20:
            raise OSError(28, "No space left on device")

    one = sweep(seed=("1",), shared=("name=slow",))
    with pytest.raises(OSError, match="No space left"):
        one.work(seen=new_seen(look))
    assert (one.folder / "0/checkpoints/last.ckpt").exists()


def test_a_state_that_cannot_be_read_is_named(sweep):
    one = sweep(seed=("1",))
    (one.folder / "sweep.db").write_text("this is no database" * 100)
    with pytest.raises(OSError, match=r"sweep\.db cannot be used \(file is not a database\)"):
        one.work()


# --- several at a time ----------------------------------------------------------------------------------


def test_as_many_trials_run_at_a_time_as_the_launcher_takes(sweep, new_seen, monkeypatch):
    def look(running):
        if len(running) == 3:
            (four.folder / "go").touch()

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("gptpl.sweeps.jobs.usable_cores", lambda: 7)
    four = sweep(seed=numbers(4), shared=("name=wait",))
    seen = new_seen(look)
    results = four.work(launcher=Processes(n_jobs=3), seen=seen)
    assert set(states(results).values()) == {"finished"}
    assert seen.most_at_a_time == 3
    assert {each["environment"]["OMP_NUM_THREADS"] for each in four.starts} == {"2"}


def test_two_workers_share_a_sweep_and_run_no_trial_twice(sweep, new_seen):
    """Each in a thread; they know of each other only by the files of the sweep."""
    four = sweep(seed=numbers(4), shared=("name=0:wait_1:wait",))

    def look(running):
        if (four.folder / "1").exists():  # the one has 0 and the other has 1
            (four.folder / "go").touch()

    both = [new_seen(look), new_seen(look)]
    threads = [threading.Thread(target=four.work, kwargs={"seen": seen}) for seen in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(four.started) == list(numbers(4))
    assert all(seen.endings for seen in both)
    assert set(states(four.work()).values()) == {"finished"}


def test_the_trials_of_a_worker_that_lives_are_left_to_it(sweep):
    two = sweep(seed=numbers(2))
    with two.study() as other:
        claimed = other.next()
        assert claimed is not None
        assert claimed.folder == "0"
        assert states(two.work()) == {"0": "running", "1": "finished"}
    assert states(two.work()) == {"0": "finished", "1": "finished"}


# --- Ctrl-C ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_trial_save_and_the_next_start_goes_on(sweep, new_seen, number):
    three = sweep(seed=numbers(3), shared=("name=1:slow",))

    def look(running):
        if not sent and [(trial.claim.folder, trial.step) for trial in running] == [("1", 20)]:
            sent.append(number)
            os.kill(os.getpid(), number)

    sent: list[int] = []
    before = signal.getsignal(number)
    results = three.work(seen=new_seen(look))
    assert states(results) == {"0": "finished", "1": "interrupted", "2": "waiting"}
    assert results["1"].error == "stopped by SIGTERM"
    assert signal.getsignal(number) == before
    assert three.started == ["0", "1"]
    assert set(states(three.work()).values()) == {"finished"}
    first, second = three.starts
    assert first["arguments"] == [f"resume={three.folder / '1'}"]
    assert second["folder"] == "2"


def test_a_signal_while_the_next_trial_is_chosen_is_not_lost(sweep, monkeypatch):
    def next_trial(self):
        claim = original(self)
        if claim is not None and claim.folder == "1":
            os.kill(os.getpid(), signal.SIGINT)
        return claim

    original = SweepStudy.next
    monkeypatch.setattr(SweepStudy, "next", next_trial)
    three = sweep(seed=numbers(3), shared=("name=1:slow",))
    assert states(three.work()) == {"0": "finished", "1": "interrupted", "2": "waiting"}
    assert three.started == ["0"]


def test_a_second_signal_ends_trials_that_do_not_listen(sweep, new_seen):
    def look(running):
        if running and running[0].step == 20 and len(sent) < 2:
            sent.append(signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    sent: list[int] = []
    one = sweep(seed=("1",), shared=("name=deaf",))
    results = one.work(seen=new_seen(look))
    assert results["0"].error.startswith("killed by SIGKILL")


# --- pruning --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shared", "metric"),
    [
        (("name=8:slow",), {}),
        (("name=8:slow", "record=own"), {"metric": "val/f1", "mode": "max"}),
    ],
)
def test_a_trial_that_falls_behind_is_stopped_and_counts_as_pruned(sweep, shared, metric):
    """`MedianPruner` begins after five trials: the sixth, far worse than they, is stopped and not resumed."""
    six = sweep(search("grid", None, "median", **metric), seed=(*numbers(5), "8"), shared=shared)
    results = six.work()
    assert states(results) == {**dict.fromkeys(numbers(5), "finished"), "5": "pruned"}
    assert (six.folder / "5/checkpoints/last.ckpt").exists()
    assert six.started
    assert states(six.work())["5"] == "pruned"
    assert six.started == []


# --- the processes --------------------------------------------------------------------------------------


def test_a_trial_takes_itself_for_no_part_of_another_job(sweep, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    one = sweep(seed=("1",))
    one.work()
    [start] = one.starts
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"} & start["environment"].keys()


def test_each_trial_sees_the_gpus_of_its_place_only(sweep, new_seen, monkeypatch):
    def look(running):
        if len(running) == 2:
            (four.folder / "go").touch()

    monkeypatch.setattr("gptpl.sweeps.jobs.visible_gpus", lambda: ["4", "5", "6", "7"])
    four = sweep(seed=numbers(4), shared=("name=wait",))
    launcher = Processes(gpus_per_trial=2)
    assert launcher.n_jobs == 2
    four.work(launcher=launcher, seen=new_seen(look))
    assert {each["environment"]["CUDA_VISIBLE_DEVICES"] for each in four.starts} == {"4,5", "6,7"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n_jobs": 0}, "must be 1 or more"),
        ({"gpus_per_trial": 1}, "must be 0 to 0"),
        ({"n_jobs": -1}, "got -1"),
    ],
)
def test_impossible_places_are_refused(monkeypatch, settings, words):
    monkeypatch.setattr("gptpl.sweeps.jobs.visible_gpus", list)
    with pytest.raises(InputError, match=words):
        Processes(**settings)


def test_more_trials_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr("gptpl.sweeps.jobs.visible_gpus", lambda: ["0", "1"])
    with pytest.raises(InputError, match=r"n_jobs must be 1 to 2 here, got 3"):
        Processes(n_jobs=3)


# --- other pools ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tasks_per_node", "nodes"])
def test_a_slurm_job_of_several_tasks_is_refused(name, tmp_path):
    """submitit runs the trial in each of them, and its result is then that of none."""
    words = rf"hydra\.launcher\.{name}=4 would start each trial 4 times in one folder.*trainer\.devices"
    with pytest.raises(InputError, match=words):
        jobs.slurm(folder=str(tmp_path), n_jobs=1, cluster="local", **{name: 4})


@pytest.fixture(params=["joblib", "slurm"])
def pool(request, tmp_path):
    if request.param == "joblib":
        pytest.importorskip("joblib", reason="joblib is not installed")
        launcher = jobs.joblib(n_jobs=2)
    else:
        pytest.importorskip("submitit", reason="submitit is not installed")
        launcher = jobs.slurm(folder=str(tmp_path / "slurm"), n_jobs=2, cluster="local", timeout_min=5)
    yield launcher
    launcher.close()


@pytest.mark.slow
def test_a_pool_runs_trials_as_processes_do(sweep, new_seen, pool):
    def look(running):
        slow = [trial for trial in running if trial.claim.folder == "2" and trial.step == 20]
        if slow and len(running) == 1 and not sent:
            sent.append(signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    sent: list[int] = []
    three = sweep(seed=numbers(3), shared=("name=0:fail_1:kill_2:slow",))
    results = three.work(launcher=pool, seen=new_seen(look))
    assert states(results) == {"0": "failed", "1": "interrupted", "2": "interrupted"}
    assert results["0"].error == "name=fail is refused"
    assert results["1"].error.startswith("killed by SIGKILL")
    assert results["2"].error == "stopped by SIGTERM"
    assert three.started
    assert states(three.work(launcher=pool)) == {"0": "failed", "1": "finished", "2": "finished"}
    assert sorted(three.started) == ["1", "2"]
