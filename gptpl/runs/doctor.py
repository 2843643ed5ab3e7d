"""What a machine and its launcher offer, what looks wrong there, and what helps."""

import errno
import os
import platform
import re
import shutil
import socket
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch import Tensor

from gptpl import __version__
from gptpl.errors import InputError, ProcessError
from gptpl.files.download import cache_dir
from gptpl.files.durable import is_locked, locked_folder
from gptpl.files.run_record import package_version
from gptpl.runs.fit import git_commit
from gptpl.runs.listing import runs_folder
from gptpl.settings import POSITIVE
from gptpl.text import bytes_text, count_text, one_line, printable, some, table
from gptpl.training.autotune import machine_name
from gptpl.training.costs import control_group_limits, free_memory
from gptpl.training.performance import choose_precision, device_type, missing_tool
from gptpl.training.processes import Launcher, Processes, find_launcher, session

LOW_MEMORY_BYTES = 2_000_000_000
LOW_SHARED_BYTES = 500_000_000
"""Docker gives a container 64 MB of shared memory by itself."""
LOW_DISK_BYTES = 5_000_000_000
"""Three checkpoints of the model of 124M parameters, with optimizer state."""
MOST_SECONDS_APART = 2.0
"""Between two clocks: files from elsewhere seem to be of the future, and the lines of logs out of order."""
SLOW_BYTES_PER_SECOND = 100_000_000
"""An Ethernet of 1 Gbit/s: all gradients of 124M parameters take 5 seconds."""
GRADIENT_BYTES = 4 * 124_439_808
"""Of GPT-2 small in fp32."""


class Finding(NamedTuple):
    """A fact, in words and as plain data. `remedy` is what helps where it is not `ok`."""

    label: str
    text: str
    value: Any = None  # plain data; None: the text
    ok: bool | None = None  # None: it cannot be wrong
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `doctor` found, by section. `failure`: why the ranks are not connected, in one line."""

    rank: int
    sections: Mapping[str, Sequence[Finding]]
    failure: str | None = None

    def warnings(self) -> list[dict[str, str]]:
        """What looks wrong: its section, label and text, and the remedy."""
        return [
            {"section": name, "label": each.label, "text": each.text, "remedy": each.remedy}
            for name, found in self.sections.items()
            for each in found
            if each.ok is False
        ]

    def record(self) -> dict[str, Any]:
        """The report as plain data."""
        facts = {
            name: {each.label: each.text if each.value is None else each.value for each in found}
            for name, found in self.sections.items()
        }
        return {"rank": self.rank, **facts, "warnings": self.warnings(), "failure": self.failure}

    def lines(self) -> list[str]:
        """The report for a person; a remedy follows what looks wrong."""
        count = len(self.warnings())
        verdict = f"{count_text(count, 'warning')}, marked with !" if count else "nothing looks wrong"
        lines = [f"gptpl doctor: {verdict}"]
        width = max(len(each.label) for found in self.sections.values() for each in found)
        for name, found in self.sections.items():
            lines += ["", name]
            for label, text, _, ok, remedy in found:
                mark = {None: "", True: "ok", False: "!"}[ok]
                lines.append(f"  {mark:<2}  {label:<{width}}  {printable(text)}")
                if ok is False:
                    lines.append(f"{'':<{width + 8}}-> {remedy}")
        return lines


def doctor(*, seconds: float = 20, megabytes: int = 64) -> Report:
    """Look at this machine, its folders and its launcher, and at the connection between ranks if it has some.

    All ranks have to call it. It waits for others up to `seconds`, and as long to connect with them; the
    bandwidth is that of an all-reduce of `megabytes`, fewer if that would take long. Raises InputError for
    variables of a launcher that make no sense.
    """
    POSITIVE.check("doctor.seconds", seconds)
    POSITIVE.check("doctor.megabytes", megabytes)
    launcher = find_launcher()
    folders = {"cache": cache_dir(), "runs": runs_folder().absolute()}
    sections = {
        "versions": _versions(),
        "machine": _machine(launcher.local_world_size if launcher else 1),
        "cache": _place(folders["cache"], "GPTPL_CACHE"),
        "runs": _place(folders["runs"], "GPTPL_RUNS"),
        "launcher": _launcher_findings(launcher),
    }
    report = Report(rank=launcher.rank if launcher else 0, sections=sections)
    if launcher is None or launcher.world_size == 1:
        return report
    try:
        with _process_group(launcher, seconds) as together:
            between = _ranks(report, together, folders, seconds, megabytes)
    except RanksError as error:
        text, remedy = error.args
        lost = {"ranks": [Finding("connection", text, None, False, remedy)]}
        return replace(report, sections=sections | lost, failure=f"{text}: {remedy}")
    return replace(report, sections=sections | {"ranks": between})


# --- versions -------------------------------------------------------------------------------------------


def _versions() -> list[Finding]:
    commit, cuda = git_commit() or "", torch.version.cuda or torch.version.hip
    changed = " with changes" if commit.endswith("-dirty") else ""
    found = {
        "gptpl": __version__ + (commit and f", commit {commit[:12]}{changed}"),
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, {f'built for CUDA {cuda}' if cuda else 'without CUDA'}",
        "lightning": package_version("lightning") or "not installed",
        "hydra": package_version("hydra-core") or "not installed",
    }
    if dist.is_nccl_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    name = platform.system()
    with suppress(OSError):  # not a Linux
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    found[_SYSTEM] = f"{name}, {platform.platform()}"
    return [*(Finding(label, text) for label, text in found.items()), *_driver()]


_SYSTEM = "system"
"""The only one of the versions that may differ between machines."""


def _driver(file: Path = Path("/proc/driver/nvidia/version")) -> list[Finding]:
    """The NVIDIA driver, if there is one; wrong where torch cannot use it."""
    if not file.is_file():
        return []
    version = re.search(r"Module .*?(\d+\.[\d.]+)", file.read_text(encoding="utf-8"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        works = torch.cuda.is_available()
    reason = "torch finds no GPU: see nvidia-smi, and whether CUDA_VISIBLE_DEVICES is empty"
    if torch.version.cuda is None:
        reason = "this torch is built without CUDA: install the one for this driver, see pytorch.org"
    elif caught:
        reason = one_line(str(caught[0].message))
    return [Finding("driver", version[1] if version else "unknown", None, works, reason)]


# --- this machine ---------------------------------------------------------------------------------------


def _machine(processes: int) -> list[Finding]:
    """The hardware that this process may use, one of so many on this machine."""
    device, free, total = device_type("auto"), free_memory("cpu"), psutil.virtual_memory().total
    limit = min(map(int, control_group_limits("memory.max").values()), default=total)
    memory = f"{bytes_text(free)} free of {bytes_text(min(total, limit))}"
    found = [
        Finding("CPU", machine_name("cpu")),
        _cores(processes, device=device, threads=torch.get_num_threads()),
        Finding(
            "memory",
            memory + (", the limit of the control group" if limit < total else ""),
            {"free": free, "total": total, "limit": limit},
            free >= LOW_MEMORY_BYTES,
            "end other programs, ask for more (srun --mem), or use a smaller model or batch",
        ),
    ]
    if Path("/dev/shm").is_dir():
        found.append(_shared_memory(shutil.disk_usage("/dev/shm").total))
    for i in range(torch.cuda.device_count() if device == "cuda" else 0):
        gpu, unused = torch.cuda.get_device_properties(i), torch.cuda.mem_get_info(i)[0]
        facts = {"name": gpu.name, "free": unused, "total": gpu.total_memory, "bf16": gpu.major >= 8}
        text = f"{gpu.name}, {bytes_text(unused)} free of {bytes_text(gpu.total_memory)}, compute capability"
        text += f" {gpu.major}.{gpu.minor}, {'bf16' if facts['bf16'] else 'no bf16'}"
        busy = "another program uses this GPU: see nvidia-smi"
        found.append(Finding(f"GPU {i}", text, facts, unused >= 0.5 * gpu.total_memory, busy))
    precision, missing = choose_precision(device), missing_tool(device)
    return [
        *found,
        Finding(
            "trainer=auto",
            f"{device}, {precision.precision} unless timing shows otherwise: {precision.reason};"
            f" {f'cannot compile, {missing} was not found' if missing else 'can compile'}",
            {"device": device, "precision": precision.precision, "can_compile": missing is None},
        ),
    ]


def _cores(processes: int, *, device: str, threads: int) -> Finding:
    total = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total
    quotas = [text.split() for text in control_group_limits("cpu.max").values()]
    usable = min([float(allowed), *(int(quota) / int(period) for quota, period in quotas)])
    each = max(1, int(usable) // processes)
    shared = f" in each of {processes} processes" if processes > 1 else ""
    return Finding(
        "cores",
        f"{usable:g} of {total} usable, torch computes with {count_text(threads, 'thread')}{shared}",
        {"usable": usable, "affinity": allowed, "total": total, "threads": threads},
        threads <= each and (device != "cpu" or threads > each / 2),
        f"set OMP_NUM_THREADS={each}" + (", which torchrun sets to 1" if threads == 1 else ""),
    )


def _shared_memory(size: int) -> Finding:
    remedy = "too small for DataLoader workers and NCCL: docker run --shm-size=8g, or data.num_workers=0"
    return Finding("/dev/shm", bytes_text(size), size, size >= LOW_SHARED_BYTES, remedy)


# --- folders --------------------------------------------------------------------------------------------

_NETWORK = (
    *("nfs", "lustre", "cifs", "smb", "fuse.", "gpfs", "beegfs", "ceph", "glusterfs", "9p", "afs"),
    *("virtiofs", "wekafs"),
)
"""How the names of network file systems begin, and of those that mostly are."""


def _place(folder: Path, variable: str) -> list[Finding]:
    """What a folder offers, or the nearest one above that exists. It is left as it was."""
    there = _nearest(folder)
    kind, usage = _file_system(there.resolve()), shutil.disk_usage(there)
    network, refusal = kind.startswith(_NETWORK), ""
    elsewhere = f"set {variable}=FOLDER to another folder"
    tried: list[Finding] = []
    try:
        with tempfile.TemporaryDirectory(prefix=".gptpl-doctor-", dir=there) as name:
            tried = _tried(Path(name), elsewhere)
    except OSError as error:
        refusal = f", cannot be written ({error.strerror})"
    text = f"{one_line(str(folder))}{'' if there == folder else ' (does not exist yet)'}{refusal}"
    free, total = usage.free, usage.total
    return [
        Finding("folder", text, str(folder), not refusal, f"{elsewhere}, or change its permissions"),
        Finding(
            "file system",
            f"{kind}, {'on the network' if network else 'local'}",
            {"kind": kind, "network": network},
        ),
        Finding(
            "space",
            f"{bytes_text(free)} free of {bytes_text(total)}",
            {"free": free, "total": total},
            free >= LOW_DISK_BYTES,
            f"make room, or {elsewhere}",
        ),
        *tried,
    ]


def _nearest(folder: Path) -> Path:
    # Not `Path.is_dir`, which fails within a folder that this user may not look into.
    return next(path for path in (folder, *folder.parents) if os.path.isdir(path))  # noqa: PTH112


def _tried(folder: Path, elsewhere: str) -> list[Finding]:
    """What only trying tells, in an empty folder: locks as gptpl takes them, and the clock of the server."""
    file = folder / "file"
    file.touch()
    apart = file.stat().st_mtime - time.time()
    with locked_folder(folder):
        locks = is_locked(folder) or sys.platform == "win32"
    try:
        with FileLock(file), suppress(Timeout), FileLock(file, timeout=0):
            locks = False
    except (OSError, NotImplementedError):
        locks = False
    return [
        Finding(
            "locks",
            "keep two processes apart" if locks else "do not keep two processes apart",
            locks,
            locks,
            f"have one process at a time work there, mount it with locks (Lustre: -o flock), or {elsewhere}",
        ),
        Finding(
            "clock",
            f"{abs(apart):.1f} s from this machine's",
            apart,
            abs(apart) <= MOST_SECONDS_APART,
            "set the clocks of this machine and of the file server by the same NTP server",
        ),
    ]


def _file_system(path: Path) -> str:
    """The kind of file system that holds a path."""
    mounts = [each for each in psutil.disk_partitions(all=True) if path.is_relative_to(each.mountpoint)]
    mounts.sort(key=lambda each: len(each.mountpoint))  # a later one hides an earlier one
    return mounts[-1].fstype if mounts else "unknown"


# --- launcher -------------------------------------------------------------------------------------------

_VARIABLES = re.compile(
    r"RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|GROUP_RANK|GROUP_WORLD_SIZE|NODE_RANK|MASTER_ADDR|MASTER_PORT"
    r"|TORCHELASTIC_(RUN_ID|RESTART_COUNT|USE_AGENT_STORE)"
    r"|SLURM_(JOB_ID|JOB_NAME|NTASKS|NTASKS_PER_NODE|NNODES|NODELIST|PROCID|LOCALID|NODEID)"
    r"|CUDA_VISIBLE_DEVICES|OMP_NUM_THREADS|(GLOO|NCCL)_SOCKET_IFNAME"
)
"""What a launcher sets, or decides how its processes find one another."""


def _launcher_findings(launcher: Launcher | None) -> list[Finding]:
    seen = [f"{name}={value}" for name, value in sorted(os.environ.items()) if _VARIABLES.fullmatch(name)]
    environment = [Finding("environment", one_line(" ".join(seen)), seen)] if seen else []
    if launcher is None:
        partly = sorted({"RANK", "WORLD_SIZE", "NODE_RANK", "SLURM_NTASKS"} & os.environ.keys())
        text = f"none: one process{f', although {partly[0]}={os.environ[partly[0]]}' if partly else ''}"
        remedy = (
            "start all processes with torchrun or srun, which set what a rank needs: RANK, WORLD_SIZE,"
            " LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT"
        )
        alone = False if any(os.environ[name] not in ("", "0", "1") for name in partly) else None
        return [Finding("launcher", text, "none", alone, remedy), *environment]
    text = (
        f"{launcher.name}: rank {launcher.rank} of {launcher.world_size}, local rank {launcher.local_rank} of"
        f" {launcher.local_world_size}, node {launcher.node_rank} of {launcher.nodes}, meeting at"
        f" {launcher.address}:{launcher.port}"
    )
    return [Finding("launcher", text, asdict(launcher)), *environment]


# --- between ranks --------------------------------------------------------------------------------------


class RanksError(RuntimeError):
    """The ranks did not find one another, or lost one another: why, and what helps."""


_OPEN = (
    "open all ports between the nodes in the firewall, name their network in GLOO_SOCKET_IFNAME or"
    " NCCL_SOCKET_IFNAME, or raise doctor.seconds"
)
_GLOO_TRIES = 5
"""To connect; each may take the timeout of the process group."""
_BLOCKING = "TORCH_NCCL_BLOCKING_WAIT"
"""Has NCCL raise after a timeout, which would else end the process."""


@contextmanager
def _process_group(launcher: Launcher, seconds: float) -> Iterator[Processes]:
    """All ranks, with a process group: nccl where each has a CUDA device, else gloo."""
    if dist.is_initialized():
        raise InputError(
            "this process has a process group already: call gptpl.doctor() before that is set up"
        )
    rank = launcher.rank
    was_set = _BLOCKING in os.environ
    os.environ.setdefault(_BLOCKING, "1")
    began, came = time.monotonic(), False
    try:
        server = _store(launcher, seconds)
        timeout = timedelta(seconds=seconds)
        name = session(server, launcher, timeout, setting="doctor.seconds")
        came = True
        store = dist.PrefixStore(f"doctor/{name}", server)  # type: ignore[attr-defined]
        together = Processes(launcher=launcher, store=store, timeout=timeout, setting="doctor.seconds")
        on_cuda = all(together.gathered(torch.cuda.is_available())) and dist.is_nccl_available()
        if on_cuda:
            torch.cuda.set_device(launcher.local_rank % torch.cuda.device_count())
        dist.init_process_group(
            "nccl" if on_cuda else "gloo",
            store=dist.PrefixStore("group", store),  # type: ignore[attr-defined]
            rank=rank,
            world_size=launcher.world_size,
            timeout=timedelta(seconds=seconds / _GLOO_TRIES),
        )
        yield together
    except ProcessError as error:
        raise RanksError(str(error), _OPEN) from error
    except (RuntimeError, OSError) as error:
        number, text = getattr(error, "errno", None), getattr(error, "strerror", None) or str(error)
        reason = re.sub(r"\[/\S+:\d+\] ", "", text.partition("\n")[0].partition(" (while")[0]).rstrip(".")
        remedy = _OPEN if came else f"start all ranks with the same MASTER_ADDR and MASTER_PORT, {_OPEN}"
        if number == errno.EADDRINUSE:
            remedy = "set MASTER_PORT to a free port, on all ranks"
        raise RanksError(
            one_line(
                f"rank {rank} is not connected with the others at {launcher.address}:{launcher.port}"
                f" ({reason}), {time.monotonic() - began:.0f} s waited"
            ),
            remedy,
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        if not was_set:
            del os.environ[_BLOCKING]


def _store(launcher: Launcher, seconds: float) -> Any:
    """The store at the master's address. Plain sockets try it first: torch would log each attempt."""
    address, port, deadline = launcher.address, launcher.port, time.monotonic() + seconds
    is_master = launcher.rank == 0 and not launcher.hosts_store
    if is_master:
        socket.create_server(("", port)).close()
    while not is_master:
        left = deadline - time.monotonic()
        try:
            socket.create_connection((address, port), timeout=max(0.1, left)).close()
            break
        except OSError:
            if left <= 0:
                raise
            time.sleep(min(0.2, left))
    timeout = timedelta(seconds=seconds)
    return dist.TCPStore(  # type: ignore[attr-defined]
        address, port, is_master=is_master, timeout=timeout, wait_for_workers=False
    )


def _ranks(
    own: Report, together: Processes, folders: Mapping[str, Path], seconds: float, megabytes: int
) -> list[Finding]:
    """What the ranks are, in what they differ, and how fast they talk to one another."""
    launcher, on_cuda = together.launcher, dist.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
    ranks = together.gathered(
        {
            "host": socket.gethostname(),
            "node": launcher.node_rank,
            "local_rank": launcher.local_rank,
            "device": f"{device} ({torch.cuda.get_device_name(device)})" if on_cuda else "cpu",
            "versions": {each.label: each.text for each in own.sections["versions"] if each.label != _SYSTEM},
            "warnings": own.warnings(),
        }
    )
    rows = table(
        [
            [f"node {each['node']}", f"local rank {each['local_rank']}", each["host"], each["device"]]
            for each in ranks
        ]
    )
    found = [Finding(f"rank {number}", row, ranks[number]) for number, row in enumerate(rows)]
    others = {each["host"]: each["warnings"] for each in ranks if each["host"] != ranks[0]["host"]}
    for host, wrong in others.items():
        for each in wrong:
            text = f"{each['section']}, {each['label']}: {each['text']}"
            found.append(Finding(f"on {host}", text, None, False, each["remedy"]))
    differ = [
        f"rank {number} has {name} {each['versions'].get(name, 'none')}, not {version}"
        for number, each in enumerate(ranks)
        for name, version in ranks[0]["versions"].items()
        if each["versions"].get(name) != version
    ]
    text, remedy = "; ".join(differ) or "the same on all ranks", "install the same on all nodes"
    return [
        *found,
        Finding("versions", text, differ, not differ, remedy),
        *(_shared(name, folder, together, ranks) for name, folder in folders.items()),
        *_measured(together, device, seconds, megabytes),
    ]


_UNSHARED = {
    "cache": "each node downloads and encodes for itself: set GPTPL_CACHE to a folder that all nodes have",
    "runs": "only rank 0's node has the checkpoints: set GPTPL_RUNS to a folder that all nodes have",
}


def _shared(name: str, folder: Path, together: Processes, ranks: Sequence[Mapping[str, Any]]) -> Finding:
    """Whether all ranks see a file that rank 0 writes into a folder, or the nearest one above that exists."""
    seen = together.seeing(_nearest(folder), seconds=1)
    without = [number for number, sees in enumerate(seen) if not sees]
    hosts = ", ".join(sorted({ranks[number]["host"] for number in without}))
    text = f"not shared: rank {some(list(map(str, without)))} ({hosts}) does not see rank 0's files"
    value = {"shared": not without, "not_seen_by": without}
    return Finding(name, text if without else "shared by all ranks", value, not without, _UNSHARED[name])


_FLOATS_OF_MEGABYTE = 250_000


def _measured(together: Processes, device: torch.device, seconds: float, megabytes: int) -> list[Finding]:
    small, middle = torch.zeros(1, device=device), torch.zeros(_FLOATS_OF_MEGABYTE, device=device)
    latency = statistics.median([_all_reduce_seconds(small) for _ in range(25)])
    slowest = max(together.gathered(min(_all_reduce_seconds(middle) for _ in range(2))))
    fitting = max(1, min(megabytes, int(seconds / 20 / slowest)))
    large = torch.zeros(fitting * _FLOATS_OF_MEGABYTE, device=device)
    speed = large.nbytes / statistics.median([_all_reduce_seconds(large) for _ in range(5)])
    n = dist.get_world_size()
    bus = speed * 2 * (n - 1) / n
    dist.barrier()
    clocks = together.gathered(time.time())
    apart = max(clocks) - min(clocks)
    return [
        Finding(
            "latency", f"{1e6 * latency:.0f} us for an all-reduce of 4 bytes ({dist.get_backend()})", latency
        ),
        Finding(
            "bandwidth",
            f"{bytes_text(speed)}/s for one of {bytes_text(large.nbytes)}, {bytes_text(bus)}/s on the bus;"
            f" gradients of 124M parameters take {GRADIENT_BYTES / speed:.3g} s a step",
            {"algorithm": speed, "bus": bus},
            speed >= SLOW_BYTES_PER_SECOND,
            "name the fastest network in NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME, or accumulate batches",
        ),
        Finding(
            "clocks",
            f"{apart:.3f} s apart"
            + (f", rank {clocks.index(max(clocks))} ahead" if apart > MOST_SECONDS_APART else ""),
            apart,
            apart <= MOST_SECONDS_APART,
            "set the clocks of all nodes by the same NTP server",
        ),
    ]


def _all_reduce_seconds(tensor: Tensor) -> float:
    began = time.perf_counter()
    dist.all_reduce(tensor)
    tensor[0].item()  # a CUDA device works on after the call
    return time.perf_counter() - began
