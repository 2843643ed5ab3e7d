"""`gptpl doctor` as launchers start it: real processes, connected by gloo."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import gptpl as package

LAUNCHERS = ("RANK", "WORLD", "LOCAL", "GROUP", "NODE", "MASTER", "SLURM", "TORCHELASTIC")


def errors_apart() -> None:
    """Standard error goes to the file `err` of the folder."""
    os.dup2(os.open("err", os.O_WRONLY | os.O_CREAT), 2)


def odd() -> None:
    """A rank on another machine: its clock is ahead, its gptpl another one."""
    errors_apart()
    now = time.time
    time.time = lambda: now() + 90
    socket.gethostname = lambda: "node-b"
    from gptpl.runs import doctor  # imported in the first process, or now

    package.__version__ = vars(doctor)["__version__"] = "9.9"


def started(words: Sequence[str], folder: Path, **variables: object) -> subprocess.Popen[str]:
    """A process with these variables of a launcher and no others."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    folder.mkdir()
    own = {"GPTPL_CACHE": folder / "cache", "PYTHONPATH": Path(package.__file__).parents[1]} | variables
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        env=kept | {"OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in own.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.hosts
def test_torchrun_starts_two_ranks_that_print_one_page(tmp_path):
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    process = started([*launch, "-m", "gptpl", "doctor", "doctor.megabytes=8"], tmp_path / "a")
    page, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert page.count("gptpl doctor: ") == 1
    assert re.findall(r"^ +rank (\d) +node 0 +local rank (\d)  \S+  cpu$", page, re.MULTILINE) == [
        ("0", "0"),
        ("1", "1"),
    ]
    assert "torchrun: rank 0 of 2, local rank 0 of 2, node 0 of 1" in page
    assert "the same on all ranks" in page
    assert page.count("shared by all ranks") == 2
    [latency] = re.findall(r"latency +(\d+) us", page)
    [bandwidth] = re.findall(r"bandwidth +([\d.]+) [MG]B/s for one of 8.0 MB", page)
    assert float(latency) > 0
    assert float(bandwidth) > 0
    assert list((tmp_path / "a").iterdir()) == []


@pytest.mark.slow
def test_ranks_that_differ(tmp_path, copies, monkeypatch):
    """Ranks by hand: each with folders of its own, and one with another clock, host and version."""
    for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
        monkeypatch.delenv(name)
    given = {"WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
    given |= {"MASTER_PORT": free_port()}
    ranks = []
    for rank, before in enumerate((errors_apart, odd)):
        folder = tmp_path / str(rank)
        folder.mkdir()
        own = {"cwd": folder, "output": folder / "out", "GPTPL_CACHE": folder / "cache", "RANK": rank}
        ranks.append(copies("doctor", "--json", "doctor.megabytes=8", before=before, **own, **given))
    assert [rank.wait(100) for rank in ranks] == [0, 0], (tmp_path / "0/err").read_text()
    assert ranks[1].said == ""
    record: dict[str, Any] = json.loads(ranks[0].said)
    between = record["ranks"]
    assert [between[name]["host"] for name in ("rank 0", "rank 1")] == [socket.gethostname(), "node-b"]
    [versions] = between["versions"]
    assert re.fullmatch(rf"rank 1 has gptpl 9\.9\S*.*, not {re.escape(package.__version__)}.*", versions)
    assert between["cache"] == between["runs"] == {"shared": False, "not_seen_by": [1]}
    assert between["clocks"] == pytest.approx(90, abs=5)
    assert between["bandwidth"]["algorithm"] == between["bandwidth"]["bus"] > 0
    wrong = {each["label"]: each for each in record["warnings"] if each["section"] == "ranks"}
    assert wrong.keys() - {"bandwidth"} == {"versions", "cache", "runs", "clocks", "on node-b"}
    assert wrong["clocks"]["text"].endswith("rank 1 ahead")


def test_a_master_that_nobody_answers_for(gptpl, monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
        monkeypatch.delenv(name)
    port = free_port()
    given = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    outcome = gptpl("doctor", "doctor.seconds=0.6")
    assert 0.6 <= time.monotonic() - began < 30
    assert (outcome.status, outcome.out) == (1, "")
    [line] = outcome.err.splitlines()
    expected = rf"127\.0\.0\.1:{port} \(Connection refused\), 1 s waited: .*GLOO_SOCKET_IFNAME"
    assert re.search(expected, line)
    # Nor does anybody come to this one.
    monkeypatch.setenv("RANK", "0")
    began = time.monotonic()
    outcome = gptpl("doctor", "doctor.seconds=0.6")
    assert 0.6 <= time.monotonic() - began < 30
    assert outcome.status == 1
    assert "rank 0 has waited 0.6 s (doctor.seconds) for rank 1 of 2" in outcome.err
    assert "rank 0 has waited 0.6 s (doctor.seconds) for rank 1 of 2" in outcome.out


def test_a_wait_has_to_be_positive(refused):
    assert refused("doctor", "doctor.seconds=0").startswith("doctor.seconds must be positive, got 0")
