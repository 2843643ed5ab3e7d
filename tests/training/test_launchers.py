"""Runs on two machines: torchrun on each, which here are one, or network namespaces joined by a cable."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import lightning as L
import psutil
import pytest
import torch

import gptpl
from experiments.data_parallel.hosts import Hosts, ip
from gptpl.checkpoints import files
from gptpl.checkpoints.format import read_checkpoint

ROOT = Path(__file__).parents[2]
SETTINGS = (
    *("experiment=quick", "model.drop_rate=0.1", "data.batch_size=4", "trainer.max_steps=12", "trainer=cpu"),
    *("scheduler.warmup_steps=2", "eval_every_n_steps=6", "~callbacks.sample_text", "resume=auto"),
    *("callbacks.checkpoint_last.every_n_steps=1", "trainer.attention=sdpa", "trainer.head=fused"),
)
"""With the choices that processes measure, each start of them by itself: bits are compared."""


class Slow(L.Callback):
    """Leaves the time to pull a cable, or to start another machine."""

    def __init__(self, *, seconds: float = 0.3) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, *args: Any) -> None:
        time.sleep(self.seconds)


class Machines:
    """Machines that train together: one torchrun each, with one process."""

    def __init__(self, folder: Path, hosts: Hosts | None) -> None:
        self.folder, self.hosts = folder, hosts
        self.agents: list[subprocess.Popen[bytes]] = []

    def start(
        self,
        *overrides: str,
        second: tuple[str, ...] = (),
        without: str = "",
        restarts: int = 0,
        nodes: str = "2",
        after: Callable[[], None] = lambda: None,
    ) -> None:
        """All with these overrides; the second machine with more, and when `after` has returned."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        settings = [each for each in SETTINGS if each not in without]
        for number in range(int(nodes[-1])):
            if number == 1:
                after()
            prefix, addresses = [], ["127.0.0.1", "127.0.0.1"]
            if self.hosts is not None:
                prefix = self.hosts.command(number)
                addresses = [self.hosts.address(each) for each in (0, number)]
            command = [
                *(*prefix, sys.executable, "-m", "torch.distributed.run", "--nnodes", nodes),
                *("--nproc-per-node", "1", "--max-restarts", str(restarts), "--rdzv-backend", "c10d"),
                *("--rdzv-endpoint", f"{addresses[0]}:{port}", "--rdzv-id", "test", "--local-addr"),
                *(addresses[-1],),
                *(f"--rdzv-conf=is_host={int(number == 0)},last_call_timeout=1,read_timeout=10",),
                *("-m", "gptpl", "train", *settings, f"run_dir={self.run_dir}", *overrides),
                *(second if number else ()),
            ]
            environment = os.environ | {
                # torch 2.13's shared store does not tell a machine that comes later where rank 0 is.
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": str(int(nodes != "2")),
                "GPTPL_CACHE": str(self.folder / f"cache_{number}"),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(ROOT),
            }
            with self.log(number).open("ab") as log:
                agent = subprocess.Popen(
                    command, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True
                )
            self.agents.append(agent)

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def log(self, number: int) -> Path:
        return self.folder / f"machine_{number}.log"

    def statuses(self, timeout: float = 150) -> list[int]:
        """Wait for all to end."""
        deadline = time.monotonic() + timeout
        found = [agent.wait(max(1.0, deadline - time.monotonic())) for agent in self.agents]
        self.agents.clear()
        return found

    def said(self, number: int) -> str:
        return self.log(number).read_text(errors="replace")

    def reaches(self, step: int) -> None:
        """Wait until that step is saved."""
        deadline = time.monotonic() + 100
        while not (self.run_dir / f"checkpoints/step-{step:08d}.ckpt").exists():
            assert time.monotonic() < deadline, self.said(0)[-3000:]
            assert all(agent.poll() is None for agent in self.agents), self.said(0)[-3000:]
            time.sleep(0.02)

    def worker(self, number: int) -> psutil.Process:
        """The process that trains on a machine."""
        below = psutil.Process(self.agents[number].pid).children(recursive=True)
        found = [one for one in below if "torch.distributed.run" not in one.cmdline()]
        assert found, f"no process trains on machine {number}"
        return found[0]

    def left(self) -> list[psutil.Process]:
        """Those that still run, agents and what they have started."""
        mark, every = f"run_dir={self.run_dir}", psutil.process_iter(["cmdline"])
        return [process for process in every if mark in (process.info["cmdline"] or ())]

    def end(self) -> None:
        """Kill what is left, until nothing is; torchrun starts its processes in sessions of their own."""
        while left := self.left():
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.02)
        for agent in self.agents:
            agent.wait()


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    found = Machines(tmp_path, None)
    yield found
    found.end()


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    checkpoint = read_checkpoint(run_dir / "checkpoints" / "last.ckpt")
    assert checkpoint["gptpl_resume"]["step"] == 12
    state: dict[str, torch.Tensor] = checkpoint["state_dict"]
    return state


@pytest.fixture(scope="module")
def unbroken(
    tmp_path_factory: pytest.TempPathFactory, gptpl_train: Callable[..., str]
) -> dict[str, torch.Tensor]:
    """The weights that two processes end with which nobody disturbs."""
    folder = tmp_path_factory.mktemp("unbroken")
    two = ("trainer.strategy=ddp", "trainer.devices=2", "run_dir=run")
    gptpl_train(folder, *(each for each in SETTINGS if each != "resume=auto"), *two, ranks=2)
    return weights(folder / "run")


@pytest.mark.hosts
def test_a_killed_process_costs_a_restart_and_no_bit(
    machines: Machines, unbroken: dict[str, torch.Tensor]
) -> None:
    machines.start(restarts=2)
    machines.reaches(4)
    machines.worker(1).kill()
    assert machines.statuses() == [0, 0], machines.said(0)[-3000:]
    found = weights(machines.run_dir)
    assert all(torch.equal(found[name], tensor) for name, tensor in unbroken.items())
    record = json.loads((machines.run_dir / "run.json").read_text())
    assert len(record["resumed"]) == 1
    assert [path.name for path in machines.folder.glob("runs*")] == []  # no ghost of the other machine
    log = (machines.run_dir / "train.log").read_text()
    assert log.count("processes: 2 nodes x 1 process, by torchrun") == 2
    assert "step 0:" not in machines.said(1)  # one of them logs


@pytest.mark.hosts
def test_processes_with_other_settings_end_all_of_them(machines: Machines) -> None:
    machines.start("seed=7", second=("seed=1",))
    assert machines.statuses() == [1, 1]
    words = "rank 1 on {0} would train something else than rank 0 on {0}: seed is 1, not 7"
    assert words.format(socket.gethostname()) in machines.said(0)
    assert not (machines.run_dir / "run.json").exists()


@pytest.mark.hosts
def test_a_folder_that_is_taken_ends_all_of_them(machines: Machines) -> None:
    (machines.run_dir / "checkpoints").mkdir(parents=True)
    (machines.run_dir / "config.yaml").write_text("{}")
    machines.start(without="resume=auto")
    assert machines.statuses() == [1, 1]
    assert f"run_dir={machines.run_dir} holds config.yaml, of a run or of another program" in machines.said(0)
    assert "rank 0 on" in machines.said(1)


# --- processes that others than torchrun start ----------------------------------------------------------


@pytest.fixture
def started(tmp_path: Path, copies: Callable[..., Any]) -> Callable[..., list[Any]]:
    """`started(each, *overrides)`: two processes, with `each(number)` in the environment of one.

    HOST is the name of its host, and `before` what it calls first.
    """

    def start(
        each: Callable[[int], dict[str, Any]], *overrides: str, before: Callable[[], object] = list
    ) -> list[Any]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pair = []
        has_folder = any(each.startswith("run_dir=") for each in overrides)
        settings = [each for each in SETTINGS if has_folder or each != "resume=auto"]
        for number in range(2):
            variables: dict[str, Any] = {
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GPTPL_CACHE": tmp_path / f"cache_{number}",
                "HOST": socket.gethostname(),
            } | each(number)  # fmt: skip

            def first(name: str = variables["HOST"]) -> None:
                socket.gethostname = lambda: name
                before()

            output = tmp_path / f"said_{len(list(tmp_path.glob('said_*')))}"
            task = copies(
                "train", *settings, *overrides, cwd=tmp_path, output=output, before=first, **variables
            )
            pair.append(task)
        return pair

    return start


def ends(tasks: list[Any], seconds: float = 120) -> tuple[list[int], list[str]]:
    """Exit statuses, and what each has said."""
    return [task.wait(seconds) for task in tasks], [task.said for task in tasks]


def slurm(number: int) -> dict[str, Any]:
    """What srun sets for two tasks on two nodes."""
    return {
        "SLURM_PROCID": number, "SLURM_NTASKS": 2, "SLURM_STEP_NUM_TASKS": 2, "SLURM_LOCALID": 0,
        "SLURM_NODEID": number, "SLURM_NNODES": 2, "SLURM_STEP_NUM_NODES": 2, "SLURM_JOB_ID": 7,
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    }  # fmt: skip


@pytest.mark.slow
def test_srun_needs_no_setting_and_no_folder(
    started: Callable[..., Any], tmp_path: Path, unbroken: dict[str, torch.Tensor]
) -> None:
    """The first names the folder after the time."""
    tasks = started(slurm)
    statuses, said = ends(tasks)
    assert statuses == [0, 0], said
    assert "processes: 2 nodes x 1 process, by SLURM" in said[0]
    assert said[1] == ""
    [run_dir] = [path.parent for path in (tmp_path / "runs").rglob("config.yaml")]
    found = weights(run_dir)
    assert all(torch.equal(found[name], tensor) for name, tensor in unbroken.items())


@pytest.mark.slow
def test_a_signal_to_one_ends_all_with_its_status(started: Callable[..., Any], tmp_path: Path) -> None:
    slow = "+callbacks.slow._target_=tests.training.test_launchers.Slow"
    tasks = started(slurm, f"run_dir={tmp_path / 'run'}", slow)
    deadline = time.monotonic() + 100
    while not (tmp_path / "run/checkpoints/step-00000002.ckpt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    tasks[1].send(signal.SIGTERM)
    statuses, said = ends(tasks)
    assert statuses == [143, 143], said
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["stopped"]["reason"] == "SIGTERM"
    assert (tmp_path / f"run/checkpoints/step-{record['stopped']['step']:08d}.ckpt").exists()
    assert "gptpl train resume=" in said[0]


@pytest.mark.hosts
def test_ranks_alone_are_enough_where_each_has_a_machine(
    started: Callable[..., Any], tmp_path: Path, unbroken: dict[str, torch.Tensor]
) -> None:
    """As Kubernetes' PyTorchJob sets them; on one machine a device would have two processes."""
    run_dir = tmp_path / "run"

    def rank(number: int) -> dict[str, Any]:
        return {"RANK": number, "WORLD_SIZE": 2}

    tasks = started(lambda number: rank(number) | {"HOST": f"pod-{number}"}, f"run_dir={run_dir}")
    statuses, said = ends(tasks)
    assert statuses == [0, 0], said
    found = weights(run_dir)
    assert all(torch.equal(found[name], tensor) for name, tensor in unbroken.items())
    tasks = started(lambda number: rank(number) | {"HOST": "one"}, f"run_dir={tmp_path / 'other'}")
    statuses, said = ends(tasks)
    assert statuses == [2, 2], said
    assert "rank 0 on one and rank 1 on one share a machine" in said[0]
    assert not (tmp_path / "other").exists()


@pytest.mark.hosts
def test_a_process_group_that_is_there_is_used(
    started: Callable[..., Any], tmp_path: Path, unbroken: dict[str, torch.Tensor]
) -> None:
    """As Ray Train makes it, with a store at MASTER_PORT."""
    places = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    tasks = started(
        lambda number: places | {"RANK": number, "LOCAL_RANK": number},
        f"run_dir={tmp_path / 'run'}",
        before=lambda: torch.distributed.init_process_group("gloo"),
    )
    statuses, said = ends(tasks)
    assert statuses == [0, 0], said
    assert "processes: 1 node x 2 processes" in said[0]
    found = weights(tmp_path / "run")
    assert all(torch.equal(found[name], tensor) for name, tensor in unbroken.items())


def in_a_task(overrides: tuple[str, ...]) -> tuple[str, float]:
    """What a task of submitit runs, by the README: where its run is, and its last loss."""
    import submitit  # here, as the module is imported without it

    submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
    run = gptpl.build(*overrides)
    return str(run.run_dir), run.fit()["val/loss"]


@pytest.mark.hosts
@pytest.mark.slow
def test_tasks_of_submitit_train_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbroken: dict[str, torch.Tensor]
) -> None:
    submitit = pytest.importorskip("submitit", reason="submitit is not installed")
    monkeypatch.chdir(tmp_path)
    variables = {"GPTPL_CACHE": tmp_path / "cache", "OMP_NUM_THREADS": 1, "PYTHONPATH": ROOT}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    executor = submitit.AutoExecutor(folder=tmp_path / "jobs", cluster="local")
    executor.update_parameters(tasks_per_node=2, timeout_min=3)
    job = executor.submit(in_a_task, tuple(each for each in SETTINGS if each != "resume=auto"))
    try:
        first, second = job.results()
    finally:
        job.cancel()
    assert first == second
    run_dir = Path(first[0])
    assert "processes: 1 node x 2 processes" in (run_dir / "train.log").read_text()
    found = weights(run_dir)
    assert all(torch.equal(found[name], tensor) for name, tensor in unbroken.items())


@pytest.mark.slow
def test_one_process_of_a_host_verifies_the_checkpoint_and_what_it_finds_is_said_by_all(
    started: Callable[..., Any], tmp_path: Path, unbroken: dict[str, torch.Tensor]
) -> None:
    """Each says which checkpoints it reads for that."""
    verify = files.verify

    def told(path: Path) -> str | None:
        print("reads", path.name)
        return verify(path)

    def tell() -> None:
        files.verify = told

    places = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}

    def go(*overrides: str) -> tuple[list[int], list[str]]:
        folder = f"run_dir={tmp_path / 'run'}"
        return ends(started(lambda n: places | {"RANK": n, "LOCAL_RANK": n}, folder, *overrides, before=tell))

    statuses, said = go("trainer.stop_at_step=6")
    assert statuses == [0, 0], said
    assert "reads" not in "".join(said)
    statuses, said = go()
    assert statuses == [0, 0], said
    assert [each.count("reads step-00000006.ckpt") for each in said] == [1, 0]
    found = weights(tmp_path / "run")
    assert all(torch.equal(found[name], tensor) for name, tensor in unbroken.items())
    for checkpoint in (tmp_path / "run/checkpoints").glob("step-*.ckpt"):
        checkpoint.write_bytes(checkpoint.read_bytes()[:-9])
    statuses, said = go()
    assert statuses == [2, 2], said
    damaged = "step-00000012.ckpt is damaged"
    assert damaged in said[0]
    assert re.search(rf"rank 0 on \S+ failed: checkpoint \S+{damaged}", said[1])


# --- two machines joined by a cable ---------------------------------------------------------------------


@pytest.fixture
def joined(tmp_path: Path) -> Iterator[Callable[..., Machines]]:
    """`joined(count, delay_ms=0)`: network namespaces that can only reach each other."""
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("network namespaces need root, and the program ip")
    with ExitStack() as ends:

        def make(count: int, **settings: float) -> Machines:
            try:
                found = Machines(tmp_path, ends.enter_context(Hosts(count, **settings)))
            except (subprocess.CalledProcessError, OSError) as error:
                pytest.skip(
                    f"no network namespaces can be made here: {error} {getattr(error, 'stderr', b'')!r}"
                )
            ends.callback(found.end)
            return found

        yield make


@pytest.fixture
def hosts(joined: Callable[..., Machines]) -> Machines:
    """Two of them."""
    return joined(2)


@pytest.mark.hosts
def test_nothing_runs_on_hosts_that_are_gone(joined: Callable[..., Machines]) -> None:
    """Not even a process in a session of its own whose parent has ended: a study may fail anywhere."""
    hosts = joined(2).hosts
    assert hosts is not None
    command = [*hosts.command(1), "sh", "-c", "setsid sleep 600 >/dev/null 2>&1 & echo $!"]
    pid = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    deadline = time.monotonic() + 10
    while psutil.Process(pid).name() != "sleep":  # which setsid becomes
        assert time.monotonic() < deadline
    hosts.close()
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_processes_that_are_started_while_others_are_killed_are_killed_as_well(tmp_path: Path) -> None:
    """As by torchrun, which starts a process again that has ended."""

    class Restarting(Machines):
        def left(self) -> list[psutil.Process]:
            found = super().left()
            if len(self.agents) < 3:
                self.start_one()
            return found

        def start_one(self) -> None:
            wait = "import time; time.sleep(60)"
            command = [sys.executable, "-c", wait, f"run_dir={self.run_dir}"]
            self.agents.append(subprocess.Popen(command, start_new_session=True))

    machines = Restarting(tmp_path, None)
    machines.start_one()
    machines.end()
    assert [agent.poll() for agent in machines.agents] == [-signal.SIGKILL] * 3


@pytest.mark.hosts
def test_a_cable_that_is_pulled_ends_the_run_which_then_continues(
    hosts: Machines, unbroken: dict[str, torch.Tensor]
) -> None:
    slow = "+callbacks.slow._target_=tests.training.test_launchers.Slow"
    hosts.start("trainer.timeout=00:00:00:08", slow)
    hosts.reaches(2)
    assert hosts.hosts is not None
    cable = ("-n", hosts.hosts.names[1], "link", "set", hosts.hosts.ends[1])
    ip(*cable, "down")
    far = hosts.worker(1)
    assert hosts.agents[0].wait(60) == 1
    deadline = time.monotonic() + 60
    while far.is_running() and far.status() != psutil.STATUS_ZOMBIE:  # its agent may look for the other one
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert "rank 1 on" in hosts.said(0)
    assert "says nothing: its process or node is gone, or cannot be reached" in hosts.said(0)
    ip(*cable, "up")
    hosts.end()
    hosts.agents.clear()
    hosts.start("trainer.timeout=00:00:01:00", slow)
    assert hosts.statuses() == [0, 0], hosts.said(0)[-3000:]
    found = weights(hosts.run_dir)
    assert all(torch.equal(found[name], tensor) for name, tensor in unbroken.items())


@pytest.mark.hosts
def test_a_connection_of_50_ms_changes_no_bit(
    joined: Callable[..., Machines], unbroken: dict[str, torch.Tensor]
) -> None:
    hosts = joined(2, delay_ms=50)
    hosts.start()  # on two hosts, as one machine with two processes
    assert hosts.statuses() == [0, 0], hosts.said(0)[-3000:]
    found = weights(hosts.run_dir)
    assert all(torch.equal(found[name], tensor) for name, tensor in unbroken.items())


@pytest.mark.hosts
def test_three_hosts_train_as_one_process_with_their_batches(
    joined: Callable[..., Machines], tmp_path: Path, gptpl_train: Callable[..., str]
) -> None:
    other = ("model.drop_rate", "data.batch_size", "resume")
    settings = [each for each in SETTINGS if not each.startswith(other)]
    gptpl_train(tmp_path, *settings, "model.drop_rate=0", "data.batch_size=6", "run_dir=alone")
    hosts = joined(3)
    hosts.start("model.drop_rate=0", "data.batch_size=2", nodes="3")
    assert hosts.statuses() == [0, 0, 0], hosts.said(0)[-3000:]
    found = weights(hosts.run_dir)
    for name, tensor in weights(tmp_path / "alone").items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=0, msg=name)


@pytest.mark.hosts
def test_a_host_that_comes_later_takes_its_share(
    machines: Machines, tmp_path: Path, gptpl_train: Callable[..., str]
) -> None:
    """With `--nnodes 1:2` one begins; torchrun then starts both again, which share the batches."""
    settings = [each for each in SETTINGS if not each.startswith(("model.drop_rate", "resume"))]
    gptpl_train(tmp_path, *settings, "model.drop_rate=0", "run_dir=alone")
    slow = ("+callbacks.slow._target_=tests.training.test_launchers.Slow", "+callbacks.slow.seconds=1.5")
    machines.start("model.drop_rate=0", *slow, nodes="1:2", restarts=3, after=lambda: machines.reaches(1))
    assert machines.statuses() == [0, 0], machines.said(0)[-3000:]
    found = weights(machines.run_dir)
    for name, tensor in weights(tmp_path / "alone").items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=0, msg=name)
    log = (machines.run_dir / "train.log").read_text()
    assert "processes: 1 -> 2, from step" in log
