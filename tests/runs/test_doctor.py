"""`gptpl.doctor()` on machines, folders and launchers that are not there."""

import os
import socket
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from gptpl.errors import InputError
from gptpl.runs import doctor as doctor_module
from gptpl.runs.doctor import Finding, Report, doctor
from gptpl.training.processes import find_launcher

KINDS = ("RANK", "WORLD", "LOCAL", "GROUP", "NODE", "MASTER", "SLURM", "TORCHELASTIC")


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    """`environment(RANK=1)`: an environment with these variables of a launcher and no others."""
    for name in [name for name in os.environ if name.startswith(KINDS)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GPTPL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GPTPL_RUNS", str(tmp_path / "runs"))

    def set_up(**variables: object) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return set_up


def finding(found: list[Finding], label: str) -> Finding:
    [one] = [each for each in found if each.label == label]
    return one


# --- the page -------------------------------------------------------------------------------------------


def test_this_machine_alone(tmp_path):
    began = time.monotonic()
    report = doctor()
    assert time.monotonic() - began < 30
    record, page = report.record(), "\n".join(report.lines())
    assert record["launcher"] == {"launcher": "none"} | record["launcher"]
    assert record["cache"]["folder"] == str(tmp_path / "cache")
    assert record["machine"]["cores"]["affinity"] == len(os.sched_getaffinity(0))
    assert record["failure"] is None
    assert "ranks" not in record
    assert f"{tmp_path / 'runs'} (does not exist yet)" in page
    assert page.count("-> ") == len(report.warnings())
    assert list(tmp_path.iterdir()) == []


def test_a_remedy_follows_what_looks_wrong():
    findings = [
        Finding("a", "fact"),
        Finding("bb", "right", 5, True, "nothing"),
        Finding("c", "wrong", 7, False, "mend it"),
    ]
    report = Report(rank=0, sections={"all": findings})
    assert report.lines() == [
        "gptpl doctor: 1 warning, marked with !",
        "",
        "all",
        "      a   fact",
        "  ok  bb  right",
        "  !   c   wrong",
        "          -> mend it",
    ]
    wrong = {"section": "all", "label": "c", "text": "wrong", "remedy": "mend it"}
    facts = {"a": "fact", "bb": 5, "c": 7}
    assert report.record() == {"rank": 0, "all": facts, "warnings": [wrong], "failure": None}


# --- the machine ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quota", "processes", "threads", "ok", "each"),
    [
        ("max 100000", 1, 8, True, 8),
        ("max 100000", 1, 1, False, 8),
        ("max 100000", 8, 1, True, 1),
        ("400000 100000", 1, 8, False, 4),
        ("400000 100000", 2, 2, True, 2),
        ("50000 100000", 1, 1, True, 1),
    ],
)
def test_threads_should_be_as_many_as_cores(monkeypatch, quota, processes, threads, ok, each):
    """On 8 cores, with and without a limit of the control group."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    limits = {} if quota.startswith("max") else {Path("/"): quota}
    monkeypatch.setattr(doctor_module, "control_group_limits", lambda name: limits)
    cores = doctor_module._cores(processes, device="cpu", threads=threads)
    assert (cores.ok, cores.remedy.partition(",")[0]) == (ok, f"set OMP_NUM_THREADS={each}")


def test_docker_gives_too_little_shared_memory():
    assert doctor_module._shared_memory(67_108_864).ok is False
    assert doctor_module._shared_memory(8_000_000_000).ok is True


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023",
            "535.104.05",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build", "570.86.15"),
    ],
)
def test_a_driver_that_torch_does_not_use(monkeypatch, tmp_path, text, version):
    (tmp_path / "version").write_text(text)
    monkeypatch.setattr("torch.version.cuda", None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    [driver] = doctor_module._driver(tmp_path / "version")
    assert (driver.text, driver.ok) == (version, False)
    assert "built without CUDA" in driver.remedy
    assert doctor_module._driver(tmp_path / "none") == []


# --- folders --------------------------------------------------------------------------------------------

MOUNTS = {
    "/dev/sda": ("/", "ext4"),
    "server:/home": ("/home", "nfs4"),
    "tmpfs": ("/home/me/fast", "tmpfs"),
    "//host/share": ("/media/my share", "cifs"),
    "old": ("/data", "ext4"),
    "lustre@tcp:/scratch": ("/data", "lustre"),
}


@pytest.mark.parametrize(
    ("path", "kind", "network"),
    [
        ("/home/me/runs", "nfs4", True),
        ("/home/me/fast/x", "tmpfs", False),
        ("/homes", "ext4", False),
        ("/media/my share/x", "cifs", True),
        ("/data/runs", "lustre", True),
    ],
)
def test_the_file_system_of_a_folder(monkeypatch, path, kind, network):
    mounts = [SimpleNamespace(mountpoint=mount, fstype=kind) for mount, kind in MOUNTS.values()]
    monkeypatch.setattr("psutil.disk_partitions", lambda all: mounts)
    assert doctor_module._file_system(Path(path)) == kind
    assert kind.startswith(doctor_module._NETWORK) == network


@pytest.mark.parametrize("missing", ["of folders", "of files"])
def test_a_folder_without_locks(tmp_path, monkeypatch, missing):
    assert [each.ok for each in doctor_module._place(tmp_path, "GPTPL_RUNS")[3:]] == [True, True]
    if missing == "of folders":
        monkeypatch.setattr(doctor_module, "is_locked", lambda folder: False)
    else:
        monkeypatch.setattr(doctor_module, "FileLock", lambda *given, **settings: nullcontext())
    locks = finding(doctor_module._place(tmp_path, "GPTPL_RUNS"), "locks")
    assert (locks.ok, locks.text) == (False, "do not keep two processes apart")
    assert "GPTPL_RUNS=FOLDER" in locks.remedy


def test_a_file_server_with_another_clock(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda now=time.time: now() - 90)
    clock = finding(doctor_module._place(tmp_path, "GPTPL_RUNS"), "clock")
    assert (clock.ok, clock.text) == (False, "90.0 s from this machine's")


def test_a_folder_that_cannot_be_written():
    found = doctor_module._place(Path("/proc/runs"), "GPTPL_CACHE")
    folder = next(each for each in found if each.ok is False)
    assert folder.text.startswith("/proc/runs (does not exist yet), cannot be written (")
    assert "GPTPL_CACHE=FOLDER" in folder.remedy


# --- launchers ------------------------------------------------------------------------------------------

TORCHRUN = {
    "RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4, "TORCHELASTIC_RUN_ID": "none",
    "MASTER_ADDR": "a", "MASTER_PORT": 1,
}  # fmt: skip
TWO = {"WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}


def test_what_started_this_process(environment):
    environment(**TORCHRUN)
    found = doctor_module._launcher_findings(find_launcher())
    text = "torchrun: rank 5 of 8, local rank 1 of 4, node 1 of 2, meeting at a:1"
    assert finding(found, "launcher").text == text
    assert "LOCAL_RANK=1" in finding(found, "environment").text


@pytest.mark.parametrize(
    "variables", [{"WORLD_SIZE": 2}, {"NODE_RANK": 2, "MASTER_ADDR": "a"}, {"SLURM_NTASKS": 4}]
)
def test_a_process_that_is_one_of_several_but_alone(environment, variables):
    environment(**variables)
    launcher = finding(doctor_module._launcher_findings(find_launcher()), "launcher")
    assert launcher.ok is False
    assert "torchrun or srun" in launcher.remedy


def test_variables_that_are_missing_are_named(environment):
    environment(RANK=1, WORLD_SIZE=2, MASTER_ADDR="a")
    with pytest.raises(InputError, match="RANK=1, but no MASTER_PORT: set it"):
        doctor()


def test_a_port_that_another_program_has(environment):
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        environment(RANK=0, MASTER_PORT=port, **TWO)
        report = doctor(seconds=5)
    assert report.failure is not None
    assert f"127.0.0.1:{port} (Address already in use), 0 s waited" in report.failure
    assert report.failure.endswith("set MASTER_PORT to a free port, on all ranks")
    assert report.record()["ranks"] == {"connection": report.warnings()[-1]["text"]}
