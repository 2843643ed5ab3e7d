"""Processes that a launcher started: who they are, what they tell each other, and when one fails."""

import errno
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]

from gptpl.checkpoints import files
from gptpl.checkpoints.files import CheckpointFolder, Damaged, GoodCheckpoint, write_checkpoint
from gptpl.errors import InputError, ProcessError
from gptpl.runs.resume import found_by_node
from gptpl.runs.trainer import launched
from gptpl.training import processes as module
from gptpl.training.processes import Launcher, Processes, find_launcher, meet, session
from gptpl.training.run_log import further_process, is_first_process

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "node-a",
    "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}  # fmt: skip
SRUN = {
    "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NODEID": "1", "SLURM_NTASKS": "4", "MASTER_ADDR": "node-a", "MASTER_PORT": "15000",
}  # fmt: skip


# --- who they are ---------------------------------------------------------------------------------------


def test_torchrun_says_who_this_is():
    found = find_launcher(TORCHRUN)
    assert found is not None
    assert (found.rank, found.world_size, found.local_rank, found.nodes, found.node_rank) == (5, 8, 1, 2, 1)
    assert (found.address, found.port, found.hosts_store) == ("node-a", 29500, True)
    assert str(found) == "2 nodes x 4 processes, by torchrun"


def test_slurm_says_who_this_is():
    found = find_launcher(SRUN)
    assert found is not None
    assert (found.rank, found.world_size, found.local_rank, found.local_world_size) == (3, 4, 1, 2)
    assert (found.nodes, found.node_rank, found.address, found.port) == (2, 1, "node-a", 15000)
    assert find_launcher(SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)"}) == found
    step = {"SLURM_STEP_NODELIST": "gpu[07-08,11]", "SLURM_JOB_ID": "1234567", "MASTER_ADDR": ""}
    found = find_launcher(SRUN | step | {"MASTER_PORT": ""})
    assert found is not None
    assert (found.address, found.port) == ("gpu07", 19567)


def test_without_local_ranks_every_process_has_a_node():
    """As in a PyTorchJob of Kubernetes."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    found = find_launcher({name: TORCHRUN[name] for name in names})
    assert found is not None
    assert (found.rank, found.world_size, found.local_rank, found.nodes, found.node_rank) == (5, 8, 0, 8, 5)
    assert (found.address, found.port, found.hosts_store) == ("node-a", 29500, False)
    assert str(found) == "8 nodes x 1 process, by the environment (RANK, WORLD_SIZE)"


@pytest.mark.parametrize(
    ("without", "words"),
    [
        (("LOCAL_WORLD_SIZE",), "RANK=5, but no LOCAL_WORLD_SIZE: set it"),
        (("LOCAL_RANK",), "RANK=5, but no LOCAL_RANK: set it"),
        (("MASTER_ADDR", "LOCAL_RANK", "LOCAL_WORLD_SIZE"), "RANK=5, but no MASTER_ADDR: set it"),
        (("MASTER_ADDR", "MASTER_PORT"), "RANK=5, but no MASTER_ADDR and no MASTER_PORT: set it"),
        (("WORLD_SIZE",), "RANK=5, but no WORLD_SIZE: set it"),
    ],
)
def test_what_a_launcher_does_not_set_is_named(without, words):
    with pytest.raises(InputError, match=words):
        find_launcher({name: value for name, value in TORCHRUN.items() if name not in without})


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"},
    ],
    ids=["alone", "one by itself", "started by Lightning", "in the script of sbatch"],
)
def test_without_a_launcher_there_is_none(environment):
    assert find_launcher(environment) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"RANK": "first"}, "RANK='first'"),
        ({"LOCAL_WORLD_SIZE": "3"}, "8 processes, not equally many on every node"),
        ({"LOCAL_WORLD_SIZE": "0"}, "8 processes, not equally many"),
        ({"RANK": "8"}, "rank 8 of 8 processes: the first one has rank 0"),
        ({"WORLD_SIZE": "0"}, "rank 5 of 0 processes"),
    ],
)
def test_a_launcher_that_contradicts_itself_is_refused(changes, words):
    with pytest.raises(InputError, match=words):
        find_launcher(TORCHRUN | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"MASTER_PORT": "abc"}, "MASTER_PORT='abc'"),
        ({"MASTER_PORT": "", "SLURM_JOB_ID": "12_3"}, "SLURM_JOB_ID='12_3'"),
        ({"SLURM_STEP_TASKS_PER_NODE": "3,1"}, "SLURM started 4 processes, not equally many on every node"),
        ({"SLURM_STEP_NUM_NODES": "3"}, "SLURM started 4 processes, not equally many"),
        ({"SLURM_STEP_NUM_NODES": "0"}, "SLURM started 4 processes, not equally many"),
    ],
)
def test_a_slurm_that_cannot_be_followed_is_refused(changes, words):
    with pytest.raises(InputError, match=words):
        find_launcher(SRUN | changes)


@pytest.mark.parametrize(
    ("environment", "which"),
    [
        ({}, ""),
        ({"RANK": "0", "LOCAL_RANK": "0"}, ""),
        ({"RANK": "4", "LOCAL_RANK": "0"}, "rank 4"),  # the first of the second node
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "rank 1"),
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, "node 1"),
        ({"LOCAL_RANK": "2", "NODE_RANK": "0"}, "local rank 2"),
    ],
)
def test_only_rank_0_is_the_first(monkeypatch, environment, which):
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (further_process(), is_first_process()) == (which, not which)


@pytest.mark.parametrize("left", [{}, {"RANK": "0"}, {"RANK": "3"}, {"RANK": "0", "WORLD_SIZE": "1"}])
@pytest.mark.parametrize("rank", [0, 3])
def test_a_variable_that_is_left_from_elsewhere_makes_no_other_process_the_first(monkeypatch, left, rank):
    """In a task of srun: a run has one first process, whoever is asked."""
    environment = SRUN | left | {"SLURM_PROCID": str(rank)}
    for name in {*TORCHRUN, *SRUN, "NODE_RANK"}:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = find_launcher()
    assert found is not None
    assert found.rank == rank
    assert is_first_process() == (rank == 0)


def test_a_launcher_that_wants_several_processes_on_a_node_has_to_start_them():
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    with pytest.raises(InputError, match="PET_NPROC_PER_NODE=8, but this is the only process of its node"):
        find_launcher({name: TORCHRUN[name] for name in names} | {"PET_NPROC_PER_NODE": "8"})


def test_devices_and_nodes_follow_from_the_launcher():
    launcher = find_launcher(TORCHRUN)
    assert launcher is not None
    conf = {"devices": 1, "num_nodes": 1, "strategy": "auto"}
    assert launched(conf, launcher) == {"devices": 4, "num_nodes": 2, "strategy": "ddp"}
    assert launched(conf | {"devices": "auto", "strategy": "fsdp"}, launcher) == {
        "devices": 4,
        "num_nodes": 2,
    }
    words = "but there are 2 nodes x 4 processes, by torchrun: leave it out"
    with pytest.raises(InputError, match=rf"^trainer.devices=2, {words}, or give auto$"):
        launched(conf | {"devices": 2}, launcher)
    with pytest.raises(InputError, match=rf"^trainer.num_nodes=3, {words}$"):
        launched(conf | {"num_nodes": 3}, launcher)


# --- what they tell each other --------------------------------------------------------------------------

Each = Callable[[Processes], Any]


@pytest.fixture
def together() -> Callable[[Each], list[Any]]:
    """`together(say)`: what `say` returns or raises in each of three processes, threads here, by rank."""
    store = HashStore()
    hosts = ["a", "a", "b"]

    def run(say: Each) -> list[Any]:
        found: list[Any] = [None] * len(hosts)

        def process(rank: int) -> None:
            launcher = Launcher(
                name="torchrun", rank=rank, world_size=3, local_rank=0, local_world_size=1, node_rank=rank,
                address="a", port=1, hosts_store=True,
            )  # fmt: skip
            one = Processes(launcher=launcher, store=store, timeout=timedelta(seconds=1), hosts=list(hosts))
            try:
                found[rank] = say(one)
            except (InputError, ProcessError, ZeroDivisionError) as error:
                found[rank] = error

        threads = [threading.Thread(target=process, args=(rank,)) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    return run


def test_all_hear_what_each_says(together):
    def say(one: Processes) -> Any:
        first = one.gathered({"rank": one.launcher.rank})
        return first, one.gathered(one.launcher.rank * 2)

    assert together(say) == [([{"rank": 0}, {"rank": 1}, {"rank": 2}], [0, 2, 4])] * 3


def test_the_first_decides(together):
    def say(one: Processes) -> Any:
        return one.from_first(lambda: f"made by {one.launcher.rank}")

    assert together(say) == ["made by 0"] * 3


@pytest.mark.parametrize("own", [{}, {2: "other"}])
def test_who_has_the_folder_of_the_first(together, tmp_path, own):
    def say(one: Processes) -> list[bool]:
        folder = tmp_path / own.get(one.launcher.rank, "shared")
        folder.mkdir(exist_ok=True)
        return one.seeing(folder, seconds=0.2)

    assert together(say) == [[True, True, not own]] * 3
    assert not [*tmp_path.glob("*/.*")]


def test_who_differs_in_what_is_said_by_all(together):
    def say(one: Processes) -> None:
        one.agree({"seed": 1, "optimizer.lr": 0.1 + (one.launcher.rank == 2), "torch": "2.13"})

    words = "rank 2 on b would train something else than rank 0 on a: optimizer.lr is 1.1, not 0.1: start all"
    found = together(say)
    assert all(isinstance(error, InputError) and str(error).startswith(words) for error in found)


def test_the_same_facts_are_no_difference(together):
    assert together(lambda one: one.agree({"seed": 1})) == [None] * 3


@pytest.mark.parametrize(("own", "heard"), [(InputError, InputError), (ZeroDivisionError, ProcessError)])
def test_when_one_fails_the_others_say_why(together, own, heard):
    def say(one: Processes) -> None:
        try:
            if one.launcher.rank == 1:
                raise own("data.path=x does\nnot exist")
        except BaseException as error:
            one.failed(error, reads=True)
            raise
        one.gathered("ready")

    found = together(say)
    assert type(found[1]) is own
    for error in (found[0], found[2]):
        assert type(error) is heard
        assert str(error) == "rank 1 on a failed: data.path=x does not exist"


def test_one_that_does_not_come_is_named(together):
    def say(one: Processes) -> Any:
        return None if one.launcher.rank == 2 else one.gathered("ready")

    found = together(say)
    for error in found[:2]:
        assert isinstance(error, ProcessError)
        assert "rank 2 on b has ended, or not come as far as this process within 1 s" in str(error)


def test_after_a_failure_in_training_the_first_hears_the_others(together, monkeypatch):
    monkeypatch.setattr(module, "_LAST_WORDS", timedelta(seconds=0.5))

    def say(one: Processes) -> Any:
        one.gathered("ready")
        if one.launcher.rank == 1:
            one.failed(RuntimeError("out of memory"), reads=False)
        return one.last_words() if one.launcher.rank == 0 else None

    said = together(say)[0]
    assert said[0] == "rank 1 on a failed: out of memory"
    assert said[1].startswith("rank 2 on b says nothing: its process or node is gone")


def test_all_end_together_the_first_as_the_last(together):
    ends, recorded = list[str](), threading.Event()

    def say(one: Processes) -> None:
        if one.launcher.rank == 0:
            ends.append("recorded")
            recorded.set()
        elif one.launcher.rank == 1:
            recorded.wait(20)
            time.sleep(0.2)  # in which one that does not wait would end
            ends.append("the last begins to end")
        one.wait_to_end()
        if one.launcher.rank == 0:
            ends.append("the first has ended")

    assert together(say) == [None] * 3
    assert ends == ["recorded", "the last begins to end", "the first has ended"]


def test_a_first_that_does_not_record_the_stop_is_no_stop(together):
    errors = together(lambda one: None if one.launcher.rank == 0 else one.wait_to_end())[1:]
    assert all(isinstance(error, ProcessError) for error in errors)
    assert {str(error) for error in errors} == {
        "rank 0 on a has ended without a record of the stop: see what it says"
    }


# --- the checkpoint that they resume from ---------------------------------------------------------------


@pytest.fixture
def saved(tmp_path) -> CheckpointFolder:
    """With the steps 1 and 2, of which the second is damaged."""
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (1, 2):
        write_checkpoint({"state_dict": {"weight": torch.ones(9)}}, folder.path(step))
    folder.path(2).write_bytes(b"cut")
    return folder


@pytest.fixture
def read(monkeypatch) -> list[tuple[str, str]]:
    """The threads that read a checkpoint to verify it, and which."""
    found, verify = list[tuple[str, str]](), files.verify

    def verified(path: Path) -> str | None:
        found.append((threading.current_thread().name, path.name))
        return verify(path)

    monkeypatch.setattr(files, "verify", verified)
    return found


def placed(one: Processes) -> Processes:
    """Ranks 0 and 1 on a node, rank 2 on another."""
    rank = one.launcher.rank
    threading.current_thread().name = f"rank {rank}"
    one.launcher = replace(one.launcher, local_rank=rank % 2, node_rank=rank // 2)
    return one


def test_one_process_of_a_node_reads_the_checkpoints(together, saved, read):
    found = together(lambda one: found_by_node(saved, placed(one)))
    damaged = Damaged(path=saved.path(2), reason="is damaged (its SHA-256 is not the recorded one)")
    assert found == [GoodCheckpoint(path=saved.path(1), damaged=[damaged])] * 3
    names = [saved.path(step).name for step in (2, 1)]
    assert sorted(read) == sorted((rank, name) for rank in ("rank 0", "rank 2") for name in names)


def test_each_node_has_its_own_checkpoints(together, saved, tmp_path):
    other = CheckpointFolder(tmp_path / "other", keep=2)
    found = together(lambda one: found_by_node(other if one.launcher.rank == 2 else saved, placed(one)))
    assert [None if each is None else each.path for each in found] == [saved.path(1), saved.path(1), None]


def test_a_process_whose_node_has_not_looked_looks_itself(together, saved, read):
    """The first does not see the folder and begins a new run; the difference is reported later."""

    def say(one: Processes) -> Any:
        one = placed(one)
        return one.gathered(None) and None if one.launcher.rank == 0 else found_by_node(saved, one)

    found = together(say)
    assert [each and each.path for each in found] == [None, saved.path(1), saved.path(1)]
    assert {rank for rank, _ in read} == {"rank 1", "rank 2"}


def one_of_three(rank: int) -> Launcher:
    return Launcher(
        name="torchrun", rank=rank, world_size=3, local_rank=0, local_world_size=1, node_rank=rank,
        address="a", port=1, hosts_store=True,
    )  # fmt: skip


def test_processes_that_are_started_again_do_not_hear_those_before():
    """At the same store, and not all at the same moment."""
    store, before = HashStore(), set[str]()

    def start(rank: int, seconds: float, names: dict[int, str]) -> None:
        time.sleep(seconds)
        names[rank] = session(store, one_of_three(rank), timedelta(seconds=5))

    for again in range(3):
        names: dict[int, str] = {}
        later = [0.15 * ((rank + again) % 3) for rank in range(3)]
        threads = [threading.Thread(target=start, args=(rank, later[rank], names)) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(names) == 3
        assert len({*names.values()} - before) == len({*names.values()}) == 1
        before |= {*names.values()}


# --- where they meet ------------------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch) -> Callable[..., None]:
    """`started(**variables)`: in the environment of one of two processes."""
    monkeypatch.setattr(module, "_met", None)

    def start(**variables: Any) -> None:
        given = {
            "RANK": 0,
            "WORLD_SIZE": 2,
            "LOCAL_RANK": 0,
            "LOCAL_WORLD_SIZE": 1,
            "MASTER_ADDR": "127.0.0.1",
        }
        for name, value in (given | variables).items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)

    return start


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def test_a_first_process_that_is_not_there_is_said(started):
    port = free_port()
    started(RANK=1, MASTER_PORT=port)
    with pytest.raises(ProcessError, match=rf"rank 1 cannot reach rank 0 at 127.0.0.1:{port} within 1 s"):
        meet(timedelta(seconds=1))


def test_a_second_process_that_does_not_come_is_said(started):
    started(RANK=0, MASTER_PORT=free_port())
    with pytest.raises(ProcessError, match=r"rank 0 has waited 1 s .*for rank 1 of 2: see what it says"):
        meet(timedelta(seconds=1))


def test_a_port_that_is_taken_is_said(started):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        started(RANK=0, MASTER_PORT=port)
        with pytest.raises(ProcessError, match=f"port {port} of this machine is in use"):
            meet(timedelta(seconds=1))


def test_one_process_alone_meets_nobody(started):
    started(WORLD_SIZE=1, MASTER_PORT=1)
    assert meet(timedelta(seconds=1)) is None
    assert not dist.is_initialized()


def test_the_port_for_a_group_that_is_there_is_taken_before_it_is_told(started, monkeypatch):
    """Else another program may take it first."""
    taken = []

    def broadcast(port: torch.Tensor, src: int) -> None:
        with socket.socket() as other:
            try:
                other.bind(("", int(port)))
            except OSError as error:
                taken.append(error.errno)

    group = {"is_initialized": True, "get_world_size": 2, "get_backend": "gloo"}
    for name, value in group.items():
        monkeypatch.setattr(dist, name, lambda value=value: value)
    monkeypatch.setattr(dist, "broadcast", broadcast)
    started(RANK=0, MASTER_PORT=free_port())
    with pytest.raises(ProcessError, match="rank 0 has waited 1 s"):
        meet(timedelta(seconds=1))
    assert taken == [errno.EADDRINUSE]
